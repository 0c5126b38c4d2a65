"""The C++ halves of a transformer block against the plain composition in float64, for every instruction set here."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from jmm_fast import ops

native = pytest.importorskip("jmm_fast._C", reason="the C++ extension is not built", exc_type=ImportError)


@pytest.fixture(params=native.isas())
def isa(request):
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _one_thread():
    """Small problems are quickest so; the test of threads sets its own numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poison():
    """Every tensor that torch leaves uninitialised is full of NaN: an element the kernel forgets is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x, *, fused=False, add=True, **_):
        if fused:
            return ops.mlp_half(x, self.norm, self.fc1, self.fc2, add=add)
        y = self.fc2(functional.gelu(self.fc1(self.norm(x))))
        return x + y if add else y


class Linears(nn.Module):
    """The products of the attention half without the attention between them."""

    def __init__(self, width, out):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * out), nn.Linear(out, width)

    def forward(self, x, *, fused=False, add=True):
        norm, qkv, proj = self.norm, self.qkv, self.proj
        if fused:
            y = _Into.apply(x, norm.weight, norm.bias, qkv.weight, qkv.bias, norm.eps)
            return _Out.apply(
                y.tanh()[..., : proj.in_features].contiguous(), proj.weight, proj.bias, x if add else None
            )
        y = proj(qkv(norm(x)).tanh()[..., : proj.in_features])
        return x + y if add else y


class _Into(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_w, norm_b, weight, bias, eps):
        ctx.save_for_backward(x, norm_w, norm_b, weight)
        ctx.eps = eps
        half = torch.is_autocast_enabled("cpu")
        return torch.ops.jmm_fast.norm_linear_forward(x, norm_w, norm_b, weight, bias, eps, half)

    @staticmethod
    def backward(ctx, grad):
        x, *parameters = ctx.saved_tensors
        parts = grad.chunk(3, -1)
        return *torch.ops.jmm_fast.norm_linear_backward(*parts, None, None, x, *parameters, ctx.eps), None


class _Out(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual):
        ctx.save_for_backward(x, weight)
        ctx.add = residual is not None
        return torch.ops.jmm_fast.linear_add_forward(x, weight, bias, residual, None)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return *torch.ops.jmm_fast.linear_add_backward(grad, x, weight, None), grad if ctx.add else None


class Attention(nn.Module):
    def __init__(self, width, heads, bias=True, mode="add", joints=5):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width, bias), nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn(heads, joints, joints))
        self.heads, self.mode = heads, mode

    def forward(self, x, *, fused=False, add=True, joints=None, keep=None):
        table = self.table if joints is not None else None
        if fused:
            return ops.attention_half(
                x,
                self.norm,
                self.qkv,
                self.proj,
                table,
                joints,
                heads=self.heads,
                multiply=self.mode == "scale",
                keep=keep,
                add=add,
            )
        bodies, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(bodies, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = ops.topology_attention(q, k, v, table, joints, mode=self.mode, backend="reference")
        y = self.proj(out.transpose(1, 2).reshape(bodies, length, width))
        y = x + y if add else y
        return y if keep is None else torch.stack([row[chosen] for row, chosen in zip(y, keep, strict=True)])


def randomize(module):
    """Weights of a trained network rather than of a fresh one: no zero bias, no LayerNorm of ones."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.5 * torch.randn_like(parameter))
            elif name != "table":
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return module


