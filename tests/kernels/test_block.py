"""The Triton kernels around a block's products against the plain composition in float64: on a GPU, or interpreted."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from jmm_fast import ops
from jmm_fast.models import JMMTGT, ModelConfig
from jmm_fast.models.blocks import Block, Stack

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
GPU = torch.cuda.is_available()
pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture(params=["products", "fused"])
def form(request, monkeypatch):
    """Both forms of the MLP, whichever is shipped."""
    from jmm_fast.kernels import block as kernel

    for name in kernel.FUSED:
        monkeypatch.setitem(kernel.FUSED, name, {(4, kernel.ANY, kernel.ANY): (request.param == "fused",)})
    return request.param


@pytest.fixture(autouse=True)
def _small_spans(monkeypatch):
    """Spans of few rows in the interpreter, so that small problems have several."""
    from jmm_fast.kernels import block as kernel

    if not GPU:
        monkeypatch.setitem(kernel.NORM, "sm_90", {(4, 256): (512, 4), (4, kernel.ANY): (1024, 4)})
        monkeypatch.setitem(kernel.NORM_BACKWARD, "sm_90", {(4, 256): (1024, 3, 4), (4, kernel.ANY): (1024, 2, 4)})
        monkeypatch.setitem(kernel.GELU_BACKWARD, "sm_90", {(4, kernel.ANY): (16, 64, 2, 4)})
        monkeypatch.setitem(kernel.COLUMNS, "sm_90", {(4, kernel.ANY): (16, 64, 2, 4)})


def leaves_of(inputs, dtype=None):
    return [
        x if x is None or not x.is_floating_point() else x.detach().to(dtype or x.dtype).requires_grad_()
        for x in inputs
    ]


def gradients(outs, inputs, seeds):
    """Results that are there, and the gradient of each differentiable input."""
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    pairs = [(out, seed.to(out.dtype)) for out, seed in zip(outs, seeds, strict=True) if out is not None]
    grads = torch.autograd.grad([out for out, _ in pairs], wanted, [seed for _, seed in pairs])
    return [*(out.detach() for out, _ in pairs), *grads]


def plain(x, branch, bias, factor, rows, weight, shift, eps, dtype):
    if branch is not None:
        # The branch joins the stream in its precision, whatever it was rounded to before.
        branch = branch.to(x.dtype)
        branch = branch if bias is None else branch + bias
        x = x + (branch if factor is None else branch * factor[:, None, None])
    if rows is not None:
        x = x.flatten(0, 1)[rows].view(len(x), -1, x.shape[2])
    if weight is None:
        return x, None
    return x, functional.layer_norm(x, x.shape[-1:], weight, shift, eps).to(dtype)


def ours(x, branch, bias, factor, rows, weight, shift, eps, dtype):
    norm = None if weight is None else SimpleNamespace(weight=weight, bias=shift, eps=eps)
    y, n = ops.block._add_norm(ops.Stream(x, branch, bias, factor, rows), norm, dtype)
    return y, None if norm is None else n


@pytest.fixture
def check_norm(parity, device):
    def check(inputs, dtype=F32, eps=1e-5, seeds=None):
        x, branch, bias, factor, rows, weight, shift = inputs
        kept = x.shape[1] if rows is None else len(rows) // len(x)
        seeds = seeds or [torch.randn(len(x), kept, x.shape[2], device=device) for _ in range(2)]
        if weight is None:
            seeds = [seeds[0], None]
        found = []
        for function, precision in ((ours, None), (plain, None), (plain, torch.float64)):
            leaves = leaves_of(inputs, precision)
            if factor is not None:
                leaves[3] = leaves[3].detach()
            outs = function(*leaves, eps, precision or dtype)
            # float64 starts from the same short floats.
            used = [s if s is None else s.to(dtype if i else F32) for i, s in enumerate(seeds)]
            found.append(gradients(outs, leaves, used))
        names = [n for n, there in (("y", True), ("n", weight is not None), ("dx", True)) if there]
        names += [
            name
            for name, value in zip(
                ("dbranch", "dbias", "dweight", "dshift"), (branch, bias, weight, shift), strict=True
            )
            if value is not None
        ]
        return parity(names, *found)

    return check


@pytest.fixture
def norm_problem(device):
    def make(bodies=2, tokens=9, width=40, dtype=F32, branch=True, bias=True, factor=False, keep=None, norm=True):
        def draw(*shape):
            return torch.randn(*shape, device=device)

        rows = None
        if keep is not None:
            picked = torch.stack([torch.randperm(tokens)[:keep] for _ in range(bodies)])
            rows = (picked + torch.arange(bodies)[:, None] * tokens).flatten().to(device)
        return [
            draw(bodies, tokens, width),
            draw(bodies, tokens, width).to(dtype) if branch else None,
            draw(width) if branch and bias else None,
            (torch.arange(bodies, device=device) % 2 * 1.25) if factor else None,
            rows,
            draw(width) if norm else None,
            draw(width) if norm else None,
        ]

    return make


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("tokens", [1, 63, 74, 75, 127, 250])
def test_norm_over_lengths(check_norm, norm_problem, tokens, dtype):
    check_norm(norm_problem(1 + tokens % 2, tokens, 32, dtype), dtype)


@pytest.mark.parametrize("width", [1, 3, 16, 33, 130, 256, 1100])
def test_norm_over_widths(check_norm, norm_problem, width):
    check_norm(norm_problem(width=width, tokens=5))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"branch": False},
        {"bias": False},
        {"factor": True},
        {"factor": True, "bias": False, "norm": False},
        {"norm": False},
        {"keep": 4},
        {"keep": 1, "factor": True},
        {"keep": 9},
        {"keep": 5, "branch": False},
        {"keep": 5, "norm": False},
    ],
    ids=str,
)
def test_parts_of_the_stream(check_norm, norm_problem, options, dtype):
    check_norm(norm_problem(3, dtype=dtype, **options), dtype)


def test_rows_far_from_zero(check_norm, norm_problem):
    inputs = norm_problem(branch=False)
    inputs[0] += 1000
    check_norm(inputs)


def test_rows_of_zeros_are_normed_to_the_bias(check_norm, norm_problem):
    inputs = norm_problem(branch=False)
    inputs[0][1] = 0
    _, n, *_ = check_norm(inputs)
    assert torch.equal(n[1], inputs[6].expand_as(n[1]))


def test_any_strides_and_nothing_outside_is_read(check_norm, norm_problem, ringed, device):
    seeds = [torch.randn(2, 4, 40, device=device) for _ in range(2)]
    inputs = norm_problem(keep=4, factor=True)
    clean = check_norm(inputs, seeds=seeds)
    around = [None if x is None else ringed(x) for x in inputs]
    again = check_norm(around, seeds=[ringed(seed) for seed in seeds])
    assert all(torch.equal(a, b) for a, b in zip(again, clean, strict=True))
    inputs[0] = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)
    inputs[1] = inputs[1][:1].expand(2, -1, -1)
    inputs[5] = inputs[5][:1].expand(40)
    check_norm(inputs, seeds=[seed[:, :1].expand(-1, 4, -1) for seed in seeds])


def test_a_row_outside_the_stream_reaches_no_other_memory(norm_problem):
    x, branch, bias, _, _, weight, shift = norm_problem(2, 3)
    rows = torch.tensor([0, 2**40, -1, 5], device=x.device)
    y, n, _ = torch.ops.jmm_fast.block_triton_add_norm(x, branch, bias, None, rows, weight, shift, 1e-5, F32)
    assert not y.flatten(0, 1)[1:3].any() and n.isfinite().all()


def test_the_stream_passes_through_when_nothing_is_added(norm_problem):
    x = norm_problem()[0]
    assert ops.Stream(x).settle() is x


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x, fused=False):
        if fused:
            return ops.mlp_half(ops.Stream(x), self.norm, self.fc1, self.fc2).settle()
        return x + self.fc2(functional.gelu(self.fc1(self.norm(x))))


class Head(nn.Module):
    def __init__(self, width, out, bias):
        super().__init__()
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, out, bias)

    def forward(self, x, fused=False):
        return ops.norm_linear(ops.Stream(x), self.norm, self.head) if fused else self.head(self.norm(x))


class Attention(nn.Module):
    def __init__(self, width, heads, bias=True, mode="add", joints=5):
        super().__init__()
        self.block = Block(width, heads, 1.0, bias, mode, 0.0, "reference")
        self.table = nn.Parameter(torch.randn(heads, joints, joints))

    def forward(self, x, fused=False, joints=None, keep=None):
        block, attn = self.block, self.block.attn
        table = self.table if joints is not None else None
        if fused:
            shared = {"heads": attn.heads, "multiply": attn.mode == "scale", "keep": keep}
            return ops.attention_half(ops.Stream(x), block.norm1, attn.qkv, attn.proj, table, joints, **shared).settle()
        y = x + attn(block.norm1(x), table, joints)
        return y if keep is None else y.gather(1, keep[..., None].expand(-1, -1, x.shape[2]))


def randomize(module, device):
    """Weights of a trained network rather than of a fresh one: no zero bias, no LayerNorm of ones."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.5 * torch.randn_like(parameter))
            elif not name.endswith("table"):
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return module.to(device)


