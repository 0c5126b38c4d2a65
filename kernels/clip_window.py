"""Clip windows for GPUs: crop, resample and rotate straight from the packed frames, in one pass.

Every product and sum is rounded by itself, in the order of the plain twin, and places are computed in integers: clips
that are equal bit for bit draw equal masks. So this kernel is compiled without fused multiply-adds.
"""

import triton
import triton.language as tl
from torch import Tensor

from jmm_fast.kernels import config

# (bytes an element, 3) at most -> frames, joints, warps.
_CUT = {(4, 3): (16, 32, 4)}
CUT = dict.fromkeys(config.ARCHITECTURES.values(), _CUT)
"""Not yet measured on a GPU."""


@triton.jit
def _mixed(first, second, weight, inside):
    """Between two frames; the operations of the plain twin."""
    x = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(second, mask=inside, other=0.0).to(tl.float32)
    return (1.0 - weight) * x + weight * y


@triton.jit
def _turned(x, y, z, a, b, c):
    """One coordinate of turned poses. The matrix is computed in double precision and rounded once."""
    return x * a.to(tl.float32) + y * b.to(tl.float32) + z * c.to(tl.float32)


@triton.jit
def _cut(
    Frames, Start, Length, Sine, Cosine, Out, ff, fv, fc, starts, lengths, window, span, joints, blocks,
    BI: tl.constexpr, BV: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """``BI`` frames of ``BV`` joints of one clip."""
    program = tl.program_id(0)
    body, frame = (program // blocks).to(tl.int64), program % blocks * BI + tl.arange(0, BI)
    joint = tl.program_id(1) * BV + tl.arange(0, BV)
    here = (frame < window)[:, None] & (joint < joints)[None, :]
    start = tl.load(Start + body * starts).to(tl.int64)
    length = tl.load(Length + body * lengths).to(tl.int64)
    unit = 2 * window
    source = tl.maximum((2 * frame + 1) * length - window, 0)
    low = tl.minimum(source // unit, length - 1)
    high = tl.minimum(low + 1, length - 1)
    weight = tl.minimum(tl.div_rn((source - low * unit).to(tl.float32), span), 1.0)[:, None]
    # An empty clip may point anywhere: it reads nothing. (The interpreter makes an integer of a lone truth value.)
    inside = here & (frame < tl.where(length > 0, window, 0))[:, None]
    column = joint.to(tl.int64)[None, :] * fv
    first = Frames + (start + low)[:, None] * ff + column
    second = Frames + (start + high)[:, None] * ff + column
    x = _mixed(first, second, weight, inside)
    y = _mixed(first + fc, second + fc, weight, inside)
    z = _mixed(first + fc + fc, second + fc + fc, weight, inside)  # twice the stride may not fit 32 bits
    if TURN:
        Sine += 3 * body
        Cosine += 3 * body
        sa, sb, sc = tl.load(Sine), tl.load(Sine + 1), tl.load(Sine + 2)
        ca, cb, cc = tl.load(Cosine), tl.load(Cosine + 1), tl.load(Cosine + 2)
        x, y, z = (
            _turned(x, y, z, cc * cb, sc * ca + cc * sb * sa, sc * sa - cc * sb * ca),
            _turned(x, y, z, -sc * cb, cc * ca - sc * sb * sa, cc * sa + sc * sb * ca),
            _turned(x, y, z, sb, -cb * sa, cb * ca),
        )
    at = Out + ((body * window + frame)[:, None] * joints + joint[None, :]) * 3
    tl.store(at, x.to(Out.dtype.element_ty), mask=here)
    tl.store(at + 1, y.to(Out.dtype.element_ty), mask=here)
    tl.store(at + 2, z.to(Out.dtype.element_ty), mask=here)


@config.on_device
def forward(frames: Tensor, start: Tensor, length: Tensor, angles: Tensor | None, window: int) -> Tensor:
    """``[B,window,V,3]``: see ``jmm_fast.ops.clip_window``."""
    bodies, joints = len(start), frames.shape[1]
    out = frames.new_empty(bodies, window, joints, 3)
    if not out.numel():
        return out
    rows, columns, warps = config.choose(CUT, frames)
    columns = min(columns, triton.next_power_of_2(joints))
    blocks = triton.cdiv(window, rows)
    turns = (frames, frames)
    if angles is not None:
        angles = angles.float().double()
        turns = (angles.sin().contiguous(), angles.cos().contiguous())
    _cut[(bodies * blocks, triton.cdiv(joints, columns))](
        frames, start, length, *turns, out, *frames.stride(), start.stride(0), length.stride(0),
        window, float(2 * window), joints, blocks,
        BI=rows, BV=columns, TURN=angles is not None, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return out