def results(module, x, dtype, grad, **options):
    """Output, gradient of ``x`` and of every parameter that takes part."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = module(x, **options)
    assert out.dtype == x.dtype or not options.get("fused")
    grads = torch.autograd.grad(out, [x, *module.parameters()], grad.to(out.dtype), allow_unused=True)
    found = {"out": out.detach(), "x": grads[0]} | dict(
        zip((name for name, _ in module.named_parameters()), grads[1:], strict=True)
    )
    return {name: value for name, value in found.items() if value is not None}


def largest(x):
    return x.abs().max().item()


def rms(x):
    return x.square().mean().sqrt().item()


def check(module, x, dtype=torch.float32, grad=None, **options):
    """Parity: at most twice the error of the plain composition in the same dtype plus the rounding of the largest
    result; three times for gradients, whose chain is twice as long.

    Of the attention half, which chains three kernels, only the root mean square is compared:
    each kernel has its own test of the largest error.
    """
    if grad is None:
        keep = options.get("keep")
        grad = torch.randn(*(x.shape[:2] if keep is None else keep.shape), x.shape[2])
    size = rms if isinstance(module, Attention) else largest
    ours = results(module, x, dtype, grad, fused=True, **options)
    same = results(module, x, dtype, grad, **options)
    exact = results(copy.deepcopy(module).double(), x.double(), torch.float64, grad.double(), **options)
    assert ours.keys() == exact.keys()
    if isinstance(module, Attention) and module.mode == "add" and "qkv.bias" in exact:
        # A shift of all keys shifts a row of scores: the gradient is zero, and what is computed is rounding alone.
        width = x.shape[2]
        for found in (ours, same, exact):
            found["qkv.bias"] = torch.cat([found["qkv.bias"][:width], found["qkv.bias"][2 * width :]])
    for name, truth in exact.items():
        assert ours[name].dtype == torch.float32 and ours[name].isfinite().all(), name
        error = size(ours[name].double() - truth)
        bound = 2 * (size(same[name].double() - truth) + torch.finfo(dtype).eps * size(truth))
        if name != "out":
            bound *= 1.5
        assert error <= bound, f"{name}: error {error:.3g}, bound {bound:.3g}"
    return ours


@pytest.mark.parametrize("width, hidden", [(16, 64), (32, 96), (33, 70), (1, 3), (130, 300), (256, 1024)])
def test_mlp_over_widths(isa, dtype, width, hidden):
    check(randomize(Mlp(width, hidden)), torch.randn(2, 37, width), dtype)


@pytest.mark.parametrize("length", [1, 63, 74, 75, 127, 250, 750])
def test_mlp_over_lengths(isa, dtype, length):
    # Up to several pieces and spans, also with an odd last row.
    check(randomize(Mlp(32, 64)), torch.randn(3, length, 32), dtype, add=length % 2 == 0)


@pytest.mark.parametrize("width, out", [(16, 16), (32, 24), (33, 70), (1, 3), (130, 50), (256, 256)])
def test_products_over_widths(isa, dtype, width, out):
    check(randomize(Linears(width, out)), torch.randn(2, 37, width), dtype)


@pytest.mark.parametrize("length", [1, 63, 74, 75, 127, 250, 750])
def test_products_over_lengths(isa, dtype, length):
    check(randomize(Linears(32, 32)), torch.randn(3, length, 32), dtype, add=length % 2 == 0)


@pytest.mark.parametrize("width, heads", [(16, 2), (24, 3), (33, 1), (256, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_over_widths(isa, dtype, width, heads, bias):
    joints = torch.randint(0, 5, (2, 41))
    check(randomize(Attention(width, heads, bias)), torch.randn(2, 41, width), dtype, joints=joints)


@pytest.mark.parametrize(
    "length, mode", [(1, "add"), (63, "scale"), (74, None), (75, "add"), (127, "scale"), (250, None), (750, "add")]
)
def test_attention_over_lengths(isa, dtype, length, mode):
    joints = None if mode is None else torch.arange(length) % 5
    module = randomize(Attention(32, 2, mode=mode or "add"))
    check(module, torch.randn(2, length, 32), dtype, joints=joints, add=length != 63)


def test_norm_and_head(isa, dtype):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 32, bias=dtype == torch.float32)

        def forward(self, x, *, fused=False):
            return ops.norm_linear(x, self.norm, self.head).float() if fused else self.head(self.norm(x))

    check(randomize(Head()), torch.randn(3, 41, 32), dtype)


@pytest.mark.parametrize("add", [True, False])
def test_attention_of_some_tokens(isa, dtype, add):
    keep = torch.stack([torch.randperm(40)[:23] for _ in range(3)])
    check(randomize(Attention(32, 2)), torch.randn(3, 40, 32), dtype, joints=torch.arange(40) % 5, keep=keep, add=add)


def test_inputs_of_any_strides(isa, dtype):
    mlp, attention = randomize(Mlp(32, 64)), randomize(Attention(32, 2))
    ring = torch.full((5, 52, 34), float("nan"))
    x = ring[1:4, 1:51, 1:33].copy_(torch.randn(3, 50, 32))
    grad = torch.randn(3, 32, 50).transpose(1, 2)
    for module in (mlp, attention):
        check(module, x, dtype, grad, joints=torch.arange(50) % 5)
        check(module, x[:1, :, :1].expand(3, 50, 32) + torch.linspace(0, 1, 32), dtype, grad)
        check(module, torch.randn(1, 50, 32).expand(3, 50, 32), dtype, torch.randn(1, 1, 32).expand(3, 50, 32))
    with torch.no_grad():
        mlp.fc1.weight.set_(mlp.fc1.weight.t().contiguous().t())
    check(mlp, x, dtype, grad)


def test_rows_far_from_zero(isa):
    """LayerNorm's variance by the mean's side: rows whose mean is a thousand times their spread."""
    check(randomize(Mlp(64, 128)), torch.randn(2, 50, 64) + 1000)


def test_all_zero_bodies(isa, dtype):
    x = torch.randn(3, 20, 32)
    x[1] = 0
    check(randomize(Mlp(32, 64)), x, dtype)
    check(randomize(Attention(32, 2)), x, dtype, joints=torch.arange(20) % 5)


def test_gelu_over_its_whole_range(isa, gelu):
    out = ops.mlp_half(torch.randn(1, 1, len(gelu.values)), gelu.norm, gelu.fc1, gelu.fc2, add=False)
    out.sum().backward()
    torch.testing.assert_close(out[0, 0].double(), gelu.result, rtol=2e-6, atol=2e-7)
    torch.testing.assert_close(gelu.fc1.bias.grad.double(), gelu.slope, rtol=2e-6, atol=5e-7)


def test_results_repeat_for_any_number_of_threads(isa, dtype, threads):
    x, grad = torch.randn(7, 150, 32), torch.randn(7, 150, 32)
    for module in (randomize(Mlp(32, 64)), randomize(Attention(32, 2))):
        for joints in (None, torch.arange(150) % 5):

            def run(count, module=module, joints=joints):
                threads(count)
                return results(module, x, dtype, grad, fused=True, joints=joints)

            first = run(1)
            for count in (1, 2, 3, 8):
                again = run(count)
                assert all(torch.equal(first[name], again[name]) for name in first), f"{count} threads"


def test_nothing_is_left_from_the_call_before(isa, dtype):
    module, x, grad = randomize(Mlp(32, 64)), torch.randn(2, 90, 32), torch.randn(2, 90, 32)
    clean = results(module, x, dtype, grad, fused=True)
    bad = results(
        randomize(Mlp(64, 300)), torch.full((3, 200, 64), float("nan")), dtype, torch.ones(3, 200, 64), fused=True
    )
    assert bad["out"].isnan().all() and bad["x"].isnan().all()
    again = results(module, x, dtype, grad, fused=True)
    assert all(torch.equal(clean[name], again[name]) for name in clean)


def test_who_is_served():
    x = torch.randn(2, 5, 8)
    assert ops.block_backend(x, "auto", 4) == ops.block_backend(x, "cpu", 128) == "cpu"
    assert not ops.block_backend(x, "reference", 4)
    assert not ops.block_backend(x.double(), "auto", 4)
    assert not ops.block_backend(x[:0], "auto", 4)
    assert not ops.block_backend(x, "auto", 129)
    with torch.autocast("cpu", dtype=torch.float16):
        assert not ops.block_backend(x, "auto", 4)


def test_operators_pass_opcheck_and_refuse_what_does_not_fit():
    namespace = torch.ops.jmm_fast
    x, grad = torch.randn(2, 7, 8), torch.randn(2, 7, 8)
    norm = (torch.rand(8), torch.randn(8))
    w, b = torch.randn(24, 8), torch.randn(24)
    w1, b1, w2, b2 = torch.randn(20, 8), torch.randn(20), torch.randn(8, 20), torch.randn(8)
    rows = torch.tensor([3, 12, 0, 5, 6, 1, 13])
    calls = {
        "norm_linear_forward": (x, *norm, w, b, 1e-5, True),
        "norm_linear_backward": (grad, grad, grad, x[0], rows, x, *norm, w, 1e-5),
        "linear_add_forward": (x, w2.t()[:8, :8], None, x, rows),
        "linear_add_backward": (x[0], x.bfloat16(), torch.randn(8, 8), rows),
        "norm_mlp_forward": (x, *norm, w1, b1, w2, b2, 1e-5, False, True),
        "norm_mlp_backward": (grad, x, *norm, w1, b1, w2, 1e-5, True, False),
    }
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(namespace, name).default, arguments)
    for name, place, wrong in (
        ("norm_linear_forward", 0, x[..., :5]),
        ("norm_linear_forward", 1, norm[0].double()),
        ("norm_linear_forward", 4, b[:23]),
        ("norm_linear_backward", 1, grad[:1]),
        ("linear_add_forward", 3, x[:, :3]),
        ("linear_add_forward", 4, rows + 1),
        ("linear_add_forward", 4, rows - 1),
        ("linear_add_forward", 4, rows.int()),
        ("linear_add_backward", 3, rows // 2),
        ("linear_add_backward", 3, rows[1:]),
        ("norm_linear_backward", 4, rows[1:]),
        ("linear_add_backward", 0, grad.double()),
        ("norm_mlp_forward", 5, w2[:, :19]),
        ("norm_mlp_forward", 5, w2[:7]),
        ("norm_mlp_backward", 0, grad[..., :7]),
    ):
        arguments = list(calls[name])
        arguments[place] = wrong
        with pytest.raises(RuntimeError, match="must"):
            getattr(namespace, name)(*arguments)


def test_no_rows():
    namespace = torch.ops.jmm_fast
    x = torch.randn(0, 5, 8)
    w1, b1, w2, b2 = torch.randn(20, 8), torch.randn(20), torch.randn(8, 20), torch.randn(8)
    assert namespace.norm_mlp_forward(x, b2, b2, w1, b1, w2, b2, 1e-5, False, True).shape == x.shape
    dx, *rest = namespace.norm_mlp_backward(x, x, b2, b2, w1, b1, w2, 1e-5, False, True)
    assert dx.shape == x.shape and not any(gradient.any() for gradient in rest)
