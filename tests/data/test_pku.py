import zipfile

import numpy as np
import pytest

from jmm_fast.data import prepare
from jmm_fast.data.readers.pku import CLASS_NAMES, PkuOptions
from jmm_fast.errors import UserError


@pytest.fixture
def make(tmp_path):
    """``make(videos, labels, **files)``: a PKU folder; videos are float arrays ``[n, 2, 25, 3]``, labels text."""

    def write(videos, labels, **files):
        raw = tmp_path / "raw"
        (raw / "skeleton").mkdir(parents=True)
        (raw / "label").mkdir()
        for name, video in videos.items():
            text = video if isinstance(video, bytes) else rows(video)
            (raw / "skeleton" / f"{name}.txt").write_bytes(text)
        for name, text in labels.items():
            (raw / "label" / f"{name}.txt").write_text(text)
        for name, text in files.items():
            (raw / f"{name}.txt").write_text(text)
        return raw

    return write


def rows(video):
    return b"\r\n".join(" ".join(f"{value:.6f}" for value in row.ravel()).encode() for row in video)


def video(frames, bodies=2, seed=0):
    frames = np.random.default_rng(seed).normal(size=(frames, 2, 25, 3)).round(6)
    frames[:, bodies:] = 0
    return frames


def split(train, test):
    return f"Training videos:\n{train}\nValidataion videos:\n{test}\n"


def clip(store, number):
    rows = store.frames[store.offsets[number] : store.offsets[number + 1]].numpy()
    return rows.reshape(int(store.clip_bodies[number, 1]), -1, 25, 3)


@pytest.fixture
def run(tmp_path):
    """``run(raw, phase, **options)``: the store and what was said."""

    def call(raw, phase=1, **options):
        said = []
        store = prepare(f"pku{phase}", raw, tmp_path / "out.safetensors", PkuOptions(**options), say=said.append)
        return store, said

    return call


def refused(run, raw, phase=1, **options):
    with pytest.raises(UserError) as error:
        run(raw, phase, **options)
    text = str(error.value)
    assert "\n" not in text and str(raw) in text
    return text.removeprefix(f"{raw}: ")


@pytest.mark.parametrize("split_name, key", [("xsub", "XSub"), ("xview", "XView")])
def test_equals_the_reference_preparation(golden, run, split_name, key):
    store, said = run(golden("pku_raw/raw"))
    expected = np.load(golden("pku_raw/expected.npz"))
    assert not said
    for part in ("train", "test"):
        ids = store.splits[split_name][part].tolist()
        x, y = expected[f"{key}/x_{part}"], expected[f"{key}/y_{part}"]
        assert len(ids) == len(x)
        for row, number in enumerate(ids):
            frames = clip(store, number)
            dense = np.zeros((300, 2, 25, 3), np.float32)
            dense[: frames.shape[1], : len(frames)] = frames.transpose(1, 0, 2, 3)
            np.testing.assert_array_equal(dense.reshape(300, 150), x[row])
            assert int(store.labels[number]) == y[row].argmax()
    assert [entry["clip"] for entry in store.provenance["log"]] == ["0031-M/1"]


def test_every_rule_can_be_switched_off(golden, run):
    raw = golden("pku_raw/raw")
    store, _ = run(raw, max_frames=0, drop_empty=False, drop_absent=False, center=True)
    assert store.num_clips == 11 and store.lengths.max() == 548
    assert (store.clip_bodies[:, 1] == 2).all()
    for number, name in enumerate(store.names):
        frames = clip(store, number)
        assert name == "0031-M/1" or not frames[0, 0, 1].any()
        assert not frames[1].any()


