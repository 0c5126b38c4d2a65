"""The C++ motion mask against its plain twin, for every instruction set of this machine: the sets must be equal."""

import ctypes
import mmap
import sys

import numpy as np
import pytest
import torch

from jmm_fast import ops, reference

native = pytest.importorskip("jmm_fast._C", reason="the C++ extension is not built", exc_type=ImportError)

EPS = torch.finfo(torch.float32).eps
VARIANTS = ("released", "paper", "mamp")


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
    """Every tensor that torch leaves uninitialised is full of NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def bodies(count=4, frames=120, joints=25, coordinates=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    still = torch.randn(count, 1, joints, coordinates, generator=generator)
    return still + 0.02 * torch.randn(count, frames, joints, coordinates, generator=generator).cumsum(1)


def guarded(x):
    """A copy of ``x`` whose last byte lies right before a page that nobody may read."""
    page = mmap.PAGESIZE
    size = -(-x.nbytes // page) * page
    region = mmap.mmap(-1, size + page)
    end = ctypes.addressof(ctypes.c_char.from_buffer(region)) + size
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), page, 0) == 0
    values = torch.frombuffer(region, dtype=x.dtype, count=size // x.itemsize)
    return values[-x.numel() :].view(x.shape).copy_(x)


def single_probability(clips, variant, tau, t_patch, gate=None, valid=None):
    scores = reference.motion_scores(clips.float(), t_patch=t_patch, variant=variant, gate=gate).flatten(1)
    if valid is not None:
        scores = scores * reference.known_scores(valid, clips.shape[2])
    return torch.softmax(scores / (scores.amax(1, keepdim=True) * tau + 1e-10), 1)


def check(clips, **options):
    """Equal sets; probabilities within twice the error of the formula in float32 plus a rounding of the largest."""
    ours = ops.motion_mask(clips, **options, backend="cpu")
    expected = ops.motion_mask(clips, **options, backend="reference")
    for name in ("visible", "mask", "restore"):
        a, b = getattr(ours, name), getattr(expected, name)
        assert a.dtype == b.dtype and torch.equal(a, b), name
    exact = ops.motion_mask(clips.double(), **options, backend="reference").probability
    formula = {"variant": "released", "tau": 0.8, "t_patch": 4, "gate": None, "valid": None}
    formula |= {key: value for key, value in options.items() if key in formula}
    if clips.numel():
        error = (ours.probability - exact).abs().max()
        rounding = (single_probability(clips, **formula) - exact).abs().max() + EPS * exact.max()
        assert error <= 2 * rounding, f"error {error:.3g}, bound {2 * rounding:.3g}"
    assert ours.probability.dtype == torch.float32
    return ours


@pytest.mark.parametrize("variant, gate", [("released", None), ("paper", None), ("paper", 0.2), ("mamp", None)])
@pytest.mark.parametrize("tau", [0.8, 0.1])
def test_masks_equal_the_reference(isa, variant, gate, tau):
    check(bodies(24), variant=variant, gate=gate, tau=tau, seed=3, epoch=7, clip_ids=torch.arange(24) * 7 + (5 << 32))


@pytest.mark.parametrize(
    "frames, joints, coordinates, t_patch",
    [
        (2, 1, 3, 1),
        (12, 21, 3, 4),
        (8, 37, 3, 4),
        (12, 25, 3, 4),
        (127, 1, 3, 1),
        (40, 25, 3, 4),
        (120, 25, 3, 4),
        (60, 17, 3, 2),
        (30, 20, 2, 5),
        (48, 14, 3, 8),
        (16, 33, 4, 4),
        (24, 64, 3, 4),
        (18, 5, 1, 3),
    ],
)
def test_parity_over_shapes(isa, frames, joints, coordinates, t_patch):
    for variant in VARIANTS:
        clips = bodies(3, frames, joints, coordinates)
        check(clips, mask_ratio=0.45, variant=variant, t_patch=t_patch, seed=frames)


@pytest.mark.parametrize("mask_ratio", [0.001, 0.1, 0.5, 0.9, 0.998])
def test_any_share_of_tokens(isa, mask_ratio):
    assert check(bodies(), mask_ratio=mask_ratio).visible.shape[1] == reference.num_visible(750, mask_ratio)


def test_golden_masks(isa, golden):
    arrays = np.load(golden("masking_t120.npz"), allow_pickle=True)
    clips = torch.from_numpy(arrays["x"]).permute(0, 4, 2, 3, 1).flatten(0, 1)
    drawn = check(
        clips,
        mask_ratio=float(arrays["mask_ratio"]),
        tau=float(arrays["tau"]),
        uniform=torch.from_numpy(arrays["uniform"]),
    )
    assert torch.equal(drawn.mask, torch.from_numpy(arrays["mask"]).bool())


@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_that_float32_cannot_tell_apart(isa, variant):
    """Twenty masked tokens of each body get draws that put their keys within 1e-7 of the threshold."""
    clips, kept = bodies(16), 74
    uniform = torch.rand(16, 750)
    scores = reference.motion_scores(clips.double(), t_patch=4, variant=variant).flatten(1)
    logits = scores / (scores.amax(1, keepdim=True) * 0.8 + 1e-10)
    keys = logits - torch.log(-torch.log(uniform.double() + 1e-10) + 1e-10)
    order = keys.argsort(1)
    threshold = keys.gather(1, order[:, kept - 1 : kept])
    near = torch.cat([order[:, 60:70], order[:, 400:410]], 1)
    uniform.scatter_(1, near, torch.exp(-torch.exp(logits.gather(1, near) - threshold)).float())
    keys = logits - torch.log(-torch.log(uniform.double() + 1e-10) + 1e-10)
    assert ((keys - threshold).abs() < 2e-7).sum() >= 16 * 21, "the draws do not crowd the threshold"
    check(clips, variant=variant, uniform=uniform)
    settled = torch.ops.jmm_fast.motion_mask_cpu(
        clips, kept, 0.8, 4, VARIANTS.index(variant), 0.5, uniform, 0, 0, None
    )[4]
    assert settled == 16


def test_few_bodies_need_double_precision(isa):
    settled = torch.ops.jmm_fast.motion_mask_cpu(bodies(400), 74, 0.8, 4, 0, 0.5, None, 1, 2, None)[4]
    assert settled < 40


def test_equal_keys_keep_the_lower_token(isa):
    for variant in VARIANTS:
        drawn = check(torch.zeros(2, 120, 25, 3), variant=variant, uniform=torch.full((2, 750), 0.5))
        assert drawn.visible.tolist() == [list(range(74))] * 2
    # Every draw occurs five times: ties everywhere, the threshold among them.
    repeated = torch.rand(2, 150).repeat_interleave(5, dim=1)
    for _ in range(5):
        check(torch.ones(2, 120, 25, 3), uniform=repeated)
        repeated = repeated.roll(1, 1)


def test_bodies_that_hardly_move(isa):
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


def test_extreme_draws(isa):
    uniform = torch.rand(6, 750)
    uniform[0, ::3] = 0
    uniform[1] = 1 - 2**-24
    uniform[2] = torch.where(torch.rand(750) < 0.5, 2**-24, 1 - 2**-24)
    uniform[3] = 0
    uniform[4] = 1 - torch.randint(1, 40, (750,)) * 2**-24
    uniform[5] = torch.randint(0, 40, (750,)) * 2**-24
    for mask_ratio in (0.9, 0.5, 0.05):
        check(bodies(6), uniform=uniform, mask_ratio=mask_ratio)


def test_strides(isa):
    clips = bodies(4)
    plain = check(clips, seed=2)
    moved = (
        clips.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1),
        clips.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0),
        clips.repeat_interleave(2, 1)[:, ::2],
        torch.cat([clips, clips], 3)[..., :3],
        torch.cat([clips, clips], 2)[:, :, :25],
        clips.flip(0).flip(0),
    )
    for other in moved:
        for a, b in zip(check(other, seed=2), plain, strict=True):
            assert torch.equal(a, b)
    check(clips[:1].expand(3, -1, -1, -1))
    check(clips[:, :1].expand(-1, 40, -1, -1))
    check(clips[:, :, :1].expand(-1, -1, 30, -1))
    check(clips[..., :1].expand(-1, -1, -1, 3))
    check(clips, uniform=torch.rand(750, 4).T)
    check(clips, uniform=torch.rand(1, 750).expand(4, -1), clip_ids=torch.arange(8)[::2])


def test_nothing_outside_the_inputs_is_read(isa):
    for joints in (25, 17, 1):
        for around in (1, 0):
            ring = torch.full((5, 40 + 2 * around, joints + 2 * around, 3 + 2 * around), float("nan"))
            inner = ring[1:-1, around : 40 + around, around : joints + around, around : 3 + around]
            inner.copy_(bodies(3, 40, joints))
            drawn = check(inner, uniform=torch.full((5, 10 * joints), 0.3)[1:-1], mask_ratio=0.5)
            assert drawn.probability.isfinite().all()


@pytest.mark.skipif(sys.platform != "linux", reason="protects a page the Linux way")
def test_nothing_behind_the_last_number_is_read(isa):
    for joints in (25, 17, 1):
        clips, uniform = bodies(3, 40, joints), torch.rand(3, 10 * joints)
        check(guarded(clips), uniform=guarded(uniform), mask_ratio=0.5)
        check(guarded(clips[:, :1]).expand(-1, 40, -1, -1), mask_ratio=0.5)
        check(guarded(clips.transpose(2, 3).contiguous()).transpose(2, 3), mask_ratio=0.5)


def test_nothing_is_left_from_the_call_before(isa):
    clips = bodies(3)
    clean = check(clips)
    ops.motion_mask(torch.full((2, 240, 50, 3), float("nan")), backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(clean, check(clips), strict=True))


def test_bad_numbers_still_give_a_set(isa):
    clips = bodies(3)
    clips[0, 50, 7, 1] = float("nan")
    clips[1, 50, 7, 1] = float("inf")
    ours, expected = (ops.motion_mask(clips, backend=name) for name in ("cpu", "reference"))
    assert torch.equal(ours.visible, expected.visible) and torch.equal(ours.restore, expected.restore)
    valid = torch.rand(3, 750) < 0.5
    ours, expected = (ops.motion_mask(clips, valid=valid, backend=name) for name in ("cpu", "reference"))
    assert torch.equal(ours.visible, expected.visible) and torch.equal(ours.restore, expected.restore)
    valid[:2, 12 * 25 + 7] = valid[:2, 11 * 25 + 7] = True
    ours, expected = (ops.motion_mask(clips, valid=valid, backend=name) for name in ("cpu", "reference"))
    assert torch.equal(ours.visible, expected.visible) and torch.equal(ours.restore, expected.restore)
    for uniform in (torch.full((3, 750), 1.0), torch.full((3, 750), -1.0), torch.full((3, 750), float("nan"))):
        drawn = ops.motion_mask(clips, uniform=uniform, backend="cpu")
        assert (drawn.mask.sum(1) == 676).all() and (drawn.visible.diff(dim=1) > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_clips(isa, dtype):
    check(bodies(6).to(dtype), uniform=torch.rand(6, 750).to(dtype) * 0.99)


def test_double_precision_is_left_to_the_reference():
    clips = bodies(2).double()
    with pytest.raises(ValueError, match="clips must be float32, bfloat16 or float16, got float64"):
        ops.motion_mask(clips, backend="cpu")
    with pytest.raises(ValueError, match="uniform must be float32"):
        ops.motion_mask(clips.float(), uniform=torch.rand(2, 750).double(), backend="cpu")
    assert torch.equal(ops.motion_mask(clips).mask, ops.motion_mask(clips, backend="reference").mask)


def missing(clips, share, t_patch=4):
    """The clips with a part of the tokens at the origin, as missing joints are, and which tokens are left."""
    count, frames, joints, _ = clips.shape
    valid = torch.rand(count, frames // t_patch, joints) < share
    return clips * valid.repeat_interleave(t_patch, 1)[..., None], valid.flatten(1)


@pytest.mark.parametrize("variant, gate", [("released", None), ("paper", None), ("paper", 0.2), ("mamp", None)])
@pytest.mark.parametrize("share", [0.99, 0.8, 0.3, 0.12])
def test_tokens_that_were_not_seen(isa, variant, gate, share):
    clips, valid = missing(bodies(16) + 3, share)
    drawn = check(clips, variant=variant, gate=gate, valid=valid, seed=4, clip_ids=torch.arange(16) + 70)
    shown = valid.gather(1, drawn.visible)
    assert torch.equal(shown.sum(1), valid.sum(1).clamp(max=74)), "what was not seen is shown without need"
    for tau in (0.1, 0.003):
        check(clips, variant=variant, gate=gate, tau=tau, valid=valid, mask_ratio=0.95)


@pytest.mark.parametrize("seen", [0, 1, 73, 74, 75, 76, 749, 750])
def test_as_many_seen_tokens_as_are_kept(isa, seen):
    valid = torch.rand(4, 750).argsort(1) < seen
    for clips in (bodies(4), torch.zeros(4, 120, 25, 3)):
        check(clips, valid=valid)
        # Bodies that are done in double precision as a whole.
        check(clips, valid=valid, tau=0.001)


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_seen_is_as_if_nothing_was_said(isa, variant):
    clips = bodies(9)
    clips[0] = 0
    clips[1, :, 3:] = 0
    for tau in (0.8, 0.003):
        plain, told = (
            ops.motion_mask(clips, variant=variant, tau=tau, valid=valid, backend="cpu")
            for valid in (None, torch.ones(9, 750, dtype=torch.bool))
        )
        assert all(torch.equal(a, b) for a, b in zip(plain, told, strict=True))


@pytest.mark.parametrize(
    "frames, joints, coordinates, t_patch", [(2, 1, 3, 1), (8, 37, 3, 4), (30, 20, 2, 5), (127, 1, 3, 1)]
)
def test_tokens_that_were_not_seen_over_shapes(isa, frames, joints, coordinates, t_patch):
    for variant in VARIANTS:
        clips, valid = missing(bodies(3, frames, joints, coordinates), 0.6, t_patch)
        check(clips, mask_ratio=0.45, variant=variant, t_patch=t_patch, valid=valid, seed=frames)


def test_strides_and_threads_of_what_was_seen(isa, threads):
    clips, valid = missing(bodies(6), 0.5)
    plain = check(clips, valid=valid)
    for other in (valid.t().contiguous().t(), valid.repeat_interleave(2, 1)[:, ::2]):
        assert all(torch.equal(a, b) for a, b in zip(check(clips, valid=other), plain, strict=True))
    check(clips, valid=valid[:1].expand(6, -1))
    for count in (1, 3):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(check(clips, valid=valid), plain, strict=True))


def test_keys_that_float32_cannot_tell_apart_among_seen_tokens(isa):
    """The same crowd at the threshold as above, with half of it unseen."""
    clips, valid, kept = *missing(bodies(8), 0.5), 74
    uniform = torch.rand(8, 750)
    scores = reference.motion_scores(clips.double(), t_patch=4, variant="paper").flatten(1)
    scores = scores * reference.known_scores(valid, 25)
    logits = scores / (scores.amax(1, keepdim=True) * 0.8 + 1e-10)
    keys = logits - torch.log(-torch.log(uniform.double() + 1e-10) + 1e-10)
    order = keys.masked_fill(~valid, torch.inf).argsort(1)
    threshold = keys.gather(1, order[:, kept - 1 : kept])
    near = torch.cat([order[:, 60:70], order[:, 200:210], order[:, 700:720]], 1)
    uniform.scatter_(1, near, torch.exp(-torch.exp(logits.gather(1, near) - threshold)).float())
    check(clips, variant="paper", uniform=uniform, valid=valid)


def test_empty_batch(isa):
    drawn = check(torch.zeros(0, 120, 25, 3))
    assert drawn.visible.shape == (0, 74) and drawn.mask.shape == drawn.probability.shape == (0, 750)


def test_any_number_of_threads_and_any_batch(isa, threads):
    clips, ids = bodies(37), torch.arange(37) + (1 << 32)

    def run(count):
        threads(count)
        return ops.motion_mask(clips, seed=4, clip_ids=ids, backend="cpu")

    first = run(1)
    for count in (1, 2, 3, 8):
        assert all(torch.equal(a, b) for a, b in zip(first, run(count), strict=True)), f"{count} threads"
    part = ops.motion_mask(clips[9:11], seed=4, clip_ids=ids[9:11], backend="cpu")
    assert all(torch.equal(a[9:11], b) for a, b in zip(first, part, strict=True))


def test_the_operator_refuses_what_would_read_other_memory():
    clips = bodies(2)
    run = torch.ops.jmm_fast.motion_mask_cpu
    for change, message in (
        ({0: clips.double()}, "clips must be a float32 CPU tensor"),
        ({0: clips[:, :50]}, "whole patches"),
        ({1: 0}, r"kept must be in \[1, 750\], got 0"),
        ({1: 751}, "got 751"),
        ({6: torch.rand(2, 749)}, r"uniform must be a float32 CPU tensor \[B,L\]"),
        ({9: torch.zeros(3, dtype=torch.int64)}, r"clip_ids must be an int64 CPU tensor \[B\]"),
        ({9: torch.zeros(2, dtype=torch.int32)}, "clip_ids must be an int64"),
        ({10: torch.ones(2, 749, dtype=torch.bool)}, r"valid must be a bool CPU tensor \[B,L\]"),
        ({10: torch.ones(2, 750)}, "valid must be a bool"),
        ({11: torch.zeros(1, dtype=torch.int64)}, r"epoch_at must be an int64 CPU tensor \[\]"),
        ({11: torch.zeros((), dtype=torch.int32)}, "epoch_at must be an int64"),
    ):
        arguments = [clips, 74, 0.8, 4, 0, 0.5, None, 0, 0, None, None, None]
        for place, value in change.items():
            arguments[place] = value
        with pytest.raises(RuntimeError, match=message):
            run(*arguments)


def test_opcheck_compile_and_export():
    clips, ids = bodies(2, 24), torch.arange(2)
    valid = torch.rand(2, 150) < 0.6
    arguments = (clips, 0.9, 0.8, 4, "paper", 0.5, None, 1, 2, ids, "cpu")
    for given in (arguments, (*arguments, valid)):
        torch.library.opcheck(torch.ops.jmm_fast.motion_mask.default, given)

    class Draw(torch.nn.Module):
        def forward(self, clips, ids, epoch=3, valid=valid):
            return tuple(ops.motion_mask(clips, seed=1, epoch=epoch, clip_ids=ids, valid=valid, backend="cpu"))

    compiled = torch.compile(Draw(), fullgraph=True)
    for epoch in (3, 4, 5):
        for a, b in zip(compiled(clips, ids, epoch), Draw()(clips, ids, epoch), strict=True):
            assert torch.equal(a, b)
    exported = torch.export.export(Draw(), (clips, ids)).module()
    assert all(torch.equal(a, b) for a, b in zip(exported(clips, ids), Draw()(clips, ids), strict=True))
