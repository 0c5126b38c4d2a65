"""The Triton kernels of the motion loss against the plain twin in float64: on a GPU, or in Triton's interpreter."""

import pytest
import torch

from jmm_fast import ops, reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture
def problem(device):
    def make(bodies=2, frames=8, joints=25, channels=3, *, patch=4, masked=None, dtype=F32):
        """Clips that move by centimetres; with ``masked``, that many in every body, and their predictions alone."""
        tokens = frames // patch * joints
        clips = torch.randn(bodies, 1, joints, channels, device=device)
        clips = clips + 0.02 * torch.randn(bodies, frames, joints, channels, device=device).cumsum(1)
        mask = torch.rand(bodies, tokens, device=device) < 0.9
        if masked is not None:
            mask = torch.rand(bodies, tokens, device=device).argsort(dim=1) < masked
        rows = tokens if masked is None else masked
        return torch.randn(bodies, rows, patch * channels, device=device).to(dtype), clips, mask

    return make


def both(function, prediction, clips, mask, factor, options):
    leaf = prediction.detach().requires_grad_()
    loss = function(leaf, clips, mask, **options)
    (gradient,) = torch.autograd.grad(loss * factor, leaf)
    return loss.detach(), gradient


def kernel(*inputs, **options):
    return ops.motion_loss(*inputs, backend="triton", **options)


@pytest.fixture
def check(parity):
    def run(prediction, clips, mask, factor=1.0, **options):
        options = {"t_patch": 4, "stride": 1, "normalize": True, **options}
        ours = both(kernel, prediction, clips, mask, factor, options)
        assert [x.dtype for x in ours] == [F32, prediction.dtype]
        single = both(reference.motion_loss, prediction, clips, mask, factor, options)
        exact = both(reference.motion_loss, prediction.double(), clips.double(), mask, factor, options)
        return parity(("loss", "gradient"), ours, single, exact)

    return run


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("frames, joints", [(4, 1), (4, 63), (8, 37), (12, 25), (4, 127), (40, 25), (120, 25)])
def test_parity_over_lengths(check, problem, frames, joints, dtype, normalize):
    tokens = frames // 4 * joints
    check(*problem(2, frames, joints, dtype=dtype), normalize=normalize)
    # As a loss scaler does it: unscaled, gradients this small would vanish in float16.
    inputs = problem(2, frames, joints, masked=tokens - tokens // 10 - 1, dtype=dtype)
    check(*inputs, 1024.0, normalize=normalize)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("patch", [2, 3, 5, 30])
def test_parity_over_token_sizes(check, problem, channels, patch):
    for joints in (1, 17):
        check(*problem(2, 3 * patch, joints, channels, patch=patch), t_patch=patch)
        check(*problem(2, 3 * patch, joints, channels, patch=patch, masked=joints + 1), t_patch=patch)


@pytest.mark.parametrize("stride", [1, 2, 4, 7, 11])
def test_parity_over_strides_of_the_motion(check, problem, stride):
    check(*problem(frames=12), stride=stride)
    check(*problem(frames=12, masked=50), stride=stride, normalize=False)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_tokens_of_one_number(check, problem):
    prediction, clips, mask = problem(2, 6, 5, 1, patch=1)
    check(prediction, clips, mask, t_patch=1, normalize=False)
    # The unbiased variance of one number is 0 / 0.
    assert kernel(prediction, clips, mask, t_patch=1).isnan()


@pytest.mark.parametrize("masked", [0, 1, 49, 50])
def test_masked_tokens_alone(check, problem, masked, device):
    prediction, clips, mask = problem(masked=masked)
    loss, gradient = check(prediction, clips, mask, factor=3.0)
    whole = torch.randn(2, 50, 12, device=device)
    whole[mask] = prediction.flatten(0, 1)
    whole_loss, whole_gradient = check(whole, clips, mask, factor=3.0)
    torch.testing.assert_close(loss, whole_loss)
    torch.testing.assert_close(gradient.flatten(0, 1), whole_gradient[mask])
    assert not whole_gradient[~mask].any()


def test_nothing_masked_and_everything_masked(check, problem):
    prediction, clips, mask = problem()
    loss, gradient = check(prediction, clips, torch.zeros_like(mask))
    assert loss == 0 and not gradient.any()
    check(prediction, clips, torch.ones_like(mask))


@pytest.mark.parametrize("masked", [None, 1, 44])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_tokens_of_unknown_motion(check, problem, masked, dtype):
    prediction, clips, mask = problem(masked=masked, dtype=dtype)
    plain = check(prediction, clips, mask)
    for share in (0.0, 0.5, 0.97):
        valid = torch.rand(mask.shape, device=mask.device) < share
        _, gradient = check(prediction, clips, mask, factor=3.0, valid=valid)
        counted = valid[mask].view(2, -1) if masked is not None else mask & valid
        assert not gradient[~counted].any() and gradient[counted].any() == counted.any()
        check(prediction, clips, mask, valid=valid.t().contiguous().t())
    everything = check(prediction, clips, mask, valid=torch.ones_like(mask))
    assert all(torch.equal(a, b) for a, b in zip(everything, plain, strict=True))


def test_a_whole_clip_with_tokens_of_unknown_motion(check, problem):
    for masked in (None, 676):
        prediction, clips, mask = problem(1, 120, masked=masked, dtype=BF16)
        check(prediction, clips, mask, valid=torch.rand(mask.shape, device=mask.device) < 0.8)


def test_more_than_is_taken_at_once(check, problem, monkeypatch):
    from jmm_fast.kernels import motion_loss

    monkeypatch.setattr(motion_loss, "_TOGETHER", 16)
    check(*problem(10, 40, masked=20))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_strided_inputs(check, problem, dtype):
    prediction, clips, mask = problem(dtype=dtype)
    check(prediction.transpose(1, 2).contiguous().transpose(1, 2), clips, mask)
    check(prediction.repeat_interleave(2, dim=2)[..., ::2], clips, mask)
    check(prediction[:1].expand_as(prediction), clips[:, :1].expand_as(clips), mask[:1].expand_as(mask))
    check(prediction[:, :1].expand_as(prediction), clips[:, :, :, :1].expand_as(clips), mask)
    check(prediction, clips.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), mask.t().contiguous().t())
    check(prediction, clips.transpose(1, 2).contiguous().transpose(1, 2), mask.repeat_interleave(2, dim=1)[:, ::2])
    check(prediction, clips.flip(1)[:, ::2].repeat_interleave(2, dim=1), mask)


