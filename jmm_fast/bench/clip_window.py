"""Crop, resample and rotate packed clips: ours, the plain twin, and feeders that go sample by sample."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from jmm_fast import ops, reference
from jmm_fast.bench.case import Case, Check, Work, Workload, moved
from jmm_fast.bench.inputs import clip_lengths, made_up_clips, moving_clips
from jmm_fast.bench.numpy_feeder import FEEDERS, dense_sample, feed
from jmm_fast.bench.parity import compare
from jmm_fast.ops.backend import unavailable

# Two bodies in every clip: nothing is empty, which would cost us less than the feeder.
SHAPES = {
    "ntu48": {"clips": 48, "bodies": 2, "joints": 25, "window": 120},
    "gpu_ntu512": {"clips": 512, "bodies": 2, "joints": 25, "window": 120, "device": "cuda"},
}


def _crops(shape: str) -> tuple[Tensor, Tensor]:
    """First row and length of the crop of each body: half to all of its clip, 64 frames where there are as many."""
    size = SHAPES[shape]
    count = torch.from_numpy(np.repeat(clip_lengths(size["clips"]), size["bodies"]))
    share = torch.rand(len(count), generator=torch.Generator().manual_seed(0))
    length = torch.maximum((count * share / 2 + count / 2).long(), count.clamp(max=64))
    return count.cumsum(0) - count + (count - length) // 2, length


def bytes_cut(length: np.ndarray, window: int, joints: int) -> float:
    """Bytes moved to cut windows from crops of so many frames: these once, of a long one those that are mixed, with
    their places and angles; the windows."""
    read = np.minimum(length, 2 * window).sum() * joints * 12 + len(length) * (8 + 8 + 12)
    return moved("forward", read=float(read), written=len(length) * window * joints * 12)


def prepare(case: Case) -> Callable[[], object]:
    size = SHAPES[case.shape]
    bodies, window = size["bodies"], size["window"]
    clips = made_up_clips(size["clips"], bodies, size["joints"])
    if case.contender in FEEDERS:
        samples = [dense_sample(clip) for clip in clips]
        draws = np.random.default_rng(0)
        return lambda: feed(samples, case.contender, window, draws)
    frames = torch.cat([torch.from_numpy(clip).flatten(0, 1) for clip in clips])
    angles = torch.empty(size["clips"] * bodies, 3).uniform_(-0.3, 0.3)
    inputs = [x.to(size.get("device", "cpu")) for x in (frames, *_crops(case.shape), angles)]
    return lambda: ops.clip_window(*inputs, window=window, backend=case.contender)


def checks(dtype: str, contender: str) -> Iterator[Check]:
    kind = getattr(torch, dtype)
    device = "cuda" if contender == "triton" else "cpu"
    frames = moving_clips(1, 900)[0].to(device, kind)
    length = torch.tensor([0, 1, 2, 63, 64, 74, 120, 121, 240, 300, 900], device=device)
    start = torch.tensor([900, 5, 7, 10, 0, 300, 3, 200, 20, 600, 0], device=device)
    angles = torch.empty(len(length), 3).uniform_(-0.3, 0.3).to(device)
    for window in (1, 40, 120):
        for turn in (angles, None):
            yield from compare(
                ("clips",),
                [ops.clip_window(frames, start, length, turn, window=window, backend=contender)],
                [reference.clip_window(frames, start, length, turn, window=window)],
                [
                    reference.clip_window(
                        frames.double(), start, length, None if turn is None else turn.double(), window=window
                    )
                ],
                torch.finfo(kind).eps,
                where=f"window={window} {'turned ' if turn is not None else ''}",
            )


def missing(case: Case) -> str | None:
    if case.contender in FEEDERS and SHAPES[case.shape].get("device") == "cuda":
        return "it feeds the CPU: see the feeder"
    return None if case.contender in FEEDERS else unavailable("clip_window", case.contender)


def work(case: Case) -> Work:
    size = SHAPES[case.shape]
    return Work(bytes=bytes_cut(_crops(case.shape)[1].numpy(), size["window"], size["joints"]))


WORKLOAD = Workload(
    shapes=SHAPES,
    dtypes=("float32",),
    directions=("forward",),
    contenders=("cpu", "triton", "reference", *FEEDERS),
    prepare=prepare,
    checks=checks,
    unavailable=missing,
    work=work,
)
