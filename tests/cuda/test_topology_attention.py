"""The CUDA topology attention, its device code run on the CPU thread by thread, against the formula in float64."""

import ctypes
from ctypes import c_bool, c_float, c_int, c_int64, c_void_p

import pytest
import torch

from jmm_fast.bench.parity import results
from jmm_fast.ops.topology_attention import CUDA_JOINTS, CUDA_TOKENS, CUDA_WIDTHS
from jmm_fast.reference.topology_attention import pair_term

UPWARDS, DOWNWARDS, MIXED = 0, 1, 143  # 11 * 13: no divisor in common with a number of warps or lanes
CODES = {
    1: "threads parted at a barrier",
    2: "memory behind the shared memory was written",
    3: "a copy was not waited for",
}
MODES = (None, "add", "scale")
HALVES = (torch.bfloat16, torch.float16)


class View(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        *((name, c_int64) for name in ("body", "head", "token", "channel")),
        ("wide", c_bool),
    ]


class Problem(ctypes.Structure):
    _fields_ = [
        ("bodies", c_int64),
        *((name, c_int) for name in ("heads", "tokens", "width", "joints")),
        *((name, View) for name in ("q", "k", "v")),
        *((name, c_void_p) for name in ("table", "joint")),
        *((name, c_int64) for name in ("joint_body", "joint_token")),
        ("scale", c_float),
        ("mode", c_int),
        ("bfloat16", c_bool),
    ]


class Forward(ctypes.Structure):
    _fields_ = [("out", View), ("most", c_void_p), ("total", c_void_p)]


class Backward(ctypes.Structure):
    _fields_ = [
        *((name, View) for name in ("grad", "out", "dq", "dk", "dv")),
        *((name, c_void_p) for name in ("most", "total", "partial")),
        ("parts", c_int),
    ]


@pytest.fixture(scope="module")
def kernel(compiled):
    return ctypes.CDLL(compiled("topology_attention"))


def view(x):
    """As the torch boundary describes a tensor to the kernel."""
    strides = x.stride()
    wide = strides[3] == 1 and x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in strides[:3])
    return View(x.data_ptr(), *strides, wide)


def poisoned(x):
    """Room for a result, laid out token by token, between NaN."""
    bodies, heads, length, dim = x.shape
    return torch.full((bodies, length, heads, dim), torch.nan, dtype=x.dtype).transpose(1, 2)


@pytest.fixture
def attention(kernel):
    """``attention(joints, mode, ...)``: the kernels as one differentiable function of q, k, v and the table.
    ``packed``: gradients are written where those of packed queries, keys and values lie."""

    def make(joints, mode="add", scale=None, order=MIXED, parts=2, packed=False):
        class Attention(torch.autograd.Function):
            @staticmethod
            def problem(q, k, v, table):
                bodies, heads, length, dim = q.shape
                places = joints.expand(bodies, -1) if table is not None else None
                return Problem(
                    *(bodies, heads, length, dim, 0 if table is None else table.shape[1], view(q), view(k), view(v)),
                    *((None, None, 0, 0) if table is None else (table.data_ptr(), places.data_ptr(), *places.stride())),
                    *(dim**-0.5 if scale is None else scale, 0 if table is None else MODES.index(mode)),
                    q.dtype == torch.bfloat16,
                )

            @staticmethod
            def forward(ctx, q, k, v, table):
                out, statistics = poisoned(q), torch.full((2, *q.shape[:3]), torch.nan)
                forward = Forward(view(out), *(x.data_ptr() for x in statistics))
                run(kernel.forward, Attention.problem(q, k, v, table), forward, order)
                ctx.save_for_backward(q, k, v, table, out, statistics)
                ctx.statistics = statistics
                return out

            @staticmethod
            def backward(ctx, grad):
                q, k, v, table, out, statistics = ctx.saved_tensors
                problem, (dq, dk, dv) = Attention.problem(q, k, v, table), (poisoned(q) for _ in range(3))
                if packed:
                    dq, dk, dv = poisoned(torch.cat([q, q, q], 1)).unflatten(1, (3, -1)).unbind(1)
                dtable = None if table is None else torch.full_like(table, torch.nan)
                shape = (q.shape[1], parts, *(() if table is None else table.shape[1:]))
                partial = torch.full(shape, torch.nan)
                views = [view(x) for x in (grad, out, dq, dk, dv)]
                backward = Backward(*views, *(x.data_ptr() for x in (*statistics, partial)), parts)
                run(kernel.backward, problem, backward, None if table is None else dtable.data_ptr(), order)
                return dq, dk, dv, dtable

        return Attention.apply

    def run(function, problem, passed, *rest):
        *pointer, order = rest
        code = function(ctypes.byref(problem), ctypes.byref(passed), *map(c_void_p, pointer), order)
        assert code == 0, CODES[code]

    return make


