"""Pickles of pyskl: numbers, confidence, splits; hostile, truncated and wrong ones."""

import builtins
import os
import pickle
import struct
import subprocess

import numpy as np
import pytest

from jmm_fast import skeleton
from jmm_fast.cli import main
from jmm_fast.data import ClipStore, prepare
from jmm_fast.data.readers.pyskl import PysklOptions, read
from jmm_fast.data.unpickle import load_plain, value
from jmm_fast.errors import UserError


def annotation(name, label=0, shape=(1, 6, 17, 2), seed=0, **fields):
    rng = np.random.default_rng([seed, len(name), *name.encode()])
    keypoint = rng.uniform(10, 400, shape).astype(np.float32)
    fields = {"frame_dir": name, "label": label, "total_frames": shape[1], "keypoint": keypoint, **fields}
    if shape[-1] == 2:
        fields.setdefault("img_shape", (500, 800))
    return {name: item for name, item in fields.items() if item is not None}


def whole():
    """Three clips of 2D bodies with scores, in two splits."""
    clips = [annotation("a", 0), annotation("b", 2, (2, 9, 17, 2)), annotation("c", 1, (1, 4, 17, 2))]
    for clip in clips:
        clip["keypoint_score"] = np.linspace(0.2, 0.9, clip["keypoint"][..., 0].size, dtype=np.float32).reshape(
            clip["keypoint"].shape[:3]
        )
    return {
        "split": {"xsub_train": ["a", "b"], "xsub_val": ["c"], "train": ["c"], "val": ["a", "gone"]},
        "annotations": clips,
    }


@pytest.fixture
def file(tmp_path):
    """``file(content, protocol)``: its pickle; bytes are written as they are."""

    def make(content, protocol=4):
        path = tmp_path / "raw.pkl"
        path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=protocol))
        return path

    return make


@pytest.mark.parametrize("protocol", range(6))
def test_numbers_and_scores_of_every_protocol(file, protocol):
    held = whole()
    contents = read(file(held, protocol), center=False)
    assert contents.skeleton == skeleton.get("coco17") and contents.names == ["a", "b", "c"]
    assert contents.labels.tolist() == [0, 2, 1] and contents.class_names == ["class 0", "class 1", "class 2"]
    assert contents.offsets.tolist() == [0, 6, 24, 28] and contents.body_offsets.tolist() == [0, 6, 15, 24, 28]
    pixels = np.concatenate([clip["keypoint"].reshape(-1, 17, 2) for clip in held["annotations"]])
    frames = np.concatenate(contents.frames)
    np.testing.assert_allclose(frames[..., 0], pixels[..., 0] / 500, rtol=1e-6)
    np.testing.assert_allclose(frames[..., 1], (500 - pixels[..., 1]) / 500, rtol=0, atol=1e-6)
    assert not frames[..., 2].any()
    scores = np.concatenate([clip["keypoint_score"].reshape(-1, 17) for clip in held["annotations"]])
    np.testing.assert_allclose(np.concatenate(contents.confidence), scores, rtol=0, atol=5e-4)


def test_ntu_keypoints_keep_their_metres(file):
    clips = [annotation(f"S001C001P00{clip}R001A001", clip, (2, 7, 25, 3)) for clip in range(3)]
    clips[1]["keypoint"][1] = 0
    clips[2]["keypoint"][1, 3:] = 0
    contents = read(file({"split": {}, "annotations": clips}), center=False)
    assert contents.skeleton == skeleton.get("ntu25") and contents.confidence is None
    assert np.diff(contents.body_offsets).tolist() == [7] * 5
    expected = np.concatenate([clip["keypoint"][body] for clip in clips for body in (0, 1)])
    expected = np.delete(expected, np.s_[21:28], axis=0)
    np.testing.assert_array_equal(np.concatenate(contents.frames), expected)
    centred = read(file(clips))  # the older form: the list alone
    spine = contents.skeleton.joint_names.index("spine_mid")
    np.testing.assert_array_equal(centred.frames[0][[0, 14, 21], spine], 0)
    np.testing.assert_array_equal(centred.frames[0][-4:], 0)
    shift = clips[2]["keypoint"][0, 0, spine]
    np.testing.assert_allclose(centred.frames[0][28:31], clips[2]["keypoint"][1, :3] - shift, rtol=0, atol=1e-4)