def test_columns_classes_and_label_subsets(make, run):
    names = [f"{number:04d}-{view}" for number in (2, 3) for view in "LMR"]
    labels = {name: "".join(f"{1 + k % 51},{k},{k + 5},1\n" for k in range(20)) for name in names}
    raw = make(
        {name: video(30, seed=k) for k, name in enumerate(names)},
        labels,
        cross_subject=split(", ".join(names[:3]), ",".join(names[3:])),
        cross_view=split("0002-L,0002-M,0003-L,0003-M", "0002-R, 0003-R"),
    )
    store, said = run(raw)
    assert not said and store.num_clips == 120 and store.fps == 30
    assert store.class_names == list(CLASS_NAMES) and len(set(CLASS_NAMES)) == 51
    assert store.names[21] == "0002-M/2" and int(store.labels[21]) == 1 and int(store.columns["instance"][21]) == 2
    assert store.column_values["view"] == ["L", "M", "R"] and int(store.columns["view"][21]) == 1
    assert store.column_values["video"][int(store.columns["video"][21])] == "0002-M"
    assert set(store.label_subsets) == {"xsub", "xview"} and set(store.label_subsets["xsub"]) == {"0.01", "0.05", "0.1"}
    assert [len(store.splits["xview"][part]) for part in ("train", "test")] == [80, 40]


def test_phase_two_takes_its_own_splits_and_tells_the_subject(make, run):
    raw = make(
        {"A01N02-L": video(9), "A11N13-R": video(9)},
        {"A01N02-L": "1,0,5,1", "A11N13-R": "51,4,9"},
        cross_subject=split("0002-L", "0003-L"),
    )
    (raw / "split").mkdir()
    (raw / "split" / "cross_subject_v2.txt").write_text(split("A01N02-L", "A11N13-R"))
    (raw / "split" / "cross-view_v2.txt").write_text(split("A11N13-R,", "A01N02-L"))
    store, said = run(raw, phase=2)
    assert not said
    assert store.columns["subject"].tolist() == [2, 13] and store.labels.tolist() == [0, 50]
    assert store.splits["xsub"]["train"].tolist() == [0] and store.splits["xview"]["train"].tolist() == [1]


@pytest.mark.parametrize("name", ["cross_subject", "cross-subject", "cross_subject_v2", "Cross-Subject-v2"])
def test_takes_each_name_of_a_split_file(make, run, name):
    raw = make({"0002-L": video(9)}, {"0002-L": "1,0,5,1"}, **{name: split("0002-L", "")[:-1] + "0003-L"})
    store, said = run(raw)
    assert store.splits["xsub"]["train"].tolist() == [0]
    assert any("no split xview" in line for line in said)


def test_a_zip_with_the_owners_folder_names(make, run, tmp_path):
    raw = make({"0002-L": video(9), "0003-R": video(9, 1)}, {"0002-L": "7,0,5,1", "0003-R": "8,2,9,1\n"})
    plain, _ = run(raw)
    packed = tmp_path / "pku.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for folder, name in (("skeleton", "PKU/Data/Skeleton_v2"), ("label", "PKU/Label_PKUMMD_v2")):
            for file in (raw / folder).iterdir():
                archive.write(file, f"{name}/{file.name}")
    store, _ = run(packed)
    np.testing.assert_array_equal(store.frames, plain.frames)
    assert store.names == plain.names == ["0002-L/1", "0003-R/1"]
    assert store.clip_bodies[:, 1].tolist() == [2, 1]


def test_warns_of_what_the_split_files_miss(make, run):
    videos = {name: video(9) for name in ("0002-L", "0003-L", "0004-L")}
    raw = make(videos, dict.fromkeys(videos, "1,0,5,1"), cross_subject=split("0002-L,0008-M,0009-M", "0003-L"))
    store, said = run(raw)
    assert said == [
        "warning: no split xview: cross_view.txt is not there",
        "warning: split xsub: 2 videos are named in its file, but there is no such video, e.g. 0008-M",
        "warning: split xsub: 1 videos are not named in its file: they are in neither part, e.g. 0004-L",
    ]
    assert set(store.splits) == {"xsub"} and store.splits["xsub"]["test"].tolist() == [1]


