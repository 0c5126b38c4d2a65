import io
import pickle
import zipfile

import numpy as np
import pytest

from jmm_fast.data import ClipStore, prepare
from jmm_fast.data.readers import npz
from jmm_fast.data.readers.ragged import RaggedOptions, read
from jmm_fast.errors import UserError


def test_plain_file(ragged_file, ragged_arrays):
    contents = read(ragged_file(), center=False)
    np.testing.assert_array_equal(contents.frames, ragged_arrays["frames"])
    assert contents.names == ["one", "two", "three", "four"]
    assert contents.class_names == ["a", "b", "c"] and contents.fps == 25.0
    assert contents.skeleton.joint_names == ("root", "left_x", "right_x", "left_y", "right_y")
    assert contents.skeleton.pairs == ((1, 2), (3, 4))
    assert contents.column_values == {"subject": ["ann", "bob"], "weather": ["fog", "rain", "sun"]}
    assert contents.columns["weather"].tolist() == [2, 1, 2, 0]
    assert contents.columns["correct"].tolist() == [1, 0, 0, 1]
    assert contents.provenance["source"] == "raw.npz" and len(contents.provenance["source_sha256"]) == 64


def test_centring_and_layout(ragged_file, ragged_arrays):
    index = np.array([0, 1, 3, *[4] * 22])
    contents = read(ragged_file(ntu25_index=index))
    assert contents.skeleton.name == "ntu25"
    expected = ragged_arrays["frames"][:, index]
    np.testing.assert_allclose(contents.frames[6:10], expected[6:10] - expected[6, 1], rtol=0, atol=1e-6)
    kept = read(ragged_file(ntu25_index=index), layout="keep")
    assert kept.skeleton.num_joints == 5
    np.testing.assert_array_equal(kept.frames[6, 0], 0)


def test_where_label_and_split(ragged_file, ragged_arrays):
    contents = read(ragged_file(), where="labels in 1,2", split=("ann=subject in ann",), center=False)
    assert contents.class_names == ["b", "c"] and contents.labels.tolist() == [0, 1, 0]
    np.testing.assert_array_equal(contents.frames, ragged_arrays["frames"][6:])
    assert contents.splits["ann"]["train"].tolist() == [1]
    assert contents.splits["ann"]["test"].tolist() == [0, 2]
    joined = read(ragged_file(), label="labels,correct")
    assert joined.class_names == ["a / correct=1", "b / correct=0", "b / correct=1", "c / correct=0"]
    assert joined.labels.tolist() == [0, 1, 3, 2]
    assert joined.columns["original_label"].tolist() == [0, 1, 2, 1]
    assert joined.column_values["original_label"] == ["a", "b", "c"]


def test_label_subsets(ragged_file, tmp_path):
    arrays = {
        "frames": np.random.default_rng(0).normal(size=(80, 5, 3)).astype(np.float32),
        "offsets": np.arange(0, 81, 2),
        "labels": np.arange(40) % 3,
        "subject": np.arange(40) % 2,
        "correct": None,
        "weather": None,
        "source": np.array([f"n{clip}" for clip in range(40)]),
    }
    options = {"split": ("even=subject in ann", "odd=subject in bob"), "label_fractions": (0.01, 0.5)}
    store = prepare("ragged", ragged_file(**arrays), tmp_path / "a", RaggedOptions(**options))
    assert {split: list(parts) for split, parts in store.label_subsets.items()} == {
        "even": ["0.01", "0.5"],
        "odd": ["0.01", "0.5"],
    }
    for name in ("even", "odd"):
        split = store.split(name)
        counts = store.labels[split.train].bincount().tolist()
        for fraction in (0.01, 0.5):
            held = store.label_subsets[name][f"{fraction:g}"]
            chosen = store.labelled(split, fraction, seed=99)
            assert [store.names[clip] for clip in chosen.tolist()] == held
            assert len(held) == sum(max(1, round(fraction * count)) for count in counts)
            assert set(chosen.tolist()) <= set(split.train.tolist())
            assert set(store.labels[chosen].tolist()) == {0, 1, 2}
    other = prepare("ragged", ragged_file(**arrays), tmp_path / "b", RaggedOptions(**options, label_seed=1))
    assert other.label_subsets != store.label_subsets
    assert prepare("ragged", ragged_file(**arrays), tmp_path / "c", RaggedOptions()).label_subsets == {}
    with pytest.raises(UserError, match="fraction must be above 0 and at most 1, got 2"):
        prepare(
            "ragged", ragged_file(**arrays), tmp_path / "d", RaggedOptions(split=options["split"], label_fractions=(2,))
        )
    assert not (tmp_path / "d").exists()


