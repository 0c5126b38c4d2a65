"""Drawing the mask: ours and the plain twin."""

from collections.abc import Callable, Iterator

import torch

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
    eps = torch.finfo(torch.float32).eps
    for variant in ("released", "paper", "mamp"):
        for bodies, frames in ((1, 8), (3, 40), (8, 120)):
            clips = moving_clips(bodies, frames)
            clips[-1] = 0  # a body that is not there
            where = f"{variant} B={bodies} T={frames} "
            ours = ops.motion_mask(clips, variant=variant, seed=7, epoch=3, backend=contender, **SETTINGS)
            plain = {"variant": variant, "seed": 7, "epoch": 3, **SETTINGS}
            single = reference.motion_mask(clips, **plain)
            exact = reference.motion_mask(clips.double(), **plain)
            if ours.probability is not None:
                yield from compare(("probability",), ours[3:], single[3:], exact[3:], eps, where=where)
            yield from _selection(ours, clips, variant, where)


def _selection(ours, clips: torch.Tensor, variant: str, where: str) -> Iterator[Check]:
    """The drawn set by its float64 keys: what is kept may exceed what is masked by rounding alone."""
    bodies, tokens = ours.mask.shape
    draws = reference.uniform(7, reference.MASK, torch.arange(bodies), 3, tokens)

    def keys(clips: torch.Tensor) -> torch.Tensor:
        scores = reference.motion_scores(clips, t_patch=SETTINGS["t_patch"], variant=variant).flatten(1)
        logits = scores / (scores.amax(1, keepdim=True) * SETTINGS["tau"] + 1e-10)
        return logits - torch.log(-torch.log(draws.to(clips.dtype) + 1e-10) + 1e-10)

    exact = keys(clips.double())
    rounding = (keys(clips).double() - exact).abs().max().item()
    bound = 2 * (rounding + torch.finfo(torch.float32).eps * exact.abs().max().item())
    kept = exact.masked_fill(ours.mask, float("-inf")).amax(1)
    masked = exact.masked_fill(~ours.mask, float("inf")).amin(1)
    yield Check(where + "selection", (kept - masked).clamp(min=0).max().item(), bound)

    visible = torch.stack([row.nonzero()[:, 0] for row in ~ours.mask])
    order = torch.argsort(ours.mask.to(torch.int8), dim=1, stable=True)
    wrong = (ours.visible != visible).sum() + (ours.restore != torch.argsort(order, dim=1)).sum()
    wrong += visible.shape[1] != reference.num_visible(tokens, SETTINGS["mask_ratio"])
    yield Check(where + "order", float(wrong), 0.0)


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