def test_a_split_file_of_other_videos(make, run):
    raw = make({"0002-L": video(9)}, {"0002-L": "1,0,5,1"}, cross_view=split("0008-L,0009-L", "0010-L"))
    store, said = run(raw)
    assert len(store.splits["xview"]["train"]) == len(store.splits["xview"]["test"]) == 0
    assert any("3 videos are named in its file" in line for line in said)


def test_the_same_after_where(make, run):
    videos = {name: video(9) for name in ("0002-L", "0002-M", "0003-L")}
    raw = make(videos, dict.fromkeys(videos, "3,0,5,1\n9,1,8,1"), cross_subject=split("0002-L,0002-M", "0003-L"))
    store, said = run(raw, where="view in L")
    assert store.names == ["0002-L/1", "0002-L/2", "0003-L/1", "0003-L/2"] and len(said) == 1
    assert store.splits["xsub"]["train"].tolist() == [0, 1] and store.splits["xsub"]["test"].tolist() == [2, 3]


BAD_ACTIONS = [
    ("52,0,5,1", "class 52 is outside 1..51"),
    ("0,0,5,1", "class 0 is outside 1..51"),
    ("1,5,5,1", "the action ends at frame 5, expected an end after its start 5"),
    ("1,7,5,1", "the action ends at frame 5, expected an end after its start 7"),
    ("1,-1,5,1", "the action lies at frames -1 to 5, outside the 9 frames of its video"),
    ("1,9,12,1", "the action lies at frames 9 to 12, outside the 9 frames of its video"),
    ("1,3", "expected class,start,end,confidence in whole numbers, got '1,3'"),
    ("1,3,x,1", "expected class,start,end,confidence in whole numbers, got '1,3,x,1'"),
    ("", "expected class,start,end,confidence in whole numbers, got ''"),
]


@pytest.mark.parametrize("line, reason", BAD_ACTIONS)
def test_a_bad_action_stops_or_is_left_out_alone(make, run, line, reason):
    raw = make({"0002-L": video(9)}, {"0002-L": f"1,0,5,1\n{line}\n2,4,9,1\n"})
    reason = f"label/0002-L.txt, line 2: {reason}"
    assert refused(run, raw) == f"skeleton/0002-L.txt: {reason} (--on-error drop leaves such files out)"
    store, _ = run(raw, on_error="drop")
    assert store.names == ["0002-L/1", "0002-L/3"]
    assert [(entry["clip"], entry["reason"]) for entry in store.provenance["log"]] == [("0002-L/2", reason)]
    # What was dropped is not forgotten when it should stop again.
    assert reason in refused(run, raw)


def test_an_action_that_goes_on_after_the_video_is_cut(make, run):
    raw = make({"0002-L": video(9)}, {"0002-L": "1,0,5,1\n2,4,12,1"})
    store, _ = run(raw)
    assert store.names == ["0002-L/1", "0002-L/2"] and store.lengths.tolist() == [5, 5]
    reason = "the action ends at frame 12, after the video's 9: it was cut there"
    assert [(entry["clip"], entry["reason"]) for entry in store.provenance["log"]] == [("0002-L/2", reason)]


def test_a_clip_with_nan_or_one_frame_is_left_out_alone(make, run):
    broken = video(9)
    broken[6, 0, 3, 1] = np.inf
    raw = make({"0002-L": broken}, {"0002-L": "1,0,5,1\n1,5,9,1\n1,2,3,1"})
    assert "clip 0002-L/2 holds 1 NaN or infinite coordinates" in refused(run, raw)
    store, _ = run(raw, on_error="drop")
    assert store.names == ["0002-L/1"] and len(store.provenance["log"]) == 2


