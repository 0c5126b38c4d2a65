"""Which tokens of a clip are masked: drawn by how much and how alike the joints move."""

from typing import NamedTuple

import torch
from torch import Tensor

from jmm_fast import reference
from jmm_fast.ops import checks
from jmm_fast.ops.backend import choose, library

VARIANTS = ("released", "paper", "mamp")

MOST_TOKENS = 4096
"""Tokens of a body that the CUDA kernel can hold in the shared memory of a block."""

library.define(
    "motion_mask(Tensor clips, float mask_ratio, float tau, int t_patch, str variant, float? gate, Tensor? uniform, "
    "SymInt seed, SymInt epoch, Tensor? clip_ids, str backend, Tensor? valid=None, Tensor? epoch_at=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
# What the extensions serve, called inside the op above: compilers see that one alone. The last result on the CPU counts
# the bodies whose set was settled in double precision.
library.define(
    "motion_mask_cpu(Tensor clips, int kept, float tau, int t_patch, int variant, float gate, Tensor? uniform, "
    "int seed, int epoch, Tensor? clip_ids, Tensor? valid=None, Tensor? epoch_at=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, int)"
)
library.define(
    "motion_mask_cuda(Tensor clips, int kept, float tau, int t_patch, int variant, float gate, Tensor? uniform, "
    "int seed, int epoch, Tensor? clip_ids, Tensor? valid=None, Tensor? epoch_at=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


class MotionMask(NamedTuple):
    """A drawn mask over the ``L = T/u * V`` tokens of each body, token ``l = t' * V + v``.

    Attributes:
        visible: int64 ``[B,K]``, the tokens that stay visible, ascending.
        mask: bool ``[B,L]``, True where a token is masked (to be predicted).
        restore: int64 ``[B,L]``: where each token of the grid sits in ``[visible, masked]``, both ascending.
        probability: float32 ``[B,L]``, the softmax of the scores, or None from a backend that never forms it.
    """

    visible: Tensor
    mask: Tensor
    restore: Tensor
    probability: Tensor | None


def motion_mask(
    clips: Tensor,
    *,
    mask_ratio: float = 0.9,
    tau: float = 0.8,
    t_patch: int = 4,
    variant: str = "released",
    gate: float | None = None,
    uniform: Tensor | None = None,
    seed: int = 0,
    epoch: int | Tensor = 0,
    clip_ids: Tensor | None = None,
    valid: Tensor | None = None,
    backend: str = "auto",
) -> MotionMask:
    """Draw a mask that hides moving joints more often than still ones.

    With ``a = P[t',v]`` and ``b = P[t'-1,v]`` the ``n = u*C`` numbers of a token and of the one before it:

    - ``dif = mean_i |a_i - b_i|``
    - ``sim = mean_i |(a_i - mean a)(b_i - mean b)| / (|a - mean a| |b - mean b| + 1e-10)`` (``released``), or
      ``sim = |sum_i (a_i - mean a)(b_i - mean b)| / (same)`` (``paper``: the absolute correlation)
    - score: ``dif + sim`` (``released``), ``g dif + (1 - g) sim`` (``paper``), ``dif`` (``mamp``); the first time step
      takes the second's
    - ``z = score / (max_l score * tau + 1e-10)``, ``p = softmax_l z``
    - ``key_l = z_l - log(-log(U_l + 1e-10) + 1e-10)``, ``U ~ Uniform[0,1)``: the ``K = int(L * (1 - mask_ratio))``
      smallest keys stay visible (ties: the lower token), the rest is masked.

    With ``valid``, where a token is False unless it was really seen:

    - a score that compares with a token that is not valid says nothing: it becomes 0, so it enters neither the maximum
      nor, but for the 0, the probabilities. With ``w[t',v] = valid[t',v] and valid[t'-1,v]`` for ``t' >= 1`` and
      ``w[0,v] = w[1,v]``, ``score <- score if w else 0``
    - tokens that are not valid come after all valid ones, in the order of the grid: they stay visible only where fewer
      than ``K`` tokens are valid, and are masked otherwise. ``mask`` stays "all but the visible ones";
      ``jmm_fast.ops.motion_loss`` takes the tokens to predict from ``valid`` of its own.

    Args:
        clips: floating ``[B,T,V,C]``, metres; finite; ``T`` a multiple of ``t_patch`` with at least two patches.
        mask_ratio: share of tokens to mask, in (0, 1), leaving at least one visible.
        tau: temperature, > 0; smaller follows motion more closely.
        t_patch: frames per token, ``u``.
        variant: ``"released"`` (the authors' code), ``"paper"`` (the abstract's formula) or ``"mamp"``.
        gate: ``g`` in [0, 1] of variant ``paper``; None means 0.5. Other variants have no gate.
        uniform: floating ``[B,L]`` in [0, 1): draws to use instead of Philox's.
        seed, epoch, clip_ids: name the Philox draws (``jmm_fast.reference.uniform``); ``clip_ids`` int ``[B]`` is the
            clip's index in the dataset plus ``body << 32``, and None means ``0..B-1``. An ``epoch`` that is an int64
            tensor ``[]`` is read by the kernel, where a number would be part of a captured CUDA graph.
        valid: bool ``[B,L]``, True where a token was seen in all of its frames; None: all were. All True gives what
            None gives, bit for bit.
        backend: see ``jmm_fast.backends()``. ``"cpu"`` and ``"cuda"`` take float32, bfloat16 or float16 clips and
            draws, ``"cuda"`` at most 4096 tokens.

    Returns:
        ``MotionMask``. Not differentiable.

    Raises:
        ValueError: wrong shape, dtype, device or value.

    Deterministic: a function of the arguments, the same for any batch the body is drawn in and any number of threads.
    The drawn set is the one that the formulas give in float64, on every backend and for every dtype; probabilities are
    float32 results. Source: JMM-TGT (PLOS ONE
    20(12): e0338008) and MAMP (arXiv 2308.07092); draws: Gumbel top-K (Kool et al., ICML 2019).
    """
    checks.floating("clips", clips, "[B,T,V,C]", 4)
    checks.patches(clips, t_patch)
    checks.require(clips.shape[1] >= 2 * t_patch, "clips", f"of at least {2 * t_patch} frames (two patches)", clips)
    checks.require(variant in VARIANTS, "variant", f"one of {', '.join(VARIANTS)}", variant)
    checks.require(tau > 0, "tau", "positive", tau)
    tokens = clips.shape[1] // t_patch * clips.shape[2]
    checks.require(
        0 < mask_ratio < 1 and reference.num_visible(tokens, mask_ratio) >= 1,
        "mask_ratio",
        f"in (0, 1) and leave one of {tokens} tokens visible",
        mask_ratio,
    )
    if gate is not None:
        checks.require(variant == "paper", "gate", "None unless variant is paper", gate)
        checks.require(0 <= gate <= 1, "gate", "in [0, 1]", gate)
    if uniform is not None:
        checks.floating("uniform", uniform, "[B,L]", 2)
        checks.require(
            uniform.shape == (clips.shape[0], tokens), "uniform", lambda: f"[{clips.shape[0]}, {tokens}]", uniform
        )
    if clip_ids is not None:
        checks.integer("clip_ids", clip_ids, "[B]", 1)
        checks.require(clip_ids.shape[0] == clips.shape[0], "clip_ids", lambda: f"int [{clips.shape[0]}]", clip_ids)
    if valid is not None:
        checks.boolean("valid", valid, (clips.shape[0], tokens))
    epoch_at = None
    if isinstance(epoch, Tensor):
        checks.require(epoch.dtype == torch.int64 and not epoch.dim(), "epoch", "an integer or int64 []", epoch)
        epoch, epoch_at = 0, epoch
    checks.same_device(clips=clips, uniform=uniform, clip_ids=clip_ids, valid=valid, epoch=epoch_at)
    refusal = next(
        (
            f"{name} must be float32, bfloat16 or float16, got {checks.describe(tensor)}"
            for name, tensor in (("clips", clips), ("uniform", uniform))
            if tensor is not None and tensor.dtype == torch.float64
        ),
        None,
    )
    refusals = {"cpu": refusal, "cuda": refusal}
    if tokens > MOST_TOKENS:
        refusals["cuda"] = f"clips must have at most {MOST_TOKENS} tokens a body, got {tokens}"
    backend = choose("motion_mask", backend, clips, **refusals)
    return MotionMask(
        *torch.ops.jmm_fast.motion_mask(
            clips, mask_ratio, tau, t_patch, variant, gate, uniform, seed, epoch, clip_ids, backend, valid, epoch_at
        )
    )


@torch.library.impl(library, "motion_mask", "CompositeExplicitAutograd")
def _run(
    clips: Tensor,
    mask_ratio: float,
    tau: float,
    t_patch: int,
    variant: str,
    gate: float | None,
    uniform: Tensor | None,
    seed: int,
    epoch: int,
    clip_ids: Tensor | None,
    backend: str,
    valid: Tensor | None = None,
    epoch_at: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if backend in ("cpu", "cuda"):
        kernel = torch.ops.jmm_fast.motion_mask_cpu if backend == "cpu" else torch.ops.jmm_fast.motion_mask_cuda
        visible, mask, restore, probability, *_ = kernel(
            clips.float(),
            reference.num_visible(clips.shape[1] // t_patch * clips.shape[2], mask_ratio),
            tau,
            t_patch,
            VARIANTS.index(variant),
            0.5 if gate is None else gate,
            None if uniform is None else uniform.float(),
            seed,
            epoch,
            None if clip_ids is None else clip_ids.long(),
            valid,
            epoch_at,
        )
        return visible, mask, restore, probability
    return reference.motion_mask(
        clips,
        mask_ratio=mask_ratio,
        tau=tau,
        t_patch=t_patch,
        variant=variant,
        gate=gate,
        uniform_draws=uniform,
        seed=seed,
        epoch=epoch if epoch_at is None else epoch_at,
        clip_ids=clip_ids,
        valid=valid,
    )


@torch.library.register_fake("jmm_fast::motion_mask", lib=library)
def _fake(
    clips: Tensor,
    mask_ratio: float,
    tau: float,
    t_patch: int,
    variant: str,
    gate: float | None,
    uniform: Tensor | None,
    seed: int,
    epoch: int,
    clip_ids: Tensor | None,
    backend: str,
    valid: Tensor | None = None,
    epoch_at: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bodies, frames, joints, _ = clips.shape
    tokens = frames // t_patch * joints
    grid = clips.new_empty(bodies, tokens, dtype=torch.int64)
    return (
        clips.new_empty(bodies, reference.num_visible(tokens, mask_ratio), dtype=torch.int64),
        clips.new_empty(bodies, tokens, dtype=torch.bool),
        grid,
        clips.new_empty(bodies, tokens, dtype=torch.promote_types(clips.dtype, torch.float32)),
    )