def results(module, x, dtype, grad, **options):
    """Output, gradient of ``x`` and of every parameter that takes part."""
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, dtype=BF16 if dtype == F32 else dtype, enabled=dtype in (BF16, F16)):
        out = module(x, **options)
    parameters = dict(module.named_parameters())
    grads = torch.autograd.grad(out, [x, *parameters.values()], grad.to(out.dtype), allow_unused=True)
    found = {"out": out.detach()} | dict(zip(("x", *parameters), grads, strict=True))
    return {name: value for name, value in found.items() if value is not None}


def largest(x):
    return x.abs().max().item()


def rms(x):
    return x.square().mean().sqrt().item()


def check(module, x, dtype=F32, grad=None, size=rms, **options):
    """At most twice the error of the plain composition in the same dtype plus the rounding of the largest result; three
    times for gradients, whose chain is twice as long. Root mean squares where several kernels are chained: each has
    its own test of the largest error."""
    if grad is None:
        with torch.no_grad():
            grad = torch.randn_like(module(x, **options))
    mine = results(module, x, dtype, grad, fused=True, **options)
    same = results(module, x, dtype, grad, **options)
    exact = results(copy.deepcopy(module).double(), x.double(), torch.float64, grad.double(), **options)
    assert mine.keys() == exact.keys()
    for name, truth in exact.items():
        a, b = mine[name], same[name]
        assert a.dtype == b.dtype and a.isfinite().all(), name
        if name.endswith("qkv.bias") and isinstance(module, Attention) and module.block.attn.mode == "add":
            # A shift of all keys shifts a row of scores: the gradient is zero, and what is computed is rounding alone.
            width = x.shape[2]
            a, b, truth = (torch.cat([y[:width], y[2 * width :]]) for y in (a, b, truth))
        bound = 2 * (size(b.double() - truth) + torch.finfo(dtype).eps * size(truth))
        bound *= 1 if name == "out" else 1.5
        assert size(a.double() - truth) <= bound, f"{name}: error {size(a.double() - truth):.3g}, bound {bound:.3g}"
    return mine


