import pytest
import torch

from jmm_fast import ops
from jmm_fast.ops.backend import unavailable


def attention_inputs(bodies=2, heads=2, length=7, dim=4, joints_of="body", dtype=torch.float64, joints=5):
    q, k, v = (torch.randn(bodies, heads, length, dim, dtype=dtype) for _ in range(3))
    table = torch.randn(heads, joints, joints, dtype=dtype)
    shape = (bodies, length) if joints_of == "body" else (length,)
    return q, k, v, table, torch.randint(0, joints, shape)


@pytest.mark.parametrize("joints_of", ["body", "grid"])
@pytest.mark.parametrize("mode", ["add", "scale"])
def test_attention_is_the_formula(mode, joints_of):
    q, k, v, table, joints = attention_inputs(joints_of=joints_of)
    out = ops.topology_attention(q, k, v, table, joints, mode=mode, backend="reference")
    for body in range(2):
        joint = joints[body] if joints_of == "body" else joints
        for head in range(2):
            for i in range(7):
                score = torch.stack([q[body, head, i] @ k[body, head, j] / 4**0.5 for j in range(7)])
                pair = torch.stack([table[head, joint[i], joint[j]] for j in range(7)])
                score = score * pair if mode == "scale" else score + pair
                torch.testing.assert_close(out[body, head, i], torch.softmax(score, 0) @ v[body, head])


def test_zero_table_and_no_table_are_plain_attention():
    q, k, v, table, joints = attention_inputs(dtype=torch.float32)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(ops.topology_attention(q, k, v), plain)
    torch.testing.assert_close(ops.topology_attention(q, k, v, torch.zeros_like(table), joints), plain)
    torch.testing.assert_close(ops.topology_attention(q, k, v, torch.ones_like(table), joints, mode="scale"), plain)
    torch.testing.assert_close(
        ops.topology_attention(q, k, v, scale=0.25),
        torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.25),
    )


@pytest.mark.parametrize("joints_of", ["body", "grid"])
@pytest.mark.parametrize("mode", ["add", "scale"])
def test_gradients_of_every_input(mode, joints_of):
    *inputs, joints = attention_inputs(joints_of=joints_of, length=5, dim=3)
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(
        lambda q, k, v, table: ops.topology_attention(q, k, v, table, joints, mode=mode), inputs
    )


def test_packed_qkv_views_need_no_copy():
    packed = torch.randn(2, 7, 3, 2, 4)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    _, _, _, table, joints = attention_inputs(dtype=torch.float32)
    ours = ops.topology_attention(q, k, v, table, joints)
    torch.testing.assert_close(ours, ops.topology_attention(*(x.contiguous() for x in (q, k, v)), table, joints))


def test_bfloat16_stays_within_its_own_error():
    q, k, v, table, joints = attention_inputs(length=75, dim=32, dtype=torch.float32)
    exact = ops.topology_attention(q.double(), k.double(), v.double(), table.double(), joints)
    half = ops.topology_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), table, joints, backend="reference")
    assert half.dtype == torch.bfloat16
    assert (half.double() - exact).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(2, 7, 4)}, r"q must be floating \[B,H,N,D\], got float32 \[2, 7, 4\]"),
        ({"k": torch.zeros(2, 2, 6, 4)}, r"k must be float32 \[2, 2, 7, 4\] as q is, got float32 \[2, 2, 6, 4\]"),
        ({"v": torch.zeros(2, 2, 7, 4, dtype=torch.float64)}, "v must be float32"),
        ({"table": torch.zeros(3, 5, 5)}, r"table must be floating \[2,V,V\]"),
        ({"joints": None}, "joints must be given with a table"),
        ({"joints": torch.zeros(2, 7)}, r"joints must be int \[N\] or \[B,N\] with N=7, B=2, got float32 \[2, 7\]"),
        ({"joints": torch.full((7,), 5)}, r"joints must be in \[0, 5\), got values from 5 to 5"),
        ({"mode": "mul"}, 'mode must be "add" or "scale"'),
        ({"backend": "cuda"}, 'topology_attention: backend "cuda" cannot run: '),
    ],
)
def test_bad_arguments(change, message):
    q, k, v, table, joints = attention_inputs(dtype=torch.float32)
    arguments = {"q": q, "k": k, "v": v, "table": table, "joints": joints}
    with pytest.raises(ValueError, match=message):
        ops.topology_attention(**arguments | change)


def test_a_named_backend_never_falls_back():
    q, k, v, table, joints = attention_inputs()
    with pytest.raises(ValueError, match='topology_attention: backend "cpu" cannot run: '):
        ops.topology_attention(q, k, v, table, joints, backend="cpu")
    ops.topology_attention(q, k, v, table, joints, backend="auto")


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    reason = unavailable("topology_attention", request.param)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("with_table", [True, False])
def test_opcheck(backend, with_table):
    q, k, v, table, joints = attention_inputs(dtype=torch.float32)
    if not with_table:
        table = joints = None
    arguments = q, k, v, table, joints, False, 0.5
    if backend == "cpu":
        out, statistics = torch.ops.jmm_fast.topology_attention_forward(*arguments)
        torch.library.opcheck(torch.ops.jmm_fast.topology_attention_forward.default, arguments)
        torch.library.opcheck(
            torch.ops.jmm_fast.topology_attention_backward.default,
            (torch.randn_like(out), q, k, v, table, joints, out, statistics, False, 0.5),
        )
    else:
        for tensor in (q, k, v, table):
            if tensor is not None:
                tensor.requires_grad_()
        torch.library.opcheck(torch.ops.jmm_fast.topology_attention.default, arguments)


@pytest.mark.parametrize("with_table", [True, False])
def test_compile_and_export(backend, with_table):
    q, k, v, table, joints = attention_inputs(dtype=torch.float32)
    if not with_table:
        table = joints = None
    inputs = [x.requires_grad_() for x in (q, k, v, table) if x is not None]

    class Attend(torch.nn.Module):
        def forward(self, q, k, v, table, joints):
            return ops.topology_attention(q, k, v, table, joints, backend=backend)

    arguments = (q, k, v, table, joints)
    eager = Attend()(*arguments)
    compiled = torch.compile(Attend(), fullgraph=True)(*arguments)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(torch.autograd.grad(compiled.sum(), inputs), torch.autograd.grad(eager.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.export.export(Attend(), arguments).module()(*arguments), eager)
