"""Drawing the mask: ours and the plain twin."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from jmm_fast import ops, reference
from jmm_fast.bench.case import Case, Check, Workload
from jmm_fast.bench.inputs import moving_clips
from jmm_fast.bench.parity import compare
from jmm_fast.ops.backend import unavailable

# 96 bodies are the released batch of 48 clips with two bodies each.
SHAPES = {
    "96": {"bodies": 96, "frames": 120, "variant": "released"},
    "96_paper": {"bodies": 96, "frames": 120, "variant": "paper"},
    "8": {"bodies": 8, "frames": 120, "variant": "released"},
}
SETTINGS = {"mask_ratio": 0.9, "tau": 0.8, "t_patch": 4}


def prepare(case: Case) -> Callable[[], object]:
    size = SHAPES[case.shape]
    clips = moving_clips(size["bodies"], size["frames"])
    return lambda: ops.motion_mask(clips, variant=size["variant"], backend=case.contender, **SETTINGS)


def checks(dtype: str, contender: str) -> Iterator[Check]:
    """The drawn tokens exactly; the probabilities by the rule, whose float32 side is the formula in float32."""
    for variant in ("released", "paper", "mamp"):
        for bodies, frames in ((1, 8), (3, 40), (8, 120)):
            clips = moving_clips(bodies, frames)
            clips[-1] = 0  # a body that is not there
            where = f"{variant} B={bodies} T={frames} "
            ours = ops.motion_mask(clips, variant=variant, seed=7, epoch=3, backend=contender, **SETTINGS)
            plain = reference.motion_mask(clips.double(), variant=variant, seed=7, epoch=3, **SETTINGS)
            for name, drawn, expected in zip(("visible", "mask", "restore"), ours, plain, strict=False):
                differing = (drawn != expected).sum() if drawn.shape == expected.shape else expected.numel()
                yield Check(where + name, float(differing), 0.0)
            if ours.probability is not None:
                eps = torch.finfo(torch.float32).eps
                yield from compare(
                    ("probability",), ours[3:], [_probability(clips, variant)], plain[3:], eps, where=where
                )


def _probability(clips: Tensor, variant: str) -> Tensor:
    # The plain twin draws in double whatever it is given, so that backends can agree; here float32 is wanted.
    scores = reference.motion_scores(clips, t_patch=SETTINGS["t_patch"], variant=variant).flatten(1)
    return torch.softmax(scores / (scores.amax(1, keepdim=True) * SETTINGS["tau"] + 1e-10), 1)


def missing(case: Case) -> str | None:
    return unavailable("motion_mask", case.contender)


WORKLOAD = Workload(
    shapes=SHAPES,
    dtypes=("float32",),
    directions=("forward",),
    contenders=("cpu", "reference"),
    prepare=prepare,
    checks=checks,
    unavailable=missing,
)
