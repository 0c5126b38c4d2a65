import numpy as np
import pytest

from jmm_fast.data import ClipStore, write_store
from jmm_fast.data.inspect import duplicates, inspect, length_histogram, log_lines, suspects
from jmm_fast.errors import UserError


@pytest.fixture
def path(tmp_path, make_contents):
    contents = make_contents(
        sizes=[5, 9, 4, 12],
        bodies=[1, 2, 1, 1],
        class_names=["walk", "wave", "sit"],
        splits={"xsub": {"train": [0, 1, 2], "test": [3]}},
        provenance={"reader": "made", "dropped": [{"clip": "clip 9 (z)", "reason": "has no class"}]},
    )
    write_store(tmp_path / "clips", contents)
    return tmp_path / "clips"


def test_text(path):
    text = inspect(ClipStore.open(path, check_values=False))
    for line in (
        "clips        4 (3 with 1 body, 1 with 2 bodies)",
        "frames       30 at 30 a second, 0.0 minutes; 39 body poses",
        "lengths      4 / 5 / 7 / 10 / 12 frames",
        "layout       ntu25, 25 joints, root spine_shoulder",
        "2 sit       0   (no clip)",
        "subject        3 values: s01 (2), s02 (1), s03 (1)",
        "xsub           3 train, 1 test",
        "clips worth a look: none",
        "left out when the store was made: 1",
        "clip 9 (z): has no class",
        f"data hash    {ClipStore.open(path).fingerprint[:16]}",
    ):
        assert line in text, text


def test_suspects(tmp_path, make_contents):
    contents = make_contents(sizes=[5, 9, 4, 12, 6], bodies=[1, 2, 1, 1, 1])
    frames = contents.frames
    frames[2, 0, 0] = np.nan
    frames[5 + 3] = frames[14 + 3] = 0
    frames[23 + 1, 4, 1] = 900
    frames[27:39] = frames[27]
    write_store(tmp_path / "clips", contents)
    store = ClipStore.open(tmp_path / "clips", check_values=False)
    assert [(item.clip, item.reason) for item in suspects(store)] == [
        (0, "1 NaN or infinite coordinates"),
        (1, "1 frames without a body"),
        (2, "coordinates up to 900: not metres?"),
        (3, "nothing moves"),
    ]
    assert "clips worth a look: 4" in inspect(ClipStore.open(tmp_path / "clips", check_values=False))


def test_duplicates_and_histogram(tmp_path, make_contents):
    contents = make_contents(sizes=[5, 9, 5, 5, 30], bodies=[1] * 5)
    contents.frames[14:19] = contents.frames[:5]
    contents.frames[19 + 2] = contents.frames[2]  # as long, and alike in the middle frame alone
    write_store(tmp_path / "clips", contents)
    store = ClipStore.open(tmp_path / "clips")
    assert duplicates(store) == {2: 0}
    assert [item.reason for item in suspects(store)] == ["the same poses as clip 0"]
    assert length_histogram(store, 2) == [(5, 17, 4), (18, 30, 1)]
    assert sum(count for *_, count in length_histogram(store)) == 5


def test_log(tmp_path, make_contents):
    log = [
        {"file": "a.txt", "clip": "one", "body": "7", "reason": "moves too little"},
        {"file": "b.txt", "clip": "", "body": "", "reason": "line 3: expected 25 joints, got 24"},
    ]
    contents = make_contents(provenance={"reader": "made", "log": log, "warnings": ["xsub has 3 clips"]})
    contents.confidence = np.ones((len(contents.frames), 25), np.float16)
    contents.confidence[:, 3] = 0
    write_store(tmp_path / "clips", contents)
    assert log_lines(ClipStore.open(tmp_path / "clips")) == [
        "a.txt, clip one, body 7: moves too little",
        "b.txt: line 3: expected 25 joints, got 24",
    ]
    text = inspect(ClipStore.open(tmp_path / "clips", check_values=False))
    assert "left out when the store was made: 2" in text and "a.txt, clip one, body 7: moves too little" in text
    assert "warning: xsub has 3 clips" in text
    assert "missing      head 100 %" in text


def test_bad_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        inspect(ClipStore.open(tmp_path / "nothing", check_values=False))
