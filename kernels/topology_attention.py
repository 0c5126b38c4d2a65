"""Topology attention for GPUs: flash attention whose scores carry a term for the joints of query and key.

The term of a score is ``rows_i . onehot(joint(j))`` with ``rows_i = table[h, joint(i), :]``, so it is one more matrix
product over ``V`` padded columns: no gather per score, and its gradient is the same product transposed. Where operands
are 16 bits wide, rows go in as a high and a low half, which keeps 16 (bfloat16) or 22 (float16) bits of the table.

Scores, softmax statistics and all sums are float32. Statistics are the row's maximum and the sum of its
weights, kept apart: their logarithm would round away what large scores differ by. The table's gradient is summed in
registers over the keys of a block of queries, folded onto joints and written as one partial table a block; torch sums
the partial tables in a fixed order. No atomics: the same bits from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jmm_fast.kernels import config

LOG2E = tl.constexpr(1.4426950408889634)

ANY = config.ANY

REACH = 1 << 31
"""Places within a body and head are 32-bit numbers of elements in the kernels, bodies and heads 64-bit ones."""

# (bytes an element, D, N), each at most -> block of queries, block of keys, warps, stages.
_FORWARD = {
    (2, 64, 128): (64, 32, 4, 3),
    (2, 64, ANY): (128, 64, 8, 3),
    (2, 128, ANY): (64, 64, 8, 2),
    (4, 32, ANY): (32, 32, 4, 1),
    (4, 64, ANY): (16, 32, 4, 1),
    (4, 128, ANY): (16, 16, 4, 1),
}
_QUERIES = {
    (2, 64, ANY): (64, 64, 4, 2),
    (2, 128, ANY): (32, 32, 8, 1),
    (4, 32, ANY): (32, 32, 8, 1),
    (4, 64, ANY): (16, 32, 8, 1),
    (4, 128, ANY): (16, 16, 8, 1),
}
_KEYS = {
    (2, 64, 128): (32, 64, 4, 2),
    (2, 64, ANY): (64, 64, 4, 2),
    (2, 128, ANY): (32, 32, 8, 1),
    (4, 64, ANY): (16, 32, 8, 1),
    (4, 128, ANY): (16, 16, 8, 1),
}
FORWARD, QUERIES, KEYS = (dict.fromkeys(config.ARCHITECTURES.values(), table) for table in (_FORWARD, _QUERIES, _KEYS))
FORWARD["sm_100"] = _FORWARD | {(2, 128, ANY): (64, 32, 8, 2), (4, 128, ANY): (16, 16, 8, 1)}
QUERIES["sm_80"] = {(2, 32, ANY): (64, 32, 4, 2)} | _QUERIES | {(2, 64, ANY): (64, 32, 8, 2)}
QUERIES["sm_100"] = _QUERIES | {(2, 64, ANY): (64, 32, 8, 2)}
KEYS["sm_80"] = {(2, 32, ANY): (32, 64, 4, 2)} | _KEYS | {(2, 64, ANY): (32, 64, 4, 1)}
KEYS["sm_100"] = _KEYS | {(2, 64, 128): (32, 32, 4, 1), (2, 64, ANY): (64, 64, 8, 2)}
"""Sizes that compile without spills on each architecture, by Triton 3.6 to 3.9, of which on 8.0 and 9.0 no two warps
compute the same scores where operands are 16 bits wide and the head at most 32; not yet measured on a GPU."""


@triton.jit
def _halves(x, DOT: tl.constexpr):
    """``x`` as two operands whose sum keeps about twice the bits of one."""
    high = x.to(DOT)
    return high, (x - high.to(tl.float32)).to(DOT)


@triton.jit
def _onehot(joint, VP: tl.constexpr, DOT: tl.constexpr):
    """``[n]`` joints -> ``[VP, n]``, 1 where the row is the joint."""
    return (tl.arange(0, VP)[:, None] == joint[None, :]).to(DOT)


@triton.jit
def _terms(Table, joint, step, across, V, scale, VP: tl.constexpr, DOT: tl.constexpr, DIVIDE: tl.constexpr):
    """Table rows of some tokens (columns, if steps are so), ``[n, VP]`` in two halves, zero in the padding; a joint of
    -1 gives zeros."""
    other = tl.arange(0, VP)
    inside = (joint[:, None] >= 0) & (other[None, :] < V)
    x = tl.load(Table + joint[:, None] * step + other[None, :] * across, mask=inside, other=0.0)
    if DIVIDE:
        x /= scale
    return _halves(x, DOT)


@triton.jit
def _tile(X, row, length, row_step, step, D: tl.constexpr, DP: tl.constexpr, TAIL: tl.constexpr):
    """Rows of a body and head, ``[n, DP]``, zero in the padding. TAIL: some may be behind the last one: zeros."""
    dim = tl.arange(0, DP)
    at = X + row[:, None] * row_step + dim[None, :] * step
    if TAIL:
        return tl.load(at, mask=(row < length)[:, None] & (dim < D)[None, :], other=0.0)
    elif D < DP:
        return tl.load(at, mask=(dim < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _joints(Joints, token, length, TAIL: tl.constexpr):
    """Joints of tokens; -1 behind the last one."""
    if TAIL:
        return tl.load(Joints + token, mask=token < length, other=-1)
    else:
        return tl.load(Joints + token)


@triton.jit
def _scores(
    product, high, low, other, scale,
    TERM: tl.constexpr, EXACT: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores from products, without the factor ``scale`` where it is folded; and terms that are multiplied by."""
    s = product
    term = product
    if TERM == 1 and FOLD:
        s = tl.dot(high, other, acc=s, input_precision=PRECISION)
        s = tl.dot(low, other, acc=s, input_precision=PRECISION)
    elif TERM > 0:
        term = tl.dot(high, other, input_precision=PRECISION)
        if not EXACT:
            term = tl.dot(low, other, acc=term, input_precision=PRECISION)
    if not FOLD:
        s *= scale
        if TERM == 1:
            s += term
    if TERM == 2:
        s *= term
    return s, term


