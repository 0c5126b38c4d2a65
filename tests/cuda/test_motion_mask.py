"""The CUDA motion mask, its device code run on the CPU thread by thread, against its plain twin: equal sets."""

import ctypes
from ctypes import c_bool, c_double, c_float, c_int, c_int64, c_uint64, c_void_p

import pytest
import torch

from jmm_fast import ops, reference
from jmm_fast.ops.motion_mask import MOST_TOKENS, VARIANTS, MotionMask

EPS = torch.finfo(torch.float32).eps
SMALLEST = 2.0**-149
UPWARDS, DOWNWARDS, MIXED = 0, 1, 77


class Problem(ctypes.Structure):
    _fields_ = [
        ("clips", c_void_p),
        *((name, c_int64) for name in ("body_stride", "frame_stride", "joint_stride", "coordinate_stride")),
        *((name, c_int64) for name in ("bodies", "steps", "joints", "coordinates", "patch", "tokens", "kept")),
        ("variant", c_int),
        ("tau", c_double),
        ("gate", c_double),
        ("uniform", c_void_p),
        ("seed", c_uint64),
        ("epoch", c_uint64),
        ("clip_ids", c_void_p),
        ("valid", c_void_p),
        ("epoch_at", c_void_p),
    ]


class Result(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("visible", "restore", "mask", "probability")]


@pytest.fixture(scope="module")
def kernel(compiled):
    return ctypes.CDLL(compiled("motion_mask"))


