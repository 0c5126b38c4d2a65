import warnings
import zipfile

import numpy as np
import pytest

from jmm_fast.cli import main
from jmm_fast.data import ClipStore, collect, ntu_text, prepare
from jmm_fast.data.readers import ntu
from jmm_fast.data.readers.ntu import CLASS_NAMES, NtuOptions
from jmm_fast.data.splits import ColumnTable, matching
from jmm_fast.errors import UserError

BODY = "{} 0 1 1 1 1 0 0.5 -0.25 2\n25\n"
REST = "384.4772 166.3369 958.3697 400.1625 -1.45 -0.61 0.06 1.03 2"
TRAIN_60 = [1, 2, 4, 5, 8, 9, 13, 14, 15, 16, 17, 18, 19, 25, 27, 28, 31, 34, 35, 38]


def person(frames, seed, motion=0.1, width=0.4):
    """Joints [frames,25,3] of somebody about 1.7 m tall and ``width`` times as wide, as text can say them."""
    rng = np.random.default_rng(seed)
    joints = rng.uniform(-0.5, 0.5, (1, 25, 3)) * 1.7 * np.array([width, 1, 0.3]) + [0, 0, 3]
    joints[0, :2, :2] = [[-0.85 * width, -0.85], [0.85 * width, 0.85]]
    wave = np.linspace(0, 3, frames)[:, None, None]
    return np.round(joints + motion * np.sin(wave + rng.uniform(0, 6, (1, 25, 1))), 7).astype(np.float32)


def text(frames):
    """A file; ``frames`` lists for each frame the (id, joints [25,3]) in it."""
    parts = [f"{len(frames)}\n"]
    for bodies in frames:
        parts.append(f"{len(bodies)}\n")
        for name, joints in bodies:
            parts.append(BODY.format(name))
            parts += [f"{x:.7f} {y:.7f} {z:.7f} {REST}\n" for x, y, z in joints.tolist()]
    return "".join(parts)


def alone(frames=20, seed=0, name=72057594037931101):
    return text([[(name, joints)] for joints in person(frames, seed)])


@pytest.fixture
def tree(tmp_path):
    """``tree(NAME=text, ...)``: a folder of these files; default nine clips of four performers and three cameras."""

    def make(**files):
        folder = tmp_path / "raw"
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        if not files:
            for number in range(9):
                setup, camera, performer, action = number % 2 + 1, number % 3 + 1, number % 4 + 1, number % 2 + 1
                files[f"S{setup:03}C{camera:03}P{performer:03}R001A{action:03}"] = alone(12 + number, number)
        for name, content in files.items():
            content = content if isinstance(content, bytes) else content.encode()
            (folder / f"{name}.skeleton").write_bytes(content)
        return folder

    return make


def store_of(folder, tmp_path, release="ntu60", **options):
    """The store, quietly; ``options`` are the reader's."""
    out = tmp_path / "out.safetensors"
    prepare(release, folder, out, NtuOptions(**options), workers=1, say=lambda line: None)
    return ClipStore.open(out)


@pytest.mark.parametrize("without", ["nothing", "_host"])
def test_equals_the_common_preparation(golden, tmp_path, monkeypatch, without):
    if without == "_host":
        monkeypatch.setattr(ntu_text, "_host", None)
    elif ntu_text._host is None:
        pytest.skip("the C++ reader extension is not built")
    store = store_of(golden("ntu_raw/skeletons"), tmp_path)
    columns = {name: column.numpy() for name, column in store.columns.items()}
    groups = {
        "XSub/train": ("performer", TRAIN_60),
        "XSub/test": ("performer", sorted(set(range(1, 41)) - set(TRAIN_60))),
        "XView/train": ("camera", [2, 3]),
        "XView/test": ("camera", [1]),
    }
    with np.load(golden("ntu_raw/expected.npz")) as expected:
        assert store.names == expected["names"].tolist()
        for key, (column, ids) in groups.items():
            split, part = key.split("/")
            clips = getattr(store.split(split.lower()), part).tolist()
            # The array's rows are grouped by the id in the order of the split's list, and by name within.
            clips.sort(key=lambda clip, column=column, ids=ids: (ids.index(columns[column][clip]), clip))
            x, y = expected[f"{split}/x_{part}"], expected[f"{split}/y_{part}"]
            assert len(clips) == len(x)
            for row, clip in enumerate(clips):
                frames = store.clip(clip).numpy()
                padded = np.zeros((x.shape[1], 2, 25, 3), dtype=np.float32)
                padded[: frames.shape[1], : len(frames)] = frames.transpose(1, 0, 2, 3)
                np.testing.assert_array_equal(padded.reshape(-1, 150), x[row], err_msg=f"{key} {store.names[clip]}")
                assert store.labels[clip] == y[row].argmax()
    assert store.fps == 30 and store.skeleton.name == "ntu25"
    reasons = {entry["clip"]: entry for entry in store.provenance["log"]}
    assert reasons["S003C003P002R002A016"]["reason"] == "wider than 0.8 of its height in 84 of 84 frames"
    assert reasons["S003C003P002R002A016"]["body"] == "72057594037931368"
    assert reasons["S011C003P040R001A018"]["reason"] == "seen in 9 frames, expected at least 12"
    assert reasons["S006C002P040R001A027"]["reason"] == "5 of 58 frames without a body"
    assert reasons["S015C002P002R002A055"]["reason"].startswith("seen together with 2 that move more")
    assert store.columns["num_bodies"].tolist() == [1, 2, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2]


