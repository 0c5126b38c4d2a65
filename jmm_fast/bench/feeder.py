"""A whole training batch from a clip store, draws included, against feeders that go sample by sample."""

import os
from collections.abc import Callable, Iterator

import numpy as np
import torch

from jmm_fast import reference
from jmm_fast.bench.case import Case, Check, Work, Workload
from jmm_fast.bench.clip_window import bytes_cut
from jmm_fast.bench.inputs import clip_lengths, made_up_clips, store_of
from jmm_fast.bench.numpy_feeder import FEEDERS, dense_sample, fed_by_workers, feed
from jmm_fast.bench.parity import compare
from jmm_fast.data import BodyBatches

SHAPES = {
    "ntu48": {"clips": 48, "bodies": 2, "joints": 25, "window": 120},
    "gpu_ntu48": {"clips": 48, "bodies": 2, "joints": 25, "window": 120, "device": "cuda"},
}
WORKERS = {"numpy_16": 16}
"""Contenders of several processes: the usual feeder in so many."""


def _clips(shape: str) -> list[np.ndarray]:
    size = SHAPES[shape]
    return made_up_clips(size["clips"], size["bodies"], size["joints"])


def _batches(shape: str, backend: str) -> BodyBatches:
    size = SHAPES[shape]
    return BodyBatches(
        store_of(_clips(shape)),
        torch.arange(size["clips"]),
        batch_size=size["clips"],
        window=size["window"],
        train=True,
        seed=0,
        empty_bodies="keep",
        device=size.get("device", "cpu"),
        backend=backend,
    )


def prepare(case: Case) -> Callable[[], object]:
    size = SHAPES[case.shape]
    if case.contender in (*FEEDERS, *WORKERS):
        samples = [dense_sample(clip) for clip in _clips(case.shape)]
        on_gpu = size.get("device") == "cuda"
        if case.contender in WORKERS:
            fed = fed_by_workers(samples, "numpy", size["window"], WORKERS[case.contender], pin_memory=on_gpu)
            return lambda: next(fed).to(size.get("device", "cpu"), non_blocking=True)
        draws = np.random.default_rng(0)
        return lambda: feed(samples, case.contender, size["window"], draws).to(size.get("device", "cpu"))
    batches = _batches(case.shape, case.contender)
    return lambda: batches.batch(batches.ids, 0).clips


def checks(dtype: str, contender: str) -> Iterator[Check]:
    """The batch against windows cut and turned one by one in float64, by the draws that the batches report."""
    for shape, size in SHAPES.items():
        if size.get("device") == "cuda" and not torch.cuda.is_available():
            continue
        ours, single = (_batches(shape, backend) for backend in (contender, "reference"))
        store, index, epoch = ours.store, ours.ids, 3
        begin, length = ours.windows(index, epoch)
        angles = ours.angles(index, epoch).double()
        exact = [
            reference.clip_window(
                store.frames.double(),
                store.body_offsets[first + body, None] + begin[clip, None],
                length[clip, None],
                angles[clip, None],
                window=ours.window,
            )
            for clip, (first, bodies) in enumerate(store.clip_bodies.tolist())
            for body in range(bodies)
        ]
        yield from compare(
            ("clips",),
            [ours.batch(index, epoch).clips.cpu()],
            [single.batch(index, epoch).clips.cpu()],
            [torch.cat(exact)],
            torch.finfo(torch.float32).eps,
        )


def missing(case: Case) -> str | None:
    cores = os.cpu_count() or 1
    workers = WORKERS.get(case.contender, 0)
    return f"needs {workers} cores, there are {cores}" if workers > cores else None


def work(case: Case) -> Work:
    """The windows of the batch, three quarters of each clip (the mean of the crop's share)."""
    size = SHAPES[case.shape]
    length = np.repeat(0.75 * clip_lengths(size["clips"]), size["bodies"])
    return Work(bytes=bytes_cut(length, size["window"], size["joints"]))


WORKLOAD = Workload(
    shapes=SHAPES,
    dtypes=("float32",),
    directions=("forward",),
    contenders=("auto", "reference", *FEEDERS, *WORKERS),
    prepare=prepare,
    checks=checks,
    unavailable=missing,
    work=work,
)
