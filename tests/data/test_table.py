import io
import itertools
import zipfile

import numpy as np
import pytest
import yaml

from jmm_fast.data import prepare
from jmm_fast.data.readers.table import FolderOptions
from jmm_fast.errors import UserError

JOINTS = {"joints": ["hip", "left_hand", "right_hand"], "parents": [-1, 0, 0], "fps": 25}
HEADER = [f"{joint}_{axis}" for joint in JOINTS["joints"] for axis in "xyz"]


@pytest.fixture
def make(tmp_path):
    """``make({path: array, text or bytes}, **yaml)``: a folder and its clips.yaml."""

    def write(files, **fields):
        raw = tmp_path / "raw"
        fields = {name: value for name, value in (JOINTS | fields).items() if value is not None}
        for name, content in ({"clips.yaml": yaml.safe_dump(fields, sort_keys=False)} | files).items():
            path = raw / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, np.ndarray):
                np.save(path, content)
            else:
                path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return raw

    return write


@pytest.fixture
def run(tmp_path):
    """``run(raw, **options)``: the store and what was said; positions as they are unless ``center`` is given."""

    def call(raw, **options):
        said = []
        options = FolderOptions(**{"center": False} | options)
        return prepare("folder", raw, tmp_path / "out.safetensors", options, say=said.append), said

    return call


def refused(run, raw, **options):
    with pytest.raises(UserError) as error:
        run(raw, **options)
    text = str(error.value)
    assert "\n" not in text and str(raw) in text
    return text.removeprefix(f"{raw}: ")


def poses(frames=4, bodies=None, seed=0):
    shape = (frames, 3, 3) if bodies is None else (frames, bodies, 3, 3)
    return np.random.default_rng(seed).normal(size=shape)


def table(array, header=HEADER, delimiter=",", extra=()):
    lines = [delimiter.join(header)] if header else []
    return "\n".join([*lines, *(delimiter.join(f"{value:.7g}" for value in row) for row in array)]) + "\n"


def clip(store, number):
    rows = store.frames[store.offsets[number] : store.offsets[number + 1]].numpy()
    return rows.reshape(int(store.clip_bodies[number, 1]), -1, *rows.shape[1:])


def test_every_shape_of_array(make, run):
    one, two, three = poses(), poses(5, seed=1), poses(6, 2, seed=2)
    absent = poses(4, 3, seed=3)
    absent[:, 1] = 0
    raw = make(
        {
            "a.npy": one,
            "b.npy": two.reshape(5, 9).astype(np.float32),
            "c.npy": three.astype(np.float16),
            "d.npy": np.asfortranarray(absent),
            "e.csv": table(two.reshape(5, 9)),
            "f.npy": np.arange(36).reshape(4, 3, 3),
        }
    )
    store, said = run(raw)
    assert not said and store.names == list("abcdef") and store.fps == 25 and store.class_names == ["unlabelled"]
    expected = [
        one[None],
        two[None],
        three.astype(np.float16).transpose(1, 0, 2, 3),
        absent[:, [0, 2]].transpose(1, 0, 2, 3),
    ]
    expected += [two[None], np.arange(36).reshape(1, 4, 3, 3)]
    for number, frames in enumerate(expected):
        np.testing.assert_allclose(clip(store, number), frames.astype(np.float32), rtol=1e-6)
    assert store.skeleton.joint_names == ("hip", "left_hand", "right_hand") and store.skeleton.pairs == ((1, 2),)
    assert store.confidence is None


def test_unit_axes_and_centre(make, run):
    frames = poses(4, 2)
    raw = make({"a.npy": frames}, unit="mm", up="z")
    store, _ = run(raw)
    np.testing.assert_allclose(
        clip(store, 0), (frames / 1000)[..., [0, 2, 1]].transpose(1, 0, 2, 3) * [1, 1, -1], rtol=1e-5
    )
    centred, _ = run(raw, center=True)
    np.testing.assert_allclose(clip(centred, 0), clip(store, 0) - clip(store, 0)[0, 0, 0], atol=1e-7)