def test_bodies_by_offsets(ragged_file, ragged_arrays):
    contents = read(ragged_file(body_offsets=np.array([0, 3, 6, 10, 15, 17, 20])), center=False)
    assert np.diff(contents.offsets).tolist() == [6, 4, 10, 3]
    assert np.diff(contents.body_offsets).tolist() == [3, 3, 4, 5, 5, 3]
    frames = ragged_arrays["frames"]
    np.testing.assert_array_equal(contents.frames[10:15], frames[10:15])
    np.testing.assert_array_equal(contents.frames[15:17], frames[15:17])
    np.testing.assert_array_equal(contents.frames[17:20], 0)  # the second body is shorter: absent at the end


def test_bodies_by_sample(ragged_file, ragged_arrays):
    contents = read(ragged_file(sample=np.array(["p", "q", "r", "q"])), center=False)
    assert contents.labels.tolist() == [0, 1, 2] and contents.names == ["one", "two", "three"]
    assert np.diff(contents.body_offsets).tolist() == [6, 4, 4, 7]
    frames = ragged_arrays["frames"]
    np.testing.assert_array_equal(contents.frames[10:13], frames[17:20])
    np.testing.assert_array_equal(contents.frames[14:], frames[10:17])
    with pytest.raises(UserError, match="clip 2 shares a sample id with a clip of another label"):
        read(ragged_file(sample=np.array([5, 6, 6, 7])))


