"""The C++ kernels of the token grid against the plain twins in float64, for every instruction set of this machine."""

import pytest
import torch

from jmm_fast import ops, reference

native = pytest.importorskip("jmm_fast._C", reason="the C++ extension is not built", exc_type=ImportError)

F32, BF16 = torch.float32, torch.bfloat16


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
def poison():
    """Every tensor that torch leaves uninitialised is full of NaN: an element the kernel forgets is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def results(function, inputs, grad_out=None):
    """Output and gradient of every input."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    grad_out = torch.ones_like(out) if grad_out is None else grad_out
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))]


def furthest(a, b):
    return (a.double() - b).abs().max().item() if a.numel() else 0.0


def compare(names, ours, single, exact):
    """Parity: at most twice the error of the twin in the same dtype plus the rounding of the largest result."""
    for name, a, b, c in zip(names, ours, single, exact, strict=True):
        assert a.dtype == b.dtype and a.shape == c.shape and a.isfinite().all(), name
        error, largest = furthest(a, c), furthest(c, torch.zeros(()))
        bound = 2 * (furthest(b, c) + torch.finfo(a.dtype).eps * largest)
        assert error <= bound, f"{name}: error {error:.3g}, bound {bound:.3g}"
    return ours


def check_gather(clips, visible, t_patch=4, grad_out=None):
    if grad_out is None:
        grad_out = torch.randn(*visible.shape, t_patch * clips.shape[3])

    def ours(x):
        return ops.token_grid_gather(x, visible, t_patch=t_patch, backend="cpu")

    def twin(x):
        return reference.token_grid_gather(x, visible, t_patch)

    return compare(
        ("patches", "dclips"),
        results(ours, [clips], grad_out),
        results(twin, [clips], grad_out),
        results(twin, [clips.double()], grad_out.to(clips.dtype).double()),
    )


def check_scatter(tokens, restore, *others, grad_out=None):
    inputs = [tokens, *others]
    if grad_out is None:
        grad_out = torch.randn(*restore.shape, tokens.shape[2])

    def ours(x, *rest):
        return ops.token_grid_scatter(x, restore, *rest, backend="cpu")

    def twin(x, *rest):
        return reference.token_grid_scatter(x, restore, *rest)

    first = results(ours, inputs, grad_out)
    return compare(
        ("grid", "dtokens", "dmask_token", "djoint", "dtime"),
        first,
        results(twin, inputs, grad_out),
        results(twin, [x.double() for x in inputs], grad_out.to(first[0].dtype).double()),
    )


def draw(bodies, tokens, kept):
    """Visible tokens, ascending, and where each token sits in [visible, masked]."""
    order = torch.rand(bodies, tokens).argsort(dim=1)
    visible, hidden = order[:, :kept].sort(dim=1).values, order[:, kept:].sort(dim=1).values
    return visible, torch.cat([visible, hidden], 1).argsort(dim=1)