def test_columns_and_labels_from_names(make, run):
    files = {
        f"{label}_s{subject:02d}_{take}.npy": poses()
        for label in ("wave", "bow")
        for subject in (1, 12)
        for take in "ab"
    }
    store, _ = run(make(files, names="{label}_s{subject}_{take}"))
    assert store.class_names == ["bow", "wave"] and store.labels.tolist() == [0] * 4 + [1] * 4
    assert store.columns["subject"].tolist() == [1, 1, 12, 12] * 2
    assert store.column_values["take"] == ["a", "b"] and "subject" not in store.column_values


def test_names_may_take_in_folders_and_numbers_keep_their_order(make, run):
    store, _ = run(make({f"x/{label}/p1-{label}.npy": poses() for label in (9, 10, 11)}, names="{label}/p{who}-{take}"))
    assert store.class_names == ["9", "10", "11"] and store.names[0] == "x/10/p1-10"
    assert store.labels.tolist() == [1, 2, 0] and store.columns["who"].tolist() == [1, 1, 1]


def test_labels_from_a_table(make, run):
    labels = "\ufefffile, label,subject,weight\r\nb.npy,wave,ann,1.5\r\nsub/a,bow,bob,2\r\nmissing,bow,bob,2\r\n"
    raw = make({"b.npy": poses(), "sub/a.csv": table(poses().reshape(4, 9)), "labels.csv": labels}, labels="labels.csv")
    store, said = run(raw)
    assert store.names == ["b", "sub/a"] and store.class_names == ["bow", "wave"] and store.labels.tolist() == [1, 0]
    assert store.column_values["subject"] == ["ann", "bob"] and store.columns["subject"].tolist() == [0, 1]
    assert said == ["warning: labels.csv: 1 lines have no file, e.g. 'missing'"]


def test_a_description_and_labels_elsewhere(make, run, tmp_path):
    raw = make({"a.npy": poses(), "b.npy": poses()})
    (tmp_path / "about").mkdir()
    described = (raw / "clips.yaml").rename(tmp_path / "about" / "set.yaml")
    assert "there is no clips.yaml" in refused(run, raw)
    described.write_text(described.read_text() + "labels: l.csv\n")
    (tmp_path / "about" / "l.csv").write_text("file,label\na,x\nb,y\n")
    store, _ = run(raw, describe=described)
    assert store.class_names == ["x", "y"]
    single, _ = run(raw / "a.npy", describe=described)
    assert single.names == ["a"] and single.class_names == ["x"]
    with pytest.raises(UserError, match=r"nothing\.yaml: No such file or directory"):
        run(raw, describe=tmp_path / "nothing.yaml")


def test_a_zip_gives_the_same(make, run, tmp_path):
    raw = make({"bow/a.npy": poses(), "wave/b.csv": table(poses().reshape(4, 9))}, names="{label}/{who}")
    plain, _ = run(raw)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in raw.rglob("*.*"):
            archive.write(file, file.relative_to(raw))
    packed, _ = run(tmp_path / "set.zip")
    assert packed.names == plain.names and packed.class_names == plain.class_names == ["bow", "wave"]
    np.testing.assert_array_equal(packed.frames, plain.frames)


def test_classes_in_order_and_labels_outside(make, run):
    files = {f"{label}_1.npy": poses() for label in ("wave", "0", "2", "bow")}
    raw = make(files, names="{label}_{take}", classes=["wave", "bow", "sit"])
    store, _ = run(raw)
    assert store.class_names == ["wave", "bow", "sit"]
    assert dict(zip(store.names, store.labels.tolist(), strict=True)) == {"0_1": 0, "2_1": 2, "bow_1": 1, "wave_1": 0}
    np.save(raw / "3_1.npy", poses())
    assert refused(run, raw).startswith("3_1.npy: its label '3' is not one of the 3 classes")
    store, _ = run(raw, on_error="drop")
    assert store.num_clips == 4 and store.provenance["log"][0]["file"] == "3_1.npy"