@pytest.fixture
def check(attention, attention_parity):
    def check(q, k, v, table, joints, mode="add", scale=None, grad=None, **options):
        return attention_parity(attention(joints, mode, scale, **options), q, k, v, table, joints, mode, scale, grad)

    return check


def make(length, *, dim=32, bodies=2, heads=2, joints=25, own=True, mode="add", dtype=torch.bfloat16):
    torch.manual_seed(length)
    q, k, v = torch.randn(bodies, length, 3, heads, dim).to(dtype).permute(2, 0, 3, 1, 4)
    if mode is None:
        return q, k, v, None, None
    table = torch.randn(heads, joints, joints) + (1 if mode == "scale" else 0)
    numbers = torch.randint(0, joints, (bodies, length)) if own else torch.arange(length) % joints
    return q, k, v, table, numbers


def test_fields_are_those_of_the_header():
    assert ctypes.sizeof(View) == 6 * 8
    assert ctypes.sizeof(Problem) == 8 + 4 * 4 + 3 * 48 + 2 * 8 + 2 * 8 + 4 + 4 + 8
    assert ctypes.sizeof(Backward) == 5 * 48 + 3 * 8 + 8


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [1, 2, 7, 8, 15, 16, 17, 32, 33, 63, 74, 75, 80, 81, 127, 128])
def test_parity_over_lengths(check, dtype, length, mode):
    check(*make(length, heads=1 if length > 80 else 2, own=length != 63, mode=mode, dtype=dtype), mode=mode)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dim", [16, 64])
def test_parity_over_head_widths(check, dim, mode, dtype):
    for length in (5, 74, 90):
        check(*make(length, dim=dim, heads=1, mode=mode, dtype=dtype), mode=mode)


@pytest.mark.parametrize("mode", ["add", "scale"])
@pytest.mark.parametrize("joints", [1, 2, 17, 31, 32, 33, 64])
def test_any_number_of_joints(check, joints, mode):
    for length in (20, 100):
        check(*make(length, dim=16, heads=1, joints=joints, mode=mode), mode=mode)


def test_one_joint_for_all_tokens_and_joints_that_do_not_occur(check):
    q, k, v, table, joints = make(74)
    *_, dtable = check(q, k, v, table, torch.full_like(joints, 24))
    assert (dtable[:, :24] == 0).all() and (dtable[:, :, :24] == 0).all()
    check(q, k, v, table, joints % 3)
    check(q, k, v, table, torch.tensor([24, 3]).repeat(37))


