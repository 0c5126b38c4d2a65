"""The masked motion loss: ours and the plain twin."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from jmm_fast import ops, reference
from jmm_fast.bench.case import Case, Check, Work, Workload, moved
from jmm_fast.bench.inputs import moving_clips
from jmm_fast.bench.parity import compare, results
from jmm_fast.ops.backend import unavailable

T_PATCH, PATCH = 4, 12

# `full`: a prediction for every token; `masked`: for the masked tokens alone, as the training step makes it.
SHAPES = {
    "full": {"bodies": 96, "frames": 120, "prediction": "all tokens"},
    "masked": {"bodies": 96, "frames": 120, "prediction": "masked tokens"},
    "gpu_masked": {"bodies": 1024, "frames": 120, "prediction": "masked tokens", "device": "cuda"},
}


def _problem(bodies: int, frames: int, masked_only: bool, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    clips = moving_clips(bodies, frames)
    tokens = frames // T_PATCH * clips.shape[2]
    order = torch.rand(bodies, tokens, generator=generator).argsort(1)
    mask = order >= reference.num_visible(tokens, 0.9)
    count = int(mask[0].sum()) if masked_only and bodies else tokens
    return torch.randn(bodies, count, PATCH, generator=generator), clips, mask


def prepare(case: Case) -> Callable[[], object]:
    size = SHAPES[case.shape]
    generator = torch.Generator().manual_seed(0)
    masked_only = size["prediction"] == "masked tokens"
    problem = _problem(size["bodies"], size["frames"], masked_only, generator)
    prediction, clips, mask = (x.to(size.get("device", "cpu")) for x in problem)
    prediction = prediction.to(case.torch_dtype)

    def loss() -> Tensor:
        return ops.motion_loss(prediction, clips, mask, t_patch=T_PATCH, backend=case.contender)

    if case.direction == "forward":
        return torch.no_grad()(loss)
    prediction.requires_grad_()

    def run() -> Tensor:
        prediction.grad = None
        loss().backward()
        return prediction.grad

    return run


def checks(dtype: str, contender: str) -> Iterator[Check]:
    kind = getattr(torch, dtype)
    device = "cuda" if contender == "triton" else "cpu"
    generator = torch.Generator().manual_seed(0)
    for bodies, frames in ((1, 8), (3, 40), (8, 120)):
        for masked_only in (False, True):
            prediction, clips, mask = (x.to(device) for x in _problem(bodies, frames, masked_only, generator))
            clips[-1, : frames // 2] = 0
            for stride, normalize in ((1, True), (2, True), (1, False)):
                settings = {"t_patch": T_PATCH, "stride": stride, "normalize": normalize}

                def ours(prediction, clips=clips, mask=mask, settings=settings):
                    return ops.motion_loss(prediction, clips, mask, backend=contender, **settings)

                def plain(prediction, clips=clips, mask=mask, settings=settings):
                    return reference.motion_loss(prediction, clips, mask, **settings)

                def exact(prediction, clips=clips, plain=plain):
                    return plain(prediction, clips.double())

                # Clips are data: the kernel leaves their gradient to the plain twin.
                inputs, seed = [prediction.to(kind)], torch.tensor(1.0, device=device)
                yield from compare(
                    ("loss", "dprediction"),
                    results(ours, inputs, seed),
                    results(plain, inputs, seed),
                    results(exact, [x.double() for x in inputs], seed.double()),
                    torch.finfo(kind).eps,
                    where=f"B={bodies} T={frames} {'masked ' if masked_only else ''}s={stride} n={int(normalize)} ",
                )


def missing(case: Case) -> str | None:
    return unavailable("motion_loss", case.contender)


def work(case: Case) -> Work:
    """Prediction, poses of 25 joints and mask in; the gradient of the prediction out."""
    size = SHAPES[case.shape]
    tokens = size["frames"] // T_PATCH * 25
    predicted = tokens if size["prediction"] == "all tokens" else tokens - reference.num_visible(tokens, 0.9)
    prediction = predicted * PATCH * case.torch_dtype.itemsize
    read = prediction + size["frames"] * 25 * 12 + tokens
    return Work(bytes=size["bodies"] * moved(case.direction, read=read, written=0, gradients=prediction))


WORKLOAD = Workload(
    shapes=SHAPES,
    dtypes=("float32", "bfloat16"),
    directions=("forward", "forward_backward"),
    contenders=("cpu", "triton", "reference"),
    prepare=prepare,
    checks=checks,
    unavailable=missing,
    work=work,
)