def test_missing_joints_and_empty_frames(file):
    clip = annotation("a", shape=(2, 5, 25, 3))
    keypoint = clip["keypoint"]
    keypoint[0, :2, 1] = 0
    keypoint[:, 2] = 0
    keypoint[1, 3] = 0
    contents = read(file([clip]))
    frames, confidence = contents.frames[0], contents.confidence[0]
    assert contents.offsets.tolist() == [0, 8]
    expected = np.ones((8, 25))
    expected[:2, 1] = 0
    expected[6] = 0
    np.testing.assert_array_equal(confidence, expected)
    assert not frames[expected == 0].any()
    score = np.ones((2, 5, 25))
    score[0, 4, 3], score[1, 4] = 1e-9, 0
    scored = read(file([clip | {"keypoint_score": score}]))
    expected[3, 3] = expected[7] = 0
    np.testing.assert_array_equal(scored.confidence[0], expected)
    assert not scored.frames[0][expected == 0].any()
    # The spine is first seen in the third frame that is left: that is the origin.
    np.testing.assert_array_equal(frames[2, 1], 0)
    np.testing.assert_allclose(frames[0, 0], keypoint[0, 0, 0] - keypoint[0, 3, 1], rtol=0, atol=1e-4)


def test_centring_2d_bodies(file):
    clip = annotation("a", shape=(1, 5, 17, 2))
    torso = [5, 6, 11, 12]
    clip["keypoint"][0, 0, 6] = 0
    contents = read(file([clip, annotation("b", shape=(1, 4, 17, 2))]))
    frames = contents.frames[0]
    np.testing.assert_allclose(frames[[1, 5]][:, torso].mean(axis=1), 0, rtol=0, atol=1e-6)
    assert abs(frames[0, 5]).max() > 0.01 and not frames[0, 6].any()
    clip["keypoint"][0, :, 6] = 0
    unmoved = read(file([clip])).frames[0]
    np.testing.assert_allclose(unmoved[:, 0, 0], clip["keypoint"][0, :, 0, 0] / 500, rtol=1e-6)


def test_splits_and_warnings(file, tmp_path):
    held = whole()
    held["split"] |= {"lonely_train": ["a"], "odd": ["b"], "x_train1": ["a"], "x_test1": ["b"], "x_val1": ["c"]}
    held["split"] |= {"far_train": ["a"], "far_test": ["gone"]}
    lines = []
    store = prepare("pyskl", file(held), tmp_path / "out", PysklOptions(split=("one=label in 0",)), say=lines.append)
    ids = {name: {part: clips.tolist() for part, clips in pair.items()} for name, pair in store.splits.items()}
    assert ids == {
        "xsub": {"train": [0, 1], "test": [2]},
        "default": {"train": [2], "test": [0]},
        "x_1": {"train": [0], "test": [1]},
        "one": {"train": [0], "test": [1, 2]},
    }
    assert sorted(lines) == [
        "warning: part lonely_train of split is left out: there is no other half",
        "warning: part odd of split is left out: expected NAME_train with NAME_val or NAME_test",
        "warning: part x_val1 of split is left out: x_test1 is the test part",
        "warning: split far is left out: far_train or far_test names none of the clips",
    ]
    assert store.provenance["warnings"] == [line.removeprefix("warning: ") for line in lines]
    with pytest.raises(UserError, match="split: b is in both z_train and z_val"):
        read(file({"annotations": held["annotations"], "split": {"z_train": ["b", "a"], "z_val": ["b"]}}))


