import json
import resource

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jmm_fast import skeleton
from jmm_fast.data import ClipStore, stratified_fraction, write_store
from jmm_fast.errors import UserError
from jmm_fast.skeleton import Skeleton


def test_round_trip(tmp_path, make_contents):
    contents = make_contents(
        bodies=[1, 2, 1, 2],
        names=["a", "b", "c", "ä"],
        fps=25.0,
        splits={"half": {"train": np.array([0, 1]), "test": np.array([2, 3])}},
        provenance={"reader": "made", "count": np.int64(3)},
    )
    path = tmp_path / "clips.safetensors"
    write_store(path, contents)
    store = ClipStore.open(path)
    np.testing.assert_array_equal(store.frames, contents.frames)
    np.testing.assert_array_equal(store.offsets, contents.offsets)
    np.testing.assert_array_equal(store.body_offsets, contents.body_offsets)
    np.testing.assert_array_equal(store.labels, contents.labels)
    assert store.lengths.tolist() == [5, 9, 4, 12]
    assert store.clip_bodies.tolist() == [[0, 1], [1, 2], [3, 1], [4, 2]]
    assert (store.num_clips, store.num_bodies, store.max_bodies, store.num_classes) == (4, 6, 2, 2)
    assert store.names == ["a", "b", "c", "ä"] and store.class_names == ["walk", "wave both"] and store.fps == 25.0
    assert store.columns["speed"].dtype == torch.float64 and store.columns["subject"].tolist() == [0, 1, 2, 0]
    assert store.column_values == {"subject": ["s01", "s02", "s03"]}
    assert store.provenance == {"reader": "made", "count": 3}
    assert store.skeleton == skeleton.get("ntu25")
    assert store.splits["half"]["test"].tolist() == [2, 3]
    clip = store.clip(1)
    assert clip.shape == (2, 9, 25, 3)
    np.testing.assert_array_equal(clip[1], contents.frames[14:23])


def test_custom_layout_survives(tmp_path, make_contents):
    layout = Skeleton.from_parents([-1, 0, 0], ["hips", "LeftLeg", "RightLeg"], name="mine")
    contents = make_contents()
    contents.frames, contents.skeleton = contents.frames[:, :3].copy(), layout
    write_store(tmp_path / "s.safetensors", contents)
    assert ClipStore.open(tmp_path / "s.safetensors").skeleton == layout


def test_blocks_and_keywords_write_the_same_file(tmp_path, make_contents):
    whole = make_contents()
    write_store(tmp_path / "a", whole)
    fields = {name: getattr(whole, name) for name in whole.__slots__}
    fields["frames"] = [whole.frames[:7], whole.frames[7:8], whole.frames[8:]]
    write_store(tmp_path / "b", **fields)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    # An independent reader of the format agrees.
    np.testing.assert_array_equal(load_file(tmp_path / "b")["frames"], whole.frames)


def test_frames_are_mapped_not_read(tmp_path, make_contents):
    path = tmp_path / "big"
    contents = make_contents(sizes=[40_000, 40_000])
    write_store(path, contents)

    def anonymous_kilobytes() -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))

    before = anonymous_kilobytes()
    store = ClipStore.open(path)
    assert store.frames.numel() * 4 > 20e6
    assert anonymous_kilobytes() - before < 5_000


def test_in_memory_store_equals_the_file(tmp_path, make_contents):
    contents = make_contents(bodies=[2, 1, 1, 1], splits={"x": {"train": [0, 1], "test": [2]}})
    write_store(tmp_path / "s", contents)
    here, there = ClipStore.from_contents(contents), ClipStore.open(tmp_path / "s")
    assert here.fingerprint == there.fingerprint
    torch.testing.assert_close(here.clip(0), there.clip(0), rtol=0, atol=0)


