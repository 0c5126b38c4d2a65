"""The whole pretraining step, as training takes it: the next batch of a clip store, mask, forward, loss, backward,
update. Ours, the plain path of every op, and that path through torch.compile."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from jmm_fast import ops, recipes
from jmm_fast.bench import block
from jmm_fast.bench.case import Case, Check, Work, Workload, no_compiler
from jmm_fast.bench.inputs import made_up_clips, moving_clips, store_of
from jmm_fast.bench.parity import compare_rms, devices
from jmm_fast.data import ClipBatch
from jmm_fast.models import JMMTGT
from jmm_fast.train.config import RunConfig
from jmm_fast.train.evaluate import batches
from jmm_fast.train.graph import CudaGraphs
from jmm_fast.train.loop import LoopConfig, autocast, steps
from jmm_fast.train.optim import adamw

BATCHES = 4
"""Batches that a store holds clips for; they come round."""

# Bodies, not clips, are what a step computes; the released code makes two of every clip.
SHAPES = {
    "released": {"recipe": "released", "clips": 16, "bodies": 32},
    "small": {"recipe": "small", "clips": 32, "bodies": 32},
    "gpu_released": {"recipe": "released", "clips": 48, "bodies": 96, "device": "cuda"},
}


def _mask(config: RunConfig, clips: Tensor, backend: str) -> ops.MotionMask:
    settings = config.mask
    return ops.motion_mask(
        clips,
        mask_ratio=settings.mask_ratio,
        tau=settings.tau,
        t_patch=config.model.t_patch,
        variant=settings.variant,
        gate=settings.gate,
        backend=backend,
    )


def _loss(model: JMMTGT, config: RunConfig, clips: Tensor, mask: ops.MotionMask, backend: str) -> Tensor:
    # The plain path predicts every token and leaves out the visible ones afterwards, as the released code does.
    prediction = model(clips, mask, masked_only=backend != "reference")
    return ops.motion_loss(
        prediction.to(clips.dtype),
        clips,
        mask.mask,
        t_patch=config.model.t_patch,
        stride=config.loss.stride,
        normalize=config.loss.normalize,
        backend=backend,
    )


def _model(config: RunConfig, backend: str) -> JMMTGT:
    torch.manual_seed(0)
    return JMMTGT(config.model, backend=backend)


class Step:
    """A step to call, and the stream of batches that it takes from, made ahead as in training.

    Attributes:
        waited: seconds that each call so far waited for its batch.
    """

    def __init__(self, case: Case) -> None:
        size = SHAPES[case.shape]
        config = recipes.get(size["recipe"])
        backend = "reference" if case.contender == "compiled" else case.contender
        config = dataclasses.replace(config, dtype=case.dtype, backend=backend)
        device = torch.device(size.get("device", "cpu"))
        with torch.random.fork_rng(devices=[]):
            model = _model(config, backend).to(device)
        optimizer = adamw(model, config.optim)

        def objective(clips: Tensor) -> Tensor:
            return _loss(model, config, clips, _mask(config, clips, backend), backend)

        if case.contender == "compiled":
            # What was compiled of other models counts against how often a function may be compiled.
            torch.compiler.reset()
            objective = torch.compile(objective, fullgraph=True, dynamic=False)

        def loss_of(batch: ClipBatch, _epoch: int | Tensor) -> tuple[Tensor, int]:
            return objective(batch.clips), 1

        clips = made_up_clips(BATCHES * size["clips"], size["bodies"] // size["clips"], config.model.num_joints)
        stream = batches(
            store_of(clips),
            torch.arange(len(clips)),
            config,
            train=True,
            batch_size=size["clips"],
            seed=0,
            device=device,
        )
        # The plain path is timed eager on a GPU too; ours is captured, as training does.
        graphs = CudaGraphs(device, optimizer, strict=False) if device.type == "cuda" and backend == "auto" else None
        settings = LoopConfig.of(config, config, config.optim)
        self._take, self._items = steps(
            model, optimizer, stream, loss_of, settings, device, None, graphs, lambda text: print(text, file=sys.stderr)
        )
        self.restart()

    def restart(self) -> None:
        """Begin the stream anew: nothing is made ahead."""
        self.waited: list[float] = []
        self._stream = _endless(self._items)

    def __call__(self) -> Tensor:
        began = time.perf_counter()
        batch = next(self._stream)
        self.waited.append(time.perf_counter() - began)
        loss, _ = self._take(batch, 0, 1e-3, 0)
        return loss


def _endless(items: Callable[[int], Iterator]) -> Iterator:
    while True:
        yield from items(0)


def prepare(case: Case) -> Step:
    run = Step(case)
    # On a GPU kernels are compiled in the first step, and the second is captured.
    calls = 3 if "device" in SHAPES[case.shape] else 1 if case.contender == "compiled" else 0
    for _ in range(calls):
        run()
    if calls:
        run.restart()
    return run


def checks(dtype: str, contender: str) -> Iterator[Check]:
    """Loss and the gradient of every parameter, for two bodies with equal masks, wherever a shape lives here."""
    for shape, size in SHAPES.items():
        device = size.get("device", "cpu")
        if device not in devices():
            continue
        config = recipes.get(size["recipe"])
        clips = moving_clips(2, config.model.num_frames, config.model.num_joints).to(device)
        mask = _mask(config, clips, "reference")

        def gradients(backend: str, arithmetic: str, config=config, clips=clips, mask=mask) -> dict[str, Tensor]:
            model = _model(config, backend).to(clips.device)
            if arithmetic == "float64":
                model, clips = model.double(), clips.double()
            with autocast(clips.device, "float32" if arithmetic == "float64" else arithmetic):
                loss = _loss(model, config, clips, mask, backend)
            loss.backward()
            return {"loss": loss.detach()} | {f"d {name}": p.grad for name, p in model.named_parameters()}

        ours, plain, exact = (
            gradients(contender, dtype),
            gradients("reference", dtype),
            gradients("reference", "float64"),
        )
        yield from compare_rms(
            list(exact),
            list(ours.values()),
            list(plain.values()),
            list(exact.values()),
            torch.finfo(getattr(torch, dtype)).eps,
            where=f"{shape} ",
        )


def missing(case: Case) -> str | None:
    if case.contender == "compiled" and "device" not in SHAPES[case.shape]:
        return "torch.compile is measured on the released model" if case.shape == "small" else no_compiler("the step")
    return None


def counts(case: Case) -> dict[str, int]:
    size = SHAPES[case.shape]
    return {"samples": size["clips"], "bodies": size["bodies"]}


def work(case: Case) -> Work:
    """Products of the blocks (queries, keys, values, scores, weighted values, projection, MLP), forward and twice that
    backward: visible tokens in the encoder, all tokens in the decoder. For all contenders alike, whatever they compute
    twice or leave out. Embeddings and heads, 1 % more, are left out."""
    size = SHAPES[case.shape]
    config = recipes.get(size["recipe"])
    model = config.model
    visible = int(model.num_tokens * (1 - config.mask.mask_ratio))
    encoder = model.depth * block.products(visible, model.dim, model.mlp_ratio)
    decoder = model.decoder_depth * block.products(model.num_tokens, model.decoder_dim, model.mlp_ratio)
    return Work(flop=3 * size["bodies"] * (encoder + decoder))


WORKLOAD = Workload(
    shapes=SHAPES,
    dtypes=("float32", "bfloat16"),
    directions=("step",),
    contenders=("auto", "reference", "compiled"),
    prepare=prepare,
    checks=checks,
    unavailable=missing,
    work=work,
    counts=counts,
)
