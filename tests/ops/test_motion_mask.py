import math

import numpy as np
import pytest
import torch

from jmm_fast import ops, reference


def bodies(count=3, frames=24, joints=25, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, frames, joints, 3, generator=generator).cumsum(1) * 0.02


@pytest.mark.parametrize("name", ["pretrain_small", "pretrain_small_rawloss", "masking_t120"])
def test_golden_masks_are_exact(golden, name):
    arrays = np.load(golden(f"{name}.npz"), allow_pickle=True)
    x = torch.from_numpy(arrays["x"])
    clips = x.permute(0, 4, 2, 3, 1).flatten(0, 1)
    drawn = ops.motion_mask(
        clips,
        mask_ratio=float(arrays["mask_ratio"]),
        tau=float(arrays["tau"]),
        uniform=torch.from_numpy(arrays["uniform"]),
    )
    assert torch.equal(drawn.mask, torch.from_numpy(arrays["mask"]).bool())
    assert torch.equal(drawn.visible, torch.from_numpy(arrays["ids_keep"]).long().sort(1).values)
    np.testing.assert_allclose(drawn.probability, arrays["prob"], rtol=1e-4)
    scores = reference.motion_scores(clips, t_patch=4, variant="released").flatten(1)
    logits = scores / (scores.amax(1, keepdim=True) * float(arrays["tau"]) + 1e-10)
    np.testing.assert_allclose(logits, arrays["logits"], rtol=1e-4, atol=1e-6)


def by_hand(clip, variant, gate):
    """Scores of one body in float64, written with loops straight from the formulas."""
    frames, joints, _ = clip.shape
    scores = np.zeros((frames // 4, joints))
    for step in range(1, frames // 4):
        for joint in range(joints):
            a = clip[4 * step : 4 * step + 4, joint].astype(np.float64).ravel()
            b = clip[4 * step - 4 : 4 * step, joint].astype(np.float64).ravel()
            dif = np.abs(a - b).mean()
            a, b = a - a.mean(), b - b.mean()
            norm = math.sqrt((a * a).sum()) * math.sqrt((b * b).sum()) + 1e-10
            if variant == "mamp":
                scores[step, joint] = dif
            elif variant == "released":
                scores[step, joint] = dif + np.abs(a * b / norm).mean()
            else:
                scores[step, joint] = gate * dif + (1 - gate) * abs((a * b).sum() / norm)
    scores[0] = scores[1]
    return scores


@pytest.mark.parametrize("variant, gate", [("released", None), ("mamp", None), ("paper", 0.5), ("paper", 0.2)])
def test_scores_match_the_formulas(variant, gate):
    clips = bodies()
    scores = reference.motion_scores(clips, t_patch=4, variant=variant, gate=gate)
    for body in range(3):
        np.testing.assert_allclose(scores[body], by_hand(clips[body].numpy(), variant, gate), rtol=2e-5, atol=1e-6)


def test_none_gate_of_paper_is_a_half():
    clips = bodies()
    assert torch.equal(
        ops.motion_mask(clips, variant="paper").probability,
        ops.motion_mask(clips, variant="paper", gate=0.5).probability,
    )


def test_restore_inverts_visible_then_masked():
    drawn = ops.motion_mask(bodies(), mask_ratio=0.75)
    assert (drawn.visible.diff(dim=1) > 0).all()
    for body in range(3):
        masked = torch.nonzero(drawn.mask[body])[:, 0]
        order = torch.cat([drawn.visible[body], masked])
        assert torch.equal(order[drawn.restore[body]], torch.arange(150))
    assert drawn.mask.sum(1).tolist() == [150 - 37] * 3
    torch.testing.assert_close(drawn.probability.sum(1), torch.ones(3))


def test_visible_tokens_are_the_smallest_keys():
    clips = bodies()
    draws = torch.rand(3, 150, dtype=torch.float64)
    drawn = ops.motion_mask(clips.double(), uniform=draws)
    keys = drawn.probability.log() - torch.log(-torch.log(draws + 1e-10) + 1e-10)
    assert torch.equal(drawn.visible, keys.argsort(1)[:, :14].sort(1).values)


def test_74_of_750_stay_visible_at_the_released_ratio():
    assert ops.motion_mask(bodies(1, 120)).visible.shape == (1, 74)


def test_ties_keep_the_lower_token():
    drawn = ops.motion_mask(torch.zeros(1, 8, 25, 3), mask_ratio=0.8, uniform=torch.full((1, 50), 0.5))
    assert drawn.visible.tolist() == [list(range(9))]


def test_moving_joints_are_masked_more_often():
    clips = torch.zeros(400, 24, 25, 3)
    clips[:, :, 7] = torch.arange(24)[:, None] * 0.1
    mask = ops.motion_mask(clips, mask_ratio=0.5, tau=0.3, variant="mamp").mask.view(400, 6, 25)
    assert mask[:, :, 7].float().mean() > 0.85 > mask[:, :, 8].float().mean()


def test_a_body_draws_the_same_mask_in_any_batch():
    clips, ids = bodies(6), torch.tensor([5, 9, 5 + (1 << 32), 77, 0, 3])
    whole = ops.motion_mask(clips, seed=11, epoch=4, clip_ids=ids)
    part = ops.motion_mask(clips[2:4], seed=11, epoch=4, clip_ids=ids[2:4])
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[2:4], b)
    other = ops.motion_mask(clips, seed=11, epoch=5, clip_ids=ids)
    assert not torch.equal(other.mask, whole.mask)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_epoch_in_memory_draws_what_the_number_draws(backend):
    clips, ids, epoch = bodies(4), torch.tensor([5, 9, 5 + (1 << 32), 77]), torch.tensor(0)
    drawn = []
    for number in (0, 1, 2**32 - 1):
        epoch.fill_(number)
        ours, other = (
            ops.motion_mask(clips, seed=11, epoch=given, clip_ids=ids, backend=backend) for given in (epoch, number)
        )
        assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))
        drawn.append(ours.mask)
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