NUMBERS = """0 -0 1 +1 -1 5. .5 -.5 0.1 0.1234567 0.12345678 0.123456789 12.5 1e3 1E+5 -2.5e-3 1e22 1e23 1e-22 1e-23
9007199254740991 9007199254740993 90071992547409930 1234567890123456789 12345678901234567890123 0.30000000000000004
0.00000000000000000000001 16777217 16777219 1.00000005960464477540 1e38 3.5e38 1e308 1e309 1e999999999999 1e-45
7e-46 1e-400 0e999999 0.000e-99999999999999999999 nan NaN -nan inf -INF Infinity +infinity 3.4028236e38
00000000000000000000000000000001.5""".split()
NO_NUMBERS = "x 1x 1.2.3 - + . e5 1e 1e+ --1 +-1 0x10 1_0 1,5 nanx infinit 1.#QNAN ٣ 1.2\x00 1.5-".split(" ")


def numbers_text(spelling):
    joint = f"{spelling} 1 2 {REST}\n"
    return ("1\n1\n" + BODY.format(7) + joint * 25).encode()


@pytest.mark.parametrize("spelling", NUMBERS)
def test_numbers_round_as_numpy_does(spelling):
    with np.errstate(over="ignore"):
        expected = np.float64(spelling).astype(np.float32)
    for parse in (ntu_text.parse_ntu, ntu_text.parse_ntu_python):
        np.testing.assert_array_equal(parse(numbers_text(spelling)).joints[0, :, 0], expected)


@pytest.mark.parametrize("spelling", NO_NUMBERS)
def test_what_is_not_a_number(spelling):
    for parse in (ntu_text.parse_ntu, ntu_text.parse_ntu_python):
        with pytest.raises(UserError, match=r"^line 5: expected a coordinate, got '"):
            parse(numbers_text(spelling))


def outcome(parse, data):
    """What a parser makes of ``data``, comparable."""
    try:
        found = parse(data)
    except UserError as error:
        return str(error)
    return (
        found.frames,
        found.rest,
        *(array.tolist() for array in (found.frame, found.body, found.line)),
        np.where(np.isnan(found.joints), np.float32(12345), found.joints).tobytes(),
    )


def same(data):
    ours, plain = outcome(ntu_text.parse_ntu, data), outcome(ntu_text.parse_ntu_python, data)
    assert ours == plain, data
    return ours


def test_random_numbers_in_cpp_and_python():
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [rng.normal(size=(2000, 3)) * 3, rng.normal(size=(2000, 3)) * 10.0 ** rng.integers(-50, 40, (2000, 1))]
    )
    forms = ["%.7f", "%.3f", "%.8f", "%.9f", "%.17g", "%g", "%e", "%.0f", "%.25f", "%+.6f"]
    lines = [
        " ".join(forms[(row + axis) % 10] % value for axis, value in enumerate(xyz)) for row, xyz in enumerate(values)
    ]
    data = "160\n" + "".join(
        "1\n" + BODY.format(1) + "".join(f"{line} {REST}\n" for line in lines[begin : begin + 25])
        for begin in range(0, 4000, 25)
    )
    assert len(same(data.encode())[2]) == 160
    with np.errstate(over="ignore"):
        expected = np.array([line.split() for line in lines], dtype=np.float64).astype(np.float32)
    np.testing.assert_array_equal(ntu_text.parse_ntu(data.encode()).joints.reshape(-1, 3), expected)


