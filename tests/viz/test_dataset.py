"""Page and picture of a clip store."""

import json
import re
import sys

import numpy as np
import pytest

from jmm_fast.cli import main
from jmm_fast.data import ClipStore, StoreContents, write_store
from jmm_fast.errors import UserError

pytest.importorskip("matplotlib")

from jmm_fast.viz import contact_sheet, save, write_dataset_page


@pytest.fixture
def path(tmp_path):
    from jmm_fast.data.readers import READERS, write_store

    contents = READERS["synthetic"].read(None, READERS["synthetic"].options(clips=24))
    contents.provenance["log"] = [{"file": "x<y>.txt", "clip": "", "body": "", "reason": "empty"}] * 60
    rows = sum(len(block) for block in contents.frames) if isinstance(contents.frames, list) else len(contents.frames)
    contents.confidence = np.ones((rows, 25), np.float16)
    contents.confidence[: rows // 4, 3] = 0
    write_store(tmp_path / "clips", contents)
    return tmp_path / "clips"


@pytest.fixture
def make_store(path):
    """``make_store(missing)``: the clips, without the joint of that name."""
    store = ClipStore.open(path)

    def make(missing=None):
        frames = store.frames.numpy().copy()
        confidence = np.ones(frames.shape[:2], np.float16)
        if missing is not None:
            joint = store.skeleton.joint_names.index(missing)
            frames[:, joint], confidence[:, joint] = 0, 0
        return ClipStore.from_contents(
            StoreContents(
                frames=frames,
                confidence=confidence,
                offsets=store.offsets.numpy(),
                body_offsets=store.body_offsets.numpy(),
                labels=store.labels.numpy(),
                class_names=store.class_names,
                skeleton=store.skeleton,
            )
        )

    return make


def test_page_holds_everything(path, tmp_path):
    page = write_dataset_page(ClipStore.open(path, check_values=False), tmp_path / "page.html").read_text(
        encoding="utf-8"
    )
    store = ClipStore.open(path)
    for title in ("Clips to turn around", "Lengths and people", "Classes", "Missing joints", "Clips worth a look"):
        assert f"<h2>{title}</h2>" in page
    assert store.fingerprint in page and f"{store.num_clips} clips of {store.num_classes} classes" in page
    assert "x&lt;y&gt;.txt: empty" in page and "And 10 more." in page and "<y>" not in page
    assert not re.search(r"""(src|href)="(?!#)|url\((?!#)|https?://(?!www\.w3\.org)""", page), (
        "the page asks for something from outside"
    )
    clips = json.loads(re.search(r'id="player-data">(.*?)</script>', page, re.DOTALL)[1])
    assert 2 <= len(clips) <= 12 and all("patch" not in clip for clip in clips)
    assert {clip["joints"] for clip in clips} == {25}
    assert all("seen" in body for clip in clips for body in clip["bodies"])


def test_picture(path, tmp_path):
    from matplotlib.image import imread

    assert main(["inspect", str(path), "--picture", str(tmp_path / "sheet.png"), "--log", str(tmp_path / "log")]) == 0
    pixels = imread(tmp_path / "sheet.png")[..., :3]
    assert pixels.shape[0] > 100 and (pixels < 0.5).any(-1).mean() > 0.001
    assert (tmp_path / "log").read_text().splitlines() == ["x<y>.txt: empty"] * 60


def test_missing_joints_are_not_drawn(tmp_path, make_store):
    from matplotlib.collections import LineCollection

    def bones(store):
        axes = contact_sheet(store, frames=4).axes[0]
        return [len(item.get_segments()) for item in axes.collections if isinstance(item, LineCollection)]

    whole, lacking = bones(make_store()), bones(make_store(missing="left_elbow"))
    # The elbow ends two bones, in each of four frames.
    assert [a - b for a, b in zip(whole, lacking, strict=True)] == [8] * len(whole)


def test_a_set_with_bad_numbers_can_be_looked_at(tmp_path, path):
    store = ClipStore.open(path)
    frames = store.frames.numpy().copy()
    frames[3, 2] = np.nan
    write_store(
        tmp_path / "bad",
        frames=frames,
        offsets=store.offsets.numpy(),
        body_offsets=store.body_offsets.numpy(),
        labels=store.labels.numpy(),
        class_names=store.class_names,
        skeleton=store.skeleton,
    )
    page = write_dataset_page(ClipStore.open(tmp_path / "bad", check_values=False), tmp_path / "page.html").read_text(
        encoding="utf-8"
    )
    assert "3 NaN or infinite coordinates" in page and "NaN" not in re.search(r'player-data">(.*?)<', page)[1]
    save(contact_sheet(ClipStore.open(tmp_path / "bad", check_values=False)), tmp_path / "sheet.svg")


def test_without_matplotlib(path, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"figures need matplotlib: pip install"):
        write_dataset_page(ClipStore.open(path, check_values=False), tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
