"""Drawing the mask: ours, the plain twin in double precision, and the same formula in float32."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from jmm_fast import ops, reference
from jmm_fast.bench.case import Case, Check, Work, Workload, moved
from jmm_fast.bench.inputs import moving_clips
from jmm_fast.bench.parity import compare
from jmm_fast.ops.backend import unavailable

# 96 bodies are the released batch of 48 clips with two bodies each.
SHAPES = {
    "b96": {"bodies": 96, "frames": 120, "variant": "released"},
    "b96_paper": {"bodies": 96, "frames": 120, "variant": "paper"},
    "b8": {"bodies": 8, "frames": 120, "variant": "released"},
    "gpu_b1024": {"bodies": 1024, "frames": 120, "variant": "released", "device": "cuda"},
}
SETTINGS = {"mask_ratio": 0.9, "tau": 0.8, "t_patch": 4}


def eager(clips: Tensor, variant: str) -> tuple[Tensor, Tensor, Tensor]:
    """Visible tokens, mask and places in float32 with torch's own random numbers, as published code draws them."""
    logits = _logits(clips, variant)
    keys = logits.log_softmax(1) - torch.log(-torch.log(torch.rand_like(logits) + 1e-10) + 1e-10)
    order = keys.argsort(1)
    restore = order.argsort(1)
    kept = reference.num_visible(keys.shape[1], SETTINGS["mask_ratio"])
    return order[:, :kept], restore >= kept, restore


def _logits(clips: Tensor, variant: str) -> Tensor:
    scores = reference.motion_scores(clips, t_patch=SETTINGS["t_patch"], variant=variant).flatten(1)
    return scores / (scores.amax(1, keepdim=True) * SETTINGS["tau"] + 1e-10)


def prepare(case: Case) -> Callable[[], object]:
    size = SHAPES[case.shape]
    clips = moving_clips(size["bodies"], size["frames"]).to(size.get("device", "cpu"))
    if case.contender == "eager":
        return lambda: eager(clips, size["variant"])
    return lambda: ops.motion_mask(clips, variant=size["variant"], backend=case.contender, **SETTINGS)


def checks(dtype: str, contender: str) -> Iterator[Check]:
    """The drawn tokens exactly; the probabilities by the rule, whose float32 side is the formula in float32."""
    for variant in ("released", "paper", "mamp"):
        for bodies, frames in ((1, 8), (3, 40), (8, 120)):
            clips = moving_clips(bodies, frames).to("cuda" if contender == "cuda" else "cpu")
            clips[-1] = 0  # a body that is not there
            where = f"{variant} B={bodies} T={frames} "
            ours = ops.motion_mask(clips, variant=variant, seed=7, epoch=3, backend=contender, **SETTINGS)
            plain = reference.motion_mask(clips.double(), variant=variant, seed=7, epoch=3, **SETTINGS)
            for name, drawn, expected in zip(("visible", "mask", "restore"), ours, plain, strict=False):
                differing = (drawn != expected).sum() if drawn.shape == expected.shape else expected.numel()
                yield Check(where + name, float(differing), 0.0)
            if ours.probability is not None:
                # The plain twin draws in double whatever it is given, so that backends can agree.
                single = _logits(clips, variant).softmax(1)
                eps = torch.finfo(torch.float32).eps
                yield from compare(("probability",), ours[3:], [single], plain[3:], eps, where=where)


def missing(case: Case) -> str | None:
    return None if case.contender == "eager" else unavailable("motion_mask", case.contender)


def work(case: Case) -> Work:
    """Poses of 25 joints in; visible tokens, mask, places and probabilities out."""
    size = SHAPES[case.shape]
    tokens = size["frames"] // SETTINGS["t_patch"] * 25
    written = 8 * reference.num_visible(tokens, SETTINGS["mask_ratio"]) + (1 + 8 + 4) * tokens
    read = size["frames"] * 25 * 12
    return Work(bytes=size["bodies"] * moved(case.direction, read=read, written=written))


WORKLOAD = Workload(
    shapes=SHAPES,
    dtypes=("float32",),
    directions=("forward",),
    contenders=("cpu", "cuda", "reference", "eager"),
    prepare=prepare,
    checks=checks,
    unavailable=missing,
    work=work,
)