def test_strided_clips_and_empty_bodies():
    clips = bodies(4)
    clips[1] = 0
    strided = clips.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    for a, b in zip(ops.motion_mask(clips), ops.motion_mask(strided), strict=True):
        assert torch.equal(a, b)
    assert torch.isfinite(ops.motion_mask(clips).probability).all()


def by_hand_with_missing(clip, valid, uniform, kept, variant):
    """Visible tokens of one body, from the formulas: a score is known where its token and the one before were seen."""
    joints = clip.shape[1]
    scores = by_hand(clip, variant, 0.5).ravel()
    for token in range(len(scores)):
        later = max(token, token % joints + joints)
        if not (valid[later] and valid[later - joints]):
            scores[token] = 0
    z = scores / (scores.max() * 0.8 + 1e-10)
    keys = z - np.log(-np.log(uniform.astype(np.float64) + 1e-10) + 1e-10)
    order = sorted(range(len(scores)), key=lambda token: (not valid[token], keys[token] if valid[token] else 0, token))
    return sorted(order[:kept])


@pytest.mark.parametrize("variant", ["released", "paper", "mamp"])
@pytest.mark.parametrize("share", [0.9, 0.3, 0.05])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_tokens_that_were_not_seen_come_last(variant, share, backend):
    clips, valid, draws = bodies(4), torch.rand(4, 150) < share, torch.rand(4, 150)
    hidden = ~valid.view(4, 6, 25).repeat_interleave(4, 1)
    clips[hidden] = 0
    drawn = ops.motion_mask(clips, variant=variant, uniform=draws, valid=valid, backend=backend)
    for body in range(4):
        expected = by_hand_with_missing(clips[body].numpy(), valid[body].tolist(), draws[body].numpy(), 14, variant)
        assert drawn.visible[body].tolist() == expected
    for body in range(4):
        masked = torch.nonzero(drawn.mask[body])[:, 0]
        assert torch.equal(torch.cat([drawn.visible[body], masked])[drawn.restore[body]], torch.arange(150))
    torch.testing.assert_close(drawn.probability.sum(1), torch.ones(4))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_too_few_seen_tokens_are_filled_up_in_the_order_of_the_grid(backend):
    valid = torch.zeros(2, 150, dtype=torch.bool)
    valid[1, [3, 80, 149]] = True
    drawn = ops.motion_mask(bodies(2), valid=valid, backend=backend)
    assert drawn.visible.tolist() == [list(range(14)), [*range(12), 80, 149]]