@triton.jit
def _factor(scale, FOLD: tl.constexpr):
    """What differences of scores are multiplied by to be exponents of 2."""
    if FOLD:
        return scale * LOG2E
    else:
        return LOG2E


@triton.jit
def _exponential(s, most, factor, EXACT: tl.constexpr):
    """``e^(score - largest score)``. Large scores differ exactly where they are near; without that, one instruction
    less."""
    if EXACT:
        return tl.exp2((s - most) * factor)
    else:
        return tl.exp2(s * factor - most * factor)


@triton.jit
def _further(
    q, high, low, acc, most, total, K, Vv, Joints, kn, kd, vn, vd, begin, N, scale,
    D: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr, BN: tl.constexpr, TERM: tl.constexpr, DOT: tl.constexpr,
    EXACT: tl.constexpr, FOLD: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Result, largest score and sum of weights with the keys from ``begin`` on."""
    column = begin + tl.arange(0, BN)
    factor = _factor(scale, FOLD)
    if TAIL:
        dim = tl.arange(0, DP)
        inside = (dim < D)[:, None] & (column < N)[None, :]
        k = tl.load(K + column[None, :] * kn + dim[:, None] * kd, mask=inside, other=0.0).to(DOT)
    else:
        k = tl.trans(_tile(K, column, N, kn, kd, D, DP, TAIL).to(DOT))
    other = k
    if TERM > 0:
        other = _onehot(_joints(Joints, column, N, TAIL), VP, DOT)
    product = tl.dot(q, k, input_precision=PRECISION)
    s, _ = _scores(product, high, low, other, scale, TERM, EXACT, FOLD, PRECISION)
    if TAIL:
        s = tl.where((column < N)[None, :], s, float("-inf"))
    raised = tl.maximum(most, tl.max(s, 1))
    shrink = tl.exp2((most - raised) * factor)
    p = _exponential(s, raised[:, None], factor, EXACT)
    v = _tile(Vv, column, N, vn, vd, D, DP, TAIL).to(DOT)
    acc = tl.dot(p.to(DOT), v, acc=acc * shrink[:, None], input_precision=PRECISION)
    return acc, raised, total * shrink + tl.sum(p, 1)


@triton.jit
def _forward(
    Q, K, Vv, Table, Joints, Out, Stat,
    qb, qh, qn, qd, kb, kh, kn, kd, vb, vh, vn, vd, ob, oh, on, jb,
    H, N, V, scale, blocks, tasks,
    D: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TERM: tl.constexpr,
    DOT: tl.constexpr, EXACT: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of ``BM`` queries of one body and head. TERM: 0 none, 1 added, 2 multiplied."""
    program = tl.program_id(0)
    block, task = program % blocks, (program // blocks).to(tl.int64)
    body, head = task // H, task % H
    row = block * BM + tl.arange(0, BM)
    dim = tl.arange(0, DP)
    here, inner = row < N, dim < D
    K += body * kb + head * kh
    Vv += body * vb + head * vh
    q = _tile(Q + body * qb + head * qh, row, N, qn, qd, D, DP, True).to(DOT)
    high, low = q, q
    if TERM > 0:
        Joints += body * jb
        high, low = _terms(
            Table + head * V * V, _joints(Joints, row, N, True), V, 1, V, scale, VP, DOT, FOLD and TERM == 1
        )
    most = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    # Whole blocks of keys need no masks. A second copy of the code, which takes more registers.
    whole = 0
    if not EXACT and DP <= 64:
        whole = N // BN * BN
    for begin in range(0, whole, BN):
        acc, most, total = _further(
            q, high, low, acc, most, total, K, Vv, Joints, kn, kd, vn, vd, begin, N, scale,
            D, DP, VP, BN, TERM, DOT, EXACT, FOLD, False, PRECISION,
        )  # fmt: skip
    for begin in range(whole, N, BN):
        acc, most, total = _further(
            q, high, low, acc, most, total, K, Vv, Joints, kn, kd, vn, vd, begin, N, scale,
            D, DP, VP, BN, TERM, DOT, EXACT, FOLD, True, PRECISION,
        )  # fmt: skip
    acc = acc / total[:, None]
    place = Out + body * ob + head * oh + row[:, None] * on + dim[None, :]
    tl.store(place, acc.to(Out.dtype.element_ty), mask=here[:, None] & inner[None, :])
    tl.store(Stat + task * N + row, most, mask=here)
    tl.store(Stat + (tasks + task) * N + row, total, mask=here)


@triton.jit
def _against_keys(
    q, grad, most, high, low, K, Vv, Joints, kn, kd, vn, vd, begin, N, scale,
    D: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr, BN: tl.constexpr, TERM: tl.constexpr, DOT: tl.constexpr,
    EXACT: tl.constexpr, FOLD: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of queries against the keys from ``begin`` on: keys, bare products, weights that do not sum to 1 yet,
    their gradients, terms, one-hot joints."""
    column = begin + tl.arange(0, BN)
    k = _tile(K, column, N, kn, kd, D, DP, TAIL).to(DOT)
    v = _tile(Vv, column, N, vn, vd, D, DP, TAIL).to(DOT)
    other = k
    if TERM > 0:
        other = _onehot(_joints(Joints, column, N, TAIL), VP, DOT)
    product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    s, term = _scores(product, high, low, other, scale, TERM, EXACT, FOLD, PRECISION)
    e = _exponential(s, most[:, None], _factor(scale, FOLD), EXACT)
    if TAIL:
        e = tl.where((column < N)[None, :], e, 0.0)
    return k, product, e, tl.dot(grad, tl.trans(v), input_precision=PRECISION), term, other


@triton.jit
def _change(
    q, grad, most, delta, high, low, dq, dterm, K, Vv, Joints, kn, kd, vn, vd, begin, N, scale,
    D: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr, BN: tl.constexpr, TERM: tl.constexpr, DOT: tl.constexpr,
    EXACT: tl.constexpr, FOLD: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and of their terms with the keys from ``begin`` on, all by a row's sum too large."""
    k, product, e, de, term, other = _against_keys(
        q, grad, most, high, low, K, Vv, Joints, kn, kd, vn, vd, begin, N, scale,
        D, DP, VP, BN, TERM, DOT, EXACT, FOLD, TAIL, PRECISION,
    )  # fmt: skip
    ds = e * (de - delta[:, None])
    if TERM == 1:
        dterm = tl.dot(ds.to(DOT), tl.trans(other), acc=dterm, input_precision=PRECISION)
    if TERM == 2:
        dterm = tl.dot((ds * product).to(DOT), tl.trans(other), acc=dterm, input_precision=PRECISION)
        ds *= term
    return tl.dot(ds.to(DOT), k, acc=dq, input_precision=PRECISION), dterm


@triton.jit
def _backward_queries(
    Q, K, Vv, Table, Joints, Out, Grad, Stat, Rows, Dq, Partial,
    qb, qh, qn, qd, kb, kh, kn, kd, vb, vh, vn, vd, ob, oh, on, gb, gh, gn, gd, db, dh, dn, jb,
    H, N, V, scale, blocks, tasks,
    D: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TERM: tl.constexpr,
    DOT: tl.constexpr, EXACT: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of ``BM`` queries and their part of the table's gradient. For the keys, ``Rows``: ``sum_d grad * out``
    and what weights are multiplied by to sum to 1."""
    program = tl.program_id(0)
    block, task = program % blocks, (program // blocks).to(tl.int64)
    body, head = task // H, task % H
    row = block * BM + tl.arange(0, BM)
    dim = tl.arange(0, DP)
    here, inner = row < N, dim < D
    both = here[:, None] & inner[None, :]
    K += body * kb + head * kh
    Vv += body * vb + head * vh
    q = _tile(Q + body * qb + head * qh, row, N, qn, qd, D, DP, True).to(DOT)
    grad = _tile(Grad + body * gb + head * gh, row, N, gn, gd, D, DP, True)
    # A row behind the last one is zeros: its scores are 0, and so are its gradients.
    most = tl.load(Stat + task * N + row, mask=here, other=0.0)
    total = tl.load(Stat + (tasks + task) * N + row, mask=here, other=1.0)
    high, low = q, q
    joint = row
    dterm = tl.zeros([BM, VP], tl.float32)
    if TERM > 0:
        Joints += body * jb
        joint = _joints(Joints, row, N, True)
        high, low = _terms(Table + head * V * V, joint, V, 1, V, scale, VP, DOT, FOLD and TERM == 1)
    # In float32, where few weights carry a row, its result is too coarse, and so is a sum of weights that are not these
    # very ones to the last bit: both come first, in a pass of their own.
    delta = tl.zeros([BM], tl.float32)
    if not EXACT:
        out = tl.load(Out + body * ob + head * oh + row[:, None] * on + dim[None, :], mask=both, other=0.0)
        delta += tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    grad = grad.to(DOT)
    if EXACT:
        total = tl.zeros([BM], tl.float32)
        for begin in range(0, N, BN):
            _, _, e, de, _, _ = _against_keys(
                q, grad, most, high, low, K, Vv, Joints, kn, kd, vn, vd, begin, N, scale,
                D, DP, VP, BN, TERM, DOT, EXACT, FOLD, True, PRECISION,
            )  # fmt: skip
            delta += tl.sum(e * de, 1)
            total += tl.sum(e, 1)
        delta /= total
    inverse = 1.0 / total
    tl.store(Rows + task * N + row, delta, mask=here)
    tl.store(Rows + (tasks + task) * N + row, inverse, mask=here)
    dq = tl.zeros([BM, DP], tl.float32)
    whole = 0
    if not EXACT and DP <= 64:
        whole = N // BN * BN
    for begin in range(0, whole, BN):
        dq, dterm = _change(
            q, grad, most, delta, high, low, dq, dterm, K, Vv, Joints, kn, kd, vn, vd, begin, N, scale,
            D, DP, VP, BN, TERM, DOT, EXACT, FOLD, False, PRECISION,
        )  # fmt: skip
    for begin in range(whole, N, BN):
        dq, dterm = _change(
            q, grad, most, delta, high, low, dq, dterm, K, Vv, Joints, kn, kd, vn, vd, begin, N, scale,
            D, DP, VP, BN, TERM, DOT, EXACT, FOLD, True, PRECISION,
        )  # fmt: skip
    place = Dq + body * db + head * dh + row[:, None] * dn + dim[None, :]
    tl.store(place, (dq * (inverse * scale)[:, None]).to(Dq.dtype.element_ty), mask=both)
    if TERM > 0:
        dterm *= inverse[:, None]
        if TERM == 2:
            dterm *= scale
        # Onto the joints of the queries: once a block, in full precision.
        table = tl.dot(_onehot(joint, VP, tl.float32), dterm, input_precision="ieee")
        at = tl.arange(0, VP)
        part = Partial + (task * blocks + block) * V * V
        tl.store(part + at[:, None] * V + at[None, :], table, mask=(at[:, None] < V) & (at[None, :] < V))


@triton.jit
def _backward_keys(
    Q, K, Vv, Table, Joints, Grad, Stat, Rows, Dk, Dv,
    qb, qh, qn, qd, kb, kh, kn, kd, vb, vh, vn, vd, gb, gh, gn, gd, db, dh, dn, jb,
    H, N, V, scale, blocks, tasks,
    D: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TERM: tl.constexpr,
    DOT: tl.constexpr, EXACT: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of ``BN`` keys and values; scores are computed with keys as rows, terms from columns of the table.

    Nothing is masked: a key behind the last one has a row to itself that nobody stores, and a query behind the last one
    is zeros that are multiplied by zero.
    """
    program = tl.program_id(0)
    block, task = program % blocks, (program // blocks).to(tl.int64)
    body, head = task // H, task % H
    column = block * BN + tl.arange(0, BN)
    dim = tl.arange(0, DP)
    both = (column < N)[:, None] & (dim < D)[None, :]
    Q += body * qb + head * qh
    Grad += body * gb + head * gh
    k = _tile(K + body * kb + head * kh, column, N, kn, kd, D, DP, True).to(DOT)
    v = _tile(Vv + body * vb + head * vh, column, N, vn, vd, D, DP, True).to(DOT)
    high, low = k, k
    if TERM > 0:
        Joints += body * jb
        high, low = _terms(
            Table + head * V * V, _joints(Joints, column, N, True), 1, V, V, scale, VP, DOT, FOLD and TERM == 1
        )
    dk = tl.zeros([BN, DP], tl.float32)
    dv = tl.zeros([BN, DP], tl.float32)
    for begin in range(0, N, BM):
        row = begin + tl.arange(0, BM)
        here = row < N
        q = _tile(Q, row, N, qn, qd, D, DP, True).to(DOT)
        grad = _tile(Grad, row, N, gn, gd, D, DP, True).to(DOT)
        most = tl.load(Stat + task * N + row, mask=here, other=0.0)
        delta = tl.load(Rows + task * N + row, mask=here, other=0.0)
        inverse = tl.load(Rows + (tasks + task) * N + row, mask=here, other=0.0)
        other = tl.trans(q)
        if TERM > 0:
            other = _onehot(_joints(Joints, row, N, True), VP, DOT)
        if EXACT:
            # Large scores must come out as they did before, to the last bit.
            product = tl.trans(tl.dot(q, tl.trans(k), input_precision=PRECISION))
        else:
            product = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        s, term = _scores(product, high, low, other, scale, TERM, EXACT, FOLD, PRECISION)
        p = _exponential(s, most[None, :], _factor(scale, FOLD), EXACT) * inverse[None, :]
        dv = tl.dot(p.to(DOT), grad, acc=dv, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
        if TERM == 2:
            ds *= term
        dk = tl.dot(ds.to(DOT), q, acc=dk, input_precision=PRECISION)
    place = body * db + head * dh + column[:, None] * dn + dim[None, :]
    tl.store(Dk + place, (dk * scale).to(Dk.dtype.element_ty), mask=both)
    tl.store(Dv + place, dv.to(Dv.dtype.element_ty), mask=both)


def _near(x: Tensor) -> Tensor:
    """``x``, or a copy of it where places within a body and head go beyond ``REACH``."""
    _, _, length, dim = x.shape
    return x.contiguous() if (length - 1) * x.stride(2) + (dim - 1) * x.stride(3) >= REACH else x


def _token_major(x: Tensor) -> Tensor:
    bodies, heads, length, dim = x.shape
    return x.new_empty(bodies, length, heads, dim).transpose(1, 2)


def _constants(q: Tensor, table: Tensor | None, multiply: bool, scale: float) -> dict:
    """EXACT: float32, every operation as it stands in the formula. FOLD: scores stay without ``scale``, which the
    exponent takes along; added terms are divided by it, for which float16 has no room."""
    joints = 1 if table is None else table.shape[1]
    exact, added = q.dtype == torch.float32, table is not None and not multiply
    return {
        "D": q.shape[3],
        "DP": max(16, triton.next_power_of_2(q.shape[3])),
        "VP": max(16, triton.next_power_of_2(joints)),
        "TERM": 0 if table is None else 2 if multiply else 1,
        "DOT": config.dot_dtype(q.dtype),
        "EXACT": exact,
        "FOLD": not exact and scale > 0 and not (added and q.dtype == torch.float16),
        "PRECISION": "ieee",
        "enable_fp_fusion": True,
    }


def _term(q: Tensor, table: Tensor | None, joints: Tensor | None) -> tuple[Tensor, Tensor, int, int]:
    """Table, joints, the joints' stride from body to body, and the number of joints, as the kernels take them."""
    if table is None:
        return q, q, 0, 1
    joints = joints.to(torch.int32).contiguous()
    return table.float().contiguous(), joints, joints.stride(0) if joints.dim() == 2 else 0, table.shape[1]


@config.on_device
def forward(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, joints: Tensor | None, multiply: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Result ``[B,H,N,D]``, laid out token by token, and statistics ``[2,B,H,N]``: maxima, without
    ``scale`` where it is folded, and sums."""
    bodies, heads, length, _ = q.shape
    out = _token_major(q)
    statistics = q.new_empty((2, bodies, heads, length), dtype=torch.float32)
    if not out.numel():
        return out, statistics
    q, k, v = map(_near, (q, k, v))
    term, numbers, step, count = _term(q, table, joints)
    rows, columns, warps, stages = config.choose(FORWARD, q, length)
    blocks, tasks = triton.cdiv(length, rows), bodies * heads
    _forward[(blocks * tasks,)](
        q, k, v, term, numbers, out, statistics,
        *q.stride(), *k.stride(), *v.stride(), *out.stride()[:3], step,
        heads, length, count, scale, blocks, tasks,
        **_constants(q, table, multiply, scale), BM=rows, BN=columns, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, statistics


@config.on_device
def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    joints: Tensor | None,
    out: Tensor,
    statistics: Tensor,
    multiply: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k``, ``v`` (laid out token by token) and of the table (empty without one)."""
    dq, dk, dv = _token_major(q), _token_major(q), _token_major(q)
    dtable = _gradients(grad, q, k, v, table, joints, out, statistics, multiply, scale, dq, dk, dv)
    return dq, dk, dv, dtable


@config.on_device
def packed_backward(
    grad: Tensor,
    packed: Tensor,
    table: Tensor | None,
    joints: Tensor | None,
    out: Tensor,
    statistics: Tensor,
    multiply: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The same for packed queries, keys and values ``[B,N,3*H*D]``: one gradient, packed like them."""
    dpacked = torch.empty_like(packed, memory_format=torch.contiguous_format)
    heads = out.shape[1]
    parts, into = (x.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4) for x in (packed, dpacked))
    dtable = _gradients(grad, *parts, table, joints, out, statistics, multiply, scale, *into)
    return dpacked, dtable


def _gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    joints: Tensor | None,
    out: Tensor,
    statistics: Tensor,
    multiply: bool,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    """Fills ``dq``, ``dk`` and ``dv``, all of the same strides; gives the table's gradient."""
    bodies, heads, length, _ = q.shape
    shape = (0,) if table is None else table.shape
    if not q.numel():
        return q.new_zeros(shape, dtype=torch.float32)
    grad, q, k, v, out = map(_near, (grad, q, k, v, out))
    term, numbers, step, count = _term(q, table, joints)
    constants = _constants(q, table, multiply, scale)
    rows, columns, warps, stages = config.choose(QUERIES, q, length)
    blocks, tasks = triton.cdiv(length, rows), bodies * heads
    row_numbers = torch.empty_like(statistics)
    partial = q.new_empty((bodies, heads, blocks, *shape[1:]) if table is not None else (1,), dtype=torch.float32)
    inputs = (*q.stride(), *k.stride(), *v.stride())
    _backward_queries[(blocks * tasks,)](
        q, k, v, term, numbers, out, grad, statistics, row_numbers, dq, partial,
        *inputs, *out.stride()[:3], *grad.stride(), *dq.stride()[:3], step,
        heads, length, count, scale, blocks, tasks,
        **constants, BM=rows, BN=columns, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    rows, columns, warps, stages = config.choose(KEYS, q, length)
    blocks = triton.cdiv(length, columns)
    _backward_keys[(blocks * tasks,)](
        q, k, v, term, numbers, grad, statistics, row_numbers, dk, dv,
        *inputs, *grad.stride(), *dk.stride()[:3], step,
        heads, length, count, scale, blocks, tasks,
        **constants, BM=rows, BN=columns, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return q.new_empty(0, dtype=torch.float32) if table is None else partial.sum((0, 2))