def test_labelled_clips(make_contents):
    names = [f"n{clip}" for clip in range(40)]
    splits = {"x": {"train": np.arange(0, 30), "test": np.arange(30, 40)}}
    subsets = {"x": {"0.1": ["n7", "n2", "n35"], "0.5": ["n38"]}}
    contents = make_contents(sizes=[2] * 40, names=names, splits=splits, label_subsets=subsets)
    store = ClipStore.from_contents(contents)
    split = store.split("x")
    # In the order of the store, and only clips that train.
    assert [store.labelled(split, 0.1, seed).tolist() for seed in (0, 1)] == [[2, 7]] * 2
    drawn = store.labelled(split, 0.2, 3)
    assert torch.equal(drawn, stratified_fraction(store.labels, split.train, 0.2, 3)) and len(drawn) == 6
    assert not torch.equal(drawn, store.labelled(split, 0.2, 4))
    assert torch.equal(store.labelled(split, 1.0, 0), split.train)
    # The subset of a split says nothing about another one.
    other = store.split("subject in 0,1")
    assert torch.equal(store.labelled(other, 0.1, 3), stratified_fraction(store.labels, other.train, 0.1, 3))
    with pytest.raises(UserError, match=r"label subset 0\.5 of split 'x' names no training clip"):
        store.labelled(split, 0.5, 0)
    with pytest.raises(UserError, match="fraction must be above 0"):
        store.labelled(split, 0.0, 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.label_subsets.update(x={"0.1": ["clip 0"]}),
        lambda c: c.frames.__setitem__((3, 4, 1), 9.0),
        lambda c: c.labels.__setitem__(0, 1),
        lambda c: c.columns["subject"].__setitem__(0, 2),
        lambda c: c.names.extend("abcd"),
        lambda c: c.splits.update(x={"train": [0], "test": [1]}),
    ],
)
def test_fingerprint_follows_the_contents(make_contents, change):
    plain, other = make_contents(), make_contents()
    assert ClipStore.from_contents(plain).fingerprint == ClipStore.from_contents(make_contents()).fingerprint
    change(other)
    assert ClipStore.from_contents(plain).fingerprint != ClipStore.from_contents(other).fingerprint


BAD_CONTENTS = {
    "frames float64": (
        lambda c: setattr(c, "frames", c.frames.astype(np.float64)),
        r"frames must be float32 \[F,V,3\]",
    ),
    "frames flat": (lambda c: setattr(c, "frames", c.frames.reshape(-1, 75)), r"frames must be float32 \[F,V,3\]"),
    "joints": (lambda c: setattr(c, "frames", c.frames[:, :20]), "20 joints, its layout ntu25 has 25"),
    "labels outside": (lambda c: setattr(c, "labels", c.labels + 1), r"clip 1 has label 2, outside the 2 class names"),
    "labels float": (lambda c: setattr(c, "labels", c.labels * 1.0), "labels must be int64"),
    "labels short": (lambda c: setattr(c, "labels", c.labels[:3]), r"offsets must be \[N\+1\] for the 3 labels, got 5"),
    "offsets fall": (
        lambda c: setattr(c, "offsets", np.array([0, 14, 5, 18, 30])),
        "offsets must not decrease, but entry 2 is below entry 1",
    ),
    "offsets short": (
        lambda c: setattr(c, "offsets", np.array([0, 5, 14, 18, 29])),
        "offsets must run from 0 to the 30 rows of frames, got 0 to 29",
    ),
    "one frame": (
        lambda c: setattr(c, "offsets", np.array([0, 5, 14, 15, 30])),
        "clip 2 has 1 frames, expected at least 2",
    ),
    "no frame": (lambda c: setattr(c, "offsets", np.array([0, 5, 5, 18, 30])), "clip 1 has 0 frames"),
    "bodies uneven": (
        lambda c: setattr(c, "body_offsets", np.array([0, 5, 8, 14, 18, 30])),
        r"clip 1: its bodies must have the same number of frames, at least 2, got \[3, 6\]",
    ),
    "bodies miss": (
        lambda c: setattr(c, "body_offsets", np.array([0, 5, 18, 30])),
        "first row of every clip, 14 is missing",
    ),
    "column": (lambda c: c.columns.update(x=np.zeros(3)), r"column/x must be int64 or float \[4\], got float64 \[3\]"),
    "codes": (lambda c: c.columns.update(subject=np.array([0, 1, 2, 3])), "codes of its 3 value names"),
    "names": (lambda c: c.names.append("only"), r"names must hold one name per clip \(4\), got 1"),
    "split ids": (lambda c: c.splits.update(x={"train": [0], "test": [4]}), r"split x must hold clips of 0..3"),
    "split twice": (lambda c: c.splits.update(x={"train": [0], "test": [0]}), "split x holds a clip twice"),
}


