"""The C++ clip windows against their plain twin, for every instruction set of this machine: equal bit for bit."""

import ctypes
import mmap
import sys

import numpy as np
import pytest
import torch

from jmm_fast import ops, reference
from jmm_fast.ops.philox import uniform

native = pytest.importorskip("jmm_fast._C", reason="the C++ extension is not built", exc_type=ImportError)

EPS = torch.finfo(torch.float32).eps


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


def problem(count=40, rows=700, joints=25):
    start = torch.randint(0, rows // 2, (count,))
    return torch.randn(rows, joints, 3), start, torch.randint(1, rows // 2, (count,)), torch.rand(count, 3) * 8 - 4


def guarded(x):
    """A copy of ``x`` whose last byte lies right before a page that nobody may read."""
    page = mmap.PAGESIZE
    size = -(-x.nbytes // page) * page
    region = mmap.mmap(-1, size + page)
    end = ctypes.addressof(ctypes.c_char.from_buffer(region)) + size
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), page, 0) == 0
    values = torch.frombuffer(region, dtype=x.dtype, count=size // x.itemsize)
    return values[-x.numel() :].view(x.shape).copy_(x)


def check(frames, start, length, angles=None, window=120):
    ours = ops.clip_window(frames, start, length, angles, window=window, backend="cpu")
    expected = ops.clip_window(frames, start, length, angles, window=window, backend="reference")
    assert ours.is_contiguous() and ours.isfinite().all()
    assert torch.equal(ours, expected)
    return ours


@pytest.mark.parametrize("joints", [25, 1, 2, 5, 6, 17, 64])
@pytest.mark.parametrize("window", [120, 1, 7, 64])
def test_windows_equal_the_reference(isa, joints, window):
    frames, start, length, angles = problem(joints=joints)
    check(frames, start, length, angles, window)
    check(frames, start, length, None, window)


@pytest.mark.parametrize("length", [1, 2, 63, 74, 75, 119, 120, 121, 127, 240, 250, 599, 750])
def test_lengths(isa, length):
    frames = torch.randn(750, 25, 3)
    for first in {0, 750 - length}:
        ours = check(frames, torch.tensor([first]), torch.tensor([length]), torch.rand(1, 3))
        exact = ops.clip_window(frames.double(), torch.tensor([first]), torch.tensor([length]), torch.zeros(1, 3))
        still = check(frames, torch.tensor([first]), torch.tensor([length]))
        assert (still - exact).abs().max() <= 2 * EPS * frames.abs().max()
        assert ours.shape == (1, 120, 25, 3)


def test_rotation_is_the_matrix_times_the_pose(isa):
    frames, start, length, angles = problem()
    angles[3] = 0
    still = ops.clip_window(frames.double(), start, length)
    matrices = reference.rotation_matrix(angles.double())
    exact = torch.einsum("bij,btvj->btvi", matrices, still)
    ours = check(frames, start, length, angles)
    assert (ours - exact).abs().max() <= 4 * EPS * frames.abs().max()
    assert torch.equal(ours[3], check(frames, start[3:4], length[3:4])[0])


def test_golden_windows(isa, golden):
    arrays = np.load(golden("clip_crop_resize_rotate.npz"))
    for case in range(9):
        clip = torch.from_numpy(arrays[f"{case}/input"]).permute(3, 1, 2, 0)
        count = clip.shape[1]
        start = torch.tensor([0, count]) + int(arrays[f"{case}/crop_begin"])
        length = torch.full((2,), int(arrays[f"{case}/crop_length"]))
        angles = torch.from_numpy(arrays[f"{case}/angles"]).expand(2, 3)
        ours = check(clip.reshape(-1, 25, 3), start, length, angles)
        expected = torch.from_numpy(arrays[f"{case}/output"]).permute(3, 1, 2, 0)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-6)


def test_absent_bodies_are_zero(isa):
    frames, start, length, angles = problem(6)
    length[::2] = 0
    start[2], start[4] = 10**12, -5
    assert not check(frames, start, length, angles)[::2].any()


def test_each_clip_reads_its_own_rows_only(isa):
    for joints in (25, 17, 1):
        frames = torch.full((300, joints, 3), float("nan"))
        start, length = torch.tensor([0, 100, 299]), torch.tensor([90, 150, 1])
        for first, count in zip(start.tolist(), length.tolist(), strict=True):
            frames[first : first + count] = torch.randn(count, joints, 3)
        check(frames, start, length, torch.rand(3, 3))


def test_nothing_outside_the_inputs_is_read(isa):
    def ringed(x):
        filler = float("nan") if x.is_floating_point() else 2**40
        ring = torch.full([n + 2 for n in x.shape], filler, dtype=x.dtype)
        inner = ring[tuple(slice(1, -1) for _ in x.shape)]
        return inner.copy_(x)

    for joints in (25, 6):
        inputs = problem(joints=joints)
        expected = check(*inputs)
        assert torch.equal(check(*map(ringed, inputs)), expected)
        # Rows that lie packed, with other memory right before and behind.
        ring = torch.full((702, joints, 3), float("nan"))
        ring[1:-1] = inputs[0]
        assert torch.equal(check(ring[1:-1], *inputs[1:]), expected)


def test_strides(isa):
    frames, start, length, angles = problem()
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
    assert torch.equal(check(frames, start.int(), length.int(), angles.double().float()), expected)
    check(frames[:1].expand(700, -1, -1), start, length, angles[:1].expand(40, -1))
    check(frames[:, :1].expand(-1, 25, -1), start, length, angles)
    check(frames[..., :1].expand(-1, -1, 3), start, length)


@pytest.mark.skipif(sys.platform != "linux", reason="protects a page the Linux way")
def test_nothing_behind_the_last_row_is_read(isa):
    for joints in (25, 17, 2, 1):
        frames = torch.randn(80, joints, 3)
        start, length = torch.tensor([79, 10, 0, 75]), torch.tensor([1, 70, 80, 5])
        assert torch.equal(check(guarded(frames), start, length), check(frames, start, length))
        check(guarded(frames), start, length, torch.rand(4, 3))


def test_any_number_of_threads(isa, threads):
    inputs = problem()

    def run(count):
        threads(count)
        return ops.clip_window(*inputs, backend="cpu")

    first = run(1)
    assert all(torch.equal(first, run(count)) for count in (1, 2, 3, 8))


def test_empty_batch(isa):
    none = torch.zeros(0, dtype=torch.int64)
    assert check(torch.randn(5, 4, 3), none, none, torch.zeros(0, 3)).shape == (0, 120, 4, 3)
    assert check(torch.zeros(0, 4, 3), none, none).shape == (0, 120, 4, 3)
    assert not check(torch.zeros(0, 4, 3), torch.zeros(2).long(), torch.zeros(2).long()).any()


@pytest.mark.parametrize(
    "start, length",
    [(-1, 4), (0, 10), (6, 4), (10, 1), (0, -1), (2**62, 2**62), (1, 2**63 - 1)],
)
def test_windows_outside_the_frames(start, length):
    start, length = torch.tensor([0, start]), torch.tensor([9, length])
    with pytest.raises(ValueError, match=f"got start {start[1]} and length {length[1]} for clip 1"):
        ops.clip_window(torch.zeros(9, 4, 3), start, length, backend="cpu")


def test_other_dtypes_are_left_to_the_reference():
    frames, start, length, angles = problem(joints=4)
    with pytest.raises(ValueError, match=r"frames must be float32, got float64 \[700, 4, 3\]"):
        ops.clip_window(frames.double(), start, length, backend="cpu")
    assert ops.clip_window(frames.bfloat16(), start, length, angles).dtype == torch.bfloat16


def test_the_operator_refuses_what_would_read_other_memory():
    frames, start, length, angles = problem()
    run = torch.ops.jmm_fast.clip_window_cpu
    for arguments, message in (
        ((frames.double(), start, length, None, 9), r"frames must be a float32 CPU tensor \[F,V,3\]"),
        ((frames[..., :2], start, length, None, 9), "frames must be"),
        ((frames, start.int(), length, None, 9), "start and length must be int64"),
        ((frames, start[:3], length, None, 9), "start and length must be int64"),
        ((frames, start, length, angles[:3], 9), r"angles must be a float32 CPU tensor \[B,3\]"),
        ((frames, start, length, None, 0), "window must be positive"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(*arguments)


def test_opcheck_compile_and_export():
    arguments = torch.randn(20, 4, 3), torch.tensor([0, 5]), torch.tensor([5, 15]), torch.rand(2, 3)
    torch.library.opcheck(torch.ops.jmm_fast.clip_window.default, (*arguments, 8, "cpu"))
    eager = ops.clip_window(*arguments, window=8, backend="cpu")

    class Window(torch.nn.Module):
        def forward(self, frames, start, length, angles):
            return ops.clip_window(frames, start, length, angles, window=8, backend="cpu")

    assert torch.equal(torch.compile(Window(), fullgraph=True)(*arguments), eager)
    assert torch.equal(torch.export.export(Window(), arguments).module()(*arguments), eager)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 750])
def test_uniform_numbers_equal_the_reference(count):
    ids = torch.tensor([0, 17, 17 + (3 << 32), 3_000_000_000, 2**32 - 1, -1])
    for seed, epoch in ((0, 0), (2**63 - 1, 5), (2**64 - 1, 2**32 - 1), (-3, 1)):
        for purpose in (reference.CROP, reference.ROTATION, reference.ORDER):
            ours = uniform(seed, purpose, ids, epoch, count)
            assert torch.equal(ours, reference.uniform(seed, purpose, ids, epoch, count))
            assert torch.equal(uniform(seed, purpose, ids[::2], epoch, count), ours[::2])