def gather_problem(bodies=3, frames=8, joints=25, channels=3, kept=7, patch=4, dtype=F32):
    clips = torch.randn(bodies, frames, joints, channels).to(dtype)
    return clips, draw(bodies, frames // patch * joints, kept)[0]


def scatter_problem(bodies=3, steps=2, joints=25, kept=7, width=64, dtype=F32, embedding=None):
    _, restore = draw(bodies, steps * joints, kept)
    tokens = torch.randn(bodies, kept, width).to(dtype)
    others = [torch.randn(*n, width).to(embedding or dtype) for n in ((), (joints,), (steps,))]
    return tokens, restore, *others


LENGTHS = [(1, 1, 1), (1, 63, 6), (2, 37, 7), (3, 25, 74), (3, 25, 75), (1, 127, 1), (10, 25, 25), (30, 25, 74)]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("steps, joints, kept", LENGTHS)
def test_gather_over_lengths(isa, steps, joints, kept, dtype):
    check_gather(*gather_problem(2, 4 * steps, joints, kept=min(kept, steps * joints), dtype=dtype))


@pytest.mark.parametrize("dtype, embedding", [(F32, F32), (BF16, BF16), (BF16, F32), (F32, BF16)])
@pytest.mark.parametrize("steps, joints, kept", LENGTHS)
def test_scatter_over_lengths(isa, steps, joints, kept, dtype, embedding):
    kept = min(kept, steps * joints)
    grid, *_ = check_scatter(*scatter_problem(2, steps, joints, kept, 40, dtype, embedding))
    assert grid.dtype == (BF16 if embedding == dtype == BF16 else F32)


def test_gather_is_exact_for_any_token_size(isa):
    for channels, patch in ((1, 1), (2, 4), (3, 1), (3, 5), (4, 2), (6, 3)):
        clips, visible = gather_problem(2, 3 * patch, 17, channels, 9, patch)
        patches, _ = check_gather(clips, visible, patch)
        assert torch.equal(patches, reference.token_grid_gather(clips, visible, patch))


@pytest.mark.parametrize("width", [1, 3, 4, 8, 15, 16, 17, 64, 100, 128, 144, 256, 300])
def test_scatter_over_widths(isa, width):
    check_scatter(*scatter_problem(width=width))
    check_scatter(*scatter_problem(width=width, dtype=BF16))


def test_scatter_equals_the_twin_bit_for_bit_in_float32(isa):
    inputs = scatter_problem()
    grad = torch.randn(3, 50, 64)
    grid, dtokens, *_ = check_scatter(*inputs, grad_out=grad)
    assert torch.equal(grid, reference.token_grid_scatter(*inputs))
    place = inputs[1].argsort(dim=1)[:, : dtokens.shape[1]]
    assert torch.equal(dtokens, grad.gather(1, place[..., None].expand(-1, -1, 64)))


@pytest.mark.parametrize("kept", [0, 1, 49, 50])
def test_few_and_all_visible(isa, kept):
    check_gather(*gather_problem(kept=kept))
    *_, dmask, _, _ = check_scatter(*scatter_problem(kept=kept))
    assert dmask.any() == (kept < 50)


def test_grids_larger_than_the_caches(isa):
    # 8.8 MB: from 8 MiB on the rows are written past the caches, by other instructions.
    for width, dtype in ((64, F32), (65, F32), (128, BF16)):
        tokens, restore, *others = scatter_problem(46, 30, width=width, dtype=dtype)
        whole = ops.token_grid_scatter(tokens, restore, *others, backend="cpu")
        parts = [ops.token_grid_scatter(tokens[i::2], restore[i::2], *others, backend="cpu") for i in (0, 1)]
        assert torch.equal(whole[0::2], parts[0]) and torch.equal(whole[1::2], parts[1])


def test_sums_over_many_bodies(isa):
    check_scatter(*scatter_problem(bodies=131, steps=3, joints=5, kept=4, width=24))
    # Sums that cancel but for a little: float alone would lose it among a thousand bodies.
    grad = 100 + torch.randn(1024, 4, 20)
    check_scatter(*scatter_problem(bodies=1024, steps=2, joints=2, kept=1, width=20), grad_out=grad)


def test_strided_inputs(isa):
    for dtype in (F32, BF16):
        clips, visible = gather_problem(dtype=dtype)
        grad = torch.randn(7, 12, 3).permute(2, 0, 1)
        check_gather(clips.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), visible.t().contiguous().t(), 4, grad)
        check_gather(clips[:1].expand_as(clips), visible[:1].expand_as(visible), 4, grad[:, :, :1].expand_as(grad))
        check_gather(clips[:, :, :1, :1].expand_as(clips), visible.repeat_interleave(2, dim=1)[:, ::2])
        check_gather(clips.transpose(1, 2).contiguous().transpose(1, 2).flip(3), visible)
        tokens, restore, mask_token, joint, time = scatter_problem(dtype=dtype)
        grad = torch.randn(3, 1, 1).expand(3, 50, 64)
        check_scatter(
            tokens.transpose(1, 2).contiguous().transpose(1, 2), restore.t().contiguous().t(), mask_token, joint, time
        )
        check_scatter(torch.cat([tokens, tokens], 2)[..., :64], restore, mask_token[:1].expand(64), joint, time)
        check_scatter(
            tokens[:1].expand_as(tokens), restore, mask_token, joint.t().contiguous().t(), time, grad_out=grad
        )
        check_scatter(tokens, restore.repeat_interleave(2, dim=1)[:, ::2], mask_token, joint[:1].expand_as(joint), time)
        grad = torch.randn(50, 3, 128)[..., :64].transpose(0, 1)
        check_scatter(tokens[..., :1].expand_as(tokens), restore, mask_token, joint, time, grad_out=grad)