def test_nothing_outside_the_inputs_is_read(check, problem, ringed):
    for masked in (None, 44):
        inputs = problem(masked=masked)
        clean, again = check(*inputs), check(*map(ringed, inputs))
        assert all(torch.equal(a, b) for a, b in zip(again, clean, strict=True))


def test_what_does_not_count_may_be_anything(problem):
    prediction, clips, mask = problem()
    mask[:, 25:] = False
    clips[:, 5:] = float("nan")
    prediction[~mask] = float("nan")
    loss, gradient = both(kernel, prediction, clips, mask, 1.0, {})
    assert loss.isfinite() and gradient.isfinite().all() and not gradient[~mask].any()


def test_bodies_without_motion(check, problem):
    prediction, clips, mask = problem(3)
    clips[1] = 0
    clips[2] = clips[2, :1]
    check(prediction, clips, mask)
    check(prediction, torch.zeros_like(clips), mask)


def test_a_small_wobble_on_a_large_drift(check, problem):
    prediction, clips, mask = problem(frames=40)
    drift = 0.5 * torch.arange(40.0, device=clips.device)[:, None, None]
    # Steps of half a metre in every coordinate leave a variance of 1e-8: one pass over the squares would lose it.
    check(prediction, drift + 1e-4 * torch.randn_like(clips), mask)


def test_repeatable_bit_for_bit(check, problem):
    inputs = problem(5, 20)
    first, second = check(*inputs), check(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_empty_batches(problem):
    for inputs in (problem(0), problem(0, masked=44), problem(2, 8, 0), problem(2, 8, 5, 3, masked=0)):
        loss, gradient = both(kernel, *inputs, 1.0, {})
        assert loss == 0 and gradient.shape == inputs[0].shape


def test_what_the_kernel_refuses(problem):
    prediction, clips, mask = problem()
    for inputs, message in (
        ((prediction.double(), clips, mask), r"float32, bfloat16 or float16 prediction, got float64 \[2, 50, 12\]"),
        ((prediction, clips.double(), mask), r"float32 clips, got float64"),
        ((prediction, clips.clone().requires_grad_(), mask), "no gradient with respect to clips"),
    ):
        with pytest.raises(ValueError, match=f'motion_loss: backend "triton" cannot run: it .*{message}'):
            kernel(*inputs)


@pytest.mark.parametrize("masked", [None, 44])
def test_opcheck_and_compile(problem, masked, device):
    prediction, clips, mask = problem(masked=masked)
    table = torch.ops.jmm_fast
    for differentiate in (False, True):
        for valid in (None, torch.rand(mask.shape, device=device) < 0.5):
            arguments = (prediction, clips, mask, 4, 1, True, differentiate, valid)
            torch.library.opcheck(table.motion_loss_triton_forward.default, arguments)
    _, errors, factor = table.motion_loss_triton_forward(*arguments)
    torch.library.opcheck(table.motion_loss_triton_backward.default, (torch.ones((), device=device), errors, factor))
    prediction.requires_grad_()

    def loss(prediction):
        return 2 * kernel(prediction, clips, mask)

    eager = torch.autograd.grad(loss(prediction), prediction)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(prediction), prediction)
    assert torch.equal(eager[0], compiled[0])