def test_missing_joints(make, run):
    frames = poses(4, 2)
    frames[1, 0, 2, 1] = np.nan
    frames[:, 1, 0] = np.nan
    raw = make({"a.npy": frames, "b.npy": poses()}, missing="nan")
    for center in (False, True):
        store, _ = run(raw, center=center)
        confidence = store.confidence[:8].numpy().reshape(2, 4, 3)
        expected = np.ones((2, 4, 3))
        expected[0, 1, 2] = expected[1, :, 0] = 0
        np.testing.assert_array_equal(confidence, expected)
        assert (store.confidence[8:] == 1).all()
        np.testing.assert_array_equal((clip(store, 0) == 0).all(-1)[1], expected[1] == 0)
        assert not clip(store, 0)[0, 1, 2].any()
    (raw / "clips.yaml").write_text((raw / "clips.yaml").read_text().replace("missing: nan", "missing: none"))
    assert "a.npy: clip a holds 13 NaN or infinite coordinates" in refused(run, raw)


def test_centres_on_the_first_frame_that_has_the_root(make, run):
    frames = poses()
    frames[0, 0] = np.nan
    store, _ = run(make({"a.npy": frames}, missing="nan"), center=True)
    expected = np.nan_to_num(frames - frames[1, 0])
    np.testing.assert_allclose(clip(store, 0)[0], expected, rtol=1e-5, atol=1e-6)


def test_csv_with_other_columns_and_confidence(make, run):
    frames, seen = poses(), np.array([[1, 0.5, 0], [1, 1, 1], [0.25, 1, 1], [1, 1, 1]])
    header = ["time", *(f"{axis.upper()}:{joint}" for axis in "xyz" for joint in JOINTS["joints"])]
    header += [f"{joint} seen" for joint in JOINTS["joints"]]
    lines = [";".join(header)]
    for number in range(4):
        values = [*frames[number].T.ravel(), *seen[number]]
        lines.append(";".join([f'"12:0{number}; noon"', *(f" {value:.8g}" for value in values)]))
    lines[2] = lines[2].replace(f" {frames[1].T.ravel()[0]:.8g}", "", 1)
    names = [f"{axis.upper()}:{joint}" for joint in JOINTS["joints"] for axis in "xyz"]
    told = {"columns": names, "confidence": "{joint} seen", "delimiter": ";"}
    store, _ = run(make({"a.csv": "\r\n".join(lines)}, csv=told, missing="nan"))
    seen[1, 0] = 0
    np.testing.assert_allclose(store.confidence, seen)
    frames[seen == 0] = 0
    np.testing.assert_allclose(clip(store, 0)[0], frames, rtol=1e-6)


@pytest.mark.parametrize(
    "header, told",
    [
        (None, {"header": False}),
        (None, {"header": HEADER}),
        (None, {"header": HEADER, "columns": "{joint}_{axis}"}),
        (HEADER, {}),
        (HEADER[::-1], {"delimiter": "\t"}),
    ],
)
def test_csv_headers(make, run, header, told):
    rows = poses().reshape(4, 9)
    text = table(rows[:, ::-1] if header == HEADER[::-1] else rows, header, told.get("delimiter", ","))
    store, _ = run(make({"a.csv": text}, csv=told))
    np.testing.assert_allclose(clip(store, 0).reshape(4, 9), rows, rtol=1e-6)


