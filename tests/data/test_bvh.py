"""BVH: kinematics against matrices multiplied one by one, the samples, names, joints, rates, every bad file."""

import shutil
import zipfile

import numpy as np
import pytest

from jmm_fast import skeleton
from jmm_fast.cli import main
from jmm_fast.data import prepare
from jmm_fast.data.readers.bvh import MAX_JOINTS, BvhOptions, parse, positions
from jmm_fast.errors import UserError

HEAD = """HIERARCHY
ROOT Hips
{
  OFFSET 0 90 0
  CHANNELS 6 Xposition Yposition Zposition Zrotation Xrotation Yrotation
  JOINT Spine
  {
    OFFSET 0 20 1
    CHANNELS 3 Yrotation Xrotation Zrotation
    JOINT Head Top
    {
      OFFSET 0 30 0
      CHANNELS 4 Yposition Xrotation Zrotation Yrotation
      End Site
      {
        OFFSET 0 10 0
      }
    }
    JOINT LeftArm { OFFSET 15 25 0
      CHANNELS 1 Zrotation
      JOINT LeftHand
      {
        OFFSET 25 0 0
      } }
  }
}
MOTION
"""
CHANNELS = 14


def bvh(frames=5, seconds="0.0333333", head=HEAD, seed=0, values=None) -> str:
    values = np.random.default_rng(seed).uniform(-180, 180, (frames, CHANNELS)) if values is None else values
    rows = "\n".join(" ".join(f"{value:.6f}" for value in row) for row in values)
    return f"{head}Frames: {frames}\nFrame Time: {seconds}\n{rows}\n"


@pytest.fixture
def folder(tmp_path):
    """``folder({"a/b.bvh": text})``: the files, in a new folder."""

    def make(files):
        for name, text in files.items():
            path = tmp_path / "raw" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / "raw"

    return make


@pytest.fixture
def read(folder, tmp_path):
    """``read(files, **options)``: the store made of them."""

    def make(files, **options):
        shutil.rmtree(tmp_path / "raw", ignore_errors=True)
        return prepare("bvh", folder(files), tmp_path / "out", BvhOptions(**options), say=lambda text: None)

    return make


def turn(axis: str, degrees: float) -> np.ndarray:
    sine, cosine = np.sin(np.radians(degrees)), np.cos(np.radians(degrees))
    return {
        "X": np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]]),
        "Y": np.array([[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]]),
        "Z": np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]]),
    }[axis]


def expected(row) -> list[np.ndarray]:
    """Places of Hips, Spine, Head Top, its end, LeftArm and LeftHand by the definition."""
    hips = row[:3]
    whole = turn("Z", row[3]) @ turn("X", row[4]) @ turn("Y", row[5])
    spine = hips + whole @ [0, 20, 1]
    whole = whole @ turn("Y", row[6]) @ turn("X", row[7]) @ turn("Z", row[8])
    head = spine + whole @ [0, row[9], 0]
    tilt = whole @ turn("X", row[10]) @ turn("Z", row[11]) @ turn("Y", row[12])
    arm = spine + whole @ [15, 25, 0]
    return [hips, spine, head, head + tilt @ [0, 10, 0], arm, arm + whole @ turn("Z", row[13]) @ [25, 0, 0]]


def test_kinematics():
    motion = parse(bvh(2100, seconds="0.00833333").encode())
    assert motion.fps == 120 and motion.values.shape == (2100, CHANNELS)
    assert motion.hierarchy.names == ["Hips", "Spine", "Head Top", "Head Top_end", "LeftArm", "LeftHand"]
    assert motion.hierarchy.parents == [-1, 0, 1, 2, 1, 4]
    places = positions(motion.hierarchy, motion.values)
    for frame in (0, 1, 1023, 1024, 2099):
        np.testing.assert_allclose(places[frame], expected(motion.values[frame]), rtol=0, atol=1e-9)


