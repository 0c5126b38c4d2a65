import importlib.util
import sys

import numpy as np
import pytest

from jmm_fast.data import ClipStore, write_store
from jmm_fast.data.inspect import inspect, suspects
from jmm_fast.errors import UserError

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


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
    text = inspect(path)
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
        "clip 9 (z) has no class",
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
    assert "clips worth a look: 4" in inspect(tmp_path / "clips")


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="matplotlib is not installed")
def test_picture(path, tmp_path):
    text = inspect(path, tmp_path / "sheet.png")
    assert text.endswith(f"picture: {tmp_path / 'sheet.png'}")
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    from matplotlib.image import imread

    pixels = imread(tmp_path / "sheet.png")[..., :3]
    assert pixels.shape[0] > 100 and (pixels < 0.5).any(-1).mean() > 0.001


def test_picture_without_matplotlib(path, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"a picture needs matplotlib: pip install"):
        inspect(path, tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()


def test_bad_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        inspect(tmp_path / "nothing")