def test_a_known_layout_and_parents_by_name(make, run):
    arrays = {"a.npy": np.random.default_rng(0).normal(size=(3, 25, 3))}
    store, _ = run(make(arrays, layout="ntu25", joints=None, parents=None))
    assert store.skeleton.name == "ntu25"
    store, _ = run(make({"a.npy": poses()}, parents=[None, "hip", "left_hand"]))
    assert store.skeleton.parents == (-1, 0, 1)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"fsp": 30}, "unknown field 'fsp': expected fps, layout,"),
        ({"fps": None}, "fps must be a number, got nothing"),
        ({"fps": "30"}, "fps must be a number, got '30'"),
        ({"fps": True}, "fps must be a number, got True"),
        ({"fps": 0}, "fps must be a number above 0, got 0"),
        ({"fps": float("nan")}, "fps must be a number above 0, got nan"),
        ({"unit": "inch"}, "unit must be one of m, cm, mm, got 'inch'"),
        ({"up": "x"}, "up must be one of y, z, got 'x'"),
        ({"missing": 0}, "missing must be one of none, nan, got 0"),
        ({"layout": "ntu25"}, "expected either layout, one of ntu25"),
        ({"joints": None, "parents": None}, "expected either layout, one of ntu25"),
        ({"joints": None, "parents": None, "layout": "ntu26"}, "unknown skeleton 'ntu26'"),
        ({"joints": None, "layout": "ntu25"}, "parents go with joints, not with layout"),
        ({"joints": "hip"}, "joints must be a list of different names, got 'hip'"),
        ({"joints": ["a", "b", "a"]}, "joints must be a list of different names, got ['a', 'b', 'a']"),
        ({"joints": ["a", "b", [1]]}, "joints must be a list of different names"),
        ({"joints": []}, "joints must be a list of different names, got []"),
        ({"parents": None}, "parents must be a list of 3 parents, one for each joint, got nothing"),
        ({"parents": [-1, 0]}, "parents must be a list of 3 parents, one for each joint, got [-1, 0]"),
        ({"parents": [-1, "hips", 0]}, "parents: that of left_hand must be a joint or its number, got 'hips'"),
        ({"parents": [-1, 0.5, 0]}, "parents: that of left_hand must be a joint or its number, got 0.5"),
        ({"parents": [-1, 2, 1]}, "parents form a cycle"),
        ({"parents": [-1, 0, 7]}, "parent of joint 2 must be -1 or in 0..2, got 7"),
        ({"names": ["a"]}, "names must be text, got ['a']"),
        ({"names": ""}, "names must be text, got ''"),
        ({"names": "{label}_{label}"}, "names must be a pattern with each {field} once, got '{label}_{label}'"),
        ({"names": "{}_{label}"}, "names must be a pattern with each {field} once"),
        ({"names": "{1a}"}, "names must be a pattern with each {field} once"),
        ({"labels": 5}, "labels must be text, got 5"),
        ({"classes": ["a", "b"]}, "classes needs {label} in names, or labels"),
        ({"classes": {"a": 1}}, "classes must be a list of different names"),
        ({"csv": ["a"]}, "csv must be a mapping, got ['a']"),
        ({"csv": {"colums": "x"}}, "unknown field 'csv.colums': expected columns, confidence, delimiter, header"),
        ({"csv": {"columns": "{joint}"}}, "csv.columns must be a pattern with {joint} and {axis}, got '{joint}'"),
        ({"csv": {"columns": ["a", "b"]}}, "csv.columns must be 9 names for 3 joints, got 2"),
        ({"csv": {"columns": 3}}, "csv.columns must be a list of different names, got 3"),
        ({"csv": {"confidence": "seen"}}, "csv.confidence must be a pattern with {joint}, got 'seen'"),
        ({"csv": {"delimiter": ", "}}, "csv.delimiter must be one character, got ', '"),
        ({"csv": {"header": False, "confidence": "{joint}"}}, "csv.header is false: give the names as a list"),
        ({"csv": {"header": HEADER[1:]}}, "csv.header: expected one column 'hip_x', got 0 in ['hip_y', "),
        ({"csv": {"header": 3}}, "csv.header must be a list of different names, got 3"),
    ],
)
def test_every_field_is_checked(make, run, fields, message):
    text = refused(run, make({"a.npy": poses()}, **fields))
    assert text.startswith("clips.yaml: ") and message in text


