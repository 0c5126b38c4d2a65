"""The Triton clip windows against their plain twin, equal bit for bit: on a GPU, or in Triton's interpreter."""

import pytest
import torch

from jmm_fast import ops, reference

EPS = torch.finfo(torch.float32).eps
pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture
def problem(device):
    def make(count=5, rows=300, joints=25):
        start = torch.randint(0, rows // 2, (count,), device=device)
        length = torch.randint(1, rows // 2, (count,), device=device)
        return (
            torch.randn(rows, joints, 3, device=device),
            start,
            length,
            torch.rand(count, 3, device=device) * 8 - 4,
        )

    return make


def check(frames, start, length, angles=None, window=120):
    ours = ops.clip_window(frames, start, length, angles, window=window, backend="triton")
    expected = ops.clip_window(frames, start, length, angles, window=window, backend="reference")
    assert ours.is_contiguous() and ours.isfinite().all()
    if frames.dtype == torch.bfloat16 and frames.device.type == "cpu":
        # The interpreter cuts what it should round.
        assert (ours.float() - expected.float()).abs().max() <= torch.finfo(frames.dtype).eps * expected.abs().max()
    else:
        assert torch.equal(ours, expected)
    return ours


@pytest.mark.parametrize("joints", [25, 1, 2, 17, 33, 64])
@pytest.mark.parametrize("window", [120, 1, 7, 64])
def test_windows_equal_the_reference(problem, joints, window):
    frames, start, length, angles = problem(joints=joints)
    check(frames, start, length, angles, window)
    check(frames, start, length, None, window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_floats(problem, dtype):
    frames, start, length, angles = problem()
    check(frames.to(dtype), start, length, angles)


@pytest.mark.parametrize("length", [1, 2, 63, 74, 75, 119, 120, 121, 127, 240, 250, 599, 750])
def test_lengths(device, length):
    frames = torch.randn(750, 25, 3, device=device)
    first, count = torch.tensor([0, 750 - length], device=device), torch.full((2,), length, device=device)
    check(frames, first, count, torch.rand(2, 3, device=device))
    exact = ops.clip_window(frames.double(), first, count, backend="reference")
    assert (check(frames, first, count) - exact).abs().max() <= 2 * EPS * frames.abs().max()


def test_rotation_is_the_matrix_times_the_pose(problem):
    frames, start, length, angles = problem()
    angles[3] = 0
    still = ops.clip_window(frames.double(), start, length, backend="reference")
    exact = torch.einsum("bij,btvj->btvi", reference.rotation_matrix(angles.double()), still)
    ours = check(frames, start, length, angles)
    assert (ours - exact).abs().max() <= 4 * EPS * frames.abs().max()
    assert torch.equal(ours[3], check(frames, start[3:4], length[3:4])[0])


def test_absent_bodies_are_zero(problem):
    frames, start, length, angles = problem(6)
    length[::2] = 0
    start[2], start[4] = 10**12, -5
    assert not check(frames, start, length, angles)[::2].any()


def test_nothing_outside_the_windows_is_read(device, ringed):
    frames = torch.full((300, 17, 3), float("nan"), device=device)
    start, length = (torch.tensor(x, device=device) for x in ([0, 100, 299], [90, 150, 1]))
    for first, count in zip(start.tolist(), length.tolist(), strict=True):
        frames[first : first + count] = torch.randn(count, 17, 3, device=device)
    inputs = frames, start, length, torch.rand(3, 3, device=device)
    assert torch.equal(check(*map(ringed, inputs)), check(*inputs))


def test_strides(problem):
    frames, start, length, angles = problem(3)
    expected = check(frames, start, length, angles)
    for other in (
        frames.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        frames.transpose(0, 1).contiguous().transpose(0, 1),
        frames.repeat_interleave(2, 0)[::2],
        torch.cat([frames, frames], 1)[:, :25],
    ):
        assert torch.equal(check(other, start, length, angles), expected)
    columns = torch.stack([start, length], 1)
    assert torch.equal(check(frames, columns[:, 0], columns[:, 1], angles.T.contiguous().T), expected)
    assert torch.equal(check(frames, start.int(), length.int(), angles), expected)
    check(frames[:1].expand(300, -1, -1), start, length, angles[:1].expand(3, -1))
    check(frames[:, :1].expand(-1, 25, -1), start, length, angles)
    check(frames[..., :1].expand(-1, -1, 3), start, length)


def test_empty_batch(device):
    none = torch.zeros(0, dtype=torch.int64, device=device)
    frames = torch.randn(5, 4, 3, device=device)
    assert check(frames, none, none, torch.zeros(0, 3, device=device)).shape == (0, 120, 4, 3)
    two = torch.zeros(2, dtype=torch.int64, device=device)
    assert not check(frames[:0], two, two, torch.ones(2, 3, device=device)).any()


def test_other_dtypes_are_refused(problem):
    frames, start, length, _ = problem()
    with pytest.raises(ValueError, match=r"frames must be float32, bfloat16 or float16, got float64 \[300, 25, 3\]"):
        ops.clip_window(frames.double(), start, length, backend="triton")


def test_opcheck_and_compile(problem):
    arguments = problem(2, 20, 4)
    torch.library.opcheck(torch.ops.jmm_fast.clip_window.default, (*arguments, 8, "triton"))

    def run(*inputs):
        return ops.clip_window(*inputs, window=8, backend="triton")

    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments), run(*arguments))