@pytest.fixture
def draw(kernel):
    def draw(
        clips,
        *,
        mask_ratio=0.9,
        tau=0.8,
        t_patch=4,
        variant="released",
        gate=None,
        uniform=None,
        seed=0,
        epoch=0,
        clip_ids=None,
        valid=None,
        order=MIXED,
    ):
        bodies, frames, joints, coordinates = clips.shape
        tokens = frames // t_patch * joints
        kept = reference.num_visible(tokens, mask_ratio)
        epoch, epoch_at = (0, epoch) if isinstance(epoch, torch.Tensor) else (epoch, None)
        held = [None if x is None else x.contiguous() for x in (uniform, clip_ids, valid, epoch_at)]
        uniform_at, ids_at, valid_at, epoch_at = (None if x is None else x.data_ptr() for x in held)
        problem = Problem(
            *(clips.data_ptr(), *clips.stride(), bodies, frames // t_patch, joints, coordinates, t_patch, tokens, kept),
            *(VARIANTS.index(variant), tau, 0.5 if gate is None else gate, uniform_at, seed, epoch, ids_at, valid_at),
            epoch_at,
        )
        drawn = MotionMask(
            torch.full((bodies, kept), -1),
            torch.zeros(bodies, tokens, dtype=torch.bool),
            torch.full((bodies, tokens), -1),
            torch.full((bodies, tokens), torch.nan),
        )
        pointers = (drawn.visible, drawn.restore, drawn.mask, drawn.probability)
        result = Result(*(x.data_ptr() for x in pointers))
        fixed = t_patch == 4 and coordinates == 3 and clips.stride(3) == 1
        code = kernel.draw(ctypes.byref(problem), ctypes.byref(result), order, fixed)
        assert code == 0, {1: "threads parted at a barrier", 2: "memory behind the shared memory was written"}[code]
        return drawn

    return draw


@pytest.fixture
def check(draw):
    """Equal sets; probabilities as the formula in double precision gives them, rounded once."""

    def check(clips, **options):
        ours = draw(clips, **options)
        options.pop("order", None)
        expected = ops.motion_mask(clips.double(), **options, backend="reference")
        for name in ("visible", "mask", "restore"):
            assert torch.equal(getattr(ours, name), getattr(expected, name)), name
        torch.testing.assert_close(ours.probability.double(), expected.probability, rtol=EPS, atol=SMALLEST)
        return ours

    return check


def bodies(count=2, frames=120, joints=25, coordinates=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    still = torch.randn(count, 1, joints, coordinates, generator=generator)
    return still + 0.02 * torch.randn(count, frames, joints, coordinates, generator=generator).cumsum(1)


def missing(clips, share, t_patch=4):
    """The clips with a part of the tokens at the origin, as missing joints are, and which tokens are left."""
    count, frames, joints, _ = clips.shape
    valid = torch.rand(count, frames // t_patch, joints) < share
    return clips * valid.repeat_interleave(t_patch, 1)[..., None], valid.flatten(1)


def test_fields_are_those_of_the_header():
    assert ctypes.sizeof(Problem) == 12 * 8 + 8 + 2 * 8 + 6 * 8
    assert (ctypes.sizeof(c_float), ctypes.sizeof(c_bool)) == (4, 1)


def test_the_limit_is_told_once(kernel):
    assert kernel.most_tokens() == MOST_TOKENS


@pytest.mark.parametrize("variant, gate", [("released", None), ("paper", None), ("paper", 0.2), ("mamp", None)])
@pytest.mark.parametrize("tau", [0.8, 0.1])
def test_masks_equal_the_reference(check, variant, gate, tau):
    ids = torch.arange(8) * 7 + (5 << 32)
    check(bodies(8), variant=variant, gate=gate, tau=tau, seed=3, epoch=7, clip_ids=ids)


def test_the_epoch_is_read_from_memory(draw):
    clips, epoch = bodies(3), torch.tensor(0)
    for number in (0, 7, 2**32 - 1):
        epoch.fill_(number)
        ours, other = draw(clips, seed=3, epoch=epoch), draw(clips, seed=3, epoch=number)
        assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))


def test_masks_equal_those_of_the_cpu_kernel(draw):
    pytest.importorskip("jmm_fast._C", reason="the C++ extension is not built", exc_type=ImportError)
    clips, valid = missing(bodies(8), 0.7)
    for given in (None, valid):
        ours, other = draw(clips, valid=given, seed=5), ops.motion_mask(clips, valid=given, seed=5, backend="cpu")
        assert all(torch.equal(a, b) for a, b in zip(ours[:3], other[:3], strict=True))


def test_any_order_of_threads_gives_the_same(draw):
    clips, valid = missing(bodies(3), 0.6)
    clips[2] = 0
    uniform = torch.rand(3, 150).repeat_interleave(5, dim=1)
    for options in ({}, {"valid": valid}, {"uniform": uniform}, {"valid": valid & (torch.arange(750) < 60)}):
        first = draw(clips, **options, order=UPWARDS)
        for order in (DOWNWARDS, 3, MIXED, 129):
            assert all(torch.equal(a, b) for a, b in zip(first, draw(clips, **options, order=order), strict=True))


@pytest.mark.parametrize(
    "frames, joints, coordinates, t_patch",
    [
        (2, 1, 3, 1),
        (12, 21, 3, 4),
        (8, 37, 3, 4),
        (127, 1, 3, 1),
        (40, 25, 3, 4),
        (60, 17, 3, 2),
        (30, 20, 2, 5),
        (48, 14, 3, 8),
        (16, 33, 4, 4),
        (18, 5, 1, 3),
        (256, 64, 3, 4),
        (8, 300, 3, 4),
    ],
)
def test_parity_over_shapes(check, frames, joints, coordinates, t_patch):
    for variant in VARIANTS:
        clips = bodies(2, frames, joints, coordinates)
        check(clips, mask_ratio=0.45, variant=variant, t_patch=t_patch, seed=frames)
        clips, valid = missing(clips, 0.6, t_patch)
        check(clips, mask_ratio=0.45, variant=variant, t_patch=t_patch, valid=valid, seed=frames)


@pytest.mark.parametrize("mask_ratio", [0.001, 0.1, 0.5, 0.998])
def test_any_share_of_tokens(check, mask_ratio):
    check(bodies(), mask_ratio=mask_ratio)


@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_that_float32_cannot_tell_apart(check, variant):
    """Twenty masked tokens of each body get draws that put their keys within 2e-7 of the threshold."""
    clips, uniform, kept = bodies(4), torch.rand(4, 750), 74
    scores = reference.motion_scores(clips.double(), t_patch=4, variant=variant).flatten(1)
    logits = scores / (scores.amax(1, keepdim=True) * 0.8 + 1e-10)
    keys = logits - torch.log(-torch.log(uniform.double() + 1e-10) + 1e-10)
    order = keys.argsort(1)
    threshold = keys.gather(1, order[:, kept - 1 : kept])
    near = torch.cat([order[:, 60:70], order[:, 400:410]], 1)
    uniform.scatter_(1, near, torch.exp(-torch.exp(logits.gather(1, near) - threshold)).float())
    check(clips, variant=variant, uniform=uniform)


def test_equal_keys_keep_the_lower_token(check):
    for variant in VARIANTS:
        drawn = check(torch.zeros(1, 120, 25, 3), variant=variant, uniform=torch.full((1, 750), 0.5))
        assert drawn.visible.tolist() == [list(range(74))]
    # Every draw occurs five times: ties everywhere, the threshold among them.
    repeated = torch.rand(2, 150).repeat_interleave(5, dim=1)
    for _ in range(5):
        check(torch.ones(2, 120, 25, 3), uniform=repeated)
        repeated = repeated.roll(1, 1)


def test_bodies_that_hardly_move(check):
    clips = bodies(9)
    clips[0] = 0
    clips[1] = 1.5
    clips[2, :, 3:] = 0
    clips[3] = torch.randn(3)
    clips[4] = 3 + clips[4] * 1e-6
    clips[5] *= 1e-7
    clips[6] *= 1e-20
    clips[7] *= 1e6
    clips[8, 60:] = 0
    for variant in VARIANTS:
        for tau in (0.8, 0.01):
            check(clips, variant=variant, tau=tau, seed=8)


def test_extreme_draws(check):
    uniform = torch.rand(6, 750)
    uniform[0, ::3] = 0
    uniform[1] = 1 - 2**-24
    uniform[2] = torch.where(torch.rand(750) < 0.5, 2**-24, 1 - 2**-24)
    uniform[3] = 0
    uniform[4] = 1 - torch.randint(1, 40, (750,)) * 2**-24
    uniform[5] = torch.randint(0, 40, (750,)) * 2**-24
    for mask_ratio in (0.9, 0.05):
        check(bodies(6), uniform=uniform, mask_ratio=mask_ratio)


def test_strides_and_what_lies_around(check):
    clips = bodies()
    plain = check(clips, seed=2)
    for other in (
        clips.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1),
        clips.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0),
        torch.cat([clips, clips * torch.nan], 3)[..., :3],
        torch.cat([clips * torch.nan, clips, clips * torch.nan], 2)[:, :, 25:50],
    ):
        assert all(torch.equal(a, b) for a, b in zip(check(other, seed=2), plain, strict=True))
    check(clips[:1].expand(3, -1, -1, -1))
    check(clips[:, :1].expand(-1, 40, -1, -1))
    check(clips[:, :, :1].expand(-1, -1, 30, -1))
    check(clips[..., :1].expand(-1, -1, -1, 3))


