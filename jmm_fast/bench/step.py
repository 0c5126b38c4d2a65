"""The whole pretraining step: mask, forward, loss, backward, update; ours and the plain path of every op."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from jmm_fast import ops, recipes
from jmm_fast.bench.case import Case, Check, Workload
from jmm_fast.bench.inputs import moving_clips
from jmm_fast.bench.parity import compare_rms, devices
from jmm_fast.models import JMMTGT
from jmm_fast.train.config import RunConfig
from jmm_fast.train.loop import autocast, train_step
from jmm_fast.train.optim import adamw

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


def prepare(case: Case) -> Callable[[], object]:
    size = SHAPES[case.shape]
    config = recipes.get(size["recipe"])
    device = torch.device(size.get("device", "cpu"))
    clips = moving_clips(size["bodies"], config.model.num_frames, config.model.num_joints).to(device)
    with torch.random.fork_rng(devices=[]):
        model = _model(config, case.contender).to(device)
    optimizer = adamw(model, config.optim)

    def loss() -> Tensor:
        return _loss(model, config, clips, _mask(config, clips, case.contender), case.contender)

    return lambda: train_step(loss, optimizer, device=device, rate=1e-3, seed=0, step=0, dtype=case.dtype)


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
    return None


def flop(case: Case) -> float:
    """Matrix products of the blocks, forward and twice that backward, all tokens of the decoder counted, for all
    contenders alike."""
    size = SHAPES[case.shape]
    model = recipes.get(size["recipe"]).model
    visible = int(model.num_tokens * (1 - recipes.get(size["recipe"]).mask.mask_ratio))

    def blocks(tokens: int, width: int, depth: int) -> float:
        return depth * (2 * tokens * width**2 * (4 + 2 * model.mlp_ratio) + 4 * tokens**2 * width)

    forward = blocks(visible, model.dim, model.depth) + blocks(model.num_tokens, model.decoder_dim, model.decoder_depth)
    return 3.0 * size["bodies"] * forward


WORKLOAD = Workload(
    shapes=SHAPES,
    dtypes=("float32", "bfloat16"),
    directions=("step",),
    contenders=("auto", "reference"),
    prepare=prepare,
    checks=checks,
    unavailable=missing,
    flop=flop,
)
