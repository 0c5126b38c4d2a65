"""The CUDA topology attention on a GPU against its plain twin. Without a GPU see tests/cuda."""

import pytest
import torch

from jmm_fast import ops
from jmm_fast.bench.parity import results
from jmm_fast.ops.backend import choose, unavailable
from jmm_fast.ops.topology_attention import AUTO_CUDA_TOKENS, cuda_tokens

MODES = (None, "add", "scale")
HALVES = (torch.bfloat16, torch.float16)

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture(autouse=True)
def _needs_the_kernel():
    if reason := unavailable("topology_attention", "cuda"):
        pytest.skip(reason)


def make(length, *, dim=32, bodies=5, heads=3, joints=25, own=True, mode="add", dtype=torch.bfloat16):
    if length > cuda_tokens(dim, 0 if mode is None else joints, 0):
        pytest.skip("more shared memory than this GPU has")
    q, k, v = torch.randn(bodies, length, 3, heads, dim, device="cuda").to(dtype).permute(2, 0, 3, 1, 4)
    if mode is None:
        return q, k, v, None, None
    table = torch.randn(heads, joints, joints, device="cuda") + (1 if mode == "scale" else 0)
    numbers = torch.randint(0, joints, (bodies, length)) if own else torch.arange(length) % joints
    return q, k, v, table, numbers.cuda()


@pytest.fixture
def check(attention_parity):
    """Twice the same, within the bound of the parity rule."""

    def check(q, k, v, table, joints, mode="add", grad=None):
        grad = torch.randn_like(q) if grad is None else grad

        def ours(*x):
            return ops.topology_attention(*x, joints, mode=mode or "add", backend="cuda")

        first = attention_parity(ours, q, k, v, table, joints, mode, grad=grad)
        second = results(ours, (q, k, v, table), grad)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        return first

    return check


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [1, 8, 15, 16, 17, 63, 74, 75, 80, 81, 127, 128])
def test_parity_over_shapes(check, dtype, length, mode):
    check(*make(length, own=length != 63, mode=mode, dtype=dtype), mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dim", [16, 64])
def test_parity_over_head_widths(check, dim, mode):
    for length in (5, 74, 80):
        check(*make(length, dim=dim, mode=mode), mode=mode)


@pytest.mark.parametrize("joints", [1, 2, 17, 32, 33, 64])
def test_any_number_of_joints(check, joints):
    check(*make(74, dim=16, joints=joints, mode="scale"), mode="scale")


def test_many_bodies_and_views(check):
    check(*make(74, bodies=600, heads=8))
    q, k, v, table, joints = make(74)
    check(q, k, v, table, joints, grad=torch.randn(5, 1, 1, 32, device="cuda").bfloat16().expand_as(q))
    check(q[:1].expand_as(q), k[:, :1].expand_as(k), v[..., :1].expand_as(v), table[:1].expand_as(table), joints)
    around = torch.full((5, 3, 76, 40), torch.nan, device="cuda", dtype=q.dtype)
    inner = around[:, :, 1:75, 3:35]
    inner.copy_(q)
    check(inner, k, v, table.transpose(1, 2), joints)


def test_on_another_stream_and_in_a_graph():
    q, k, v, table, joints = make(74, bodies=64)
    expected = ops.topology_attention(q, k, v, table, joints, backend="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        assert torch.equal(ops.topology_attention(q, k, v, table, joints, backend="cuda"), expected)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.topology_attention(q, k, v, table, joints, backend="cuda")
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


def test_without_tokens_or_bodies():
    table, joints = torch.zeros(2, 5, 5, device="cuda", requires_grad=True), torch.zeros(0, dtype=torch.int64)
    for shape in ((0, 2, 0, 16), (3, 2, 0, 16)):
        x = torch.zeros(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        out = ops.topology_attention(x, x, x, table, joints.cuda(), backend="cuda")
        assert out.shape == shape
        out.sum().backward()
        assert (table.grad == 0).all()


def test_what_auto_takes_and_what_the_kernel_refuses():
    q, k, v, table, joints = make(AUTO_CUDA_TOKENS)
    auto = ops.topology_attention(q, k, v, table, joints)
    assert torch.equal(auto, ops.topology_attention(q, k, v, table, joints, backend="cuda"))
    for arguments, reason in (
        ((q.float(), k.float(), v.float(), table, joints), "it takes bfloat16 or float16"),
        ((q[..., :8], k[..., :8], v[..., :8], table, joints), "a head width of 16, 32 or 64"),
        ((*(x.repeat(1, 1, 2, 1) for x in (q, k, v)), None, None), "at most 128 tokens"),
        ((q, k, v, table.double(), joints), "a float32 table of at most 64 joints"),
    ):
        with pytest.raises(ValueError, match=f'backend "cuda" cannot run: .*{reason}'):
            ops.topology_attention(*arguments, backend="cuda")
        assert ops.topology_attention(*arguments).isfinite().all(), "auto takes another one"
    with pytest.raises(ValueError, match="it runs on CUDA tensors"):
        choose("topology_attention", "cuda", q.cpu())


def test_arguments_that_do_not_fit_together():
    q, k, v, table, joints = make(20, dim=16)
    arguments = (q, k, v, table, joints, False, 0.25)
    for place, value in ((0, q.cpu()), (1, k.half()), (2, v[:, :1]), (3, table[:, :3]), (4, joints[:, :3]), (4, None)):
        given = list(arguments)
        given[place] = value
        with pytest.raises(RuntimeError, match=r"must (be|have)|needs joints|same device"):
            torch.ops.jmm_fast.topology_attention_cuda_forward(*given)
