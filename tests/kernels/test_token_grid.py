"""The Triton kernels of the token grid against the plain twins in float64: on a GPU, or in Triton's interpreter."""

import pytest
import torch

from jmm_fast import ops, reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
pytestmark = pytest.mark.usefixtures("poison")


def results(function, inputs, grad_out):
    """Output and gradient of every input."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))]


@pytest.fixture
def check_gather(parity, device):
    def check(clips, visible, t_patch=4, grad_out=None):
        if grad_out is None:
            grad_out = torch.randn(*visible.shape, t_patch * clips.shape[3], device=device)
        patches, grad = parity(
            ("patches", "dclips"),
            results(lambda x: ops.token_grid_gather(x, visible, t_patch=t_patch, backend="triton"), [clips], grad_out),
            results(lambda x: reference.token_grid_gather(x, visible, t_patch), [clips], grad_out),
            results(
                lambda x: reference.token_grid_gather(x, visible, t_patch),
                [clips.double()],
                grad_out.to(clips.dtype).double(),
            ),
        )
        assert torch.equal(patches, reference.token_grid_gather(clips, visible, t_patch))
        return patches, grad

    return check


@pytest.fixture
def check_scatter(parity, device):
    def check(tokens, restore, *others, grad_out=None):
        inputs = [tokens, *others]
        if grad_out is None:
            grad_out = torch.randn(*restore.shape, tokens.shape[2], device=device)

        def ours(x, *rest):
            return ops.token_grid_scatter(x, restore, *rest, backend="triton")

        def twin(x, *rest):
            return reference.token_grid_scatter(x, restore, *rest)

        first = results(ours, inputs, grad_out)
        return parity(
            ("grid", "dtokens", "dmask_token", "djoint", "dtime"),
            first,
            results(twin, inputs, grad_out),
            results(twin, [x.double() for x in inputs], grad_out.to(first[0].dtype).double()),
        )

    return check


def draw(bodies, tokens, kept, device):
    """Visible tokens, ascending, and where each token sits in [visible, masked]."""
    order = torch.rand(bodies, tokens, device=device).argsort(dim=1)
    visible, hidden = order[:, :kept].sort(dim=1).values, order[:, kept:].sort(dim=1).values
    return visible, torch.cat([visible, hidden], 1).argsort(dim=1)


@pytest.fixture
def gather_problem(device):
    def make(bodies=2, frames=8, joints=25, channels=3, kept=7, patch=4, dtype=F32):
        clips = torch.randn(bodies, frames, joints, channels, device=device).to(dtype)
        return clips, draw(bodies, frames // patch * joints, kept, device)[0]

    return make


@pytest.fixture
def scatter_problem(device):
    def make(bodies=2, steps=2, joints=25, kept=7, width=40, dtype=F32, embedding=None):
        _, restore = draw(bodies, steps * joints, kept, device)
        tokens = torch.randn(bodies, kept, width, device=device).to(dtype)
        others = [torch.randn(*n, width, device=device).to(embedding or dtype) for n in ((), (joints,), (steps,))]
        return tokens, restore, *others

    return make


LENGTHS = [(1, 1, 1), (1, 63, 6), (2, 37, 7), (3, 25, 75), (1, 127, 1), (10, 25, 25), (30, 25, 74)]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("steps, joints, kept", LENGTHS)
def test_gather_over_lengths(check_gather, gather_problem, steps, joints, kept, dtype):
    check_gather(*gather_problem(2, 4 * steps, joints, kept=kept, dtype=dtype))


@pytest.mark.parametrize("dtype, embedding", [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F32), (F32, F16)], ids=str)
@pytest.mark.parametrize("steps, joints, kept", LENGTHS)
def test_scatter_over_lengths(check_scatter, scatter_problem, steps, joints, kept, dtype, embedding):
    grid, *_ = check_scatter(*scatter_problem(2, steps, joints, kept, 40, dtype, embedding))
    assert grid.dtype == torch.promote_types(dtype, embedding)


def test_a_whole_grid_of_the_decoder(check_scatter, scatter_problem):
    check_scatter(*scatter_problem(2, 30, 25, 74, 256, BF16, F32))


@pytest.mark.parametrize("channels, patch", [(1, 1), (2, 4), (3, 1), (3, 5), (4, 2), (6, 30)])
def test_gather_is_exact_for_any_token_size(check_gather, gather_problem, channels, patch):
    check_gather(*gather_problem(2, 2 * patch, 17, channels, 9, patch), patch)


@pytest.mark.parametrize("width", [1, 3, 16, 17, 64, 65, 128, 300])
def test_scatter_over_widths(check_scatter, scatter_problem, width):
    check_scatter(*scatter_problem(width=width))


def test_scatter_equals_the_twin_bit_for_bit_in_float32(check_scatter, scatter_problem, device):
    inputs = scatter_problem()
    grad = torch.randn(2, 50, 40, device=device)
    grid, dtokens, *_ = check_scatter(*inputs, grad_out=grad)
    assert torch.equal(grid, reference.token_grid_scatter(*inputs))
    place = inputs[1].argsort(dim=1)[:, : dtokens.shape[1]]
    assert torch.equal(dtokens, grad.gather(1, place[..., None].expand(-1, -1, 40)))


@pytest.mark.parametrize("kept", [0, 1, 49, 50])
def test_few_and_all_visible(check_gather, check_scatter, gather_problem, scatter_problem, kept):
    check_gather(*gather_problem(kept=kept))
    *_, dmask, _, _ = check_scatter(*scatter_problem(kept=kept))
    assert dmask.any() == (kept < 50)


def test_sums_over_many_bodies(check_scatter, scatter_problem, device):
    # Sums that cancel but for a little, over several groups of bodies.
    grad = 100 + torch.randn(70, 10, 20, device=device)
    check_scatter(*scatter_problem(bodies=70, joints=5, kept=3, width=20), grad_out=grad)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_strided_inputs(check_gather, check_scatter, gather_problem, scatter_problem, dtype, device):
    clips, visible = gather_problem(dtype=dtype)
    grad = torch.randn(7, 12, 2, device=device).permute(2, 0, 1)
    check_gather(clips.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), visible.t().contiguous().t(), 4, grad)
    check_gather(clips[:1].expand_as(clips), visible[:1].expand_as(visible), 4, grad[:, :, :1].expand_as(grad))
    check_gather(clips[:, :, :1, :1].expand_as(clips), visible.repeat_interleave(2, dim=1)[:, ::2])
    tokens, restore, mask_token, joint, time = scatter_problem(dtype=dtype)
    grad = torch.randn(2, 1, 1, device=device).expand(2, 50, 40)
    check_scatter(
        tokens.transpose(1, 2).contiguous().transpose(1, 2), restore.t().contiguous().t(), mask_token, joint, time
    )
    check_scatter(torch.cat([tokens, tokens], 2)[..., :40], restore, mask_token[:1].expand(40), joint, time)
    check_scatter(tokens[:1].expand_as(tokens), restore, mask_token, joint.t().contiguous().t(), time, grad_out=grad)
    check_scatter(tokens, restore.repeat_interleave(2, dim=1)[:, ::2], mask_token, joint[:1].expand_as(joint), time)
    grad = torch.randn(50, 2, 80, device=device)[..., ::2].transpose(0, 1)
    check_scatter(tokens[..., :1].expand_as(tokens), restore, mask_token, joint, time[:1].expand(2, -1), grad_out=grad)


def test_tokens_that_are_named_twice_or_never(check_gather, check_scatter, gather_problem, scatter_problem):
    clips, visible = gather_problem()
    check_gather(clips, visible[:, [0, 0, 3, 3, 3, 1]])
    tokens, restore, *others = scatter_problem()
    check_scatter(tokens, restore % 5, *others)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_nothing_outside_the_inputs_is_read(
    check_gather, check_scatter, gather_problem, scatter_problem, ringed, dtype, device
):
    grad = torch.randn(2, 7, 12, device=device)
    inputs = gather_problem(dtype=dtype)
    clean, again = check_gather(*inputs, 4, grad), check_gather(*map(ringed, inputs), 4, ringed(grad))
    assert all(torch.equal(a, b) for a, b in zip(again, clean, strict=True))
    grad = torch.randn(2, 50, 41, device=device)
    inputs = scatter_problem(width=41, dtype=dtype)
    clean, again = (
        check_scatter(*inputs, grad_out=grad),
        check_scatter(*map(ringed, inputs), grad_out=ringed(grad)),
    )
    assert all(torch.equal(a, b) for a, b in zip(again, clean, strict=True))


def test_a_visible_gradient_does_not_reach_the_mask_token(scatter_problem, device):
    tokens, restore, *others = scatter_problem()
    grad = torch.randn(2, 50, 40, device=device)
    grad[restore < 7] = float("inf")
    _, dtokens, dmask, _, _ = results(
        lambda x, *rest: ops.token_grid_scatter(x, restore, *rest, backend="triton"), [tokens, *others], grad
    )
    assert dtokens.isinf().all() and dmask.isfinite().all()


def test_numbers_outside_the_grid_reach_no_other_memory(gather_problem, scatter_problem):
    clips, visible = gather_problem()
    far = torch.full_like(visible, 2**31 - 1)
    assert not torch.ops.jmm_fast.token_grid_triton_gather_forward(clips, far, 4).any()
    assert not torch.ops.jmm_fast.token_grid_triton_gather_forward(clips, -far, 4).any()
    tokens, restore, *others = scatter_problem()
    out = torch.ops.jmm_fast.token_grid_triton_scatter_forward(tokens, restore - 2**40, *others)
    assert torch.equal(out, torch.ops.jmm_fast.token_grid_triton_scatter_forward(tokens, restore + 50, *others))


def test_repeatable_bit_for_bit(check_scatter, scatter_problem, device):
    inputs, grad = scatter_problem(40, 2, 5, 3, 20, BF16, F32), torch.randn(40, 10, 20, device=device)
    first, second = check_scatter(*inputs, grad_out=grad), check_scatter(*inputs, grad_out=grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_empty_batches(check_gather, check_scatter, gather_problem, scatter_problem):
    check_gather(*gather_problem(bodies=0))
    _, *grads = check_scatter(*scatter_problem(bodies=0))
    assert not any(grad.any() for grad in grads)
    check_scatter(*scatter_problem(steps=0, kept=0))


def test_other_dtypes_are_refused(gather_problem, scatter_problem):
    clips, visible = gather_problem(dtype=torch.float64)
    with pytest.raises(ValueError, match="it takes float32, bfloat16 or float16 clips, got float64"):
        ops.token_grid_gather(clips, visible, backend="triton")
    tokens, restore, mask_token, joint, time = scatter_problem()
    with pytest.raises(ValueError, match="it takes float32, bfloat16 or float16 joint_embedding, got float64"):
        ops.token_grid_scatter(tokens, restore, mask_token, joint.double(), time, backend="triton")


def test_opcheck_and_compile(gather_problem, scatter_problem, device):
    clips, visible = gather_problem()
    scatter = scatter_problem(dtype=BF16, embedding=F32)
    grads = torch.randn(2, 7, 12, device=device), torch.randn(2, 50, 40, device=device)
    table = torch.ops.jmm_fast
    torch.library.opcheck(table.token_grid_triton_gather_forward.default, (clips, visible, 4))
    torch.library.opcheck(table.token_grid_triton_gather_backward.default, (grads[0], visible, 4, 8, 25, 3))
    torch.library.opcheck(table.token_grid_triton_scatter_forward.default, scatter)
    torch.library.opcheck(table.token_grid_triton_scatter_backward.default, (grads[1], scatter[1], 7, 25, 2, BF16))

    def loss(clips, tokens, *others):
        patches = ops.token_grid_gather(clips, visible, backend="triton")
        grid = ops.token_grid_scatter(tokens, scatter[1], *others, backend="triton")
        return patches.square().sum() + grid.square().sum()

    leaves = [x.requires_grad_() for x in (clips, scatter[0], *scatter[2:])]
    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)