def test_tokens_that_are_named_twice(isa):
    clips, visible = gather_problem()
    check_gather(clips, visible[:, [0, 0, 3, 3, 3, 1]])
    tokens, restore, *others = scatter_problem()
    check_scatter(tokens, restore % 5, *others)


def test_nothing_outside_the_inputs_is_read(isa):
    def ringed(x):
        ring = torch.full([n + 2 for n in x.shape], float("nan") if x.is_floating_point() else -(2**40), dtype=x.dtype)
        return ring[tuple(slice(1, -1) for _ in x.shape)].copy_(x)

    def surrounded(x):
        around = torch.full((x.numel() + 64,), float("nan") if x.is_floating_point() else -(2**40), dtype=x.dtype)
        return around[32:-32].view(x.shape).copy_(x)

    for wrap in (ringed, surrounded):
        for dtype in (F32, BF16):
            grad = torch.randn(3, 7, 12)
            inputs = gather_problem(dtype=dtype)
            clean = check_gather(*inputs, 4, grad)
            again = check_gather(*map(wrap, inputs), 4, wrap(grad))
            assert all(torch.equal(a, b) for a, b in zip(again, clean, strict=True))
            grad = torch.randn(3, 50, 41)
            inputs = scatter_problem(width=41, dtype=dtype)
            clean = check_scatter(*inputs, grad_out=grad)
            again = check_scatter(*map(wrap, inputs), grad_out=wrap(grad))
            assert all(torch.equal(a, b) for a, b in zip(again, clean, strict=True))


def test_nothing_is_left_from_the_call_before(isa):
    inputs = scatter_problem()
    clean = check_scatter(*inputs, grad_out=torch.ones(3, 50, 64))
    tokens, restore, mask_token, joint, time = scatter_problem(width=256)
    bad = results(
        lambda *x: ops.token_grid_scatter(x[0], restore, *x[1:], backend="cpu"),
        [tokens * float("nan"), mask_token * float("nan"), joint * float("nan"), time],
        torch.full((3, 50, 256), float("nan")),
    )
    assert all(x.isnan().all() for x in bad)
    again = check_scatter(*inputs, grad_out=torch.ones(3, 50, 64))
    assert all(torch.equal(a, b) for a, b in zip(again, clean, strict=True))


def test_a_visible_gradient_does_not_reach_the_mask_token(isa):
    tokens, restore, *others = scatter_problem()
    grad = torch.randn(3, 50, 64)
    grad[restore < 7] = float("inf")
    _, dtokens, dmask, _, _ = results(
        lambda x, *rest: ops.token_grid_scatter(x, restore, *rest, backend="cpu"), [tokens, *others], grad
    )
    assert dtokens.isinf().all() and dmask.isfinite().all()


def test_empty_batches(isa):
    check_gather(*gather_problem(bodies=0))
    _, *grads = check_scatter(*scatter_problem(bodies=0))
    assert not any(grad.any() for grad in grads)
    check_scatter(*scatter_problem(steps=0, kept=0))


def test_results_do_not_depend_on_the_number_of_threads(isa, threads):
    clips, visible = gather_problem(35)
    tokens, restore, *others = scatter_problem(70)
    grad, patch_grad = torch.randn(70, 50, 64), torch.randn(35, 7, 12)

    def run(count):
        threads(count)
        scattered = results(
            lambda x, *rest: ops.token_grid_scatter(x, restore, *rest, backend="cpu"), [tokens, *others], grad
        )
        return scattered + results(lambda x: ops.token_grid_gather(x, visible, backend="cpu"), [clips], patch_grad)

    first = run(1)
    for count in (1, 2, 3, 8):
        assert all(torch.equal(a, b) for a, b in zip(first, run(count), strict=True)), f"{count} threads"