def test_any_order_of_threads_gives_the_same(check):
    for mode, length in (("add", 74), ("scale", 40), (None, 100)):
        q, k, v, table, joints = make(length, bodies=3, heads=1, mode=mode)
        first = check(q, k, v, table, joints, mode, grad=q, order=UPWARDS)
        for order in (DOWNWARDS, 11, MIXED):
            again = check(q, k, v, table, joints, mode, grad=q, order=order)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_views(check):
    q, k, v, table, joints = make(40)
    plain = check(q, k, v, table, joints, grad=q)
    for other in (
        q.contiguous(),
        q.transpose(2, 3).contiguous().transpose(2, 3),
        torch.cat([q, q * torch.nan], 3)[..., :32],
        torch.cat([q[..., :1] * torch.nan, q, q * torch.nan], 3)[..., 1:33],
        torch.cat([q * torch.nan, q, q * torch.nan], 2)[:, :, 40:80],
    ):
        again = check(other, k, v, table, joints, grad=other)
        assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))
    check(q[:1].expand_as(q), k[:, :1].expand_as(k), v[..., :1].expand_as(v), table, joints)
    check(q, k, v, table, joints, grad=torch.randn(2, 1, 1, 32).bfloat16().expand_as(q))
    check(q, k, v, table, torch.stack([joints, joints + 1000], 2)[..., 0])


def test_packed_gradients(check):
    inputs = make(74, heads=3)
    first, second = (check(*inputs, grad=inputs[0], packed=packed) for packed in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_outside_the_inputs_is_read(check):
    ring = torch.full((3, 44, 3, 4, 48), torch.nan).bfloat16()
    inner = ring[1:, 1:42, :, 1:3, 8:40]
    inner.copy_(torch.randn(inner.shape))
    _, _, _, table, joints = make(41)
    around = torch.full((4, 43), -(2**40))
    around[1:3, 1:42] = joints
    check(*inner.permute(2, 0, 3, 1, 4), table, around[1:3, 1:42])


def test_peaked_softmax(check):
    q, k, v, table, joints = make(74)
    check(q, k, v, 40 * table, joints)
    check(q, k, v, table - 200, joints)
    check(q, k, v, table + 200, joints)
    check(3 * q, 3 * k, v, table, joints)
    check(q, k, v, table, joints, scale=0.01)


def test_joints_outside_the_table_stay_inside_memory(attention):
    q, k, v, table, joints = make(20)
    wild = joints.clone()
    wild[0, :3] = torch.tensor([-1, 25, 2**40])
    tame = wild.where((wild >= 0) & (wild < 25), 0)
    a, b = (results(attention(numbers), (q, k, v, table), q) for numbers in (wild, tame))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("parts", [1, 3, 5, 20])
def test_bodies_in_parts(check, parts):
    check(*make(20, bodies=5 if parts < 20 else 20, dim=16, heads=3), parts=parts)


def test_statistics_are_maximum_and_sum(attention):
    q, k, v, table, joints = make(74)
    out = attention(joints)(q.requires_grad_(), k, v, table)
    most, total = out.grad_fn.saved_tensors[5]
    scores = q.float() @ k.float().transpose(2, 3) * 32**-0.5 + pair_term(table, joints)
    torch.testing.assert_close(most, scores.amax(3), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, (scores - scores.amax(3, keepdim=True)).exp().sum(3), rtol=1e-5, atol=1e-5)


def test_limits_are_told_once(kernel):
    assert kernel.most_tokens() == CUDA_TOKENS and kernel.most_joints() == CUDA_JOINTS


@pytest.mark.parametrize("memory", [0, 1000, 48 << 10, 99 << 10, 163 << 10, 227 << 10])
def test_tokens_that_shared_memory_has_room_for(kernel, memory):
    for dim in CUDA_WIDTHS:
        for joints in (0, 1, 17, 25, 32, 33, 64):
            taken = [
                max(kernel.forward_memory(dim, length, joints), kernel.backward_memory(dim, length, joints))
                for length in range(1, CUDA_TOKENS + 1)
            ]
            assert kernel.fitting(memory, dim, joints) == sum(needed <= memory for needed in taken)
    # The encoder's 74 tokens fit on everything from compute capability 8.0 on, 99 KB of 8.6 and 8.9 included.
    assert (kernel.fitting(memory, 32, 25) >= 74) == (memory >= 99 << 10)