def test_store_of_one_file(read):
    store = read({"walk_01.bvh": bvh()}, center=False)
    assert store.skeleton.joint_names == ("Hips", "Spine", "Head Top", "LeftArm", "LeftHand")
    assert store.skeleton.parents == (-1, 0, 1, 1, 3)
    assert (store.fps, store.names, store.class_names) == (30.0, ["walk_01"], ["walk"])
    values = parse(bvh().encode()).values
    all_joints = np.array([expected(row) for row in values]) / 100
    np.testing.assert_allclose(store.frames.numpy(), all_joints[:, [0, 1, 2, 4, 5]], rtol=0, atol=1e-6)
    ends = read({"walk_01.bvh": bvh()}, center=False, end_sites=True, unit="inch")
    assert ends.skeleton.joint_names[3] == "Head Top_end"
    np.testing.assert_allclose(ends.frames.numpy(), all_joints * 2.54, rtol=0, atol=1e-5)
    turned = read({"walk_01.bvh": bvh()}, up="z", center=True)
    moved = all_joints[:, [0, 1, 2, 4, 5]] - all_joints[0, 1]
    np.testing.assert_allclose(turned.frames.numpy(), moved[..., [0, 2, 1]] * [1, 1, -1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("change", ["crlf", "cr", "wrapped", "upper", "blank lines", "byte order mark"])
def test_ways_to_write_the_same(change):
    text = bvh(3)
    data = {
        "crlf": text.replace("\n", "\r\n"),
        "cr": text.replace("\n", "\r"),
        "wrapped": text[: text.index("Frame Time")] + text[text.index("Frame Time") :].replace(" -", "\n-"),
        "upper": text.replace("Xposition", "XPOSITION").replace("Frames:", "FRAMES:").replace("JOINT", "Joint"),
        "blank lines": text.replace("\n", "\n\n"),
        "byte order mark": "\ufeff" + text,
    }[change].encode()
    motion, plain = parse(data), parse(text.encode())
    np.testing.assert_array_equal(motion.values, plain.values)
    assert motion.hierarchy == plain.hierarchy and motion.fps == plain.fps


def test_samples_agree_with_the_arrays(real_data, tmp_path):
    samples = real_data("bandai-namco/samples")
    options = BvhOptions(root="Hips", pattern="dataset-{dataset}_{label}_{style}_{take}", center=False)
    store = prepare("bvh", samples, tmp_path / "out", options)
    with np.load(real_data("bandai-namco/bandai-namco.npz")) as file:
        source, offsets, frames = file["source"].tolist(), file["offsets"], file["frames"]
        labels, styles = file["label_names"][file["labels"]], file["style_names"][file["style"]]
        assert store.skeleton.joint_names == tuple(file["joint_names"].tolist())
        assert store.skeleton.parents == tuple(file["parents"].tolist())
    assert store.num_clips == 4 and store.fps == 30
    for clip, name in enumerate(store.names):
        at = source.index(name + ".bvh")
        held = store.frames[store.offsets[clip] : store.offsets[clip + 1]].numpy()
        np.testing.assert_allclose(held, frames[offsets[at] : offsets[at + 1]], rtol=0, atol=1e-3)
        assert store.class_names[store.labels[clip]] == labels[at]
        assert store.column_values["style"][store.columns["style"][clip]] == styles[at]
    assert store.columns["take"].tolist() == [1, 1, 1, 11]
    mapped = prepare("bvh", samples, tmp_path / "ntu", BvhOptions(layout="ntu25", view=True))
    assert mapped.skeleton == skeleton.get("ntu25")


def test_zip_and_threads_make_the_same_store(folder, tmp_path):
    raw = folder({f"{label}/{take:02}.bvh": bvh(seed=take) for label in ("run", "walk") for take in range(4)})
    with zipfile.ZipFile(tmp_path / "raw.zip", "w") as archive:
        for path in sorted(raw.rglob("*.bvh")):
            archive.write(path, f"set/{path.relative_to(raw)}")
    stores = [
        prepare("bvh", path, tmp_path / f"out{workers}", BvhOptions(), workers=workers)
        for path, workers in ((raw, 1), (raw, 3), (tmp_path / "raw.zip", 2))
    ]
    assert stores[0].class_names == ["run", "walk"]
    assert (tmp_path / "out1").read_bytes() == (tmp_path / "out3").read_bytes()
    np.testing.assert_array_equal(stores[0].frames, stores[2].frames)
    assert stores[2].class_names == ["run", "walk"] and stores[2].names[0] == "set/run/00"


def test_labels_from_names(read):
    names = ["walk_01", "walk2", "turn-left 003", "sit_down", "12", "jump"]
    store = read({f"{name}.bvh": bvh() for name in names})
    found = dict(zip(store.names, [store.class_names[label] for label in store.labels], strict=True))
    assert found == {
        "walk_01": "walk",
        "walk2": "walk",
        "turn-left 003": "turn-left",
        "sit_down": "sit",
        "12": "12",
        "jump": "jump",
    }
    store = read({"s1/walk_1.bvh": bvh(), "s2/run_2.bvh": bvh()}, pattern="s{subject}/{label}_{take}")
    assert store.class_names == ["run", "walk"] and store.columns["subject"].tolist() == [1, 2]
    with pytest.raises(UserError, match=r"the name 'walk' does not fit --pattern '\{label\}_\{take\}'"):
        read({"walk.bvh": bvh()}, pattern="{label}_{take}")
    for pattern in ("{take}", "{label}_{label}", "{label}{}", "{label}_{1}"):
        with pytest.raises(UserError, match=r"--pattern needs \{label\} and different names"):
            read({"walk.bvh": bvh()}, pattern=pattern)


def test_choosing_joints(read):
    files = {"walk_01.bvh": bvh()}
    whole = read(files, center=False)
    part = read(files, root="Spine", center=False)
    assert part.skeleton.joint_names == ("Spine", "Head Top", "LeftArm", "LeftHand")
    np.testing.assert_array_equal(part.frames, whole.frames[:, 1:])
    part = read(files, joints=("Hips", "Left*"), drop_joints=("LeftArm",), center=False)
    assert part.skeleton.joint_names == ("Hips", "LeftHand") and part.skeleton.parents == (-1, 0)
    np.testing.assert_array_equal(part.frames, whole.frames[:, [0, 4]])
    with pytest.raises(UserError, match=r"walk_01.bvh: --root: there is no joint 'Pelvis', but Hips, Spine"):
        read(files, root="Pelvis")
    with pytest.raises(UserError, match=r"--drop-joints: there is no joint 'Tail\*', but Hips, Spine"):
        read(files, drop_joints=("Tail*",))
    with pytest.raises(UserError, match="must be one tree, but Head Top, LeftArm have none above"):
        read(files, drop_joints=("Hips", "Spine"))
    with pytest.raises(UserError, match="must be one tree, but none have none above"):
        read(files, drop_joints=("*",))


def test_frame_rates(read):
    fast, slow = bvh(21, seconds="0.008333"), bvh(6, seconds="0.0333")
    with pytest.raises(UserError, match=r"b.bvh: has 30 frames per second, but a.bvh has 120: --fps resamples"):
        read({"a.bvh": fast, "b.bvh": slow})
    both = read({"a.bvh": fast, "b.bvh": slow}, fps=30, center=False)
    assert both.fps == 30 and both.lengths.tolist() == [6, 6]
    whole = read({"a.bvh": fast}, center=False)
    np.testing.assert_array_equal(both.frames[:6], whole.frames[::4])
    third = read({"a.bvh": fast}, fps=50, center=False)
    np.testing.assert_array_equal(third.frames, whole.frames[[0, 2, 5, 7, 10, 12, 14, 17, 19]])
    with pytest.raises(UserError, match="has 30 frames per second, expected at least --fps 60"):
        read({"b.bvh": slow}, fps=60)
    with pytest.raises(UserError, match="--fps must be more than 0"):
        read({"b.bvh": slow}, fps=-1)


def test_all_files_must_have_the_same_joints(read):
    other = bvh(head=HEAD.replace("LeftArm", "LArm"))
    with pytest.raises(UserError) as caught:
        read({"a.bvh": bvh(), "b.bvh": other})
    assert "b.bvh: expected the joints of a.bvh: LeftArm missing, LArm too many; --joints" in str(caught.value)
    store = read({"a.bvh": bvh(), "b.bvh": other}, on_error="drop")
    assert store.names == ["a"] and store.provenance["log"][0]["file"] == "b.bvh"
    assert read({"a.bvh": bvh(), "b.bvh": other}, drop_joints=("L*Arm",)).num_clips == 2
    moved = HEAD.replace("JOINT Spine\n  {", "JOINT Head Top\n  {").replace(
        "JOINT Head Top\n    {", "JOINT Spine\n    {"
    )
    with pytest.raises(UserError, match="their order or their parents differ"):
        read({"a.bvh": bvh(), "b.bvh": bvh(head=moved)})


def replaced(old: str, new: str) -> str:
    text = bvh()
    assert old in text
    return text.replace(old, new, 1)


LINES = bvh().splitlines()
BAD = {
    "empty": ("", "line 1: expected HIERARCHY, got an empty file"),
    "no header": ("MOTION\nFrames: 3\n", "has no HIERARCHY"),
    "text": ("subject,label\n1,2\n", "line 1: expected HIERARCHY, got 'subject,label'"),
    "bytes": (bytes(range(256)) * 40, "line 1: expected HIERARCHY"),
    "no motion": (HEAD.replace("MOTION", ""), "line 26: the file ends or MOTION begins too early: MOTION is missing"),
    "header cut": ("\n".join(LINES[:14]), "line 14: the file ends or MOTION begins too early: joint Head Top is"),
    "brace missing": (replaced("} }\n", "}\n"), "line 26: the file ends or MOTION begins too early: joint Hips is not"),
    "brace spare": (replaced("} }\n", "} } } } }\n"), "line 24: expected MOTION, got a } that closes nothing"),
    "brace absent": (replaced("ROOT Hips\n{", "ROOT Hips\n"), "line 4: expected { after joint Hips, got 'OFFSET 0 90"),
    "brace alone": (replaced("ROOT Hips\n", ""), "line 2: expected a joint before {"),
    "no root": (replaced("ROOT Hips", "JOINT Hips"), "line 2: expected one ROOT around all joints"),
    "two roots": (replaced("JOINT Spine", "ROOT Spine"), "line 6: expected one ROOT around all joints"),
    "end first": (replaced("ROOT Hips", "End Site"), "line 2: expected one ROOT around all joints"),
    "no name": (replaced("JOINT Spine", "JOINT"), "line 6: expected a name of its own for each joint, got 'JOINT'"),
    "name twice": (replaced("JOINT Spine", "JOINT Hips"), "line 6: expected a name of its own"),
    "offset short": (replaced("OFFSET 0 20 1", "OFFSET 0 20"), "line 8: expected OFFSET and 3 numbers"),
    "offset nan": (replaced("OFFSET 0 20 1", "OFFSET 0 nan 1"), "line 8: expected OFFSET and 3 numbers"),
    "offset missing": (replaced("    OFFSET 0 20 1\n", ""), "line 24: joint Spine has no OFFSET"),
    "channel unknown": (replaced("Yrotation X", "Yspin X"), "line 9: unknown channel 'Yspin', expected Xposition"),
    "channel count": (replaced("CHANNELS 3", "CHANNELS 4"), "line 9: expected CHANNELS, their number and as many"),
    "channel huge": (replaced("CHANNELS 3", "CHANNELS 99999999999"), "line 9: expected CHANNELS, their number"),
    "channel none": (replaced("CHANNELS 3 Yrotation Xrotation Zrotation", "CHANNELS"), "line 9: expected CHANNELS"),
    "channel twice": (replaced("Yrotation Xrotation Z", "Yrotation Yrotation Z"), "line 9: expected each channel once"),
    "unknown word": (replaced("CHANNELS 3", "CANALS 3"), "line 9: expected JOINT, End Site, OFFSET, CHANNELS"),
    "nesting": (
        "HIERARCHY\nROOT r\n{\n" + "".join(f"JOINT j{number} {{\n" for number in range(100_000)),
        f"more than {MAX_JOINTS} joints",
    ),
    "long header": ("HIERARCHY\n" + " " * (5 << 20), "expected MOTION within 4194304 bytes"),
    "no frames": (replaced("Frames: 5\n", ""), "line 28: expected Frames: COUNT after MOTION"),
    "frames negative": (replaced("Frames: 5", "Frames: -5"), "line 28: expected the number of frames, 1 or more"),
    "frames zero": (replaced("Frames: 5", "Frames: 0"), "line 28: expected the number of frames, 1 or more, got '0'"),
    "frames text": (replaced("Frames: 5", "Frames: five"), "line 28: expected the number of frames"),
    "frames huge": (replaced("Frames: 5", f"Frames: {10**14}"), "line 34: the file ends after 5 frames, but Frames s"),
    "frames few": (replaced("Frames: 5", "Frames: 4"), "line 34: the file ends after 5 frames, but Frames says 4"),
    "time zero": (replaced("0.0333333", "0"), "line 29: expected the seconds of a frame, got '0'"),
    "time nan": (replaced("0.0333333", "nan"), "line 29: expected the seconds of a frame, got 'nan'"),
    "time missing": (replaced("Frame Time: 0.0333333\n", ""), "line 29: expected Frame Time: SECONDS after Frames"),
    "motion cut": ("\n".join(LINES[:-2]), "line 32: the file ends after 3 frames, but Frames says 5"),
    "motion none": ("\n".join(LINES[:29]), "line 29: the file ends after 0 frames, but Frames says 5"),
    "row cut": (bvh()[:-20], "line 34: expected 14 numbers of a frame, got 1"),
    "row long": (bvh().rstrip() + " 1\n", "line 34: expected 14 numbers of a frame, got 15"),
    "nan": (bvh(values=np.where(np.eye(5, 14), np.nan, 1)), "line 30: expected finite numbers, got 'nan'"),
    "infinite": (bvh(values=np.where(np.eye(5, 14, 3), np.inf, 1)), "line 30: expected finite numbers, got 'inf'"),
    "word": (bvh().rstrip() + "\nthe end\n", "line 35: expected finite numbers, got 'the'"),
    "underscore": (bvh().rstrip()[:-4] + "1_23", "line 34: expected finite numbers"),
    "null byte": (bvh().rstrip() + "\0", "line 34: expected finite numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case, folder, tmp_path, capsys):
    text, message = BAD[case]
    raw = folder({"bad.bvh": text})
    assert main(["prepare", "bvh", str(raw), "--out", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"jmm-fast: error: {raw}: bad.bvh: ") and line.count("\n") == 1 and message in line, line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


def test_a_bad_file_among_good_ones(read):
    files = {"a_1.bvh": BAD["nan"][0], "b_1.bvh": bvh(), "b_2.bvh": bvh(1), "c_1.bvh": "HIERARCHY"}
    store = read(files, on_error="drop")
    assert store.names == ["b_1"] and store.class_names == ["b"]
    assert [entry["file"] for entry in store.provenance["log"]] == ["a_1.bvh", "b_2.bvh", "c_1.bvh"]
    with pytest.raises(UserError, match=r"a_1\.bvh: line 30: expected finite numbers"):
        read({name: files[name] for name in ("a_1.bvh", "c_1.bvh")}, on_error="drop")
    with pytest.raises(UserError, match=r"no \.bvh file in it"):
        read({"a.txt": ""})


def test_every_cut_of_a_file_is_refused_or_whole():
    data = bvh(2).encode()
    for size in range(0, len(data), 7):
        try:
            motion = parse(data[:size])
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert motion.values.shape == (2, CHANNELS)