def test_mutated_files_in_cpp_and_python():
    rng = np.random.default_rng(1)
    original = text([[], [(1, person(1, 0)[0])], [(1, person(1, 1)[0]), (2, person(1, 2)[0])]]).encode()
    pieces = [
        b"\n",
        b"\r\n",
        b" ",
        b"\t",
        b"-",
        b"25",
        b"0",
        b"99999999999999999999",
        b"nan",
        b"\x00",
        b"\xff",
        b"1e9",
        b"\x0b",
    ]
    outcomes = set()
    for _ in range(4000):
        data = bytearray(original)
        for _ in range(rng.integers(1, 4)):
            # Half of the damage is where the counts are.
            at = int(rng.integers(0, len(data) + 1) if rng.random() < 0.5 else rng.integers(0, 60))
            kind = rng.integers(0, 4)
            if kind == 0:
                del data[at : at + int(rng.integers(1, 200))]
            elif kind == 1:
                data[at:at] = pieces[rng.integers(len(pieces))]
            elif kind == 2:
                data[at : at + 1] = bytes([rng.integers(0, 256)])
            else:
                del data[at:]
        found = same(bytes(data))
        outcomes.add(found.split(":")[1] if isinstance(found, str) else "read")
    assert len(outcomes) > 15 and "read" in outcomes


def test_line_ends_spaces_and_what_follows():
    plain = alone(3).encode()
    wanted = same(plain)
    for data in (
        plain.replace(b"\n", b"\r\n"),
        plain.replace(b"\n", b" \t\n"),
        plain.replace(b" ", b" \t "),
        plain.rstrip(b"\n"),
        plain + b"\n \r\n\t\n",
    ):
        assert same(data) == wanted
    assert same(plain + b"\n1\n")[1] == 87
    assert same(text([[], []]).encode())[0] == 2 and same(b"0")[0] == 0


def test_claimed_counts_take_no_memory():
    for data in (b"9223372036854775807\n" + b"0\n" * 1000, b"1\n9223372036854775807\n" + BODY.format(1).encode()):
        assert "got the end of the file" in same(data)


