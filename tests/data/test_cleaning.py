import itertools

import numpy as np
import pytest

from jmm_fast.data.cleaning import Cleaner, center_clips
from jmm_fast.data.scan import scan_clips, scan_clips_numpy
from jmm_fast.errors import UserError

NAMES = ["a", "b", "c", "d"]


def naive(frames, offsets, body_offsets):
    """Clip by clip, frame by frame: frames and bodies that stay."""
    out = []
    for begin, end in itertools.pairwise(offsets):
        edges = [edge for edge in body_offsets if begin <= edge <= end]
        bodies = [frames[low:high] for low, high in itertools.pairwise(edges)]
        living = [t for t in range(len(bodies[0])) if any(body[t].any() for body in bodies)]
        out.append([body[living] for body in bodies if body.any()])
    return out


def test_empty_frames_and_bodies_go(make_contents):
    contents = make_contents(sizes=[6, 8, 5, 7], bodies=[1, 2, 2, 3])
    frames = contents.frames
    frames[2] = 0  # clip 0: a frame nobody is in
    frames[6 + 3] = 0  # clip 1: first body absent, second there
    frames[6 + 5] = frames[6 + 8 + 5] = 0  # clip 1: nobody
    frames[22 + 5 : 22 + 10] = 0  # clip 2: second body never there
    frames[32 : 32 + 7] = 0  # clip 3: first of three never there
    cleaner = Cleaner(where="x.npz")
    got, offsets, body_offsets, kept = cleaner.clean(frames, contents.offsets, contents.body_offsets, NAMES)
    expected = naive(frames, contents.offsets, contents.body_offsets)
    assert kept.tolist() == [0, 1, 2, 3]
    assert np.diff(offsets).tolist() == [5, 14, 5, 14]
    assert np.diff(body_offsets).tolist() == [5, 7, 7, 5, 7, 7]
    np.testing.assert_array_equal(got, np.concatenate([body for clip in expected for body in clip]))
    assert (cleaner.empty_frames, cleaner.empty_bodies) == (2, 2)
    assert cleaner.report()["dropped"] == []


def test_clean_data_is_not_copied(make_contents):
    contents = make_contents()
    got, *_ = Cleaner(where="x").clean(contents.frames, contents.offsets, contents.body_offsets, NAMES)
    assert got is contents.frames


@pytest.fixture
def spoilt(make_contents):
    contents = make_contents(sizes=[6, 8, 5, 7], bodies=[1, 2, 1, 1])
    contents.frames[7, 3] = np.nan
    contents.frames[18, 0, 0] = np.inf
    contents.frames[23:27] = 0
    return contents


def test_fail_names_the_first_bad_clip(spoilt):
    with pytest.raises(UserError, match=r"^x.npz: clip 1 \(b\) holds 4 NaN or infinite coordinates \(--on-error drop"):
        Cleaner(where="x.npz").clean(spoilt.frames, spoilt.offsets, spoilt.body_offsets, NAMES)


def test_drop_counts_them(spoilt):
    cleaner = Cleaner(where="x.npz", on_error="drop")
    frames, offsets, body_offsets, kept = cleaner.clean(
        spoilt.frames, spoilt.offsets, spoilt.body_offsets, NAMES, {3: "has no class"}
    )
    assert kept.tolist() == [0]
    assert offsets.tolist() == body_offsets.tolist() == [0, 6]
    np.testing.assert_array_equal(frames, spoilt.frames[:6])
    assert cleaner.dropped == [
        {"clip": "clip 1 (b)", "reason": "holds 4 NaN or infinite coordinates"},
        {"clip": "clip 2 (c)", "reason": "has 1 frame with a body, expected at least 2"},
        {"clip": "clip 3 (d)", "reason": "has no class"},
    ]
    assert sum(cleaner.report()["dropped_by_reason"].values()) == 3


@pytest.mark.parametrize("scan", [scan_clips, scan_clips_numpy])
def test_scan(scan):
    rng = np.random.default_rng(0)
    frames = rng.normal(size=(20_000, 5, 3)).astype(np.float32)
    offsets = np.array([0, 7, 7, 9000, 20_000])
    frames[3] = 0
    frames[5, 1, 2] = np.nan
    frames[8:10] = 0
    frames[9500, 0] = (np.inf, -np.inf, -50)
    nonfinite, zero_frames, max_abs = scan(frames, offsets)
    assert nonfinite.tolist() == [1, 0, 0, 2]
    assert zero_frames.tolist() == [1, 0, 2, 0]
    finite = np.where(np.isfinite(frames), np.abs(frames), 0)
    np.testing.assert_array_equal(max_abs, [finite[:7].max(), 0, finite[7:9000].max(), 50])
    assert (nonfinite.dtype, zero_frames.dtype, max_abs.dtype) == (np.int64, np.int64, np.float32)


def test_centring(make_contents):
    contents = make_contents(sizes=[4, 6], bodies=[1, 2])
    frames = contents.frames
    frames[4] = 0  # the first body of clip 1 comes a frame later
    before = frames.copy()
    center_clips(contents, 1)
    np.testing.assert_array_equal(frames[:4], before[:4] - before[0, 1])
    np.testing.assert_array_equal(frames[4], 0)
    np.testing.assert_array_equal(frames[5:16], before[5:16] - before[5, 1])
