import numpy as np
import pytest
import torch

from jmm_fast import ops, reference


def loss_inputs(dtype=torch.float32, bodies=2, frames=8, joints=5):
    clips = torch.randn(bodies, frames, joints, 3, dtype=dtype)
    prediction = torch.randn(bodies, frames // 4 * joints, 12, dtype=dtype)
    mask = torch.rand(bodies, frames // 4 * joints) < 0.6
    return prediction, clips, mask


@pytest.mark.parametrize("name", ["pretrain_small", "pretrain_small_rawloss", "masking_t120"])
def test_golden_loss(golden, name):
    arrays = np.load(golden(f"{name}.npz"), allow_pickle=True)
    clips = torch.from_numpy(arrays["x"]).permute(0, 4, 2, 3, 1).flatten(0, 1)
    mask = torch.from_numpy(arrays["mask"]).bool()
    loss = ops.motion_loss(torch.from_numpy(arrays["pred"]), clips, mask, normalize=bool(arrays["cfg_norm_skes_loss"]))
    np.testing.assert_allclose(loss.item(), float(arrays["loss"]), rtol=1e-6)


@pytest.mark.parametrize("stride", [1, 3, 7])
@pytest.mark.parametrize("normalize", [True, False])
def test_loss_is_the_formula(stride, normalize):
    prediction, clips, mask = loss_inputs(torch.float64)
    total = 0.0
    for body in range(2):
        for token in range(10):
            if not mask[body, token]:
                continue
            step, joint = divmod(token, 5)
            motion = []
            for frame in range(4 * step, 4 * step + 4):
                moved = frame + stride < 8
                motion += (
                    clips[body, frame + stride, joint] - clips[body, frame, joint] if moved else torch.zeros(3)
                ).tolist()
            motion = np.array(motion)
            if normalize:
                motion = (motion - motion.mean()) / np.sqrt(motion.var(ddof=1) + 1e-6)
            total += np.mean((prediction[body, token].numpy() - motion) ** 2)
    ours = ops.motion_loss(prediction, clips, mask, stride=stride, normalize=normalize)
    np.testing.assert_allclose(ours.item(), total / mask.sum().item(), rtol=1e-10)


def test_visible_tokens_do_not_count():
    prediction, clips, mask = loss_inputs()
    loss = ops.motion_loss(prediction, clips, mask)
    prediction[~mask] = 1e6
    assert torch.equal(ops.motion_loss(prediction, clips, mask), loss)
    assert ops.motion_loss(prediction, clips, torch.zeros_like(mask)) == 0


def masked_only(bodies=3, frames=8, joints=5, masked=6, dtype=torch.float32):
    prediction, clips, _ = loss_inputs(dtype, bodies, frames, joints)
    mask = torch.rand(prediction.shape[:2]).argsort(dim=1) < masked
    return prediction, clips, mask


@pytest.mark.parametrize("masked", [0, 1, 6, 10])
def test_predictions_of_masked_tokens_alone_give_the_same(masked):
    prediction, clips, mask = masked_only(masked=masked, dtype=torch.float64)
    whole = prediction.clone().requires_grad_()
    loss = ops.motion_loss(whole, clips, mask)
    loss.backward()
    alone = prediction[mask].reshape(3, masked, 12).clone().requires_grad_()
    ours = ops.motion_loss(alone, clips, mask)
    ours.backward()
    torch.testing.assert_close(ours, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(alone.grad, whole.grad[mask].reshape(3, masked, 12), rtol=1e-12, atol=0)


def test_predictions_of_masked_tokens_alone_need_as_many_in_every_body():
    prediction, clips, mask = masked_only()
    mask[1, mask[1].nonzero()[0]] = False
    for count in (5, 6, 7):
        with pytest.raises(ValueError, match=rf"got \[3, {count}, 12\] where bodies have 5 to 6 of 10 tokens masked"):
            ops.motion_loss(prediction[:, :count], clips, mask)


@pytest.mark.parametrize("masked", [0, 6, 10])
def test_tokens_of_unknown_motion_do_not_count(masked):
    prediction, clips, mask = masked_only(masked=masked, dtype=torch.float64)
    valid = torch.rand(mask.shape) < 0.5
    whole = prediction.clone().requires_grad_()
    loss = ops.motion_loss(whole, clips, mask, valid=valid)
    loss.backward()
    torch.testing.assert_close(loss, ops.motion_loss(whole, clips, mask & valid))
    assert not whole.grad[~(mask & valid)].any()
    alone = prediction[mask].reshape(3, masked, 12).requires_grad_()
    ours = ops.motion_loss(alone, clips, mask, valid=valid)
    ours.backward()
    torch.testing.assert_close(ours, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(alone.grad, whole.grad[mask].reshape(3, masked, 12), rtol=1e-12, atol=0)
    for inputs in (whole, alone):
        assert ops.motion_loss(inputs, clips, mask, valid=torch.zeros_like(mask)) == 0
        everything = ops.motion_loss(inputs, clips, mask, valid=torch.ones_like(mask))
        assert torch.equal(everything, ops.motion_loss(inputs, clips, mask))


def test_empty_bodies_are_finite_and_half_precision_is_summed_in_float32():
    prediction, clips, mask = loss_inputs(bodies=3)
    clips[1] = 0
    assert torch.isfinite(ops.motion_loss(prediction, clips, mask))
    half = ops.motion_loss(prediction.bfloat16(), clips, mask)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, ops.motion_loss(prediction.bfloat16().float(), clips, mask))


def test_gradients():
    prediction, clips, mask = loss_inputs(torch.float64)
    prediction.requires_grad_()
    clips.requires_grad_()
    for normalize in (True, False):
        assert torch.autograd.gradcheck(
            lambda p, c, n=normalize: ops.motion_loss(p, c, mask, normalize=n), (prediction, clips)
        )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prediction": torch.zeros(2, 10, 11)}, r"prediction must be floating \[2, 10, 12\], or of the masked"),
        ({"prediction": torch.zeros(2, 11, 12)}, r"prediction must be floating \[2, 10, 12\], or of the masked"),
        ({"mask": torch.zeros(2, 10)}, r"mask must be bool \[2, 10\], got float32 \[2, 10\]"),
        ({"valid": torch.zeros(2, 10)}, r"valid must be bool \[2, 10\], got float32 \[2, 10\]"),
        ({"stride": 8}, r"stride must be in \[1, 8\), got 8"),
        ({"stride": 0}, "stride must be in"),
    ],
)
def test_bad_arguments(change, message):
    prediction, clips, mask = loss_inputs()
    with pytest.raises(ValueError, match=message):
        ops.motion_loss(**{"prediction": prediction, "clips": clips, "mask": mask} | change)


def test_opcheck_compile_and_export():
    prediction, clips, mask = loss_inputs()
    prediction.requires_grad_()
    valid = torch.rand(mask.shape) < 0.5
    options = {"t_patch": 4, "stride": 1, "normalize": True}
    for given in (options, {**options, "valid": valid}):
        torch.library.opcheck(torch.ops.jmm_fast.motion_loss.default, (prediction, clips, mask), given)

    class Loss(torch.nn.Module):
        def forward(self, prediction, clips, mask):
            return ops.motion_loss(prediction, clips, mask)

    eager = Loss()(prediction, clips, mask)
    (expected,) = torch.autograd.grad(eager, prediction)
    compiled = torch.compile(Loss(), fullgraph=True)(prediction, clips, mask)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, prediction)[0], expected)
    exported = torch.export.export(Loss(), (prediction, clips, mask)).module()
    torch.testing.assert_close(exported(prediction, clips, mask), eager)


def test_target_normalisation_uses_the_unbiased_variance():
    target = reference.motion_target(torch.randn(1, 8, 5, 3), t_patch=4)
    torch.testing.assert_close(target.var(-1, correction=1), torch.ones(1, 10), rtol=1e-3, atol=1e-3)