@pytest.mark.parametrize(
    "width, hidden, dtype",
    [(16, 64, F32), (16, 64, BF16), (33, 70, F32), (33, 70, F16), (1, 3, BF16), (130, 300, F32)],
    ids=str,
)
def test_mlp_over_widths(form, device, width, hidden, dtype):
    check(randomize(Mlp(width, hidden), device), torch.randn(2, 37, width, device=device), dtype, size=largest)


def test_a_wide_mlp_of_the_released_model(form, device):
    rows = 1500 if GPU else 37
    check(randomize(Mlp(256, 1024), device), torch.randn(1, rows, 256, device=device), BF16)


@pytest.mark.parametrize("tokens, dtype", [(1, F32), (63, BF16), (74, F32), (127, BF16)], ids=str)
def test_mlp_over_lengths(form, device, tokens, dtype):
    check(randomize(Mlp(32, 64), device), torch.randn(2, tokens, 32, device=device), dtype, size=largest)


def test_mlp_wider_than_the_fused_kernel(form, device):
    check(randomize(Mlp(300, 20), device), torch.randn(1, 20, 300, device=device))


def test_mlp_of_weights_of_any_strides(form, device):
    mlp = randomize(Mlp(32, 64), device)
    with torch.no_grad():
        for layer in (mlp.fc1, mlp.fc2):
            layer.weight.set_(layer.weight.t().contiguous().t())
    check(mlp, torch.randn(2, 40, 32, device=device), size=largest)


