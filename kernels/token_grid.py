"""Token grid for GPUs: gather visible patches from strided clips, put tokens back on the grid.

All four passes move memory and little else. Sums of gradients are made without atomics: a program adds the rows of a
group of bodies in the order of the bodies, and torch adds the groups in double precision, in a fixed order. A row that
goes back to its token is looked for by the token, so that one named twice gets both, whoever runs first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jmm_fast.kernels import config

# (bytes an element, width) at most -> sizes.
_PATCHES = {(4, config.ANY): (1024, 4)}
_SCATTER = {(4, 64): (32, 64, 8, 4), (4, config.ANY): (16, 128, 8, 4)}
_ROWS = {(4, 64): (16, 64, 64, 4), (4, config.ANY): (16, 256, 128, 8)}
_SUM = {(4, config.ANY): (32, 64, 32, 4)}
PATCHES, SCATTER, ROWS, SUM = (
    dict.fromkeys(config.ARCHITECTURES.values(), table) for table in (_PATCHES, _SCATTER, _ROWS, _SUM)
)
"""Numbers, warps; rows, columns, bodies, warps; rows, columns, places looked at together, warps; rows, columns, bodies,
warps. Not yet measured on a GPU."""


@triton.jit
def _next(Index, step, count, wanted, after, BLOCK: tl.constexpr):
    """The first place behind ``after`` where ``Index`` names each of ``wanted``; ``count`` where none does."""
    found = tl.zeros_like(wanted) + count
    for begin in range(0, count, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        index = tl.load(Index + place.to(tl.int64) * step, mask=place < count, other=-1).to(tl.int32)
        hit = (index[None, :] == wanted[:, None]) & (place[None, :] > after[:, None])
        found = tl.minimum(found, tl.min(tl.where(hit, place[None, :], count), 1))
    return found


@triton.jit
def _named(
    Grad, Index, step, count, wanted, row_stride, column_stride, column, inside,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of the rows of ``Grad`` at all places where ``Index`` names each of ``wanted``: ``[ROWS, COLUMNS]``."""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    place = _next(Index, step, count, wanted, tl.zeros_like(wanted) - 1, BLOCK)
    while tl.min(place) < count:
        at = Grad + place.to(tl.int64)[:, None] * row_stride + column[None, :] * column_stride
        total += tl.load(at, mask=(place < count)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        place = _next(Index, step, count, wanted, place, BLOCK)
    return total


@triton.jit
def _chunks(token, number, joints, frame_stride, joint_stride, channel_stride, U: tl.constexpr, C: tl.constexpr):
    """Where the numbers of tokens lie in a clip: ``[n]``, ``[NP]`` -> ``[n, NP]``."""
    corner = (token // joints).to(tl.int64) * U * frame_stride + (token % joints).to(tl.int64) * joint_stride
    inner = (number // C).to(tl.int64) * frame_stride + (number % C).to(tl.int64) * channel_stride
    return corner[:, None] + inner[None, :]


@triton.jit
def _gather(
    Clips, Visible, Out, cb, cf, cv, cc, vb, vk, kept, tokens, joints, blocks,
    U: tl.constexpr, C: tl.constexpr, NP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Patches of ``BK`` visible tokens of a body. A number outside the grid reads nothing."""
    program = tl.program_id(0)
    body, row = (program // blocks).to(tl.int64), program % blocks * BK + tl.arange(0, BK)
    number = tl.arange(0, NP)
    token = tl.load(Visible + body * vb + row.to(tl.int64) * vk, mask=row < kept, other=-1).to(tl.int32)
    known, inside = (token >= 0) & (token < tokens), number < U * C
    at = Clips + body * cb + _chunks(token, number, joints, cf, cv, cc, U, C)
    patch = tl.load(at, mask=known[:, None] & inside[None, :], other=0.0)
    place = Out + (body * kept + row)[:, None] * (U * C) + number[None, :]
    tl.store(place, patch, mask=(row < kept)[:, None] & inside[None, :])


@triton.jit
def _gather_backward(
    Grad, Visible, Out, gb, gk, gn, vb, vk, kept, tokens, joints, blocks,
    U: tl.constexpr, C: tl.constexpr, NP: tl.constexpr, BL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of ``BL`` tokens of a clip that lies dense."""
    program = tl.program_id(0)
    body, token = (program // blocks).to(tl.int64), program % blocks * BL + tl.arange(0, BL)
    number = tl.arange(0, NP)
    here, inside = token < tokens, number < U * C
    wanted = tl.where(here, token, -2)
    total = _named(Grad + body * gb, Visible + body * vb, vk, kept, wanted, gk, gn, number, inside, BL, NP, BLOCK)
    at = Out + body * tokens * (U * C) + _chunks(token, number, joints, joints * C, C, 1, U, C)
    tl.store(at, total.to(Out.dtype.element_ty), mask=here[:, None] & inside[None, :])


@triton.jit
def _scatter(
    Tokens, Restore, Mask, Joint, Time, Out, tb, tk, td, rb, rl, md, jv, jd, et, ed,
    bodies, kept, length, joints, width,
    BL: tl.constexpr, BD: tl.constexpr, BODIES: tl.constexpr,
):  # fmt: skip
    """``BL`` rows of the grid of ``BODIES`` bodies, whose embeddings are summed once."""
    row = tl.program_id(0) * BL + tl.arange(0, BL)
    begin = tl.program_id(1).to(tl.int64) * BODIES
    column = tl.program_id(2) * BD + tl.arange(0, BD)
    inside = column < width
    both = (row < length)[:, None] & inside[None, :]
    column = column.to(tl.int64)
    step, joint = (row // joints).to(tl.int64), (row % joints).to(tl.int64)
    embedding = tl.load(Time + step[:, None] * et + column[None, :] * ed, mask=both, other=0.0).to(tl.float32)
    embedding += tl.load(Joint + joint[:, None] * jv + column[None, :] * jd, mask=both, other=0.0).to(tl.float32)
    hidden = tl.load(Mask + column * md, mask=inside, other=0.0).to(tl.float32)
    for body in range(begin, tl.minimum(begin + BODIES, bodies)):
        place = tl.load(Restore + body * rb + row.to(tl.int64) * rl, mask=row < length, other=-1)
        seen = ((place >= 0) & (place < kept))[:, None]
        at = Tokens + body * tb + place[:, None] * tk + column[None, :] * td
        inner = tl.where(seen, tl.load(at, mask=seen & both, other=0.0).to(tl.float32), hidden[None, :])
        out = Out + (body * length + row)[:, None] * width + column[None, :]
        tl.store(out, (inner + embedding).to(Out.dtype.element_ty), mask=both)


@triton.jit
def _scatter_rows(
    Grad, Restore, Out, gb, gl, gd, rb, rl, kept, length, width, blocks,
    BK: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of ``BK`` tokens of a body."""
    program = tl.program_id(0)
    body, row = (program // blocks).to(tl.int64), program % blocks * BK + tl.arange(0, BK)
    column = tl.program_id(1).to(tl.int64) * BD + tl.arange(0, BD)
    inside = column < width
    wanted = tl.where(row < kept, row, -2)
    total = _named(Grad + body * gb, Restore + body * rb, rl, length, wanted, gl, gd, column, inside, BK, BD, BLOCK)
    at = Out + (body * kept + row)[:, None] * width + column[None, :]
    tl.store(at, total.to(Out.dtype.element_ty), mask=(row < kept)[:, None] & inside[None, :])


@triton.jit
def _scatter_sums(
    Grad, Restore, Rows, Hidden, gb, gl, gd, rb, rl, bodies, kept, joints, width, blocks,
    BV: tl.constexpr, BD: tl.constexpr, BODIES: tl.constexpr,
):  # fmt: skip
    """Rows of ``BV`` joints of a time step summed over ``BODIES`` bodies, and the sum of those of masked tokens."""
    program, group = tl.program_id(0), tl.program_id(1)
    step, joint = (program // blocks).to(tl.int64), program % blocks * BV + tl.arange(0, BV)
    column = tl.program_id(2).to(tl.int64) * BD + tl.arange(0, BD)
    here, inside = joint < joints, column < width
    both = here[:, None] & inside[None, :]
    token = step * joints + joint
    total = tl.zeros([BV, BD], tl.float32)
    hidden = tl.zeros([BV, BD], tl.float32)
    begin = group.to(tl.int64) * BODIES
    for body in range(begin, tl.minimum(begin + BODIES, bodies)):
        at = Grad + body * gb + token[:, None] * gl + column[None, :] * gd
        grad = tl.load(at, mask=both, other=0.0).to(tl.float32)
        place = tl.load(Restore + body * rb + token * rl, mask=here, other=0)
        total += grad
        hidden += tl.where((place >= kept)[:, None], grad, 0.0)
    steps = tl.num_programs(0) // blocks
    at = Rows + ((group * steps + step) * joints + joint)[:, None] * width + column[None, :]
    tl.store(at, total, mask=both)
    tl.store(
        Hidden + (group.to(tl.int64) * tl.num_programs(0) + program) * width + column, tl.sum(hidden, 0), mask=inside
    )


def _tile(x: Tensor, numbers: int) -> tuple[int, dict]:
    """Tokens in a tile for the device of ``x``, and how their numbers are padded."""
    size, warps = config.choose(PATCHES, x)
    padded = triton.next_power_of_2(numbers)
    return max(1, size // padded), {"NP": padded, "num_warps": warps, "enable_fp_fusion": False}


def gather_forward(clips: Tensor, visible: Tensor, t_patch: int) -> Tensor:
    """``[B,K,u*C]``: see ``jmm_fast.ops.token_grid_gather``."""
    bodies, frames, joints, channels = clips.shape
    kept = visible.shape[1]
    out = clips.new_empty(bodies, kept, t_patch * channels)
    if out.numel():
        rows, tile = _tile(clips, t_patch * channels)
        blocks = triton.cdiv(kept, rows)
        _gather[(bodies * blocks,)](
            clips, visible, out, *clips.stride(), *visible.stride(), kept, frames // t_patch * joints, joints, blocks,
            U=t_patch, C=channels, BK=rows, **tile,
        )  # fmt: skip
    return out


def gather_backward(grad: Tensor, visible: Tensor, t_patch: int, frames: int, joints: int, channels: int) -> Tensor:
    """Gradient of clips ``[B,T,V,C]``."""
    out = grad.new_empty(grad.shape[0], frames, joints, channels)
    if out.numel():
        rows, tile = _tile(grad, t_patch * channels)
        tokens = frames // t_patch * joints
        blocks = triton.cdiv(tokens, rows)
        _gather_backward[(len(out) * blocks,)](
            grad, visible, out, *grad.stride(), *visible.stride(), visible.shape[1], tokens, joints, blocks,
            U=t_patch, C=channels, BL=rows, BLOCK=32, **tile,
        )  # fmt: skip
    return out


def scatter_forward(tokens: Tensor, restore: Tensor, mask_token: Tensor, joint: Tensor, time: Tensor) -> Tensor:
    """``[B,L,d]``: see ``jmm_fast.ops.token_grid_scatter``."""
    bodies, kept, width = tokens.shape
    length = restore.shape[1]
    dtype = torch.promote_types(tokens.dtype, torch.promote_types(joint.dtype, time.dtype))
    out = tokens.new_empty(bodies, length, width, dtype=dtype)
    if out.numel():
        rows, columns, group, warps = config.choose(SCATTER, out)
        _scatter[(triton.cdiv(length, rows), triton.cdiv(bodies, group), triton.cdiv(width, columns))](
            tokens, restore, mask_token, joint, time, out,
            *tokens.stride(), *restore.stride(), *mask_token.stride(), *joint.stride(), *time.stride(),
            bodies, kept, length, len(joint), width,
            BL=rows, BD=columns, BODIES=group, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def scatter_backward(
    grad: Tensor, restore: Tensor, kept: int, joints: int, steps: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of tokens, in ``dtype``, and of mask token, joint and time embedding, in float32."""
    bodies, length, width = grad.shape
    tokens = grad.new_empty(bodies, kept, width, dtype=dtype)
    if tokens.numel():
        rows, columns, block, warps = config.choose(ROWS, grad)
        blocks = triton.cdiv(kept, rows)
        _scatter_rows[(bodies * blocks, triton.cdiv(width, columns))](
            grad, restore, tokens, *grad.stride(), *restore.stride(), kept, length, width, blocks,
            BK=rows, BD=columns, BLOCK=block, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    rows, columns, group, warps = config.choose(SUM, grad)
    groups, blocks = triton.cdiv(bodies, group), triton.cdiv(joints, rows)
    sums = grad.new_empty(groups, steps, joints, width, dtype=torch.float32)
    hidden = grad.new_empty(groups, steps, blocks, width, dtype=torch.float32)
    if sums.numel():
        _scatter_sums[(steps * blocks, groups, triton.cdiv(width, columns))](
            grad, restore, sums, hidden, *grad.stride(), *restore.stride(), bodies, kept, joints, width, blocks,
            BV=rows, BD=columns, BODIES=group, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return tokens, *(
        part.sum(over, dtype=torch.float64).float()
        for part, over in ((hidden, (0, 1, 2)), (sums, (0, 1)), (sums, (0, 2)))
    )