@pytest.mark.parametrize("case", BAD_CONTENTS)
def test_bad_contents_are_refused(tmp_path, make_contents, case):
    change, message = BAD_CONTENTS[case]
    contents = make_contents()
    change(contents)
    with pytest.raises(UserError, match=message) as caught:
        write_store(tmp_path / "bad.safetensors", contents)
    assert str(caught.value).startswith(str(tmp_path / "bad.safetensors"))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=message):
        ClipStore.from_contents(contents)


def test_nan_names_the_clip(tmp_path, make_contents):
    contents = make_contents(names=["a", "b", "c", "d"])
    contents.frames[15, 3, 2] = np.nan
    write_store(tmp_path / "nan", contents)
    with pytest.raises(UserError, match=r"nan: clip 2 \(c\) holds NaN or infinite coordinates"):
        ClipStore.open(tmp_path / "nan")
    assert ClipStore.open(tmp_path / "nan", check_values=False).num_clips == 4


def test_huge_but_finite_values_pass(make_contents):
    contents = make_contents()
    contents.frames[:] = 3e38
    assert ClipStore.from_contents(contents).num_clips == 4


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="nothing: no such file: expected a clip store"):
        ClipStore.open(tmp_path / "nothing")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_truncated_file(tmp_path, make_contents, keep):
    path = tmp_path / "clips"
    write_store(path, make_contents())
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(UserError, match=r"clips: not a whole \.safetensors file: "):
        ClipStore.open(path)


def test_not_a_store(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"layer.weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match=r"weights\.safetensors: not a clip store: it holds layer\.weight"):
        ClipStore.open(path)


def rewrite(path, change_tensors=None, change_metadata=None):
    """The store at ``path`` with other tensors or header fields, written by an independent writer."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
    if change_tensors:
        change_tensors(tensors)
    if change_metadata:
        change_metadata(metadata)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (None, lambda m: m.update(version="9"), "clip store version 9, this program reads 1"),
        (None, lambda m: m.pop("class_names"), "header field class_names is missing"),
        (None, lambda m: m.update(splits="{"), "header field splits is missing or not JSON"),
        (None, lambda m: m.update(skeleton=json.dumps({"name": "x"})), "header field skeleton is not a joint layout"),
        (lambda t: t.pop("labels"), None, "labels is missing: it holds body_offsets"),
        (
            lambda t: t.update(labels=t["labels"].int()),
            None,
            r"labels must be int64 and one-dimensional, got int32 \[4\]",
        ),
        (lambda t: t.update(frames=t["frames"].half()), None, r"frames must be float32 \[F,V,3\], got torch.float16"),
        (lambda t: t.pop("frames"), None, r"frames must be float32 \[F,V,3\], got nothing"),
        (lambda t: t.update(frames=t["frames"][..., :2].contiguous()), None, r"got shape \[30, 25, 2\]"),
    ],
)
def test_bad_files_are_refused(tmp_path, make_contents, tensors, metadata, message):
    path = tmp_path / "clips"
    write_store(path, make_contents())
    rewrite(path, tensors, metadata)
    with pytest.raises(UserError, match=message) as caught:
        ClipStore.open(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_clip_out_of_range(make_contents):
    with pytest.raises(UserError, match="no clip 4: there are 4"):
        ClipStore.from_contents(make_contents()).clip(4)


def test_full_disk_leaves_nothing_new(tmp_path, make_contents):
    path = tmp_path / "clips"
    write_store(path, make_contents())
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A write past the limit fails as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*clips: File too large"):
            write_store(path, make_contents(seed=1))
        with pytest.raises(UserError, match=r"cannot write .*fresh"):
            write_store(tmp_path / "fresh", make_contents(seed=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["clips"]
