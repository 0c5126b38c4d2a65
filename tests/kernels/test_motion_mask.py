"""The CUDA motion mask on a GPU against its plain twin and the C++ kernel. Without a GPU see tests/cuda."""

import pytest
import torch

from jmm_fast import ops, reference
from jmm_fast.ops.backend import unavailable
from jmm_fast.ops.motion_mask import MOST_TOKENS, VARIANTS

EPS = torch.finfo(torch.float32).eps
SMALLEST = 2.0**-149


@pytest.fixture(autouse=True)
def _needs_the_kernel():
    if reason := unavailable("motion_mask", "cuda"):
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def poison():
    """Every tensor that torch leaves uninitialised is full of NaN or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def bodies(count=64, frames=120, joints=25, coordinates=3):
    still = torch.randn(count, 1, joints, coordinates)
    return (still + 0.02 * torch.randn(count, frames, joints, coordinates).cumsum(1)).cuda()


def missing(clips, share, t_patch=4):
    """The clips with a part of the tokens at the origin, as missing joints are, and which tokens are left."""
    count, frames, joints, _ = clips.shape
    valid = torch.rand(count, frames // t_patch, joints, device=clips.device) < share
    return clips * valid.repeat_interleave(t_patch, 1)[..., None], valid.flatten(1)


def check(clips, **options):
    """Equal sets; probabilities as the formula in double precision gives them, rounded once. Twice the same."""
    ours, again = (ops.motion_mask(clips, **options, backend="cuda") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    expected = ops.motion_mask(clips.double(), **options, backend="reference")
    for name in ("visible", "mask", "restore"):
        a, b = getattr(ours, name), getattr(expected, name)
        assert a.dtype == b.dtype and torch.equal(a, b), name
    torch.testing.assert_close(ours.probability.double(), expected.probability, rtol=EPS, atol=SMALLEST)
    return ours


@pytest.mark.parametrize("variant, gate", [("released", None), ("paper", None), ("paper", 0.2), ("mamp", None)])
@pytest.mark.parametrize("tau", [0.8, 0.1])
def test_masks_equal_the_reference(variant, gate, tau):
    ids = torch.arange(1024, device="cuda") * 7 + (5 << 32)
    check(bodies(1024), variant=variant, gate=gate, tau=tau, seed=3, epoch=7, clip_ids=ids)


def test_masks_equal_those_of_the_cpu_kernel():
    if reason := unavailable("motion_mask", "cpu"):
        pytest.skip(reason)
    clips, valid = missing(bodies(512), 0.7)
    for variant in VARIANTS:
        for given in (None, valid):
            ours = ops.motion_mask(clips, variant=variant, valid=given, seed=5, backend="cuda")
            told = None if given is None else given.cpu()
            other = ops.motion_mask(clips.cpu(), variant=variant, valid=told, seed=5, backend="cpu")
            assert all(torch.equal(a.cpu(), b) for a, b in zip(ours[:3], other[:3], strict=True))


@pytest.mark.parametrize(
    "frames, joints, coordinates, t_patch",
    [
        (2, 1, 3, 1),
        (8, 37, 3, 4),
        (127, 1, 3, 1),
        (120, 25, 3, 4),
        (60, 17, 3, 2),
        (30, 20, 2, 5),
        (16, 33, 4, 4),
        (18, 5, 1, 3),
        (256, 64, 3, 4),
    ],
)
def test_parity_over_shapes(frames, joints, coordinates, t_patch):
    for variant in VARIANTS:
        clips = bodies(5, frames, joints, coordinates)
        check(clips, mask_ratio=0.45, variant=variant, t_patch=t_patch, seed=frames)
        clips, valid = missing(clips, 0.6, t_patch)
        check(clips, mask_ratio=0.45, variant=variant, t_patch=t_patch, valid=valid)


def test_ties_and_bodies_that_do_not_move():
    clips = bodies(6)
    clips[0] = 0
    clips[1] = 1.5
    clips[2] = 3 + clips[2] * 1e-6
    clips[3] *= 1e-20
    clips[4, 60:] = 0
    repeated = torch.rand(6, 150, device="cuda").repeat_interleave(5, dim=1)
    for variant in VARIANTS:
        check(clips, variant=variant, seed=8)
        check(clips, variant=variant, uniform=repeated)
        check(clips, variant=variant, uniform=torch.full_like(repeated, 0.5))


@pytest.mark.parametrize("seen", [0, 1, 73, 74, 75, 749, 750])
def test_as_many_seen_tokens_as_are_kept(seen):
    check(bodies(8), valid=torch.rand(8, 750, device="cuda").argsort(1) < seen)


def test_strides_halves_streams_and_empty_batches():
    clips = bodies(4)
    plain = check(clips, seed=2)
    moved = clips.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
    wide = torch.cat([clips, clips * torch.nan], 3)[..., :3]
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        for other in (moved, wide):
            assert all(torch.equal(a, b) for a, b in zip(check(other, seed=2), plain, strict=True))
    torch.cuda.synchronize()
    for dtype in (torch.bfloat16, torch.float16):
        check(clips.to(dtype), uniform=torch.rand(4, 750, device="cuda").to(dtype) * 0.99)
    assert check(clips[:0]).visible.shape == (0, 74)


def test_one_launch_that_a_graph_can_hold():
    clips, epoch = bodies(32), torch.zeros((), dtype=torch.int64, device="cuda")
    ops.motion_mask(clips, seed=1, epoch=epoch, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = ops.motion_mask(clips, seed=1, epoch=epoch, backend="cuda")
    for number in (0, 5):
        expected = ops.motion_mask(clips, seed=1, epoch=number, backend="cuda")
        for tensor in drawn:
            tensor.zero_()
        epoch.fill_(number)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ops.motion_mask(clips, seed=1, backend="cuda")
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    # The determinism of this module's fixture fills each of the four results first.
    assert sum("draw_masks" in name for name in kernels) == 1 and len(kernels) <= 5


def test_what_the_kernel_does_not_take():
    clips = bodies(2)
    with pytest.raises(ValueError, match="clips must be float32, bfloat16 or float16, got float64"):
        ops.motion_mask(clips.double(), backend="cuda")
    large = torch.zeros(1, 4 * (MOST_TOKENS // 25 + 1), 25, 3, device="cuda")
    with pytest.raises(ValueError, match="clips must have at most 4096 tokens a body, got 4100"):
        ops.motion_mask(large, backend="cuda")
    assert ops.motion_mask(large).mask.shape == (1, 4100), "auto takes the plain twin"
    with pytest.raises(ValueError, match='backend "cuda" cannot run: it runs on CUDA tensors'):
        ops.motion_mask(clips.cpu(), backend="cuda")


def test_compile():
    clips, ids = bodies(2, 24), torch.arange(2, device="cuda")

    @torch.compile(fullgraph=True)
    def draw(clips, ids):
        return tuple(ops.motion_mask(clips, seed=1, clip_ids=ids, backend="cuda"))

    expected = ops.motion_mask(clips, seed=1, clip_ids=ids, backend="cuda")
    assert all(torch.equal(a, b) for a, b in zip(draw(clips, ids), expected, strict=True))
    kept = reference.num_visible(150, 0.9)
    arguments = (clips, kept, 0.8, 4, 0, 0.5, None, 1, 0, ids)
    for change in ({0: clips.cpu()}, {1: 0}, {9: ids[:1]}, {9: ids.int()}):
        given = list(arguments)
        for place, value in change.items():
            given[place] = value
        with pytest.raises(RuntimeError, match=r"must be"):
            torch.ops.jmm_fast.motion_mask_cuda(*given)
