"""The Triton kernels of topology attention against the formula in float64: on a GPU, or in Triton's interpreter."""

import pytest
import torch

from jmm_fast import ops
from jmm_fast.ops.backend import unavailable

GPU = torch.cuda.is_available()


pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture
def check(attention_parity):
    """The interpreter adds up a product in an order that depends on the block's shape, so there ``largest_score`` comes
    out differently in its last bits in each kernel; a GPU adds up in one order."""

    def check(q, k, v, table, joints, mode="add", scale=None, grad=None, largest_score=0.0):
        def ours(*x):
            return ops.topology_attention(*x, joints, mode=mode or "add", scale=scale, backend="triton")

        slack = 0.0 if GPU else largest_score
        return attention_parity(ours, q, k, v, table, joints, mode, scale, grad, largest_score=slack)

    return check


@pytest.fixture
def problem(device):
    def make(length, *, dim=32, bodies=1, heads=2, joints=25, own=False, mode="add", dtype=torch.float32):
        torch.manual_seed(length)
        q, k, v = (torch.randn(bodies, heads, length, dim, device=device).to(dtype) for _ in range(3))
        if mode is None:
            return q, k, v, None, None
        table = torch.randn(heads, joints, joints, device=device) + (1 if mode == "scale" else 0)
        shape = (bodies, length) if own else (length,)
        numbers = torch.randint(0, joints, shape) if own else torch.arange(length) % joints
        return q, k, v, table, numbers.to(device)

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["add", "scale", None])
@pytest.mark.parametrize("length", [1, 63, 74, 75, 127, 250, 750])
def test_parity_over_lengths(check, problem, dtype, length, mode):
    if not GPU and (length > 130 or (length == 127 and dtype != torch.float32)):
        pytest.skip("the interpreter takes minutes: shorter lengths go through the same code")
    bodies = 3 if GPU else 1
    check(*problem(length, bodies=bodies, own=length in (1, 74, 127), mode=mode, dtype=dtype), mode=mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_whole_grid(check, problem, dtype):
    if not GPU and dtype != torch.float32:
        pytest.skip("the interpreter takes minutes: shorter lengths go through the same code")
    check(*problem(750, heads=1, dim=16, dtype=dtype))


@pytest.mark.parametrize("dim", [1, 3, 16, 20, 64, 128])
def test_parity_over_head_widths(check, problem, dim):
    check(*problem(37, dim=dim, heads=1, own=True))


@pytest.mark.parametrize("joints", [1, 2, 17, 32, 33, 100])
def test_any_number_of_joints(check, problem, joints):
    check(*problem(40, dim=8, joints=joints, own=True, heads=1))
    check(*problem(40, dim=8, joints=joints, own=True, heads=1, mode="scale"), mode="scale")


def test_views(check, problem, device):
    packed = torch.randn(2, 40, 3, 2, 32, device=device)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    _, _, _, table, joints = problem(40)
    check(q, k, v, table, joints, grad=torch.randn(2, 1, 1, 32, device=device).expand_as(q))
    check(q[:1].expand_as(q), k[:, :1].expand_as(k), v[..., :1].expand_as(v), table[:1].expand_as(table), joints)
    check(q.transpose(2, 3).contiguous().transpose(2, 3), k.flip(2), v, table.transpose(1, 2), joints)


def test_tensors_whose_rows_lie_far_apart(check, problem, device, monkeypatch):
    """Offsets within a body and head are 32 bits wide: what goes beyond them is copied first."""
    from jmm_fast.kernels import topology_attention as kernel

    far = torch.empty_strided((2, 3, 750, 32), (32, 64, 2**22, 1), device="meta")
    assert kernel._near(far).is_contiguous() and kernel._near(far[:, :, :500]).stride() == far.stride()
    monkeypatch.setattr(kernel, "REACH", 100)
    q, k, v, table, joints = problem(40, bodies=2)
    check(*(x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for x in (q, k, v)), table, joints)


def test_nothing_outside_the_inputs_is_read(check, problem, device):
    ring = torch.full((3, 4, 44, 3, 20), float("nan"), device=device)
    inner = ring[:1, 1:3, 1:42, :, 2:18]
    inner.copy_(torch.randn(inner.shape, device=device))
    _, _, _, table, joints = problem(41)
    check(*inner.unbind(3), table, joints)


def test_peaked_softmax(check, problem):
    q, k, v, table, joints = problem(70, heads=1)
    check(8 * q, 8 * k, v, table, joints, largest_score=(64 * q @ k.transpose(2, 3)).abs().max().item() / 32**0.5)
    check(q, k, v, 40 * table, joints)
    check(q, k, v, table - 200, joints)


@pytest.mark.parametrize("scale", [0.7, 0.0, -0.3])
def test_any_scale(check, problem, scale):
    """Only a positive one goes into the exponents of short floats."""
    for dtype, mode in ((torch.bfloat16, "add"), (torch.float16, "scale"), (torch.float32, "add")):
        check(*problem(40, heads=1, dim=16, mode=mode, dtype=dtype), mode, scale)


def test_repeatable_bit_for_bit(check, problem):
    inputs = problem(70, bodies=2, own=True)
    first, second = check(*inputs, grad=inputs[0]), check(*inputs, grad=inputs[0])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_without_tokens_or_bodies(device):
    table, joints = torch.zeros(2, 5, 5, device=device, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    for shape in ((0, 2, 0, 8), (3, 2, 0, 8)):
        x = torch.zeros(shape, device=device, requires_grad=True)
        out = ops.topology_attention(x, x, x, table, joints.to(device), backend="triton")
        assert out.shape == shape
        out.sum().backward()
        assert (table.grad == 0).all()


def test_what_the_kernel_does_not_take(problem):
    q, k, v, table, joints = problem(10)
    for arguments, reason in (
        ((q.double(), k.double(), v.double(), table, joints), r"it takes float32, bfloat16 or float16"),
        ((q, k, v, table.double(), joints), r"it takes a float32 table of at most 128 joints"),
        ((q.repeat(1, 1, 1, 5), k.repeat(1, 1, 1, 5), v.repeat(1, 1, 1, 5), None, None), r"a head width up to 128"),
    ):
        with pytest.raises(ValueError, match=r'topology_attention: backend "triton" cannot run: .*' + reason):
            ops.topology_attention(*arguments, backend="triton")


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    if reason := unavailable("topology_attention", request.param):
        pytest.skip(reason)
    return request.param


def small(problem, backend):
    return problem(20, dim=16, own=True, dtype=torch.bfloat16 if backend == "cuda" else torch.float32)


def test_opcheck(problem, backend):
    q, k, v, table, joints = small(problem, backend)
    forward, backward = (
        getattr(torch.ops.jmm_fast, f"topology_attention_{backend}_{name}") for name in ("forward", "backward")
    )
    torch.library.opcheck(forward.default, (q, k, v, table, joints, False, 0.25))
    out, statistics = forward(q, k, v, table, joints, False, 0.25)
    torch.library.opcheck(backward.default, (out, q, k, v, table, joints, out, statistics, False, 0.25))


def test_compile_fullgraph(problem, backend):
    q, k, v, table, joints = small(problem, backend)

    def loss(q, table):
        return ops.topology_attention(q, k, v, table, joints, backend=backend).float().square().sum()

    leaves = [q.requires_grad_(), table.requires_grad_()]
    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiler = "inductor" if GPU else "aot_eager"
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=compiler)(*leaves), leaves)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype == torch.bfloat16 else 0, atol=1e-5)