def test_options(file, tmp_path):
    (tmp_path / "names.txt").write_text("walk\nrun\n\nsit\n")
    names = tmp_path / "names.txt"
    store = prepare(
        "pyskl",
        file(whole()),
        tmp_path / "out",
        PysklOptions(class_names=names, where="label in run,sit", image_height=100, fps=25, center=False),
    )
    assert store.class_names == ["run", "sit"] and store.names == ["b", "c"] and store.fps == 25
    np.testing.assert_allclose(store.frames[0, 0, 0], whole()["annotations"][1]["keypoint"][0, 0, 0, 0] / 100)
    assert list(store.splits) == ["xsub"]  # of default, --where took a half
    mapped = prepare("pyskl", file(whole()), tmp_path / "ntu", PysklOptions(layout="ntu25"))
    assert mapped.skeleton == skeleton.get("ntu25") and mapped.confidence.shape == mapped.frames.shape[:2]
    with pytest.raises(UserError, match="--image-height must be more than 0, got 0"):
        read(file(whole()), image_height=0)
    with pytest.raises(UserError, match="--fps must be more than 0, got nan"):
        read(file(whole()), fps=float("nan"))
    with pytest.raises(UserError, match="unknown skeleton 'coco'"):
        read(file(whole()), joints="coco")
    names.write_text("walk\nwalk\n")
    with pytest.raises(UserError, match="expected a class name a line, each another"):
        read(file(whole()), class_names=names)
    with pytest.raises(UserError, match="cannot read"):
        read(file(whole()), class_names=tmp_path / "absent")


def changed(**fields):
    held = whole()
    clip = held["annotations"][1]
    for name, change in fields.items():
        clip[name] = change(clip[name]) if callable(change) else change
    return held


def with_value(array, number):
    array = array.copy()
    array.reshape(-1)[7] = number
    return array


BAD_CLIPS = {
    "nan": (changed(keypoint=lambda a: with_value(a, np.nan)), "holds 1 NaN or infinite coordinates"),
    "infinite": (changed(keypoint=lambda a: with_value(a.astype(np.float64), 1e300)), "holds 1 NaN or infinite"),
    "one frame": (changed(keypoint=lambda a: a[:, :1], keypoint_score=None, total_frames=1), "has 1 frame with a body"),
    "no body": (changed(keypoint=lambda a: a[:0]), "has keypoint [0, 9, 17, 2], expected [M,T,17,2 or 3] that is not"),
    "all zero": (changed(keypoint=lambda a: a * 0), "has 0 frames with a body, expected at least 2"),
    "joints": (changed(keypoint=lambda a: a[:, :, :15]), "has keypoint [2, 9, 15, 2], expected [M,T,17,2 or 3]"),
    "dimensions": (changed(keypoint=lambda a: a[0]), "has keypoint [9, 17, 2], expected [M,T,17,2 or 3]"),
    "coordinates": (changed(keypoint=lambda a: a[..., :1]), "has keypoint [2, 9, 17, 1]"),
    "a list": (changed(keypoint=lambda a: a.tolist()), "has keypoint of list, expected an array of numbers"),
    "text": (changed(keypoint=lambda a: a.astype("U5")), "has keypoint of <U5, expected an array of numbers"),
    "total frames": (changed(total_frames=8), "has keypoint of 9 frames, but total_frames is 8"),
    "total kind": (changed(total_frames=np.arange(3)), "has keypoint of 9 frames, but total_frames is ndarray"),
    "score shape": (changed(keypoint_score=lambda a: a[:, :5]), "has keypoint_score [2, 5, 17], expected finite"),
    "score nan": (changed(keypoint_score=lambda a: with_value(a, np.nan)), "has keypoint_score [2, 9, 17], expected"),
    "score kind": (changed(keypoint_score="high"), "has keypoint_score of str, expected an array of numbers"),
    "no image": (changed(img_shape=None), "has 2D keypoints but no img_shape (height, width): say --image-height"),
    "image zero": (changed(img_shape=(0, 800)), "has 2D keypoints but no img_shape"),
    "label": (changed(label=-1), "has label -1, outside the 2 classes"),
    "name": (changed(frame_dir="a"), "has the frame_dir of another clip, expected one name a clip"),
}


