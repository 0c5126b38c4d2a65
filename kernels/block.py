"""What stands around the matrix products of a transformer block on a GPU: residual, LayerNorm, bias, GELU and sums.

The residual stream is float32; what a product reads is in the products' dtype. A row's residual, bias and LayerNorm
are one pass, and so are their gradients: the pass that makes the stream's gradient also rounds it for the product that
reads it next. Sums over rows (gradients of biases and of LayerNorm) are made in registers over a fixed span of rows,
written as one partial row a program, and added by torch in double precision: no atomics, the same bits from run to run.

The MLP has two forms: products by cuBLAS with bias and GELU between them, and one kernel whose hidden layer stays on
the chip. ``FUSED`` says which runs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jmm_fast.kernels import config

ANY = config.ANY

# (bytes an element, width) at most -> sizes.
_NORM = {(4, ANY): (1024, 4)}
_NORM_BACKWARD = {(4, ANY): (1024, 8, 4)}
_GELU = {(4, ANY): (32, 128, 4)}
_GELU_BACKWARD = {(4, ANY): (16, 128, 8, 4)}
_COLUMNS = {(4, ANY): (32, 128, 8, 4)}
NORM, NORM_BACKWARD, GELU, GELU_BACKWARD, COLUMNS = (
    dict.fromkeys(config.ARCHITECTURES.values(), table)
    for table in (_NORM, _NORM_BACKWARD, _GELU, _GELU_BACKWARD, _COLUMNS)
)
NORM_BACKWARD["sm_100"] = {(4, ANY): (1024, 8, 8)}
"""Numbers in a tile of whole rows, warps; the same with the tiles of a program between; rows, columns, warps; rows,
columns, tiles of a program, warps (twice). Not yet measured on a GPU."""

# (bytes an element, width, hidden) at most -> whether the fused kernels run.
_FUSED = {(4, ANY, ANY): (False,)}
FUSED = dict.fromkeys(config.ARCHITECTURES.values(), _FUSED)
"""Products by cuBLAS until the fused kernels are measured to be faster on an architecture."""

# (bytes an element, width) at most -> rows, hidden columns, warps, stages; and of weights, spans of rows before them.
_MLP = {(2, 256): (128, 32, 8, 2), (4, 128): (16, 16, 4, 1), (4, 256): (16, 16, 16, 1)}
_MLP_INPUT = {(2, 256): (128, 32, 8, 2), (4, 128): (16, 16, 8, 1), (4, 256): (16, 16, 8, 1)}
_MLP_WEIGHTS = {(2, 256): (32, 32, 16, 8, 1), (4, 256): (16, 16, 16, 8, 1)}
MLP, MLP_INPUT, MLP_WEIGHTS = (
    dict.fromkeys(config.ARCHITECTURES.values(), table) for table in (_MLP, _MLP_INPUT, _MLP_WEIGHTS)
)
MLP["sm_80"] = _MLP | {(2, 256): (64, 64, 8, 2)}
MLP_INPUT["sm_80"] = _MLP_INPUT | {(2, 256): (64, 64, 8, 2)}
MLP_WEIGHTS["sm_100"] = _MLP_WEIGHTS | {(2, 256): (32, 64, 16, 8, 1)}
"""Sizes that compile without spills on each architecture; not yet measured on a GPU."""

MOST_FUSED = 256
"""Widest rows that the fused MLP takes: a tile of them stays on the chip."""


@triton.jit
def _gelu(x):
    """``x cdf(x)``, exact, and the ``cdf``."""
    cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return x * cdf, cdf


@triton.jit
def _slope(x, cdf):
    """Derivative of GELU."""
    return cdf + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))


@triton.jit
def _add_norm(
    X, Branch, Bias, Factor, Rows, Weight, Shift, Y, Out, Stat, rows, total, tokens, width, eps,
    BR: tl.constexpr, DP: tl.constexpr, BRANCH: tl.constexpr, BIAS: tl.constexpr, FACTOR: tl.constexpr,
    ROWS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """``BR`` rows of the stream with what is added to them, and of their LayerNorm."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.arange(0, DP)
    here, inside = row < rows, column < width
    source = row
    known = here
    if ROWS:
        source = tl.load(Rows + row, mask=here, other=0)
        known = here & (source >= 0) & (source < total)
    both = known[:, None] & inside[None, :]
    at = source[:, None] * width + column[None, :]
    y = tl.load(X + at, mask=both, other=0.0)
    if BRANCH:
        branch = tl.load(Branch + at, mask=both, other=0.0).to(tl.float32)
        if BIAS:
            branch += tl.load(Bias + column, mask=inside, other=0.0)[None, :]
        if FACTOR:
            branch *= tl.load(Factor + source // tokens, mask=known, other=0.0)[:, None]
        y = tl.where(known[:, None], y + branch, 0.0)
    at = row[:, None] * width + column[None, :]
    both = here[:, None] & inside[None, :]
    if BRANCH or ROWS:
        tl.store(Y + at, y, mask=both)
    if NORM:
        mean = tl.sum(tl.where(inside[None, :], y, 0.0), 1) / width
        centred = tl.where(inside[None, :], y - mean[:, None], 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / width + eps)
        weight = tl.load(Weight + column, mask=inside, other=0.0)
        shift = tl.load(Shift + column, mask=inside, other=0.0)
        out = centred * scale[:, None] * weight[None, :] + shift[None, :]
        tl.store(Out + at, out.to(Out.dtype.element_ty), mask=both)
        tl.store(Stat + row, mean, mask=here)
        tl.store(Stat + rows + row, scale, mask=here)


@triton.jit
def _add_norm_backward(
    Grad, Stream, Y, Stat, Factor, Place, Weight, Dx, Dbranch, Partial, rows, total, tokens, width,
    BR: tl.constexpr, TILES: tl.constexpr, DP: tl.constexpr, BRANCH: tl.constexpr, FACTOR: tl.constexpr,
    PLACE: tl.constexpr, NORM: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """Gradients of ``TILES`` times ``BR`` rows, and their part of the sums: LayerNorm's weight and bias, the bias."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, DP)
    inside = column < width
    dweight = tl.zeros([BR, DP], tl.float32)
    dshift = tl.zeros([BR, DP], tl.float32)
    dbias = tl.zeros([BR, DP], tl.float32)
    if NORM:
        weight = tl.load(Weight + column, mask=inside, other=0.0)
    for tile in range(TILES):
        row = (program * TILES + tile) * BR + tl.arange(0, BR)
        here = row < total
        place = row
        known = here
        if PLACE:
            place = tl.load(Place + row, mask=here, other=-1)
            known = here & (place >= 0)
        both = known[:, None] & inside[None, :]
        at = place[:, None] * width + column[None, :]
        dx = tl.zeros([BR, DP], tl.float32)
        if NORM:
            grad = tl.load(Grad + at, mask=both, other=0.0).to(tl.float32)
            y = tl.load(Y + at, mask=both, other=0.0)
            mean = tl.load(Stat + place, mask=known, other=0.0)
            scale = tl.load(Stat + rows + place, mask=known, other=0.0)
            normed = tl.where(both, (y - mean[:, None]) * scale[:, None], 0.0)
            dweight += grad * normed
            dshift += grad
            grad *= weight[None, :]
            constant, slope = tl.sum(grad, 1) / width, tl.sum(grad * normed, 1) / width
            dx += (grad - constant[:, None] - normed * slope[:, None]) * scale[:, None]
        if STREAM:
            dx += tl.load(Stream + at, mask=both, other=0.0)
        at = row[:, None] * width + column[None, :]
        both = here[:, None] & inside[None, :]
        tl.store(Dx + at, dx, mask=both)
        if BRANCH:
            if FACTOR:
                dx *= tl.load(Factor + row // tokens, mask=here, other=0.0)[:, None]
            tl.store(Dbranch + at, dx.to(Dbranch.dtype.element_ty), mask=both)
            dbias += tl.where(both, dx, 0.0)
    part = Partial + program * 3 * width + column
    tl.store(part, tl.sum(dweight, 0), mask=inside)
    tl.store(part + width, tl.sum(dshift, 0), mask=inside)
    tl.store(part + 2 * width, tl.sum(dbias, 0), mask=inside)


@triton.jit
def _bias_gelu(X, Bias, Out, rows, width, BR: tl.constexpr, BC: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = column < width
    both = (row < rows)[:, None] & inside[None, :]
    at = row[:, None] * width + column[None, :]
    x = tl.load(X + at, mask=both, other=0.0).to(tl.float32)
    x += tl.load(Bias + column, mask=inside, other=0.0)[None, :]
    out, _ = _gelu(x)
    tl.store(Out + at, out.to(Out.dtype.element_ty), mask=both)


@triton.jit
def _bias_gelu_backward(
    Grad, X, Bias, Dx, Out, Partial, rows, width, BR: tl.constexpr, BC: tl.constexpr, TILES: tl.constexpr
):
    """Gradient before GELU, GELU's result once more for the next weight's gradient, and a part of the bias's."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = column < width
    bias = tl.load(Bias + column, mask=inside, other=0.0)
    total = tl.zeros([BR, BC], tl.float32)
    for tile in range(TILES):
        row = (program * TILES + tile) * BR + tl.arange(0, BR)
        both = (row < rows)[:, None] & inside[None, :]
        at = row[:, None] * width + column[None, :]
        x = tl.load(X + at, mask=both, other=0.0).to(tl.float32) + bias[None, :]
        out, cdf = _gelu(x)
        dx = tl.load(Grad + at, mask=both, other=0.0).to(tl.float32) * _slope(x, cdf)
        tl.store(Dx + at, dx.to(Dx.dtype.element_ty), mask=both)
        tl.store(Out + at, out.to(Out.dtype.element_ty), mask=both)
        total += dx
    tl.store(Partial + program * width + column, tl.sum(total, 0), mask=inside)


@triton.jit
def _column_sums(X, Partial, rows, width, BR: tl.constexpr, BC: tl.constexpr, TILES: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = column < width
    total = tl.zeros([BR, BC], tl.float32)
    for tile in range(TILES):
        row = (program * TILES + tile) * BR + tl.arange(0, BR)
        at = row[:, None] * width + column[None, :]
        total += tl.load(X + at, mask=(row < rows)[:, None] & inside[None, :], other=0.0).to(tl.float32)
    tl.store(Partial + program * width + column, tl.sum(total, 0), mask=inside)


@triton.jit
def _tile(X, row, column, rows, columns, stride, DOT: tl.constexpr):
    """Rows and columns of a matrix as an operand, zero outside it."""
    both = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(X + row[:, None] * stride + column[None, :], mask=both, other=0.0).to(DOT)


@triton.jit
def _hidden(n, W1, Bias, unit, column, width, hidden, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Some hidden units before GELU, float32, and their rows of the first weight."""
    first = _tile(W1, unit, column, hidden, width, width, DOT)
    bias = tl.load(Bias + unit, mask=unit < hidden, other=0.0)
    return tl.dot(n, tl.trans(first), input_precision=PRECISION) + bias[None, :], first


@triton.jit
def _mlp(
    N, W1, Bias, W2, Out, rows, width, hidden,
    BR: tl.constexpr, BH: tl.constexpr, DP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``W2 GELU(W1 n + bias)`` of ``BR`` rows, hidden units by blocks of ``BH``."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.arange(0, DP)
    n = _tile(N, row, column, rows, width, width, DOT)
    acc = tl.zeros([BR, DP], tl.float32)
    for begin in range(0, hidden, BH):
        unit = begin + tl.arange(0, BH)
        h, _ = _hidden(n, W1, Bias, unit, column, width, hidden, DOT, PRECISION)
        a, _ = _gelu(h)
        second = _tile(W2, column, unit, width, hidden, hidden, DOT)
        acc = tl.dot(a.to(DOT), tl.trans(second), acc=acc, input_precision=PRECISION)
    both = (row < rows)[:, None] & (column < width)[None, :]
    tl.store(Out + row[:, None] * width + column[None, :], acc.to(Out.dtype.element_ty), mask=both)


@triton.jit
def _by_depth(
    X, Weight, row, unit, rows, hidden, width, unit_stride, column_stride,
    BR: tl.constexpr, BH: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows times units by pieces of the depth: products of floats hold whole operands in registers."""
    PIECE: tl.constexpr = 64 if DP > 64 else DP
    acc = tl.zeros([BR, BH], tl.float32)
    for begin in range(0, width, PIECE):
        column = begin + tl.arange(0, PIECE)
        x = _tile(X, row, column, rows, width, width, tl.float32)
        inside = (unit < hidden)[:, None] & (column < width)[None, :]
        at = Weight + unit[:, None] * unit_stride + column[None, :] * column_stride
        weight = tl.load(at, mask=inside, other=0.0)
        acc = tl.dot(x, tl.trans(weight), acc=acc, input_precision=PRECISION)
    return acc


@triton.jit
def _mlp_input(
    Grad, N, W1, Bias, W2, Out, rows, width, hidden,
    BR: tl.constexpr, BH: tl.constexpr, DP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Gradient of ``BR`` rows of ``n``; the hidden layer is made again."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.arange(0, DP)
    if not EXACT:
        n = _tile(N, row, column, rows, width, width, DOT)
        grad = _tile(Grad, row, column, rows, width, width, DOT)
    acc = tl.zeros([BR, DP], tl.float32)
    for begin in range(0, hidden, BH):
        unit = begin + tl.arange(0, BH)
        if EXACT:
            first = _tile(W1, unit, column, hidden, width, width, DOT)
            h = _by_depth(N, W1, row, unit, rows, hidden, width, width, 1, BR, BH, DP, PRECISION)
            h += tl.load(Bias + unit, mask=unit < hidden, other=0.0)[None, :]
            dh = _by_depth(Grad, W2, row, unit, rows, hidden, width, 1, hidden, BR, BH, DP, PRECISION)
        else:
            h, first = _hidden(n, W1, Bias, unit, column, width, hidden, DOT, PRECISION)
            dh = tl.dot(grad, _tile(W2, column, unit, width, hidden, hidden, DOT), input_precision=PRECISION)
        _, cdf = _gelu(h)
        dh *= _slope(h, cdf)
        acc = tl.dot(dh.to(DOT), first, acc=acc, input_precision=PRECISION)
    both = (row < rows)[:, None] & (column < width)[None, :]
    tl.store(Out + row[:, None] * width + column[None, :], acc.to(Out.dtype.element_ty), mask=both)


@triton.jit
def _mlp_weights(
    Grad, N, W1, Bias, W2, First, Second, Sums, rows, width, hidden, span,
    BR: tl.constexpr, BH: tl.constexpr, DP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Parts of the weights' gradients: ``BH`` hidden units, summed over a span of rows."""
    group = tl.program_id(1).to(tl.int64)
    unit = tl.program_id(0) * BH + tl.arange(0, BH)
    column = tl.arange(0, DP)
    first = _tile(W1, unit, column, hidden, width, width, DOT)
    second = _tile(W2, column, unit, width, hidden, hidden, DOT)
    bias = tl.load(Bias + unit, mask=unit < hidden, other=0.0)
    dfirst = tl.zeros([BH, DP], tl.float32)
    dsecond = tl.zeros([BH, DP], tl.float32)
    dbias = tl.zeros([BH], tl.float32)
    for begin in range(group * span, tl.minimum((group + 1) * span, rows), BR):
        row = begin + tl.arange(0, BR)
        n = _tile(N, row, column, rows, width, width, DOT)
        grad = _tile(Grad, row, column, rows, width, width, DOT)
        h = tl.dot(n, tl.trans(first), input_precision=PRECISION) + bias[None, :]
        a, cdf = _gelu(h)
        dh = tl.dot(grad, second, input_precision=PRECISION) * _slope(h, cdf)
        dsecond = tl.dot(tl.trans(a.to(DOT)), grad, acc=dsecond, input_precision=PRECISION)
        dfirst = tl.dot(tl.trans(dh.to(DOT)), n, acc=dfirst, input_precision=PRECISION)
        dbias += tl.sum(dh, 0)
    inside = unit < hidden
    both = inside[:, None] & (column < width)[None, :]
    at = (group * hidden + unit)[:, None] * width + column[None, :]
    tl.store(First + at, dfirst, mask=both)
    tl.store(Second + at, dsecond, mask=both)
    tl.store(Sums + group * hidden + unit, dbias, mask=inside)


@config.on_device
def add_norm(
    x: Tensor,
    branch: Tensor | None,
    bias: Tensor | None,
    factor: Tensor | None,
    rows: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Stream, its LayerNorm in ``dtype`` and statistics: see ``jmm_fast.ops.block``. Without branch and rows the stream
    is empty, as it is ``x``; without weight the other two are."""
    bodies, tokens, width = x.shape
    total = bodies * tokens
    kept = tokens if rows is None else len(rows) // bodies
    moved, norm = branch is not None or rows is not None, weight is not None
    y = x.new_empty((bodies, kept, width) if moved else (0,))
    out = x.new_empty((bodies, kept, width) if norm else (0,), dtype=dtype)
    statistics = x.new_empty((2, bodies * kept) if norm else (0,))
    if kept * bodies:
        numbers, warps = config.choose(NORM, x)
        sizes = _whole_rows(numbers, width)
        x = x.contiguous()
        held = {"BRANCH": branch, "BIAS": bias, "FACTOR": factor, "ROWS": rows}
        _add_norm[(triton.cdiv(bodies * kept, sizes["BR"]),)](
            x, *(_dense(given, x) for given in (*held.values(), weight, shift)), y, out, statistics,
            bodies * kept, total, tokens, width, eps, **sizes,
            **{name: given is not None for name, given in held.items()}, NORM=norm,
            num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return y, out, statistics


@config.on_device
def add_norm_backward(
    grad: Tensor | None,
    stream: Tensor | None,
    y: Tensor | None,
    statistics: Tensor | None,
    factor: Tensor | None,
    rows: Tensor | None,
    weight: Tensor | None,
    tokens: int,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the stream before, ``[B,tokens,d]``, and of the branch in its dtype (empty when it is None); and
    ``[3,d]``: those of LayerNorm's weight and bias and of the branch's bias. ``grad`` is that of LayerNorm's result,
    ``stream`` that of the stream behind; one of them may be missing."""
    like = stream if grad is None else grad
    bodies, _, width = like.shape
    total = bodies * tokens
    dx = like.new_empty(bodies, tokens, width, dtype=torch.float32)
    branch = branch_dtype is not None
    dbranch = like.new_empty((bodies, tokens, width) if branch else (0,), dtype=branch_dtype)
    numbers, tiles, warps = config.choose(NORM_BACKWARD, dx)
    sizes = _whole_rows(numbers, width)
    programs = triton.cdiv(total, sizes["BR"] * tiles)
    partial = dx.new_empty(programs, 3, width)
    if total:
        place = None
        if rows is not None:
            place = torch.full((total,), -1, dtype=torch.int64, device=rows.device)
            place.scatter_(0, rows, torch.arange(len(rows), device=rows.device))
        inputs = (_dense(given, dx) for given in (grad, stream, y, statistics, factor, place, weight))
        _add_norm_backward[(programs,)](
            *inputs, dx, dbranch, partial, total if rows is None else len(rows), total, tokens, width,
            **sizes, TILES=tiles, BRANCH=branch, FACTOR=factor is not None, PLACE=place is not None,
            NORM=grad is not None, STREAM=stream is not None, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return dx, dbranch, _total(partial)


@config.on_device
def mlp(n: Tensor, weight1: Tensor, bias: Tensor, weight2: Tensor) -> tuple[Tensor, Tensor]:
    """``weight2 GELU(weight1 n + bias)`` of ``n [R,d]``, weights in its dtype; and ``weight1 n``, empty where the fused
    kernel runs."""
    if fused(n, len(weight1)):
        return mlp_fused(n, weight1, bias, weight2), n.new_empty(0)
    hidden = torch.mm(n, weight1.t())
    return torch.mm(bias_gelu(hidden, bias), weight2.t()), hidden


@config.on_device
def mlp_backward(
    grad: Tensor, n: Tensor, weight1: Tensor, bias: Tensor, weight2: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``n``, in its dtype, and of ``weight1``, ``bias`` and ``weight2``, float32."""
    if fused(n, len(weight1)):
        return mlp_fused_backward(grad, n, weight1, bias, weight2)
    dhidden, activated, dbias = bias_gelu_backward(torch.mm(grad, weight2), hidden, bias)
    return torch.mm(dhidden, weight1), _product(dhidden.t(), n), dbias, _product(grad.t(), activated)


@config.on_device
def linear_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x [R,d]``, in its dtype, and of weight and bias (empty without), float32."""
    sums = column_sums(grad) if bias else grad.new_empty(0, dtype=torch.float32)
    return torch.mm(grad, weight), _product(grad.t(), x), sums


@config.on_device
def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """``GELU(x + bias)`` of ``x [R,h]``, in its dtype."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if out.numel():
        rows, columns, warps = config.choose(GELU, x)
        _bias_gelu[(triton.cdiv(len(x), rows), triton.cdiv(x.shape[1], columns))](
            x, bias.contiguous(), out, *x.shape, BR=rows, BC=columns, num_warps=warps, enable_fp_fusion=True
        )
    return out


@config.on_device
def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of ``x [R,h]``, ``GELU(x + bias)`` once more, and the gradient of ``bias``."""
    x = x.contiguous()
    dx, out = torch.empty_like(x), torch.empty_like(x)
    partial, sizes = _spans(GELU_BACKWARD, x)
    if x.numel():
        _bias_gelu_backward[(len(partial), triton.cdiv(x.shape[1], sizes["BC"]))](
            grad.contiguous(), x, bias.contiguous(), dx, out, partial, *x.shape, **sizes
        )
    return dx, out, _total(partial)


@config.on_device
def column_sums(x: Tensor) -> Tensor:
    """Sum of the rows of ``x [R,h]``, float32."""
    x = x.contiguous()
    partial, sizes = _spans(COLUMNS, x)
    if x.numel():
        _column_sums[(len(partial), triton.cdiv(x.shape[1], sizes["BC"]))](x, partial, *x.shape, **sizes)
    return _total(partial)


@config.on_device
def mlp_fused(n: Tensor, weight1: Tensor, bias: Tensor, weight2: Tensor) -> Tensor:
    """``weight2 GELU(weight1 n + bias)`` of ``n [R,d]``; weights in its dtype."""
    n, weight1, bias, weight2 = (x.contiguous() for x in (n, weight1, bias, weight2))
    out = torch.empty_like(n)
    if out.numel():
        rows, units, warps, stages = config.choose(MLP, n)
        _mlp[(triton.cdiv(len(n), rows),)](
            n, weight1, bias, weight2, out, *n.shape, len(weight1),
            BR=rows, BH=units, **_operands(n), num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out


@config.on_device
def mlp_fused_backward(
    grad: Tensor, n: Tensor, weight1: Tensor, bias: Tensor, weight2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``n``, in its dtype, and of ``weight1``, ``bias`` and ``weight2``, float32."""
    grad, n, weight1, bias, weight2 = (x.contiguous() for x in (grad, n, weight1, bias, weight2))
    count, width = n.shape
    hidden = len(weight1)
    dn = torch.empty_like(n)
    rows, units, warps, stages = config.choose(MLP_INPUT, n)
    if dn.numel():
        _mlp_input[(triton.cdiv(count, rows),)](
            grad, n, weight1, bias, weight2, dn, count, width, hidden,
            BR=rows, BH=units, **_operands(n), EXACT=n.dtype == torch.float32, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    rows, units, spans, warps, stages = config.choose(MLP_WEIGHTS, n)
    span = triton.cdiv(triton.cdiv(count, spans), rows) * rows
    groups = triton.cdiv(count, span) if count else 0
    first, second = (n.new_empty(groups, hidden, width, dtype=torch.float32) for _ in range(2))
    sums = n.new_empty(groups, hidden, dtype=torch.float32)
    if groups:
        _mlp_weights[(triton.cdiv(hidden, units), groups)](
            grad, n, weight1, bias, weight2, first, second, sums, count, width, hidden, span,
            BR=rows, BH=units, **_operands(n), num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return dn, first.sum(0), _total(sums), second.sum(0).t().contiguous()


def fused(n: Tensor, hidden: int) -> bool:
    """Whether the fused MLP runs for rows like ``n [R,d]``."""
    return n.shape[-1] <= MOST_FUSED and config.choose(FUSED, n, hidden)[0]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Float32 result of a product, also of short operands."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _dense(given: Tensor | None, other: Tensor) -> Tensor:
    """As the kernels read it; ``other`` stands for what is not there and not looked at."""
    return other if given is None else given.contiguous()


def _whole_rows(numbers: int, width: int) -> dict:
    padded = triton.next_power_of_2(width)
    return {"BR": max(1, numbers // padded), "DP": padded}


def _spans(table: dict, x: Tensor) -> tuple[Tensor, dict]:
    """Room for a partial row of each program, and the sizes of its tiles."""
    rows, columns, tiles, warps = config.choose(table, x)
    partial = x.new_empty(triton.cdiv(len(x), rows * tiles), x.shape[1], dtype=torch.float32)
    return partial, {"BR": rows, "BC": columns, "TILES": tiles, "num_warps": warps, "enable_fp_fusion": True}


def _total(partial: Tensor) -> Tensor:
    return partial.sum(0, dtype=torch.float64).float()


def _operands(n: Tensor) -> dict:
    return {
        "DP": max(16, triton.next_power_of_2(n.shape[1])),
        "DOT": config.dot_dtype(n.dtype),
        "PRECISION": "ieee",
        "enable_fp_fusion": True,
    }
