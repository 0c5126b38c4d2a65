import itertools
import subprocess
import sys

import numpy as np
import pytest

host = pytest.importorskip("jmm_fast._host", reason="the C++ reader extension is not built", exc_type=ImportError)


def clips():
    random = np.random.default_rng(0)
    frames = random.normal(size=(500, 25, 3)).astype(np.float32)
    frames[7] = 0
    frames[8] = -0.0
    frames[12, 3, 1] = np.nan
    frames[13, 0, 0] = np.inf
    frames[13, 24, 2] = -np.inf
    frames[100, 5, 0] = -77.5
    frames[300:310] = 0
    frames[400] = np.nan
    frames[499, 24, 2] = np.float32(1e-45)  # the smallest there is: not zero
    offsets = np.array([0, 10, 10, 101, 300, 310, 400, 401, 500])
    return frames, offsets


def plain(frames, offsets):
    rows = []
    for begin, end in itertools.pairwise(offsets):
        clip = frames[begin:end]
        finite = np.abs(clip[np.isfinite(clip)])
        zero = (clip == 0).all((1, 2)).sum()
        rows.append(((~np.isfinite(clip)).sum(), zero, finite.max() if finite.size else 0.0))
    nonfinite, zero_frames, max_abs = zip(*rows, strict=True)
    return np.array(nonfinite), np.array(zero_frames), np.array(max_abs, dtype=np.float32)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_scan_clips_sees_what_numpy_sees(threads):
    frames, offsets = clips()
    found = host.scan_clips(frames, offsets, threads=threads)
    for ours, expected in zip(found, plain(frames, offsets), strict=True):
        np.testing.assert_array_equal(ours, expected)
    assert [x.dtype for x in found] == [np.int64, np.int64, np.float32]


def test_scan_clips_shares_a_large_set_between_threads():
    frames = np.random.default_rng(1).normal(size=(30_000, 25, 3)).astype(np.float32)
    offsets = np.arange(0, 30_001, 50)
    frames[offsets[:-1] + 9, 1, 1] = 1e6 + np.arange(600, dtype=np.float32)
    for threads in (1, 4):
        nonfinite, zero_frames, max_abs = host.scan_clips(frames, offsets, threads=threads)
        assert not nonfinite.any() and not zero_frames.any()
        np.testing.assert_array_equal(max_abs, 1e6 + np.arange(600, dtype=np.float32))


def test_scan_clips_takes_views_and_empty_sets():
    frames, offsets = clips()
    view = np.asfortranarray(frames[::-1])[::-1]
    for ours, expected in zip(host.scan_clips(view, offsets), plain(frames, offsets), strict=True):
        np.testing.assert_array_equal(ours, expected)
    assert [len(x) for x in host.scan_clips(frames, np.array([5]))] == [0, 0, 0]
    nonfinite, zero_frames, max_abs = host.scan_clips(np.zeros((0, 25, 3), np.float32), np.array([0, 0]))
    assert (nonfinite[0], zero_frames[0], max_abs[0]) == (0, 0, 0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((np.zeros((4, 25, 3)), [0, 4]), r"^frames must be float32 \[F,V,C\], got float64 \[4, 25, 3\]$"),
        ((np.zeros((4, 75), np.float32), [0, 4]), r"^frames must be float32 \[F,V,C\], got float32 \[4, 75\]$"),
        (([[[0.0]]], [0, 1]), r"^frames must be float32 \[F,V,C\], got list$"),
        ((np.zeros((4, 25, 3), np.float32), [0, 5]), r"^offsets must lie in 0..4 \(the rows of frames\), got 0..5$"),
        ((np.zeros((4, 25, 3), np.float32), [-1, 4]), r"^offsets must lie in 0..4 \(the rows of frames\), got -1..4$"),
        (
            (np.zeros((4, 25, 3), np.float32), [0, 3, 2, 4]),
            "^offsets must not decrease, but clip 1 goes from 3 to 2$",
        ),
        ((np.zeros((4, 25, 3), np.float32), []), r"^offsets must be int64 \[N\+1\], got int64 \[0\]$"),
    ],
)
def test_scan_clips_says_what_is_wrong(arguments, message):
    frames, offsets = arguments
    with pytest.raises(ValueError, match=message):
        host.scan_clips(frames, np.array(offsets, dtype=np.int64))


def test_scan_clips_refuses_other_integers_and_threads():
    frames, offsets = clips()
    with pytest.raises(ValueError, match=r"^offsets must be int64 \[N\+1\], got int32 \[9\]$"):
        host.scan_clips(frames, offsets.astype(np.int32))
    with pytest.raises(ValueError, match="threads must be 0"):
        host.scan_clips(frames, offsets, threads=-1)


def test_the_host_module_does_not_need_torch():
    code = "import sys, jmm_fast._host; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