def test_a_missing_joint_does_not_tilt_the_others():
    """A joint that appears from the origin moves by metres; the odds of the other joints must not see it."""
    clips = bodies(1) + 3
    missing = clips.clone()
    missing[:, 8:12, 7] = 0
    valid = torch.ones(1, 6, 25, dtype=torch.bool)
    valid[:, 2, 7] = False
    plain, covered, bare = (
        ops.motion_mask(*arguments, variant="mamp", **options).probability[0].view(6, 25)
        for arguments, options in (((clips,), {}), ((missing,), {"valid": valid.flatten(1)}), ((missing,), {}))
    )
    others = torch.arange(25) != 7
    odds = lambda p: p[:, others] / p[0, 0]  # noqa: E731
    scores = reference.motion_scores(clips, t_patch=4, variant="mamp")[0]
    assert scores.argmax() % 25 != 7
    torch.testing.assert_close(odds(covered), odds(plain))
    assert (odds(bare) - odds(plain)).abs().max() > 0.3


def test_what_was_not_seen_may_hold_anything():
    clips, valid = bodies(2), torch.rand(2, 150) < 0.7
    hidden = ~valid.view(2, 6, 25).repeat_interleave(4, 1)
    expected = ops.motion_mask(clips, valid=valid, seed=3)
    for value in (0.0, 1e30, float("inf"), float("nan")):
        clips[hidden] = value
        for backend in ("auto", "reference"):
            drawn = ops.motion_mask(clips, valid=valid, seed=3, backend=backend)
            assert torch.equal(drawn.visible, expected.visible) and torch.equal(drawn.restore, expected.restore)
            assert drawn.probability.isfinite().all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"clips": torch.zeros(2, 24, 25)}, r"clips must be floating \[B,T,V,C\], got float32 \[2, 24, 25\]"),
        ({"clips": torch.zeros(2, 22, 25, 3)}, "multiple of t_patch=4"),
        ({"clips": torch.zeros(2, 4, 25, 3)}, "at least 8 frames"),
        ({"mask_ratio": 1.0}, "mask_ratio must be in"),
        ({"mask_ratio": 0.999}, "leave one of 150 tokens visible"),
        ({"tau": 0.0}, "tau must be positive"),
        ({"variant": "best"}, "variant must be one of released, paper, mamp"),
        ({"gate": 0.5}, "gate must be None unless"),
        ({"variant": "paper", "gate": 1.5}, r"gate must be in \[0, 1\]"),
        ({"uniform": torch.zeros(2, 10)}, r"uniform must be \[2, 150\]"),
        ({"clip_ids": torch.zeros(2)}, r"clip_ids must be int \[B\], got float32 \[2\]"),
        ({"epoch": torch.zeros(2, dtype=torch.int64)}, r"epoch must be an integer or int64 \[\], got int64 \[2\]"),
        ({"epoch": torch.tensor(1.0)}, r"epoch must be an integer or int64 \[\], got float32 \[\]"),
        ({"valid": torch.ones(2, 150)}, r"valid must be bool \[2, 150\], got float32 \[2, 150\]"),
        ({"valid": torch.ones(2, 6, 25, dtype=torch.bool)}, r"valid must be bool \[2, 150\], got bool \[2, 6, 25\]"),
        ({"backend": "fast"}, 'backend must be "auto", "reference"'),
        ({"backend": "triton"}, 'motion_mask: backend "triton" cannot run: this version has no Triton kernel'),
        ({"backend": "cuda"}, 'motion_mask: backend "cuda" cannot run: (the CUDA extension|it runs on CUDA tensors)'),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        ops.motion_mask(**{"clips": torch.zeros(2, 24, 25, 3)} | change)


def test_opcheck_compile_and_export():
    clips = bodies(2)
    ids = torch.arange(2)
    valid = torch.rand(2, 150) < 0.6
    arguments = (clips, 0.9, 0.8, 4, "paper", 0.5, None, 1, 2, ids, "reference")
    for given in (arguments, (*arguments, valid), (*arguments, None, torch.tensor(2))):
        torch.library.opcheck(torch.ops.jmm_fast.motion_mask.default, given)

    class Draw(torch.nn.Module):
        def forward(self, clips, ids, valid=None, epoch=0):
            return tuple(ops.motion_mask(clips, seed=1, clip_ids=ids, valid=valid, epoch=epoch))

    for given in ((clips, ids), (clips, ids, valid), (clips, ids, None, torch.tensor(3))):
        eager = Draw()(*given)
        for run in (torch.compile(Draw(), fullgraph=True), torch.export.export(Draw(), given).module()):
            for a, b in zip(run(*given), eager, strict=True):
                assert torch.equal(a, b)
