import tracemalloc

import numpy as np
import pytest

from jmm_fast.data import ClipStore, prepare
from jmm_fast.data.readers import npz
from jmm_fast.data.readers.npz import NpzOptions, read
from jmm_fast.errors import UserError

LENGTHS = {"train": [7, 12, 3, 5, 9], "test": [4, 12, 6]}
TWO = {"train": [1, 3], "test": [2]}


def dense(frames=12, dtype=np.float32):
    """Zero-padded arrays as MAMP's preparation makes them."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, lengths in LENGTHS.items():
        x = np.zeros((len(lengths), frames, 150), dtype=dtype)
        for clip, length in enumerate(lengths):
            x[clip, :length, : 150 if clip in TWO[part] else 75] = rng.normal(
                size=(length, 150 if clip in TWO[part] else 75)
            )
        arrays[f"x_{part}"] = x
        arrays[f"y_{part}"] = np.eye(4)[(np.arange(len(lengths)) * 3) % 4]
    return arrays


@pytest.fixture
def dense_file(tmp_path):
    def make(save=np.savez, **changes):
        path = tmp_path / "mamp.npz"
        save(path, **{name: array for name, array in (dense() | changes).items() if array is not None})
        return path

    return make


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("block", [1, 1 << 26])
def test_dense_file(dense_file, tmp_path, monkeypatch, save, block):
    monkeypatch.setattr(npz, "_BLOCK_BYTES", block)
    prepare("npz", dense_file(save), tmp_path / "out")
    store = ClipStore.open(tmp_path / "out")
    assert store.lengths.tolist() == LENGTHS["train"] + LENGTHS["test"]
    assert store.clip_bodies[:, 1].tolist() == [1, 2, 1, 2, 1, 1, 1, 2]
    assert store.labels.tolist() == [0, 3, 2, 1, 0, 0, 3, 2]
    assert store.class_names == ["A001", "A002", "A003", "A004"]
    split = store.split("default")
    assert split.train.tolist() == [0, 1, 2, 3, 4] and split.test.tolist() == [5, 6, 7]
    assert store.names[5] == "test 0" and store.column_values["part"] == ["train", "test"]
    arrays = dense()
    for clip in range(8):
        x = arrays["x_train"][clip] if clip < 5 else arrays["x_test"][clip - 5]
        bodies, length = store.clip(clip).shape[:2]
        expected = x[:length].reshape(length, 2, 25, 3).transpose(1, 0, 2, 3)[:bodies]
        np.testing.assert_array_equal(store.clip(clip), expected)


def test_a_body_that_comes_late_stays_aligned(dense_file):
    arrays = dense()
    x = arrays["x_train"]
    x[1, :4, 75:] = 0  # second body absent at first
    x[3, 2] = 0  # nobody in one frame
    contents = read(dense_file(x_train=x))
    store = ClipStore.from_contents(contents)
    assert store.lengths.tolist()[:5] == [7, 12, 3, 4, 9]
    assert (store.clip(1)[1, :4] == 0).all() and (store.clip(1)[1, 4:] != 0).any()
    assert contents.provenance["empty_frames"] == 12 * 8 - sum(LENGTHS["train"] + LENGTHS["test"]) + 1


def test_other_types_and_options(dense_file):
    wanted = read(dense_file())
    halves = read(dense_file(**{k: v.astype(np.float64) for k, v in dense().items() if k[0] == "x"}))
    np.testing.assert_array_equal(np.concatenate(wanted.frames), np.concatenate(halves.frames))
    codes = read(dense_file(y_train=np.array([0, 3, 2, 1, 0]), y_test=np.array([0, 3, 2])))
    assert codes.labels.tolist() == wanted.labels.tolist() and len(codes.class_names) == 4
    some = read(dense_file(), where="label in 0,3", center=True, split=("half=part in train",))
    assert some.labels.tolist() == [0, 1, 0, 0, 1] and some.class_names == ["A001", "A004"]
    store = ClipStore.from_contents(some)
    assert store.split("half").train.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(store.clip(1)[0, 0, 1], 0)
    first = dense()["x_train"][1].reshape(12, 2, 25, 3)
    np.testing.assert_allclose(store.clip(1)[1], first[:, 1] - first[0, 0, 1], rtol=0, atol=1e-6)


def test_memory_stays_below_the_padded_array(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "_BLOCK_BYTES", 2 << 20)
    path = tmp_path / "big.npz"
    x = np.zeros((200, 300, 150), dtype=np.float32)
    x[:, :30, :75] = 1
    np.savez_compressed(
        path, x_train=x, y_train=np.eye(3)[np.arange(200) % 3], x_test=x[:4], y_test=np.eye(3)[:1].repeat(4, 0)
    )
    size = x.nbytes
    del x
    tracemalloc.start()
    contents = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert contents.num_clips == 204
    compact = sum(block.nbytes for block in contents.frames)
    assert compact < 0.06 * size
    # A block is held as bytes, then reordered, then scanned: a few times its size, and never the whole array.
    assert peak < compact + 5 * (2 << 20) < 0.5 * size


BAD = {
    "member": ({"x_test": None}, "array x_test is missing: it holds x_train, y_test, y_train"),
    "width": (
        {"x_train": np.zeros((5, 12, 75), np.float32)},
        r"x_train must be float \[5,T,150\], got float32 \[5, 12, 75\]",
    ),
    "count": ({"y_train": np.eye(4)}, r"x_train must be float \[4,T,150\], got float32 \[5, 12, 150\]"),
    "type": ({"x_train": np.zeros((5, 12, 150), np.int64)}, r"got int64"),
    "order": ({"x_train": np.asfortranarray(dense()["x_train"])}, "x_train must be stored in C order"),
    "labels": ({"y_test": np.zeros((3, 2, 2))}, r"y_test must be one-hot \[N,classes\] or int \[N\], got float64"),
    "classes": ({"y_test": np.eye(5)[:3]}, "y_train has 4 classes but y_test has 5"),
    "objects": ({"y_test": np.array([None] * 3)}, "y_test must hold numbers, got object"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(dense_file, case):
    changes, message = BAD[case]
    with pytest.raises(UserError, match=message):
        read(dense_file(**changes))


def test_bad_clips(dense_file):
    arrays = dense()
    arrays["x_train"][2, 1, 4] = np.nan
    arrays["x_test"][0] = 0
    arrays["y_train"][4] = 0
    path = dense_file(**arrays)
    with pytest.raises(UserError, match=r"mamp\.npz: clip 2 \(train 2\) holds 1 NaN"):
        read(path)
    contents = read(path, on_error="drop")
    assert contents.names == ["train 0", "train 1", "train 3", "test 1", "test 2"]
    assert contents.labels.tolist() == [0, 3, 1, 3, 2]
    assert contents.splits["default"]["test"].tolist() == [3, 4]
    reasons = [item["reason"] for item in contents.provenance["dropped"]]
    assert reasons[0] == "holds 1 NaN or infinite coordinates"
    assert reasons[1] == "has no class: its row of y_train is not one-hot"
    assert reasons[2] == "has 0 frames with a body, expected at least 2"


def test_broken_archives(tmp_path, dense_file):
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "nowhere.npz")
    path = dense_file(np.savez_compressed)
    data = path.read_bytes()
    for size in (0, 50, len(data) // 2, len(data) - 5):
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match=r"mamp\.npz: not a whole \.npz file"):
            read(path)
    broken = bytearray(data)
    broken[len(data) // 3] ^= 255
    path.write_bytes(broken)
    with pytest.raises(UserError, match=r"mamp\.npz: not a whole \.npz file"):
        read(path)
    with pytest.raises(UserError, match="--bodies must be at least 1"):
        read(path, NpzOptions(bodies=0))
    with pytest.raises(UserError, match="unknown skeleton 'ntu'"):
        read(path, NpzOptions(joints="ntu"))