def test_other_dtypes_go_to_the_plain_twin():
    clips, visible = gather_problem(dtype=torch.float64)
    with pytest.raises(ValueError, match="it takes float32 or bfloat16 clips, got float64"):
        ops.token_grid_gather(clips, visible, backend="cpu")
    assert ops.token_grid_gather(clips, visible).dtype == torch.float64
    tokens, restore, mask_token, joint, time = scatter_problem()
    with pytest.raises(ValueError, match="it takes float32 or bfloat16 joint_embedding, got float16"):
        ops.token_grid_scatter(tokens, restore, mask_token, joint.half(), time, backend="cpu")
    torch.testing.assert_close(
        ops.token_grid_scatter(tokens, restore, mask_token, joint.double(), time).float(),
        ops.token_grid_scatter(tokens, restore, mask_token, joint, time),
    )


def test_the_operators_refuse_what_would_read_other_memory():
    clips, visible = gather_problem()
    tokens, restore, mask_token, joint, time = scatter_problem()
    gather, scatter = torch.ops.jmm_fast.token_grid_gather_forward, torch.ops.jmm_fast.token_grid_scatter_forward
    for arguments, message in (
        ((clips, visible + 50, 4), r"visible must be in \[0, 50\)"),
        ((clips, visible - 50, 4), r"visible must be in \[0, 50\)"),
        ((clips, visible[:2], 4), "a row for each body"),
        ((clips, visible.int(), 4), "visible must be an int64 CPU tensor"),
        ((clips, visible, 3), "whole patches"),
        ((clips.double(), visible, 4), "clips must be a float32 or bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            gather(*arguments)
    for arguments, message in (
        ((tokens, restore + 1, mask_token, joint, time), r"restore must be in \[0, 50\), got 50"),
        ((tokens, restore - 1, mask_token, joint, time), r"restore must be in \[0, 50\), got -1"),
        ((tokens, restore[:, :49], mask_token, joint, time), r"restore must be \[B,L\]"),
        ((tokens, restore, mask_token[:63], joint, time), "as wide as the tokens"),
        ((tokens, restore, mask_token, joint[:24], time), r"restore must be \[B,L\]"),
        ((tokens.half(), restore, mask_token, joint, time), "tokens must be a float32 or bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            scatter(*arguments)
    grad = torch.randn(3, 50, 64)
    for sizes, message in (((7, 25, 3), r"grad_out must be \[B,L,d\]"), ((51, 25, 2), r"restore must be \[B,L\]")):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.jmm_fast.token_grid_scatter_backward(grad, restore, *sizes, F32)
    with pytest.raises(RuntimeError, match=r"grad_out must be \[B,K,u\*C\]"):
        torch.ops.jmm_fast.token_grid_gather_backward(torch.randn(3, 6, 12), visible, 4, 8, 25, 3)


def test_opcheck_compile_and_export():
    clips, visible = gather_problem()
    scatter = scatter_problem(dtype=BF16, embedding=F32)
    table = torch.ops.jmm_fast
    torch.library.opcheck(table.token_grid_gather_forward.default, (clips, visible, 4))
    torch.library.opcheck(table.token_grid_gather_backward.default, (torch.randn(3, 7, 12), visible, 4, 8, 25, 3))
    torch.library.opcheck(table.token_grid_scatter_forward.default, scatter)
    torch.library.opcheck(
        table.token_grid_scatter_backward.default, (torch.randn(3, 50, 64), scatter[1], 7, 25, 2, BF16)
    )

    class Both(torch.nn.Module):
        def forward(self, clips, visible, tokens, restore, mask_token, joint, time):
            patches = ops.token_grid_gather(clips, visible, backend="cpu")
            return patches, ops.token_grid_scatter(tokens, restore, mask_token, joint, time, backend="cpu")

    arguments = [clips, visible, *scatter]
    leaves = [x.requires_grad_() for x in arguments if x.is_floating_point()]
    eager = Both()(*arguments)
    expected = torch.autograd.grad([x.square().sum() for x in eager], leaves)
    compiled = torch.compile(Both(), fullgraph=True)(*arguments)
    grads = torch.autograd.grad([x.square().sum() for x in compiled], leaves)
    exported = torch.export.export(Both(), tuple(x.detach() for x in arguments)).module()(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(exported, eager, strict=True))
