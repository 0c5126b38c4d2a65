"""Masked motion prediction loss."""

import torch
from torch import Tensor

from jmm_fast import reference
from jmm_fast.ops import checks
from jmm_fast.ops.backend import choose, library

library.define(
    "motion_loss(Tensor prediction, Tensor clips, Tensor mask, *, int t_patch, int stride, bool normalize) -> Tensor"
)
library.impl("motion_loss", reference.motion_loss, "CompositeImplicitAutograd")


def motion_loss(
    prediction: Tensor,
    clips: Tensor,
    mask: Tensor,
    *,
    t_patch: int = 4,
    stride: int = 1,
    normalize: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Mean squared error between predicted and true motion, over masked tokens.

    ``m[t] = x[t+s] - x[t]`` for ``t < T-s``, 0 for the last ``s`` frames; ``y`` = ``m`` cut into tokens of ``n = u*C``
    numbers; with ``normalize``, ``y <- (y - mean y) / sqrt(var y + 1e-6)`` per token (unbiased variance).
    ``loss = sum_l mask_l * mean_i (prediction_li - y_li)^2 / sum_l mask_l`` over all bodies; 0 when nothing is masked.

    Args:
        prediction: floating ``[B,L,u*C]``; or ``[B,M,u*C]``, the masked tokens alone in ascending order, when every
            body has ``M`` of them (``MotionMask`` gives ``M = L - K``). Values of ``mask`` are checked for that on CPU
            tensors and not on a device, where looking would stall.
        clips: floating ``[B,T,V,C]``, metres.
        mask: bool ``[B,L]``, True = masked (``MotionMask.mask``).
        t_patch: frames per token, ``u``.
        stride: frames between the two poses of a difference, ``s``, in ``[1, T)``.
        normalize: predict each token's motion up to its own mean and scale.
        backend: see ``jmm_fast.backends()``.

    Returns:
        A scalar, float32 at least whatever the inputs are; differentiable in ``prediction`` and ``clips``.

    Raises:
        ValueError: wrong shape, dtype, device or value.

    Deterministic. Source: MAMP (ICCV 2023), section 3.3, as the released JMM-TGT code computes it.
    """
    checks.floating("clips", clips, "[B,T,V,C]", 4)
    checks.patches(clips, t_patch)
    bodies, frames, joints, channels = clips.shape
    tokens = frames // t_patch * joints
    checks.floating("prediction", prediction, "[B,L,u*C]", 3)
    count = prediction.shape[1]
    checks.require(
        prediction.shape == (bodies, count, t_patch * channels) and count <= tokens,
        "prediction",
        f"floating [{bodies}, {tokens}, {t_patch * channels}], or of the masked tokens alone",
        prediction,
    )
    checks.require(
        isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == (bodies, tokens),
        "mask",
        f"bool [{bodies}, {tokens}]",
        mask,
    )
    checks.require(isinstance(stride, int) and 1 <= stride < frames, "stride", f"in [1, {frames})", stride)
    checks.same_device(prediction=prediction, clips=clips, mask=mask)
    if count < tokens and mask.device.type == "cpu" and not torch.compiler.is_compiling():
        masked = mask.sum(1)
        if (masked != count).any():
            raise ValueError(
                f"prediction must be [B,L,u*C], or [B,M,u*C] with M masked tokens in every body, got "
                f"{list(prediction.shape)} where bodies have {masked.min()} to {masked.max()} of {tokens} tokens masked"
            )
    choose("motion_loss", backend, prediction)
    return torch.ops.jmm_fast.motion_loss(prediction, clips, mask, t_patch=t_patch, stride=stride, normalize=normalize)