@pytest.mark.parametrize("case", BAD_CLIPS)
def test_bad_clips(case, file, tmp_path, capsys):
    held, message = BAD_CLIPS[case]
    path = file(held)
    assert main(["prepare", "pyskl", str(path), "--out", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    name = held["annotations"][1]["frame_dir"]
    assert line.startswith(f"jmm-fast: error: {path}: clip 1 ({name}) {message}") and line.count("\n") == 1, line
    assert not (tmp_path / "out").exists()
    assert main(["prepare", "pyskl", str(path), "--out", str(tmp_path / "out"), "--on-error", "drop"]) == 0
    store = ClipStore.open(tmp_path / "out")
    assert store.names == ["a", "c"] and message in store.provenance["dropped"][0]["reason"]
    assert capsys.readouterr().err == ""


BAD_FILES = {
    "number": (3, "expected a dict with a list of annotations that is not empty, got int"),
    "array": (np.zeros(3), "expected a dict with a list of annotations that is not empty, got _Array"),
    "other dict": (
        {"data": 1, 5: 2},
        "expected a dict with a list of annotations that is not empty, got a dict of data",
    ),
    "no clips": ({"split": {}, "annotations": []}, "expected a dict with a list of annotations that is not empty"),
    "split kind": ({"split": [1], "annotations": [annotation("a")]}, "split must be a dict of lists of frame_dir, got"),
    "split part": (
        {"split": {"x": 3}, "annotations": [annotation("a")]},
        "split must be a dict of lists of frame_dir, but part x is not",
    ),
    "split items": (
        {"split": {"x": [3]}, "annotations": [annotation("a")]},
        "split must be a dict of lists of frame_dir, but part x is not",
    ),
    "split name": (
        {"split": {3: ["a"]}, "annotations": [annotation("a")]},
        "split must be a dict of lists of frame_dir, but a part is not",
    ),
    "clip kind": ([annotation("a"), 3], "annotation 1 must have frame_dir, label and keypoint, got int"),
    "clip fields": (
        [{"label": 3, "keypoint": 1}],
        "annotation 0 must have frame_dir, label and keypoint, got label, k",
    ),
    "clip name": ([annotation("a", frame_dir=5)], "annotation 0: frame_dir must be text, got int"),
    "half a character": ([annotation("a", frame_dir="\ud800")], "annotation 0: frame_dir must be text, got str"),
    "label text": ([annotation("a", "walk")], "annotation 0: label must be a whole number, got str"),
    "label float": ([annotation("a", 1.5)], "annotation 0: label must be a whole number, got float"),
    "label huge": ([annotation("a", 1 << 80)], "annotation 0: label must be a whole number, got int"),
    "label big": ([annotation("a", 1 << 30)], "annotation 0 has label 1073741824, expected below 65536"),
    "joints": ([annotation("a", shape=(1, 4, 19, 3))], "keypoint has 19 joints: say with --joints which they are"),
    "no keypoint": ([annotation("a", keypoint=None)], "no annotation has a keypoint [M,T,V,C]"),
    "objects": ([annotation("a", extra=np.array([{}], dtype=object))], "it holds numpy data of type 'O8'"),
    "record": ([annotation("a", extra=np.zeros(2, "f4,i4"))], "it holds numpy data of type 'V8'"),
    "nothing": (b"", "not a whole pickle: it ends too early"),
    "text file": (b"subject,label\n1,2\n", "not a whole pickle:"),
    "zip": (b"PK\x03\x04" + bytes(100), "not a whole pickle:"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(case, file, tmp_path, capsys):
    held, message = BAD_FILES[case]
    path = file(held)
    for drop in ([], ["--on-error", "drop"]):
        assert main(["prepare", "pyskl", str(path), "--out", str(tmp_path / "out"), *drop]) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"jmm-fast: error: {path}: {message}") and line.count("\n") == 1, line
    assert sorted(item.name for item in tmp_path.iterdir()) == ["raw.pkl"]
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "absent.pkl")


class Runs:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 4])
@pytest.mark.parametrize("place", ["alone", "nested", "key", "in an array"])
@pytest.mark.parametrize("attack", ["os.system", "eval", "exec", "open", "subprocess", "getattr", "import", "pickle"])
def test_hostile_pickles_run_nothing(attack, place, protocol, file, tmp_path):
    mark = tmp_path / "mark"
    code = f"open({str(mark)!r}, 'w')"
    hostile, asks = {
        "os.system": (Runs(os.system, f"touch {mark}"), "posix.system"),
        "eval": (Runs(eval, code), ".eval"),
        "exec": (Runs(exec, code), ".exec"),
        "open": (Runs(builtins.open, str(mark), "w"), "open"),
        "subprocess": (Runs(subprocess.check_output, ["touch", str(mark)]), ".check_output"),
        "getattr": (Runs(getattr, "a", "upper"), ".getattr"),
        "import": (Runs(__import__, "os"), ".__import__"),
        "pickle": (Runs(pickle.loads, pickle.dumps(Runs(os.system, f"touch {mark}"))), "pickle.loads"),
    }[attack]
    held = whole()
    if place == "alone":
        held = hostile
    elif place == "nested":
        held["annotations"][1]["extra"] = [{"deep": ({"deeper": hostile},)}]
    elif place == "key":
        held = {hostile: 1}
    else:
        held["annotations"][1]["keypoint"] = np.array([hostile], dtype=object)
    path = file(held, protocol)
    with pytest.raises(UserError) as caught:
        read(path)
    line = str(caught.value)
    assert "\n" not in line
    refused = f"{path}: it asks for " in line and asks in line and "nothing was run" in line
    # The type of an array of objects may come first in the file, and is refused as well.
    assert refused or (place == "in an array" and "it holds numpy data of type 'O8'" in line), line
    assert sorted(item.name for item in tmp_path.iterdir()) == ["raw.pkl"]