def test_gelu_over_its_whole_range(form, device, gelu):
    layers = [layer.to(device) for layer in (gelu.norm, gelu.fc1, gelu.fc2)]
    out = ops.mlp_half(ops.Stream(torch.zeros(1, 1, len(gelu.values), device=device)), *layers).settle()
    out.sum().backward()
    torch.testing.assert_close(out[0, 0].double().cpu(), gelu.result, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gelu.fc1.bias.grad.double().cpu(), gelu.slope, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("out, bias", [(12, True), (70, False), (1, True)])
def test_norm_and_head(device, out, bias, dtype):
    check(randomize(Head(32, out, bias), device), torch.randn(3, 41, 32, device=device), dtype)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("length, mode, bias", [(1, "add", True), (41, "scale", False), (75, None, True)])
def test_attention(device, length, mode, bias, dtype):
    joints = None if mode is None else (torch.arange(length, device=device) % 5)
    module = randomize(Attention(32, 2, bias, mode or "add"), device)
    check(module, torch.randn(2, length, 32, device=device), dtype, joints=joints)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_attention_of_some_tokens(device, dtype):
    keep = torch.stack([torch.randperm(40)[:23] for _ in range(3)]).to(device)
    joints = torch.randint(0, 5, (3, 40), device=device)
    check(randomize(Attention(32, 2), device), torch.randn(3, 40, 32, device=device), dtype, joints=joints, keep=keep)


def stacks(device, drop_path=0.0):
    """Two stacks with equal weights: the Triton path and the plain one."""
    config = ModelConfig(dim=32, decoder_dim=32, heads=2, decoder_heads=2, depth=2, decoder_depth=2)
    ours = randomize(Stack(config, 32, 2, 2, drop_path, "triton"), device)
    twin = Stack(config, 32, 2, 2, drop_path, "reference").to(device)
    twin.load_state_dict(ours.state_dict())
    return ours, twin


@pytest.mark.parametrize("keep", [None, 17])
@pytest.mark.parametrize("head", [True, False])
def test_a_stack_is_the_plain_stack(device, keep, head):
    ours, twin = stacks(device)
    head = randomize(nn.Linear(32, 12), device) if head else None
    kept = None if keep is None else torch.stack([torch.randperm(40)[:keep] for _ in range(2)]).to(device)
    x = torch.randn(2, 40, 32, device=device)
    grad = torch.randn(2, keep or 40, 12 if head else 32, device=device)
    found = []
    for stack in (ours, twin):
        leaf = x.clone().requires_grad_()
        out = stack(leaf, torch.arange(40, device=device) % 25, kept, head)
        parameters = [*stack.parameters(), *(head.parameters() if head else ())]
        found.append([out, *torch.autograd.grad(out, [leaf, *parameters], grad)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_drop_path_draws_and_drops_as_the_plain_stack(device):
    ours, twin = stacks(device, 0.5)
    x = torch.randn(6, 11, 32, device=device)
    found = []
    for stack in (ours, twin):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        out = stack.train()(leaf, torch.arange(11, device=device))
        found.append([out, *torch.autograd.grad(out.square().sum(), [leaf, *stack.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_block_takes_tensors_too(device):
    ours, twin = (stack.blocks[0] for stack in stacks(device))
    x = torch.randn(2, 11, 32, device=device)
    torch.testing.assert_close(ours(x, None, None), twin(x, None, None), rtol=1e-4, atol=1e-5)


def test_who_is_served(device, monkeypatch):
    x, table = torch.randn(2, 5, 8, device=device), torch.zeros(2, 25, 25, device=device)
    assert ops.block_backend(x, "triton", 4, table) == ops.block_backend(x, "triton", 128) == "triton"
    assert ops.block_backend(x, "auto", 4) != ("cpu" if GPU else "triton")
    for refused in (x.double(), x[:0], torch.randn(1, 1, 5000, device=device)):
        assert ops.block_backend(refused, "triton", 4) is None
    assert ops.block_backend(x, "triton", 129) is None and ops.block_backend(x, "reference", 4) is None
    assert ops.block_backend(x, "triton", 4, torch.zeros(2, 129, 129, device=device)) is None
    with torch.autocast(device, dtype=F16):
        assert ops.block_backend(x, "triton", 4) == "triton"
    assert ops.block_backend(x.to("meta"), "triton", 4) is None


def test_repeatable_bit_for_bit(form, device):
    x, grad = torch.randn(3, 25, 32, device=device), torch.randn(3, 25, 32, device=device)
    for module in (randomize(Mlp(32, 64), device), randomize(Attention(32, 2), device)):
        options = {} if isinstance(module, Mlp) else {"joints": torch.arange(25, device=device) % 5}
        first, second = (results(module, x, BF16, grad, fused=True, **options) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_opcheck(form, device):
    def draw(*shape, dtype=F32):
        return torch.randn(*shape, device=device).to(dtype)

    table = torch.ops.jmm_fast
    x, branch, d = draw(2, 9, 8), draw(2, 9, 8, dtype=BF16), [draw(8) for _ in range(3)]
    rows = torch.tensor([3, 1, 9, 17], device=device)
    factor = torch.tensor([0.0, 2.0], device=device)
    w1, w2, wide = draw(20, 8, dtype=BF16), draw(8, 20, dtype=BF16), draw(20)
    n, grad = draw(7, 8, dtype=BF16), draw(7, 8, dtype=BF16)
    hidden = n @ w1.t() if form == "products" else n.new_empty(0)
    y, normed, statistics = table.block_triton_add_norm(x, branch, d[0], factor, rows, *d[1:], 1e-5, BF16)
    packed = draw(2, 9, 24)
    pair, joints = draw(2, 5, 5), torch.arange(9, device=device) % 5
    q, k, v = ops.block.split_heads(packed, 2)
    out, held = table.topology_attention_triton_forward(q, k, v, pair, joints, False, 0.5)
    for name, arguments in (
        ("block_triton_add_norm", (x, branch, d[0], factor, rows, *d[1:], 1e-5, BF16)),
        ("block_triton_add_norm", (x, None, None, None, None, *d[1:], 1e-5, F32)),
        ("block_triton_add_norm", (x, branch, None, None, None, None, None, 0.0, F32)),
        ("block_triton_add_norm_backward", (normed, y, y, statistics, factor, rows, d[1], 9, BF16)),
        ("block_triton_add_norm_backward", (None, y, None, None, None, rows, None, 9, None)),
        ("block_triton_mlp", (n, w1, wide, w2)),
        ("block_triton_mlp_backward", (grad, n, w1, wide, w2, hidden)),
        ("block_triton_linear_backward", (grad, draw(7, 5, dtype=BF16), draw(8, 5, dtype=BF16), True)),
        ("block_triton_linear_backward", (grad, draw(7, 5, dtype=BF16), draw(8, 5, dtype=BF16), False)),
        ("topology_attention_triton_packed_backward", (out, packed, pair, joints, out, held, False, 0.5)),
    ):
        torch.library.opcheck(getattr(table, name).default, arguments)


def test_compile_and_export(device):
    config = ModelConfig(dim=32, decoder_dim=32, heads=2, decoder_heads=2, depth=1, decoder_depth=1, num_frames=8)
    model = JMMTGT(config, backend="triton").to(device)
    clips = torch.randn(1, 8, 25, 3, device=device)
    mask = ops.motion_mask(clips, mask_ratio=0.5, backend="reference")

    def loss(module):
        def run(clips):
            return module(clips, mask, masked_only=True).square().sum()

        return run

    eager = torch.autograd.grad(loss(model)(clips), [*model.parameters()])
    compiled = torch.compile(loss(model), fullgraph=True, backend="aot_eager")
    for a, b in zip(eager, torch.autograd.grad(compiled(clips), [*model.parameters()]), strict=True):
        torch.testing.assert_close(a, b)
    model.eval()
    with torch.no_grad():
        program = torch.export.export(model.encoder, (clips, mask.visible))
        torch.testing.assert_close(program.module()(clips, mask.visible), model.encoder(clips, mask.visible))


@pytest.mark.skipif(not GPU, reason="a GPU alone captures graphs")
def test_a_graph_captures_a_stack_forward_and_backward(device):
    stack, _ = stacks(device)
    x = torch.randn(2, 40, 32, device=device, requires_grad=True)
    keep = torch.stack([torch.randperm(40)[:17] for _ in range(2)]).to(device)
    joints = torch.arange(40, device=device) % 25

    def run():
        with torch.autocast(device, dtype=BF16):
            out = stack(x, joints, keep)
        return out, *torch.autograd.grad(out.square().sum(), [x, *stack.parameters()])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            eager = run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    for a, b in zip(captured, eager, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not GPU, reason="takes 9 GiB and, in the interpreter, hours")
def test_places_beyond_32_bits(device):
    from jmm_fast.kernels import block as kernel

    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("takes 9 GiB, and this GPU has less to spare")
    rows = 2**21 + 3
    x = torch.zeros(rows, 1024, device=device, dtype=BF16)
    x[-1] = 1
    out = kernel.bias_gelu(x, torch.zeros(1024, device=device))
    assert torch.equal(out[-1].float(), functional.gelu(torch.ones(1024, device=device)).bfloat16().float())
    assert not out[:-1].any()
