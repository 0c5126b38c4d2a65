"""Masked motion loss for GPUs: targets in registers, errors kept for the backward pass, sums in two fixed stages.

A program takes a block of a body's tokens: it differences the clip where it lies, normalises, compares, and writes one
partial sum. The backward pass needs no clip: errors are kept as they are, in the dtype of the prediction, and scaled in
float32 when the gradient of the loss is known; scaled before, they would underflow in float16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jmm_fast.kernels import config

# (bytes an element, numbers of a token) at most -> numbers of a tile, warps.
_ERRORS = {(4, config.ANY): (1024, 4)}
ERRORS = dict.fromkeys(config.ARCHITECTURES.values(), _ERRORS)
"""Not yet measured on a GPU."""

_TOGETHER = 1024


@triton.jit
def _errors(
    Prediction, Clips, Mask, Valid, Errors, Partial,
    pb, pr, pn, cb, cf, cv, cc, mb, ml, vb, vl,
    rows, tokens, joints, frames, stride, blocks,
    U: tl.constexpr, C: tl.constexpr, NP: tl.constexpr, BL: tl.constexpr, BEFORE: tl.constexpr,
    NORMALIZE: tl.constexpr, ALONE: tl.constexpr, VALID: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Errors of ``BL`` tokens of a body, their sum of squares, and how many of them count."""
    program = tl.program_id(0)
    body, first = (program // blocks).to(tl.int64), program % blocks * BL
    token = first + tl.arange(0, BL)
    number = tl.arange(0, NP)
    here, inside = token < tokens, number < U * C
    Mask += body * mb
    counts = tl.load(Mask + token.to(tl.int64) * ml, mask=here, other=0) != 0
    row, written = token, here
    if ALONE:
        # Predictions lie without gaps: a token's row is the number of masked tokens before it.
        before = 0
        for begin in range(0, first, BEFORE):
            place = begin + tl.arange(0, BEFORE)
            before += tl.sum((tl.load(Mask + place.to(tl.int64) * ml, mask=place < first, other=0) != 0).to(tl.int32))
        row = before + tl.cumsum(counts.to(tl.int32)) - 1
        counts &= row < rows
        written = counts
    if VALID:
        counts &= tl.load(Valid + body * vb + token.to(tl.int64) * vl, mask=here, other=0) != 0
    both = counts[:, None] & inside[None, :]
    step, joint = token // joints, token % joints
    chunk, channel = number // C, (number % C).to(tl.int64) * cc
    corner = Clips + body * cb + (step.to(tl.int64) * U * cf + joint.to(tl.int64) * cv)[:, None]
    now = corner + (chunk.to(tl.int64) * cf + channel)[None, :]
    then = corner + ((chunk + stride).to(tl.int64) * cf + channel)[None, :]
    moving = both & ((step * U)[:, None] + chunk[None, :] < frames - stride)
    target = tl.load(then, mask=moving, other=0.0) - tl.load(now, mask=moving, other=0.0)
    if NORMALIZE:
        mean = tl.sum(target, 1) / (U * C)
        target = tl.where(inside[None, :], target - mean[:, None], 0.0)
        variance = tl.sum(target * target, 1) / (U * C - 1)
        target *= (1.0 / tl.sqrt_rn(variance + 1e-6))[:, None]
    row = row.to(tl.int64)
    at = Prediction + body * pb + row[:, None] * pr + number.to(tl.int64)[None, :] * pn
    error = tl.where(both, tl.load(at, mask=both, other=0.0).to(tl.float32) - target, 0.0)
    tl.store(Partial + program, tl.sum(tl.sum(error * error, 1)))
    tl.store(Partial + tl.num_programs(0) + program, tl.sum(counts.to(tl.float32)))
    if KEEP:
        at = Errors + (body * rows + row)[:, None] * (U * C) + number[None, :]
        tl.store(at, error.to(Errors.dtype.element_ty), mask=written[:, None] & inside[None, :])


@triton.jit
def _finish(Partial, Loss, Factor, count, numbers, BLOCK: tl.constexpr):
    """The loss from all partial sums, and what errors are multiplied by to be its gradient."""
    total = tl.zeros([BLOCK], tl.float64)
    counted = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, count, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        total += tl.load(Partial + place, mask=place < count, other=0.0).to(tl.float64)
        counted += tl.load(Partial + count + place, mask=place < count, other=0.0).to(tl.float64)
    share = 1.0 / (numbers * tl.maximum(tl.sum(counted), 1.0))
    tl.store(Loss, (tl.sum(total) * share).to(tl.float32))
    tl.store(Factor, (2.0 * share).to(tl.float32))


@triton.jit
def _scale(Errors, Factor, Grad, Out, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    error = tl.load(Errors + place, mask=place < count, other=0.0).to(tl.float32)
    out = error * (tl.load(Factor) * tl.load(Grad).to(tl.float32))
    tl.store(Out + place, out.to(Out.dtype.element_ty), mask=place < count)


@config.on_device
def forward(
    prediction: Tensor,
    clips: Tensor,
    mask: Tensor,
    t_patch: int,
    stride: int,
    normalize: bool,
    differentiate: bool,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, errors in the shape and dtype of the prediction (of no body, unless ``differentiate``), and the factor that
    makes them the gradient of the loss."""
    bodies, frames, joints, channels = clips.shape
    tokens, rows, numbers = mask.shape[1], prediction.shape[1], t_patch * channels
    errors = prediction.new_empty(bodies if differentiate else 0, rows, numbers)
    if not prediction.numel():
        return clips.new_zeros(()), errors, clips.new_zeros(())
    size, warps = config.choose(ERRORS, prediction)
    padded = triton.next_power_of_2(numbers)
    block = max(1, size // padded)
    blocks = triton.cdiv(tokens, block)
    programs = bodies * blocks
    partial = clips.new_empty(2, programs)
    loss, factor = clips.new_empty(()), clips.new_empty(())
    mask = mask.view(torch.uint8)
    known = mask if valid is None else valid.view(torch.uint8)
    _errors[(programs,)](
        prediction, clips, mask, known, errors, partial,
        *prediction.stride(), *clips.stride(), *mask.stride(), *known.stride(),
        rows, tokens, joints, frames, stride, blocks,
        U=t_patch, C=channels, NP=padded, BL=block, BEFORE=_TOGETHER,
        NORMALIZE=normalize, ALONE=rows != tokens, VALID=valid is not None, KEEP=differentiate,
        num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    _finish[(1,)](
        partial, loss, factor, programs, float(numbers), BLOCK=2 * _TOGETHER, num_warps=8, enable_fp_fusion=True
    )
    return loss, errors, factor


@config.on_device
def backward(grad: Tensor, errors: Tensor, factor: Tensor) -> Tensor:
    """Gradient of the prediction, dense."""
    out = torch.empty_like(errors)
    if out.numel():
        _scale[(triton.cdiv(out.numel(), _TOGETHER),)](
            errors, factor, grad, out, out.numel(), BLOCK=_TOGETHER, enable_fp_fusion=True
        )
    return out