BAD = {
    "frames dtype": (
        {"frames": lambda a: a.astype(np.float64)},
        r"frames must be float32 \[F,V,3\], got float64 \[20, 5, 3\]",
    ),
    "frames shape": ({"frames": lambda a: a[..., :2]}, r"frames must be float32 \[F,V,3\], got float32 \[20, 5, 2\]"),
    "no frames": ({"frames": None}, r"array frames \(float32 \[F,V,3\]\) is missing: it holds offsets, labels"),
    "no parents": ({"parents": None}, r"array parents \(int \[5\]\) is missing"),
    "offsets fall": ({"offsets": [0, 10, 6, 17, 20]}, r"offsets must not decrease, but offsets\[2\] = 6 < 10"),
    "offsets end": ({"offsets": [0, 6, 10, 17, 19]}, "offsets must run from 0 to the 20 rows of frames, got 0 to 19"),
    "offsets float": ({"offsets": [0, 6.0, 10, 17, 20]}, r"offsets must be int \[N\+1\], got float64 \[5\]"),
    "labels count": ({"labels": [0, 1]}, r"labels must be int \[4\], got int64 \[2\]"),
    "label outside": ({"labels": [0, 3, 1, 1]}, r"clip 1 \(two\) has label 3, outside the 3 label_names"),
    "label negative": ({"labels": [0, 1, 1, -1]}, r"clip 3 \(four\) has label -1"),
    "column shape": ({"subject": [1, 2]}, r"column subject must be \[4\], one value per clip, got \[2\]"),
    "column codes": ({"subject": [0, 1, 2, 0]}, "column subject must hold codes of the 2 subject_names"),
    "column type": ({"subject": lambda a: a + 1j}, "column subject must hold"),
    "parents cycle": ({"parents": [-1, 2, 1, 1, 2]}, "raw.npz: skeleton custom: parents form a cycle"),
    "ntu25_index": ({"ntu25_index": [5] * 25}, r"ntu25_index must hold joints of 0..4"),
    "bodies": ({"body_offsets": [0, 10, 17, 20]}, "body_offsets must hold every clip's first row, 6 is missing"),
    "no frame": ({"offsets": [0, 6, 6, 17, 20]}, r"clip 1 \(two\) has 0 frames with a body, expected at least 2"),
    "one frame": ({"offsets": [0, 6, 16, 17, 20]}, r"clip 2 \(three\) has 1 frame with a body, expected at least 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(ragged_file, ragged_arrays, case):
    changes, message = BAD[case]
    path = ragged_file(
        **{
            name: change(ragged_arrays[name]) if callable(change) else None if change is None else np.array(change)
            for name, change in changes.items()
        }
    )
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_bad_clips_can_be_dropped(ragged_file, ragged_arrays, tmp_path):
    frames = ragged_arrays["frames"].copy()
    frames[2, 1, 1] = np.nan
    path = ragged_file(frames=frames, labels=np.array([0, 1, 9, 2]))
    with pytest.raises(UserError, match=r"clip 0 \(one\) holds 1 NaN or infinite coordinates"):
        prepare("ragged", path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    prepare("ragged", path, tmp_path / "out", RaggedOptions(on_error="drop", split=("b=label in b",)))
    store = ClipStore.open(tmp_path / "out")
    assert store.names == ["two", "four"] and store.labels.tolist() == [1, 2]
    assert store.columns["subject"].tolist() == [1, 1]
    assert store.splits["b"]["train"].tolist() == [0]
    assert [item["clip"] for item in store.provenance["dropped"]] == ["clip 0 (one)", "clip 2 (three)"]


def test_nothing_left(ragged_file, ragged_arrays):
    path = ragged_file(frames=ragged_arrays["frames"] * np.nan)
    with pytest.raises(UserError, match="no usable clip is left of 4"):
        read(path, on_error="drop")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": "person in 1"}, "asks for a column 'person'; there are label, subject, correct, weather"),
        ({"where": "subject in 5"}, "--where 'subject in 5' leaves no clip"),
        ({"label": "labels,person"}, "asks for a column 'person'"),
        ({"split": ("subject in 1",)}, "--split must be NAME=EXPRESSION"),
        ({"split": ("x==1",)}, "--split must be NAME=EXPRESSION"),
        ({"split": ("odd=subject in cid",)}, "column subject has no value 'cid'; it has ann, bob"),
    ],
)
def test_bad_options(ragged_file, options, message):
    with pytest.raises(UserError, match=message):
        read(ragged_file(), **options)


def test_broken_archives(tmp_path, ragged_file):
    with pytest.raises(UserError, match=r"nowhere\.npz: no such file"):
        read(tmp_path / "nowhere.npz")
    path = ragged_file()
    data = path.read_bytes()
    for size in (0, 3, 100, len(data) // 2, len(data) - 10):
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match=r"raw\.npz: not a whole \.npz file: "):
            read(path)
    flipped = bytearray(data)
    flipped[500] ^= 255
    path.write_bytes(flipped)
    with pytest.raises(UserError, match=r"not a whole \.npz file: .*CRC"):
        read(path)
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(UserError, match=r"expected an \.npz archive, got a single array"):
        read(tmp_path / "single.npy")


class Trap:
    def __reduce__(self):
        return print, ("a pickle ran",)


def test_pickles_are_never_run(tmp_path, ragged_arrays, capsys):
    path = tmp_path / "evil.npz"
    np.savez(path, **ragged_arrays | {"labels": np.array([Trap()] * 4, dtype=object)})
    with pytest.raises(UserError, match="Object arrays cannot be loaded"):
        read(path)
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match=r"evil\.npz"):
        read(path)
    assert "a pickle ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "options", "clips", "classes", "train"),
    [
        (
            "ui-prmd/ui-prmd-kinect.npz",
            RaggedOptions(label="labels,correct", split=("odd=subject in 0,2,4,6,8",)),
            2000,
            20,
            1000,
        ),
        (
            "bandai-namco/bandai-namco.npz",
            RaggedOptions(where="dataset_id in 2", split=("group=capture_group in 0,1",)),
            2902,
            10,
            2095,
        ),
    ],
)
def test_real_sets(real_data, tmp_path, name, options, clips, classes, train):
    path = real_data(name)
    prepare("ragged", path, tmp_path / "out.safetensors", options)
    store = ClipStore.open(tmp_path / "out.safetensors")
    assert (store.num_clips, store.num_classes, store.skeleton.name) == (clips, classes, "ntu25")
    split = store.split()
    assert len(split.train) == train and len(split.train) + len(split.test) == clips
    with np.load(path, allow_pickle=False) as raw:
        clip = int(np.flatnonzero(raw["source"] == store.names[100])[0])
        rows = raw["frames"][raw["offsets"][clip] : raw["offsets"][clip + 1]][:, raw["ntu25_index"]]
    np.testing.assert_allclose(store.clip(100)[0], rows - rows[0, 1], rtol=0, atol=1e-6)


def npy(shape, dtype="<f4") -> bytes:
    """A .npy file that announces an array and holds nothing of it."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def test_more_than_there_can_be(tmp_path, monkeypatch):
    path = tmp_path / "raw.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("frames.npy", npy((10**12, 25, 3)))
    with pytest.raises(UserError, match=r"raw\.npz: not a whole \.npz file: Unable to allocate"):
        read(path)
    real = zipfile.ZipFile.infolist

    def announced(self):
        members = real(self)
        for member in members:
            member.file_size = 300 << 30
        return members

    monkeypatch.setattr(zipfile.ZipFile, "infolist", announced)
    for reader in (read, npz.read):
        with pytest.raises(UserError, match=r"frames\.npy has \d+ bytes and would unpack to 322122547200"):
            reader(path)
