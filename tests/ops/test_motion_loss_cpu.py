"""The C++ kernel of the motion loss against the plain twin in float64, for every instruction set of this machine."""

import pytest
import torch

from jmm_fast import ops, reference

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
def poison():
    """Every tensor that torch leaves uninitialised is full of NaN: an element the kernel forgets is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def problem(bodies=3, frames=8, joints=25, channels=3, *, patch=4, masked=None, dtype=torch.float32):
    """Clips that move by centimetres, as people do; ``masked`` tokens in every body and their predictions alone."""
    tokens = frames // patch * joints
    clips = torch.randn(bodies, 1, joints, channels) + 0.02 * torch.randn(bodies, frames, joints, channels).cumsum(1)
    mask = torch.rand(bodies, tokens) < 0.9
    if masked is not None:
        mask = torch.rand(bodies, tokens).argsort(dim=1) < masked
    rows = tokens if masked is None else masked
    return torch.randn(bodies, rows, patch * channels).to(dtype), clips, mask


def both(function, prediction, clips, mask, factor, options):
    leaf = prediction.detach().requires_grad_()
    loss = function(leaf, clips, mask, **options)
    (gradient,) = torch.autograd.grad(loss * factor, leaf)
    return loss.detach(), gradient


def furthest(a, b):
    return (a.double() - b).abs().max().item() if a.numel() else 0.0


def check(prediction, clips, mask, factor=1.0, **options):
    """Parity: at most twice the error of the twin in the same dtype plus the rounding of the largest result."""
    options = {"t_patch": 4, "stride": 1, "normalize": True, **options}
    ours = both(lambda *x, **o: ops.motion_loss(*x, backend="cpu", **o), prediction, clips, mask, factor, options)
    single = both(reference.motion_loss, prediction, clips, mask, factor, options)
    exact = both(reference.motion_loss, prediction.double(), clips.double(), mask, factor, options)
    assert [x.dtype for x in ours] == [torch.float32, prediction.dtype]
    for name, a, b, c in zip(("loss", "gradient"), ours, single, exact, strict=True):
        assert a.shape == c.shape and a.isfinite().all(), name
        error, largest = furthest(a, c), furthest(c, torch.zeros(()))
        bound = 2 * (furthest(b, c) + torch.finfo(a.dtype).eps * largest)
        assert error <= bound, f"{name}: error {error:.3g}, bound {bound:.3g}"
    return ours


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("frames, joints", [(4, 1), (4, 63), (8, 37), (12, 25), (4, 127), (40, 25), (120, 25)])
def test_parity_over_lengths(isa, frames, joints, dtype, normalize):
    tokens = frames // 4 * joints
    check(*problem(2, frames, joints, dtype=dtype), normalize=normalize)
    check(*problem(2, frames, joints, masked=tokens - tokens // 10 - 1, dtype=dtype), normalize=normalize)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("patch", [2, 3, 5])
def test_parity_over_token_sizes(isa, channels, patch):
    for joints in (1, 3, 17, 25):
        check(*problem(2, 3 * patch, joints, channels, patch=patch), t_patch=patch)
        check(*problem(2, 3 * patch, joints, channels, patch=patch, masked=joints + 1), t_patch=patch)


@pytest.mark.parametrize("stride", [1, 2, 4, 7, 11])
def test_parity_over_strides_of_the_motion(isa, stride):
    check(*problem(frames=12), stride=stride)
    check(*problem(frames=12, masked=50), stride=stride, normalize=False)


def test_tokens_of_one_number(isa):
    prediction, clips, mask = problem(2, 6, 5, 1, patch=1)
    check(prediction, clips, mask, t_patch=1, normalize=False)
    # The unbiased variance of one number is 0 / 0.
    for backend in ("cpu", "reference"):
        assert ops.motion_loss(prediction, clips, mask, t_patch=1, backend=backend).isnan()


@pytest.mark.parametrize("masked", [0, 1, 25, 49, 50])
def test_masked_tokens_alone(isa, masked):
    prediction, clips, mask = problem(masked=masked)
    loss, gradient = check(prediction, clips, mask, factor=3.0)
    whole = torch.randn(3, 50, 12)
    whole[mask] = prediction.flatten(0, 1)
    whole_loss, whole_gradient = check(whole, clips, mask, factor=3.0)
    torch.testing.assert_close(loss, whole_loss)
    torch.testing.assert_close(gradient.flatten(0, 1), whole_gradient[mask])
    assert not whole_gradient[~mask].any()


def test_nothing_masked_and_everything_masked(isa):
    prediction, clips, mask = problem()
    loss, gradient = check(prediction, clips, torch.zeros_like(mask))
    assert loss == 0 and not gradient.any()
    check(prediction, clips, torch.ones_like(mask))


@pytest.mark.parametrize("masked", [None, 1, 44, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_tokens_of_unknown_motion(isa, masked, dtype):
    prediction, clips, mask = problem(masked=masked, dtype=dtype)
    plain = check(prediction, clips, mask)
    for share in (0.0, 0.02, 0.5, 0.97, 1.0):
        valid = torch.rand(mask.shape) < share
        _, gradient = check(prediction, clips, mask, factor=3.0, valid=valid)
        counted = valid[mask].view(3, -1) if masked is not None else mask & valid
        assert not gradient[~counted].any() and gradient[counted].any() == counted.any()
        check(prediction, clips, mask, valid=valid.t().contiguous().t())
        check(prediction, clips, mask, valid=valid.repeat_interleave(2, dim=1)[:, ::2])
    everything = check(prediction, clips, mask, valid=torch.ones_like(mask))
    assert all(torch.equal(a, b) for a, b in zip(everything, plain, strict=True))


@pytest.mark.parametrize("frames, joints, channels, patch", [(120, 25, 3, 4), (40, 7, 2, 5), (12, 31, 3, 2)])
def test_tokens_of_unknown_motion_over_shapes(isa, frames, joints, channels, patch):
    for masked in (None, joints + 3):
        prediction, clips, mask = problem(2, frames, joints, channels, patch=patch, masked=masked)
        check(prediction, clips, mask, t_patch=patch, valid=torch.rand(mask.shape) < 0.6)


def test_strided_inputs(isa):
    for dtype in (torch.float32, torch.bfloat16):
        prediction, clips, mask = problem(dtype=dtype)
        check(prediction.transpose(1, 2).contiguous().transpose(1, 2), clips, mask)
        check(prediction.repeat_interleave(2, dim=2)[..., ::2], clips, mask)
        check(torch.cat([prediction, prediction], dim=2)[..., :12], clips, mask)
        check(prediction[:1].expand_as(prediction), clips[:, :1].expand_as(clips), mask[:1].expand_as(mask))
        check(prediction[:, :1].expand_as(prediction), clips[:, :, :, :1].expand_as(clips), mask)
    channels_first = clips.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    check(prediction, channels_first, mask.t().contiguous().t())
    check(prediction, clips.transpose(1, 2).contiguous().transpose(1, 2), mask.repeat_interleave(2, dim=1)[:, ::2])
    check(prediction, clips.flip(1)[:, ::2].repeat_interleave(2, dim=1), mask)


def test_nothing_outside_the_inputs_is_read(isa):
    def ringed(x, value):
        ring = torch.full([n + 2 for n in x.shape], value, dtype=x.dtype)
        inner = ring[tuple(slice(1, -1) for _ in x.shape)]
        return inner.copy_(x)

    def surrounded(x, value):
        around = torch.full((x.numel() + 64,), value, dtype=x.dtype)
        return around[32:-32].view(x.shape).copy_(x)

    for wrap in (ringed, surrounded):
        for masked in (None, 44):
            prediction, clips, mask = problem(masked=masked)
            clean = check(prediction, clips, mask)
            inputs = wrap(prediction, float("nan")), wrap(clips, float("nan")), wrap(mask, True)
            assert all(torch.equal(a, b) for a, b in zip(check(*inputs), clean, strict=True))


def test_nothing_is_left_from_the_call_before(isa):
    inputs = problem(frames=40, masked=200)
    clean = check(*inputs)
    bad = problem(frames=120, joints=31)
    bad[1].fill_(float("nan"))
    assert ops.motion_loss(*bad, backend="cpu").isnan()
    assert all(torch.equal(a, b) for a, b in zip(check(*inputs), clean, strict=True))


def test_bodies_without_motion(isa):
    prediction, clips, mask = problem(4)
    clips[1] = 0
    clips[2] = clips[2, :1]
    check(prediction, clips, mask)
    check(prediction, torch.zeros_like(clips), mask)


def test_a_small_wobble_on_a_large_drift(isa):
    prediction, clips, mask = problem(frames=40)
    drift = 0.5 * torch.arange(40.0)[:, None, None]
    # Steps of half a metre in every coordinate leave a variance of 1e-8: one pass over the squares would lose it.
    check(prediction, drift + 1e-4 * torch.randn_like(clips), mask)


def test_empty_batches(isa):
    for prediction, clips, mask in (problem(0), problem(0, masked=44), problem(2, 8, 0), problem(2, 8, 5, 3, masked=0)):
        loss, gradient = both(lambda *x, **o: ops.motion_loss(*x, backend="cpu", **o), prediction, clips, mask, 1.0, {})
        assert loss == 0 and gradient.shape == prediction.shape


def test_results_do_not_depend_on_the_number_of_threads(isa, threads):
    for inputs in (problem(37, 20, masked=100), problem(37, 20, dtype=torch.bfloat16)):

        def run(count, inputs=inputs):
            threads(count)
            return both(lambda *x, **o: ops.motion_loss(*x, backend="cpu", **o), *inputs, 1.0, {})

        first = run(1)
        for count in (1, 2, 3, 8):
            assert all(torch.equal(a, b) for a, b in zip(first, run(count), strict=True)), f"{count} threads"


def test_what_the_kernel_refuses_goes_to_the_plain_twin():
    prediction, clips, mask = problem()
    for inputs, message in (
        ((prediction.double(), clips, mask), r"float32 or bfloat16 prediction, got float64 \[3, 50, 12\]"),
        ((prediction, clips.double(), mask), r"float32 clips, got float64"),
        ((prediction, clips.clone().requires_grad_(), mask), "no gradient with respect to clips"),
    ):
        with pytest.raises(ValueError, match=f'motion_loss: backend "cpu" cannot run: it .*{message}'):
            ops.motion_loss(*inputs, backend="cpu")
        torch.testing.assert_close(
            ops.motion_loss(*inputs).double(), ops.motion_loss(*inputs, backend="reference").double()
        )


def test_the_operator_refuses_what_would_read_other_memory():
    prediction, clips, mask = problem(masked=44)
    forward = torch.ops.jmm_fast.motion_loss_forward
    for arguments, message in (
        ((prediction[:, :43], clips, mask), "prediction has 43 rows, .* a body has 44 masked tokens"),
        ((prediction[:2], clips, mask), "prediction must be a CPU tensor"),
        ((prediction[..., :11], clips, mask), "prediction must be a CPU tensor"),
        ((prediction, clips[:, :7], mask), "whole patches"),
        ((prediction, clips.double(), mask), "clips must be a float32 CPU tensor"),
        ((prediction.half(), clips, mask), "prediction must be float32 or bfloat16"),
        ((prediction, clips, mask[:, :49]), "mask must be a bool CPU tensor"),
        ((prediction, clips, mask.to(torch.uint8)), "mask must be a bool CPU tensor"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(*arguments, 4, 1, True, True)
    for valid in (mask[:, :49], mask[:2], mask.to(torch.uint8)):
        with pytest.raises(RuntimeError, match="valid must be a bool CPU tensor"):
            forward(prediction, clips, mask, 4, 1, True, True, valid)
    for stride in (0, 8):
        with pytest.raises(RuntimeError, match="stride must be in"):
            forward(prediction, clips, mask, 4, stride, True, True)


def test_the_graph_can_be_kept_but_not_differentiated_twice():
    prediction, clips, mask = problem()
    prediction.requires_grad_()
    loss = ops.motion_loss(prediction, clips, mask, backend="cpu")
    loss.backward(retain_graph=True)
    first = prediction.grad.clone()
    loss.backward()
    torch.testing.assert_close(prediction.grad, 2 * first)
    weight = torch.ones((), requires_grad=True)
    loss = ops.motion_loss(prediction, clips, mask, backend="cpu") * weight
    (gradient,) = torch.autograd.grad(loss, prediction, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("masked", [None, 44])
def test_opcheck_compile_and_export(masked):
    prediction, clips, mask = problem(masked=masked)
    for differentiate in (False, True):
        for valid in (None, torch.rand(mask.shape) < 0.5):
            torch.library.opcheck(
                torch.ops.jmm_fast.motion_loss_forward.default,
                (prediction, clips, mask, 4, 1, True, differentiate, valid),
            )
    prediction.requires_grad_()

    class Loss(torch.nn.Module):
        def forward(self, prediction, clips, mask):
            return 2 * ops.motion_loss(prediction, clips, mask, backend="cpu")

    eager = Loss()(prediction, clips, mask)
    (expected,) = torch.autograd.grad(eager, prediction)
    compiled = torch.compile(Loss(), fullgraph=True)(prediction, clips, mask)
    assert torch.equal(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, prediction)[0], expected)
    exported = torch.export.export(Loss(), (prediction.detach(), clips, mask)).module()
    assert torch.equal(exported(prediction, clips, mask), eager)
