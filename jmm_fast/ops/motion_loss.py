"""Masked motion prediction loss."""

import torch
from torch import Tensor

from jmm_fast import reference
from jmm_fast.ops import checks
from jmm_fast.ops.backend import choose, library, on_triton

library.define(
    "motion_loss(Tensor prediction, Tensor clips, Tensor mask, *, int t_patch, int stride, bool normalize, "
    "Tensor? valid=None) -> Tensor"
)
# Plain tensor code all the way down: autograd, fake tensors, compile and export look through it.
library.impl("motion_loss", reference.motion_loss, "CompositeImplicitAutograd")

library.define(
    "motion_loss_forward(Tensor prediction, Tensor clips, Tensor mask, int t_patch, int stride, bool normalize, "
    "bool differentiate, Tensor? valid=None) -> (Tensor, Tensor)"
)
library.define(
    "motion_loss_triton_forward(Tensor prediction, Tensor clips, Tensor mask, int t_patch, int stride, bool normalize, "
    "bool differentiate, Tensor? valid=None) -> (Tensor, Tensor, Tensor)"
)
library.define("motion_loss_triton_backward(Tensor grad_loss, Tensor errors, Tensor factor) -> Tensor")


def motion_loss(
    prediction: Tensor,
    clips: Tensor,
    mask: Tensor,
    *,
    t_patch: int = 4,
    stride: int = 1,
    normalize: bool = True,
    valid: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean squared error between predicted and true motion, over masked tokens whose motion is known.

    ``m[t] = x[t+s] - x[t]`` for ``t < T-s``, 0 for the last ``s`` frames; ``y`` = ``m`` cut into tokens of ``n = u*C``
    numbers; with ``normalize``, ``y <- (y - mean y) / sqrt(var y + 1e-6)`` per token (unbiased variance).
    ``loss = sum_l w_l * mean_i (prediction_li - y_li)^2 / sum_l w_l`` over all bodies, ``w = mask and valid``; 0 when
    nothing is to be predicted.

    Args:
        prediction: floating ``[B,L,u*C]``; or ``[B,M,u*C]``, the masked tokens alone in ascending order, when every
            body has ``M`` of them (``MotionMask`` gives ``M = L - K``). Values of ``mask`` are checked for that on CPU
            tensors and not on a device, where looking would stall.
        clips: floating ``[B,T,V,C]``, metres.
        mask: bool ``[B,L]``, True = masked (``MotionMask.mask``).
        t_patch: frames per token, ``u``.
        stride: frames between the two poses of a difference, ``s``, in ``[1, T)``.
        normalize: predict each token's motion up to its own mean and scale.
        valid: bool ``[B,L]``, False where a pose that the token's motion needs is missing; None: all are there. All
            True gives what None gives, bit for bit.
        backend: see ``jmm_fast.backends()``. ``"cpu"`` takes a float32 or bfloat16 prediction (computed in float32, the
            gradient in the dtype of the prediction) and float32 clips that need no gradient; ``"triton"`` the same,
            and a float16 prediction.

    Returns:
        A scalar, float32 at least whatever the inputs are; differentiable in ``prediction`` and ``clips``.

    Raises:
        ValueError: wrong shape, dtype, device or value.

    Deterministic: repeatable bit for bit, for any number of threads. Source: MAMP (ICCV 2023), section 3.3, as the
    released JMM-TGT code computes it.
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
        lambda: f"floating [{bodies}, {tokens}, {t_patch * channels}], or of the masked tokens alone",
        prediction,
    )
    checks.boolean("mask", mask, (bodies, tokens))
    if valid is not None:
        checks.boolean("valid", valid, (bodies, tokens))
    checks.require(isinstance(stride, int) and 1 <= stride < frames, "stride", f"in [1, {frames})", stride)
    checks.same_device(prediction=prediction, clips=clips, mask=mask, valid=valid)
    if count < tokens and mask.device.type == "cpu" and not torch.compiler.is_compiling():
        masked = mask.sum(1)
        if (masked != count).any():
            raise ValueError(
                f"prediction must be [B,L,u*C], or [B,M,u*C] with M masked tokens in every body, got "
                f"{list(prediction.shape)} where bodies have {masked.min()} to {masked.max()} of {tokens} tokens masked"
            )
    refusals = {kind: _refusal(prediction, clips, types) for kind, types in checks.KERNEL_DTYPES.items()}
    function = _FUNCTIONS.get(choose("motion_loss", backend, prediction, **refusals))
    if function is not None:
        return function.apply(prediction, clips, mask, t_patch, stride, bool(normalize), valid)
    return torch.ops.jmm_fast.motion_loss(
        prediction, clips, mask, t_patch=t_patch, stride=stride, normalize=normalize, valid=valid
    )


def _refusal(prediction: Tensor, clips: Tensor, types: tuple[torch.dtype, ...]) -> str | None:
    """Why a kernel that takes predictions of these types cannot take these inputs; None when it can."""
    if prediction.dtype not in types:
        return f"it takes a {checks.either(types)} prediction, got {checks.describe(prediction)}"
    if clips.dtype != torch.float32:
        return f"it takes float32 clips, got {checks.describe(clips)}"
    if clips.requires_grad and torch.is_grad_enabled():
        return "it has no gradient with respect to clips, and these need one"
    return None


class _NativeLoss(torch.autograd.Function):
    """The kernel of the C++ extension, which computes the gradient on its way through the forward pass."""

    @staticmethod
    def forward(ctx, prediction, clips, mask, t_patch, stride, normalize, valid):
        loss, gradient = torch.ops.jmm_fast.motion_loss_forward(
            prediction, clips, mask, t_patch, stride, normalize, ctx.needs_input_grad[0], valid
        )
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss, None, None, None, None, None, None


class _TritonLoss(torch.autograd.Function):
    """The Triton kernels: errors are kept, and scaled when the gradient of the loss is known."""

    @staticmethod
    def forward(ctx, prediction, clips, mask, t_patch, stride, normalize, valid):
        loss, errors, factor = torch.ops.jmm_fast.motion_loss_triton_forward(
            prediction, clips, mask, t_patch, stride, normalize, ctx.needs_input_grad[0], valid
        )
        ctx.save_for_backward(errors, factor)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        gradient = torch.ops.jmm_fast.motion_loss_triton_backward(grad_loss, *ctx.saved_tensors)
        return gradient, None, None, None, None, None, None


_FUNCTIONS = {"cpu": _NativeLoss, "triton": _TritonLoss}


for _name in ("forward", "backward"):
    library.impl(f"motion_loss_triton_{_name}", on_triton("motion_loss", _name), "CompositeExplicitAutograd")


@torch.library.register_fake("jmm_fast::motion_loss_forward", lib=library)
def _fake_forward(prediction, clips, mask, t_patch, stride, normalize, differentiate, valid=None):
    bodies, rows, numbers = prediction.shape
    loss = prediction.new_empty((), dtype=torch.float32)
    return loss, prediction.new_empty(bodies if differentiate else 0, rows, numbers)


@torch.library.register_fake("jmm_fast::motion_loss_triton_forward", lib=library)
def _fake_triton_forward(prediction, *inputs):
    loss, errors = _fake_forward(prediction, *inputs)
    return loss, errors, torch.empty_like(loss)


@torch.library.register_fake("jmm_fast::motion_loss_triton_backward", lib=library)
def _fake_triton_backward(grad_loss, errors, factor):
    return torch.empty_like(errors)