def test_bad_numbers_still_give_the_same_set(draw):
    clips = bodies(3)
    clips[0, 50, 7, 1] = float("nan")
    clips[1, 50, 7, 1] = float("inf")
    valid = torch.rand(3, 750) < 0.5
    seen = valid.clone()
    seen[:2, 12 * 25 + 7] = seen[:2, 11 * 25 + 7] = True
    for variant in VARIANTS:
        for given in (None, valid, seen):
            ours = draw(clips, variant=variant, valid=given)
            expected = ops.motion_mask(clips, variant=variant, valid=given, backend="reference")
            assert all(torch.equal(a, b) for a, b in zip(ours[:3], expected[:3], strict=True))
    for uniform in (torch.full((3, 750), 1.0), torch.full((3, 750), -1.0), torch.full((3, 750), torch.nan)):
        drawn = draw(clips, uniform=uniform)
        assert (drawn.mask.sum(1) == 676).all() and (drawn.visible.diff(dim=1) > 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("share", [0.99, 0.3, 0.12])
def test_tokens_that_were_not_seen(check, variant, share):
    clips, valid = missing(bodies(4) + 3, share)
    check(clips, variant=variant, valid=valid, seed=4, clip_ids=torch.arange(4) + 70)
    for tau in (0.1, 0.003):
        check(clips, variant=variant, tau=tau, valid=valid, mask_ratio=0.95)


@pytest.mark.parametrize("seen", [0, 1, 73, 74, 75, 749, 750])
def test_as_many_seen_tokens_as_are_kept(check, seen):
    valid = torch.rand(2, 750).argsort(1) < seen
    for clips in (bodies(), torch.zeros(2, 120, 25, 3)):
        check(clips, valid=valid)
        check(clips, valid=valid, tau=0.001)


def test_all_seen_is_as_if_nothing_was_said(draw):
    clips = bodies(3)
    clips[0] = 0
    for variant in VARIANTS:
        plain, told = (
            draw(clips, variant=variant, valid=valid) for valid in (None, torch.ones(3, 750, dtype=torch.bool))
        )
        assert all(torch.equal(a, b) for a, b in zip(plain, told, strict=True))