@pytest.mark.parametrize(
    "content, message",
    [
        (b"fps: [", "clips.yaml: line 1: not YAML: "),
        (b"fps: 3\n\tunit: m", "clips.yaml: line 2: not YAML: "),
        (b"\xff\xfe\x00", "clips.yaml: not YAML: "),
        (b"!!python/object/apply:os.system ['true']", "clips.yaml: line 1: not YAML: "),
        (b"fps: !!timestamp soon", "clips.yaml: not YAML: "),
        (b"just words", "clips.yaml: expected fields such as 'fps: 30', got str"),
        (b"", "clips.yaml: expected fields such as 'fps: 30', got NoneType"),
        (b"1: 2", "clips.yaml: expected fields such as 'fps: 30', got dict"),
    ],
)
def test_what_is_not_a_description(make, run, content, message):
    assert refused(run, make({"a.npy": poses(), "clips.yaml": content})).startswith(message)


def test_a_description_that_unfolds_without_end(make, run):
    bomb = "a: &a [x, x]\n" + "".join(
        f"{c}: &{c} [*{b}, *{b}]\n" for b, c in itertools.pairwise("abcdefghijklmnopqrstuvwxyz")
    )
    bomb = "fps: [" + ", ".join(line.partition(": ")[2] for line in bomb.splitlines()) + "]"
    assert refused(run, make({"a.npy": poses(), "clips.yaml": bomb})).startswith(
        "clips.yaml: fps must be a number, got [["
    )


def pickled():
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return file.getvalue()