def test_the_command_refuses_a_hostile_pickle_in_one_line(file, tmp_path, capsys):
    path = file({"annotations": [annotation("a", extra=Runs(os.system, f"touch {tmp_path / 'mark'}"))]})
    assert main(["prepare", "pyskl", str(path), "--out", str(tmp_path / "out")]) == 2
    expected = "it asks for 'posix.system', expected numpy arrays and built-in containers only; nothing was run"
    assert capsys.readouterr().err == f"jmm-fast: error: {path}: {expected}\n"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["raw.pkl"]


def globals_of(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


@pytest.mark.parametrize(
    "code",
    [
        # Whatever is not in the table, also from modules that are: by protocol 0, by STACK_GLOBAL, and dotted.
        globals_of("numpy", "load") + b".",
        globals_of("numpy._core.multiarray", "fromfile") + b".",
        globals_of("numpy.core.multiarray", "_reconstruct.__globals__") + b".",
        globals_of("builtins", "list.__class__") + b".",
        globals_of("jmm_fast.data.unpickle", "_Array") + b".",
        b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93\x8c\x04true\x85R.",
        b"(S'true'\nios\nsystem\n.",
        globals_of("__builtin__", "eval") + b"(S'1'\ntR.",
    ],
)
def test_names_outside_the_table(code, file):
    with pytest.raises(
        UserError, match=r"raw\.pkl: it asks for '.*', expected numpy arrays and built-in containers only"
    ):
        load_plain(file(code))


def test_stand_ins_give_nothing_away(file):
    """What the table does hold cannot be turned into more: odd arguments and states, attributes set on it, bombs."""
    scalar = globals_of("numpy.core.multiarray", "scalar")
    dtype = globals_of("numpy", "dtype")
    make = globals_of("numpy.core.multiarray", "_reconstruct")
    codes = {
        "dtype of objects": dtype + b"(S'O8'\ntR.",
        "dtype of a dict": dtype + b"(}tR.",
        "array without dtype": make + b"(tR(I1\n(I3\ntS'f4'\nI00\nS'abc'\ntb.",
        "array with a wrong size": make + b"(tR(I1\n(I900000000000\nt" + dtype + b"(S'f8'\ntRI00\nS'abc'\ntb.",
        "array of negative size": make + b"(tR(I1\n(I-3\nt" + dtype + b"(S'f8'\ntRI00\nS''\ntb.",
        "state of another kind": make + b"(tRS'state'\nb.",
        "scalar of nothing": scalar + b"(tR.",
        "bytes by number": globals_of("builtins", "bytes") + b"(I900000000000\ntR.",
        "another codec": globals_of("_codecs", "encode") + b"(V1\nVzlib\ntR.",
        "array class called": globals_of("numpy", "ndarray") + b"((I900000000000\nttR.",
        "persistent": b"Pname\n.",
        "extension": b"\x82\x01.",
        "attributes of a stand-in": make + b"}S'evil'\nI1\nsb.",
        "attributes of a container": globals_of("builtins", "set") + b"}S'evil'\nI1\nsb.",
        "dict keys that nest": b"\x80\x04})" + b"\x85" * 100_000 + b"K\x01s.",
        "more of them": b"\x80\x04}()" + b"\x85" * 100_000 + b"K\x01u.",
        "and at once": b"\x80\x04()" + b"\x85" * 100_000 + b"K\x01d.",
        "set that nests": b"\x80\x04\x8f()" + b"\x85" * 100_000 + b"\x90.",
        "frozen set that nests": b"\x80\x04()" + b"\x85" * 100_000 + b"\x91.",
        "set of a list that nests": globals_of("builtins", "set") + b"(])" + b"\x85" * 100_000 + b"atR.",
        "set of a number": globals_of("builtins", "set") + b"(I5\ntR.",
        "long array": b"\x80\x05\x96" + struct.pack("<Q", 1 << 45) + b"abc.",
        "huge string": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"abc.",
    }
    for case, code in codes.items():
        with pytest.raises(UserError) as caught:
            load_plain(file(code))
        assert str(caught.value).count("\n") == 0, case
    assert len(load_plain(file(whole()))["annotations"]) == 3


def test_truncated_pickles(file):
    data = pickle.dumps(whole(), protocol=4)
    for size in [*range(0, 300, 7), *range(300, len(data), 997), len(data) - 1]:
        with pytest.raises(UserError, match=r"raw\.pkl: not a whole pickle"):
            read(file(data[:size]))


def test_flipped_bytes_never_crash(file):
    data = bytearray(pickle.dumps(whole(), protocol=4))
    rng = np.random.default_rng(0)
    for _ in range(300):
        at, old = int(rng.integers(len(data))), None
        if rng.random() < 0.5:
            at %= 400
        old, data[at] = data[at], int(rng.integers(256))
        try:
            read(file(bytes(data)))
        except UserError as error:
            assert "\n" not in str(error)
        data[at] = old


def test_plain_values(file):
    held = {
        "f": np.arange(6.0).reshape(2, 3).T,
        "big": np.arange(3, dtype=">i4"),
        "flag": np.array([True, False]),
        "text": np.array(["ab", "c"]),
        "bytes": b"",
        "scalar": np.float32(1.5),
        "name": np.str_("walk"),
        "set": {1, 2},
        "frozen": frozenset([3]),
        "empty": np.zeros((0, 3)),
        "point": np.array(2.5),
    }
    for protocol in range(6):
        loaded = load_plain(file(held, protocol))
        assert list(loaded) == list(held)
        for name, item in held.items():
            np.testing.assert_array_equal(value(loaded[name]), item, err_msg=f"{name}, protocol {protocol}")
            assert not isinstance(item, np.ndarray) or value(loaded[name]).dtype == item.dtype