@pytest.mark.parametrize(
    "content, message",
    [
        (rows(video(9))[:-20], "line 9: expected 150 numbers, got 148"),
        (rows(video(9)) + b" 1.0", "line 9: expected 150 numbers, got 151"),
        (rows(video(3)).replace(b"\r\n", b"\r\n\r\n", 1), "line 2: expected 150 numbers, got 0"),
        (b"\x00\xff" * 1000, "line 1: value 1 is not a number"),
        (rows(video(2)).replace(b".", b",", 1), "line 1: expected 150 numbers, got 151"),
        (b"", "outside the 0 frames"),
    ],
)
def test_damaged_skeletons(make, run, content, message):
    raw = make({"0002-L": content, "0003-L": video(9)}, {"0002-L": "1,0,2,1", "0003-L": "1,0,5,1"})
    assert message in refused(run, raw)
    store, _ = run(raw, on_error="drop")
    assert store.names == ["0003-L/1"] and message in store.provenance["log"][0]["reason"]


def test_skeletons_and_labels_without_each_other(make, run):
    raw = make({"0002-L": video(9), "0003-L": video(9)}, {"0003-L": "1,0,5,1", "0004-L": "1,0,5,1"})
    assert refused(run, raw).startswith("label/0004-L.txt has no skeleton file 0004-L.txt")
    store, said = run(raw, on_error="drop")
    assert store.names == ["0003-L/1"]
    assert store.provenance["log"][0]["reason"] == "there is no label file 0002-L.txt for it"
    assert "warning: label/0004-L.txt has no skeleton file 0004-L.txt; 1 label files are without theirs" in said
    (raw / "label" / "0004-L.txt").unlink()
    assert "skeleton/0002-L.txt: there is no label file 0002-L.txt for it" in refused(run, raw)


def test_names_of_the_other_phase_and_empty_labels(make, run):
    raw = make({"A01N01-L": video(9)}, {"A01N01-L": " \n"})
    assert "expected a name of phase 1 such as 0002-L.txt (pku2 reads the other)" in refused(run, raw)
    assert "label/A01N01-L.txt is empty, expected a line class,start,end,confidence" in refused(run, raw, phase=2)


def test_the_same_video_twice(make, run):
    raw = make({"0002-L": video(9)}, {"0002-L": "1,0,5,1"})
    (raw / "old" / "label").mkdir(parents=True)
    (raw / "old" / "label" / "0002-L.txt").write_text("1,0,5,1")
    assert refused(run, raw) == "label/0002-L.txt and old/label/0002-L.txt both hold the labels of 0002-L"
    (raw / "old" / "label").rename(raw / "old" / "skeleton")
    (raw / "old" / "skeleton" / "0002-L.txt").write_bytes(rows(video(9)))
    assert "clip 0002-L/1: another clip has the same name" in refused(run, raw)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "expected 4 lines"),
        ("0002-L\n0003-L\n", "expected 4 lines (a heading, the training videos, a heading, the test videos), got 2"),
        (split("0002-L", "0002-L,0003-L"), "video 0002-L is named in both parts"),
        (split("0002-L,0002-L", "0003-L"), "video 0002-L is named twice in one part"),
    ],
)
def test_broken_split_files(make, run, text, message):
    raw = make({"0002-L": video(9)}, {"0002-L": "1,0,5,1"}, cross_subject=text)
    assert message in refused(run, raw)


def test_two_split_files_for_one_split(make, run):
    raw = make(
        {"0002-L": video(9)}, {"0002-L": "1,0,5,1"}, **dict.fromkeys(["cross_view", "cross-view"], split("a", "b"))
    )
    assert refused(run, raw) == "cross-view.txt and cross_view.txt both are split files, expected one"


def test_folders_without_skeletons(run, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    assert refused(run, raw) == "no .txt file in it"
    (raw / "notes.txt").write_text("hello")
    assert refused(run, raw) == "no skeleton/NAME.txt in it"
    assert refused(run, tmp_path / "nowhere") == "no such file or folder"
    assert not (tmp_path / "out.safetensors").exists()


def test_the_number_of_frames_kept_must_make_a_clip(tmp_path):
    for value in (-1, 1):
        with pytest.raises(UserError, match=f"--max-frames must be 0 .all. or at least 2, got {value}"):
            prepare("pku1", tmp_path, tmp_path / "out", PkuOptions(max_frames=value))