GOOD = alone(12)
BAD = {
    "empty": ("", "line 1: expected the number of frames, got the end of the file"),
    "frames": ("many\n", "line 1: expected the number of frames, got 'many'"),
    "negative frames": ("-1\n", "line 1: expected the number of frames, got '-1'"),
    "huge frames": (
        GOOD.replace("12\n", "99999999999999999999\n", 1),
        "line 1: expected the number of frames, got '999",
    ),
    "missing frames": (
        GOOD.replace("12\n", "13\n", 1),
        "line 338: expected the number of bodies of a frame, got the end",
    ),
    "bodies": (GOOD.replace("\n1\n", "\n1.5\n", 1), "line 2: expected the number of bodies of a frame, got '1.5'"),
    "negative bodies": (
        GOOD.replace("\n1\n", "\n-1\n", 1),
        "line 2: expected the number of bodies of a frame, got '-1'",
    ),
    "too many bodies": (GOOD.replace("\n1\n", "\n2\n", 1), "line 30: expected 10 values of a body, got 1"),
    "body": (GOOD.replace(" 0 1 1 1", " 0 1 1", 1), "line 3: expected 10 values of a body, got 9"),
    "id": (
        GOOD.replace("72057594037931101", "somebody", 1),
        "line 3: expected the id of a body, a whole number, got 'som",
    ),
    "joints": (GOOD.replace("\n25\n", "\n24\n", 1), "line 4: expected 25 joints, got 24"),
    "no joints": (GOOD.replace("\n25\n", "\n\n", 1), "line 4: expected the number of joints, got ''"),
    "columns": (GOOD.replace(" " + REST, " " + REST[:-2], 1), "line 5: expected 12 numbers of a joint, got 11"),
    "blank": (GOOD.replace(REST + "\n", REST + "\n\n", 1), "line 6: expected 12 numbers of a joint, got 0"),
    "text": (GOOD.replace(REST + "\n", REST + "\nhead ", 1), "line 6: expected 12 numbers of a joint, got 13"),
    "word": (GOOD.replace(REST + "\n-", REST + "\nx", 1), "expected a coordinate, got 'x"),
    "binary": (bytes(range(256)) * 3, "line 1: expected the number of frames, got '?????????'"),
    "truncated": (GOOD[: len(GOOD) // 2], "expected 12 numbers of a joint, got"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_text(tree, tmp_path, case):
    content, message = BAD[case]
    folder = tree(S001C001P001R001A001=GOOD, S001C002P002R001A002=content)
    with pytest.raises(UserError) as failed:
        store_of(folder, tmp_path)
    line = str(failed.value)
    assert line.startswith(f"{folder}: S001C002P002R001A002.skeleton: line ") and "\n" not in line
    assert message in line and line.endswith("(--on-error drop leaves such files out)")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"], "a failed prepare left something behind"
    store = store_of(folder, tmp_path, on_error="drop")
    assert store.names == ["S001C001P001R001A001"]
    assert message in store.provenance["log"][0]["reason"]
    assert store.provenance["log"][0]["file"] == "S001C002P002R001A002.skeleton"


def test_coordinates_that_are_not_finite(tree, tmp_path):
    lines = GOOD.splitlines()
    lines[40] = "0.5 inf 0.5 " + REST
    folder = tree(S001C001P001R001A001="\n".join(lines))
    with pytest.raises(UserError, match=r"A001\.skeleton: line 41: coordinates of a joint that are NaN or infinite"):
        store_of(folder, tmp_path)
    # A body that is left out anyway may hold what it likes.
    frames = [[(1, joints)] for joints in person(30, 0)]
    frames[4].append((2, np.full((25, 3), np.nan)))
    for bodies in frames[5:]:
        bodies.append((3, np.full((25, 3), np.inf)))
    with warnings.catch_warnings(action="error"):
        assert store_of(tree(S001C001P001R001A001=text(frames)), tmp_path).clip(0).shape == (1, 30, 25, 3)


def test_names_and_limits(tree, tmp_path):
    with pytest.raises(UserError, match=r"walk\.skeleton: expected a name such as S001C002P003R001A010\.skeleton"):
        store_of(tree(walk=GOOD), tmp_path)
    files = {
        "S017C001P001R001A060": GOOD,
        "s001c002p003r002a005": GOOD,
        "S018C001P001R001A001": "",
        "S001C001P001R001A061": "",
    }
    store = store_of(tree(**files), tmp_path)
    assert store.names == ["S017C001P001R001A060", "S001C002P003R002A005"]
    assert store.labels.tolist() == [59, 4] and len(store.class_names) == 60
    assert [(entry["file"], entry["reason"]) for entry in store.provenance["log"]] == [
        ("S001C001P001R001A061.skeleton", "action 61 is not one of the 60 of NTU RGB+D 60"),
        ("S018C001P001R001A001.skeleton", "setup 18 is not one of the 17 of NTU RGB+D 60"),
    ]
    assert {name: column.tolist() for name, column in store.columns.items()} == {
        "setup": [17, 1],
        "camera": [1, 2],
        "performer": [1, 3],
        "replication": [1, 2],
        "num_bodies": [1, 1],
    }
    with pytest.raises(UserError, match=r"no usable clip in 1 files: S018.*: setup 18 is not one of the 17"):
        store_of(tree(S018C001P001R001A001=GOOD), tmp_path)
    store = store_of(tree(S032C001P106R002A120=GOOD), tmp_path, "ntu120")
    assert store.class_names[119] == "rock-paper-scissors" and store.labels.tolist() == [119]


def test_class_names():
    assert len(CLASS_NAMES) == len(set(CLASS_NAMES)) == 120
    assert [CLASS_NAMES[action - 1] for action in (1, 10, 43, 50, 60, 61, 112)] == [
        "drink water",
        "clapping",
        "falling down",
        "punch/slap",
        "walking apart",
        "put on headphone",
        "high-five",
    ]


def test_splits_and_warnings(tree, tmp_path):
    lines = []
    out = tmp_path / "out.safetensors"
    prepare("ntu60", tree(), out, workers=1, say=lines.append)
    store = ClipStore.open(out)
    performer, camera = store.columns["performer"], store.columns["camera"]
    assert performer[store.split("xsub").test].tolist() == [3, 3]
    assert set(performer[store.split("xsub").train].tolist()) == {1, 2, 4}
    assert set(camera[store.split("xview").train].tolist()) == {2, 3}
    assert set(camera[store.split("xview").test].tolist()) == {1}
    assert lines == [
        "warning: split xsub has 7 clips to train and 2 to test, published for NTU RGB+D 60 are 40091 and 16487",
        "warning: split xview has 6 clips to train and 3 to test, published for NTU RGB+D 60 are 37646 and 18932",
    ]
    assert store.provenance["warnings"] == [line.removeprefix("warning: ") for line in lines]
    assert set(store.label_subsets) == {"xsub", "xview"} and set(store.label_subsets["xsub"]) == {"0.01", "0.05", "0.1"}

    lines.clear()
    prepare("ntu120", tree(), out, workers=1, say=lines.append)
    store = ClipStore.open(out)
    assert set(store.columns["setup"][store.split("xset").train].tolist()) == {2}
    assert "published for NTU RGB+D 120 are 54468 and 59477" in lines[1]

    lines.clear()
    prepare("ntu60", tree(S001C001P001R001A001=GOOD), out, workers=1, say=lines.append)
    assert ClipStore.open(out).splits == {}
    assert lines[1] == "warning: split xsub is left out: it has no clip to test"
    assert lines[3] == "warning: split xview is left out: it has no clip to train"
    lines.clear()
    prepare("ntu60", tree(), out, NtuOptions(where="performer in 1-3"), workers=1, say=lines.append)
    assert lines == []


def test_performers_of_the_published_protocols():
    every = np.arange(1, 107)
    columns = {"label": every, "performer": every, "setup": np.arange(106) % 32 + 1}
    table = ColumnTable(where="", columns=columns, values={})
    sixty = every[matching(ntu._RELEASES["ntu60"].splits["xsub"], table)].tolist()
    assert sixty == TRAIN_60
    more = "45 46 47 49 50 52 53 54 55 56 57 58 59 70 74 78 80 81 82 83 84 85 86 89 91 92 93 94 95 97 98 100 103"
    all_of_them = every[matching(ntu._RELEASES["ntu120"].splits["xsub"], table)].tolist()
    assert all_of_them == TRAIN_60 + [int(number) for number in more.split()] and len(all_of_them) == 53
    assert set(columns["setup"][matching(ntu._RELEASES["ntu120"].splits["xset"], table)]) == set(range(2, 33, 2))


def two(first=20, second=20, begin=0, **changes):
    """Frames of body 1, and of body 2 from frame ``begin`` on."""
    frames = [[] for _ in range(max(first, begin + second))]
    for at, joints in enumerate(person(first, 0)):
        frames[at].append((1, joints))
    for at, joints in enumerate(person(second, 1, **changes)):
        frames[begin + at].append((2, joints))
    return frames


def one_clip(tree, tmp_path, frames, **options):
    """Bodies [M,n,25,3] and the log's reasons of a file, not centred."""
    store = store_of(tree(S001C001P001R001A001=text(frames)), tmp_path, **{"center": False} | options)
    return store.clip(0).numpy(), [(entry["body"], entry["reason"]) for entry in store.provenance["log"]]


def test_more_motion_comes_first(tree, tmp_path):
    frames, log = one_clip(tree, tmp_path, two(motion=0.3))
    np.testing.assert_array_equal(frames, [person(20, 1, motion=0.3), person(20, 0)])
    assert log == []
    frames, log = one_clip(tree, tmp_path, two(motion=0.3), max_bodies=1)
    np.testing.assert_array_equal(frames, [person(20, 1, motion=0.3)])
    assert log[0][0] == "1" and log[0][1].startswith("seen together with 1 that move more (motion ")


def test_short_and_wide_bodies(tree, tmp_path):
    frames, log = one_clip(tree, tmp_path, two(second=11))
    assert frames.shape[0] == 1 and log == [("2", "seen in 11 frames, expected at least 12")]
    frames, log = one_clip(tree, tmp_path, two(second=11), min_body_frames=11)
    assert frames.shape[0] == 2 and log == []
    frames, log = one_clip(tree, tmp_path, two(width=1.2))
    assert frames.shape[0] == 1 and log == [("2", "wider than 0.8 of its height in 20 of 20 frames")]
    assert one_clip(tree, tmp_path, two(width=1.2), spread=False)[0].shape[0] == 2
    # One that is too short or too wide stays when it is the last.
    frames, log = one_clip(tree, tmp_path, two(5, 4))
    np.testing.assert_array_equal(frames, [person(4, 1)])
    assert log == [("1", "seen in 5 frames, expected at least 12"), ("", "1 of 5 frames in which no body is left")]


def test_an_id_that_changes_is_one_actor(tree, tmp_path):
    frames, log = one_clip(tree, tmp_path, two(20, 20, begin=20))
    np.testing.assert_array_equal(frames, [np.concatenate([person(20, 0), person(20, 1)])])
    assert log == []


def test_gaps(tree, tmp_path):
    frames = two()
    frames[5:5] = [[], []]
    frames[9] = frames[9][:1]  # body 2 is away for a moment
    away = np.delete(person(20, 1), 7, axis=0)
    found, log = one_clip(tree, tmp_path, frames)
    order = [0, 1] if np.array_equal(found[0], person(20, 0)) else [1, 0]
    np.testing.assert_array_equal(found[order[1], :19], away)
    assert not found[order[1], 19].any() and log == [("", "2 of 22 frames without a body")]
    found, log = one_clip(tree, tmp_path, frames, close_gaps=False)
    assert not found[order[1], 7].any() and found[order[1], 19].any()
    found, log = one_clip(tree, tmp_path, frames, drop_empty_frames=False, close_gaps=False)
    assert found.shape[1] == 22 and not found[:, 5:7].any() and log == []


def test_frames_of_a_body_left_out(tree, tmp_path):
    frames = two(20, 5, begin=20)
    found, log = one_clip(tree, tmp_path, frames)
    assert found.shape == (1, 20, 25, 3)
    assert log[1] == ("", "5 of 25 frames in which no body is left")
    assert one_clip(tree, tmp_path, frames, drop_empty_frames=False)[0].shape == (1, 25, 25, 3)


def test_centre(tree, tmp_path):
    found, _ = one_clip(tree, tmp_path, two(20, 15, begin=5), center=True)
    plain, _ = one_clip(tree, tmp_path, two(20, 15, begin=5))
    origin = plain[0, np.flatnonzero(plain[0].any((1, 2)))[0], 1]
    absent = ~plain.any((2, 3))
    assert absent.sum() == 5
    np.testing.assert_array_equal(found[~absent], plain[~absent] - origin)
    assert not found[absent].any()


def test_an_id_twice_in_a_frame(tree, tmp_path):
    frames = [[(1, joints), (1, joints)] for joints in person(10, 0)]
    found, log = one_clip(tree, tmp_path, frames)
    assert found.shape == (1, 10, 25, 3)
    assert log == [("1", "10 rows beyond the last frame: a frame holds it twice")]


def test_text_after_the_last_frame_is_noted(tree, tmp_path):
    store = store_of(tree(S001C001P001R001A001=GOOD + GOOD), tmp_path)
    assert store.clip(0).shape[1] == 12
    assert store.provenance["log"][0]["reason"] == "line 338 and what follows it, after the last of 12 frames"


def test_files_without_a_body(tree, tmp_path):
    nobody = text([[], [], []])
    zeros = text([[(1, np.zeros((25, 3)))]] * 4)
    names = [f"S001C001P001R001A{action:03}" for action in range(1, 5)]
    folder = tree(**dict(zip(names, [GOOD, nobody, zeros, "0\n"], strict=True)))
    store = store_of(folder, tmp_path)
    assert store.names == names[:1]
    assert [entry["reason"] for entry in store.provenance["log"]] == [
        "no body in any of its 3 frames",
        "every coordinate is 0 in its 4 frames",
        "no body in any of its 0 frames",
    ]
    with pytest.raises(UserError, match=r"no usable clip in 1 files: S001C001P001R001A001.skeleton: no body in any"):
        store_of(tree(S001C001P001R001A001=nobody), tmp_path)
    with pytest.raises(UserError, match="has 1 frames with a body, expected at least 2"):
        store_of(tree(S001C001P001R001A001=alone(1)), tmp_path)


def test_exclude_lists(tree, tmp_path, capsys):
    folder = tree()
    names = [path.stem for path in sorted(folder.iterdir())]
    first, second = tmp_path / "missing60.txt", tmp_path / "missing120.txt"
    first.write_text(
        f"These samples have missing\nor incomplete skeletons:\n\n{names[2]}\n  {names[0].lower()}.skeleton \n"
    )
    second.write_text(f"# more\r\n{names[4]}\r\n{names[2]}\r\nS031C001P001R001A001\r\n")
    out = tmp_path / "out.safetensors"
    arguments = ["prepare", "ntu60", str(folder), "--exclude", str(first), "--out", str(out), f"--exclude={second}"]
    assert main(arguments) == 0
    store = ClipStore.open(out)
    assert store.names == [name for number, name in enumerate(names) if number not in (0, 2, 4)]
    assert sorted(entry["reason"] for entry in store.provenance["log"]) == [
        "named in missing120.txt",
        "named in missing120.txt",
        "named in missing60.txt",
    ]
    assert store.provenance["options"]["exclude"] == ["missing60.txt", "missing120.txt"]
    assert "3 notes on what was left out" in capsys.readouterr().out

    for content, message in (
        (
            "nothing here\n",
            r"missing60.txt: expected names such as S001C002P003R001A010, a line each, got none in 1 lines",
        ),
        ("", "got none in 0 lines"),
        (f"{names[0]}\nS001\n", r"missing60.txt: line 2: expected a name such as S001C002P003R001A010, got 'S001'"),
    ):
        first.write_text(content)
        with pytest.raises(UserError, match=message):
            store_of(folder, tmp_path, exclude=(first,))
    with pytest.raises(UserError, match=r"nowhere.txt: No such file"):
        store_of(folder, tmp_path, exclude=(tmp_path / "nowhere.txt",))
    with pytest.raises(UserError, match="--max-bodies must be at least 1, got 0"):
        store_of(folder, tmp_path, max_bodies=0)


def packed(folder, path, prefix=""):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, prefix + file.name)
    return path


def test_archive_equals_folder(tree, tmp_path):
    folder = tree()
    store_of(folder, tmp_path)
    wanted = (tmp_path / "out.safetensors").read_bytes()
    store_of(packed(folder, tmp_path / "flat.zip"), tmp_path)
    assert (tmp_path / "out.safetensors").read_bytes() == wanted
    store_of(packed(folder, tmp_path / "nested.ZIP", "nturgb+d_skeletons/"), tmp_path)
    assert (tmp_path / "out.safetensors").read_bytes() == wanted, "nothing is logged, so no path shows"
    (tmp_path / "broken.zip").write_bytes((tmp_path / "flat.zip").read_bytes()[:-200])
    with pytest.raises(UserError, match=r"broken\.zip: not a whole \.zip archive"):
        store_of(tmp_path / "broken.zip", tmp_path)


def test_workers_do_not_matter(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "CHUNK_FILES", 2)
    folder, bytes_of = tree(), {}
    for workers in (1, 4):
        out = tmp_path / f"{workers}.safetensors"
        prepare("ntu60", folder, out, workers=workers, say=lambda line: None)
        bytes_of[workers] = out.read_bytes()
    assert bytes_of[1] == bytes_of[4]


def test_a_killed_prepare_continues(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "CHUNK_FILES", 2)
    folder, out, lines, seen = tree(), tmp_path / "out.safetensors", [], []
    prepare("ntu60", folder, out, workers=1, say=lambda line: None)
    wanted = out.read_bytes()
    out.unlink()
    whole = ntu.NtuSource.read

    def dies(source, file, log):
        if len(seen) == 5:
            raise KeyboardInterrupt
        return counted(source, file, log)

    def counted(source, file, log):
        seen.append(file.name)
        return whole(source, file, log)

    monkeypatch.setattr(ntu.NtuSource, "read", dies)
    with pytest.raises(KeyboardInterrupt):
        prepare("ntu60", folder, out, workers=1, say=lines.append)
    assert not out.exists()
    monkeypatch.setattr(ntu.NtuSource, "read", counted)
    prepare("ntu60", folder, out, workers=1, say=lines.append)
    assert lines[0] == "continuing: 4 of 9 files were read before"
    assert seen[5:] == sorted(path.name for path in folder.iterdir())[4:]
    assert out.read_bytes() == wanted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", "raw"]


def test_other_options_read_again(tree, tmp_path, monkeypatch):
    source = {
        name: ntu.NtuSource("ntu60", tree(), NtuOptions(**fields)).identity
        for name, fields in {
            "plain": {},
            "split": {"split": ("a=camera in 1",), "where": "camera in 1"},
            "gaps": {"close_gaps": False},
        }.items()
    }
    assert source["plain"] == source["split"] != source["gaps"]