def promising():
    """The header of a huge array without its numbers."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (1 << 50, 3, 3)})
    return file.getvalue() + bytes(100)


@pytest.mark.parametrize(
    "content, message",
    [
        (poses(4)[:, :2], "expected float [n,3,3], [n,M,3,3] or [n,9], got float64 [4, 2, 3]"),
        (np.zeros((4, 5, 3)), "got float64 [4, 5, 3]"),
        (np.zeros((4, 18)), "got float64 [4, 18]"),
        (np.zeros((4, 0, 3, 3)), "got float64 [4, 0, 3, 3]"),
        (np.zeros(9), "got float64 [9]"),
        (np.zeros(()), "got float64 []"),
        (np.zeros((4, 3, 3), complex), "got complex128 [4, 3, 3]"),
        (np.full((4, 3, 3), "a"), "got <U1 [4, 3, 3]"),
        (np.zeros((4, 3, 3), bool), "got bool [4, 3, 3]"),
        (np.zeros((0, 3, 3)), "has 0 frames"),
        (np.full((4, 3, 3), np.inf), "holds 36 NaN or infinite coordinates"),
        (np.full((4, 3, 3), 1e300), "holds 36 NaN or infinite coordinates"),
        (pickled(), "not a whole .npy array: Object arrays cannot be loaded when allow_pickle=False"),
        (promising(), "not a whole .npy array: "),
        (b"\x93NUMPY\x01\x00\xff\xff{", "not a whole .npy array: "),
        (b"not numpy", "not a whole .npy array: "),
        (b"", "not a whole .npy array: "),
    ],
)
@pytest.mark.filterwarnings("error")
def test_damaged_arrays(make, run, content, message):
    raw = make({"a.npy": content, "b.npy": poses()})
    text = refused(run, raw)
    assert text.startswith("a.npy: ") and message in text
    store, _ = run(raw, on_error="drop")
    assert store.names == ["b"] and message in store.provenance["log"][0]["reason"]


def test_every_truncation_of_an_array(make, run):
    file = io.BytesIO()
    np.save(file, poses(2))
    whole = file.getvalue()
    raw = make({f"{size:04d}.npy": whole[:size] for size in range(len(whole) + 1)})
    store, _ = run(raw, on_error="drop")
    assert store.names == [f"{len(whole):04d}"] and len(store.provenance["log"]) == len(whole)


GOOD = table(poses().reshape(4, 9))


@pytest.mark.parametrize(
    "content, message",
    [
        (GOOD[:-30], "line 5: expected 9 fields, got "),
        (GOOD.replace("\n", ",1\n", 2), "line 3: expected 10 fields, got 9"),
        (GOOD + "1,2,3\n", "line 6: expected 9 fields, got 3"),
        (GOOD.replace("hip_y", "hip_Y", 1), "line 1: expected one column 'hip_y', got 0 in ['hip_x', 'hip_Y', 'hip_z'"),
        (GOOD.replace("hip_y", "hip_x", 1), "line 1: expected one column 'hip_x', got 2 in "),
        (GOOD + "1,2,3,4,x,6,7,8,9", "line 6: column 'left_hand_y': expected a number, got 'x'"),
        (GOOD + "1,2,3,4,1_0,6,7,8,9", "line 6: column 'left_hand_y': expected a number, got '1_0'"),
        (GOOD + "1,2,3,4,,6,7,8,9", "holds 1 NaN or infinite coordinates"),
        (GOOD + "1,2,3,4,inf,6,7,8,9", "holds 1 NaN or infinite coordinates"),
        (GOOD + "1,2,3,4,1e99,6,7,8,9", "holds 1 NaN or infinite coordinates"),
        ("", "it is empty, expected a line of column names"),
        (",".join(HEADER), "has 0 frames"),
        (b"\xff\xfe" + GOOD.encode(), "byte 0 is not UTF-8 text"),
        (GOOD + '"' + "1" * 200_000, "line 6: field larger than field limit"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_damaged_csv(make, run, content, message):
    raw = make({"a.csv": content, "b.npy": poses()})
    text = refused(run, raw)
    assert text.startswith("a.csv: ") and message in text
    store, _ = run(raw, on_error="drop")
    assert store.names == ["b"] and message in store.provenance["log"][0]["reason"]


def test_csv_without_names_and_wrong_confidence(make, run):
    rows = poses().reshape(4, 9)
    raw = make({"a.csv": table(rows, None) + "1,2,3,4,y,6,7,8,9"}, csv={"header": False})
    assert "a.csv: line 5: field 5: expected a number, got 'y'" in refused(run, raw)
    header = [*HEADER, "hip", "left_hand", "right_hand"]
    text = table(np.concatenate([rows, np.full((4, 3), 1.5)], axis=1), header)
    raw = make({"a.csv": text}, csv={"confidence": "{joint}"})
    assert "line 2: column 'hip': expected a confidence in 0..1, got 1.5" in refused(run, raw)


def test_names_that_do_not_fit_or_meet(make, run):
    raw = make({"wave_1.npy": poses(), "wave.npy": poses()}, names="{label}_{take}")
    assert refused(run, raw) == f"wave.npy does not fit the names '{{label}}_{{take}}' of {raw}: clips.yaml"
    raw = make({"wave.csv": table(poses().reshape(4, 9))}, names=None)
    assert "clip wave: another clip has the same name" in refused(run, raw)
    store, _ = run(raw, on_error="drop")
    assert store.names == ["wave", "wave_1"]


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "labels: there is no file labels.csv"),
        ("", "labels.csv: line 1: expected columns file, label and others, each once, got []"),
        (
            "file,lable\na,x",
            "labels.csv: line 1: expected columns file, label and others, each once, got ['file', 'lable']",
        ),
        ("file,label,label\na,x,y", "labels.csv: line 1: expected columns file, label and others, each once"),
        ("file,label\na,x,y", "labels.csv: line 2: expected 2 fields, got 3"),
        ("file,label\na,x\na,y", "labels.csv: line 3: file 'a' has a line already"),
        ("file,label\nb,x", "a.npy has no line in labels.csv"),
        (b"\xff", "labels.csv: byte 0 is not UTF-8 text"),
    ],
)
def test_wrong_tables_of_labels(make, run, text, message):
    files = {"a.npy": poses()} | ({} if text is None else {"labels.csv": text})
    assert message in refused(run, make(files, labels="labels.csv"))


def test_folders_without_arrays(make, run, tmp_path):
    raw = make({})
    assert refused(run, raw) == "no .npy or .csv file in it"
    raw = make({"labels.csv": "file,label\na,x"}, labels="labels.csv")
    assert refused(run, raw) == "no .npy or .csv file in it besides labels.csv"
    assert not (tmp_path / "out.safetensors").exists()
