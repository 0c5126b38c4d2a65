import shutil

import numpy as np
import pytest

from jmm_fast.data import prepare
from jmm_fast.data.readers.uiprmd import MOVEMENTS, SKELETON, UiprmdOptions, forward
from jmm_fast.errors import UserError

ROW = ",".join(["1.5"] * 66)


@pytest.fixture
def run(tmp_path):
    return lambda raw, **options: prepare("uiprmd", raw, tmp_path / "out.safetensors", UiprmdOptions(**options))


@pytest.fixture
def make(tmp_path):
    """``make({path: text})``: a folder."""

    def write(files):
        for name, text in files.items():
            path = tmp_path / "raw" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "raw"

    return write


def refused(run, raw, **options):
    with pytest.raises(UserError) as error:
        run(raw, **options)
    return str(error.value).removeprefix(f"{raw}: ")


def test_agrees_with_the_converted_set(real_data, run):
    store = run(real_data("ui-prmd/samples"), center=False)
    converted = np.load(real_data("ui-prmd/ui-prmd-kinect.npz"))
    assert list(store.skeleton.joint_names) == converted["joint_names"].tolist()
    assert list(store.skeleton.parents) == converted["parents"].tolist()
    assert store.class_names == list(MOVEMENTS) == converted["label_names"].tolist()
    sources = converted["source"].tolist()
    for number, name in enumerate(store.names):
        row = sources.index(f"{name}_positions.txt.gz")
        expected = converted["frames"][converted["offsets"][row] : converted["offsets"][row + 1]]
        frames = store.frames[store.offsets[number] : store.offsets[number + 1]].numpy()
        assert frames.shape == expected.shape
        # The converted set is rounded to 1/4096 m.
        assert np.abs(frames - expected).max() < 0.5 / 4096 + 1e-6
        assert int(store.labels[number]) == converted["labels"][row]
        assert int(store.columns["correct"][number]) == converted["correct"][row]
        for column in ("subject", "episode"):
            assert int(store.columns[column][number]) == converted[column][row] + 1


def test_angles_turn_what_hangs_below():
    offsets, angles = np.zeros((1, 22, 3), np.float32), np.zeros((1, 22, 3), np.float32)
    offsets[0, 0] = 100, 0, 0
    offsets[0, 1] = offsets[0, 2] = 0, 100, 0
    angles[0, 0] = 0, 0, 90
    places = forward(offsets, angles)[0]
    np.testing.assert_allclose(places[[0, 1, 2]], [[1, 0, 0], [0, 0, 0], [-1, 0, 0]], atol=1e-6)
    # About y first, then x, then z.
    angles[0, 0] = 90, 90, 0
    offsets[0, 1] = 0, 0, 100
    np.testing.assert_allclose(forward(offsets, angles)[0, 1], [2, 0, 0], atol=1e-6)
    assert SKELETON.num_joints == 22 and len(SKELETON.pairs) == 8


@pytest.mark.parametrize("movement_folder", ["Segmented Movements/Kinect", "a.b"])
def test_finds_the_original_folders(make, run, movement_folder):
    text = "\n".join([ROW] * 4)
    raw = make(
        {
            f"{movement_folder}/Positions/m01_s01_e01_positions.txt": text,
            f"{movement_folder}/Angles/m01_s01_e01_angles.txt": text,
            "Incorrect Segmented Movements/Kinect/Positions/m01_s01_e01_positions_inc.txt": text,
            "Incorrect Segmented Movements/Kinect/Angles/m01_s01_e01_angles_inc.txt": text,
            "Incorrect Segmented Movements/Vicon/Positions/m01_s01_e01_positions_inc.txt": "1,2,3",
            "flat/m10_s02_e03_kinect_positions.txt": text,
            "flat/m10_s02_e03_kinect_angles.txt": text,
            "flat/m10_s02_e04_positions_inc.txt": text,
            "flat/m10_s02_e04_angles_inc.txt": text,
        }
    )
    store = run(raw, label="label,correct")
    columns = ["movement", "subject", "episode", "correct"]
    found = dict(zip(store.names, np.stack([store.columns[name] for name in columns], 1).tolist(), strict=True))
    assert found == {
        "m01_s01_e01_incorrect": [1, 1, 1, 0],
        "m01_s01_e01": [1, 1, 1, 1],
        "m10_s02_e03": [10, 2, 3, 1],
        "m10_s02_e04_incorrect": [10, 2, 4, 0],
    }
    assert store.class_names[:2] == ["deep squat / correct=0", "deep squat / correct=1"] and len(store.class_names) == 4
    assert store.columns["original_label"].tolist().count(9) == 2
    assert [store.splits["xsub"][part].tolist() for part in ("train", "test")] in ([[0, 1], [2, 3]], [[0, 3], [1, 2]])
    assert not store.frames[:, 0].any()  # the waist starts, and here stays, at the origin


@pytest.mark.parametrize(
    "positions, angles, message",
    [
        (f"{ROW}\n{ROW},1", f"{ROW}\n{ROW}", "m01_s01_e01_positions.txt: line 2: expected 66 numbers, got 67"),
        (f"{ROW}\n{ROW}", f"{ROW}\n{ROW[:-4]}", "m01_s01_e01_angles.txt: line 2: expected 66 numbers, got 65"),
        (f"{ROW}\n{ROW}", ROW, "it has 2 frames, its angles in m01_s01_e01_angles.txt have 1"),
        (f"{ROW}\n{ROW}", None, "there is no file of angles for it"),
        ("", "", "clip m01_s01_e01 has 0 frames"),
        (
            f"{ROW}\n{ROW[:-3]}nan",
            f"{ROW}\n{ROW}",
            "positions.txt: line 2: expected 66 numbers, got NaN or infinity among them",
        ),
        (
            f"{ROW}\n{ROW}",
            f"inf{ROW[3:]}\n{ROW}",
            "angles.txt: line 1: expected 66 numbers, got NaN or infinity among them",
        ),
    ],
)
@pytest.mark.filterwarnings("error")
def test_damaged_files(make, run, positions, angles, message):
    files = {"m01_s01_e01_positions.txt": positions, "m01_s01_e01_angles.txt": angles}
    files |= {"m02_s01_e01_positions.txt": f"{ROW}\n{ROW}", "m02_s01_e01_angles.txt": f"{ROW}\n{ROW}"}
    raw = make({name: text for name, text in files.items() if text is not None})
    assert message in refused(run, raw)
    store = run(raw, on_error="drop")
    assert store.names == ["m02_s01_e01"] and len(store.provenance["log"]) == 1


def test_movements_that_do_not_exist_and_doubles(make, run):
    text = f"{ROW}\n{ROW}"
    raw = make({"m11_s01_e01_positions.txt": text, "m11_s01_e01_angles.txt": text})
    assert "has class 11, outside the 10 classes" in refused(run, raw)
    shutil.rmtree(raw)
    raw = make({f"{folder}/m01_s01_e01_{kind}.txt": text for folder in "ab" for kind in ("positions", "angles")})
    assert "clip m01_s01_e01: another clip has the same name" in refused(run, raw)


def test_folders_without_positions(run, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    assert refused(run, raw) == "no .txt file in it"
    (raw / "m01_s01_e01_angles.txt").write_text(ROW)
    assert refused(run, raw) == "no mMM_sSS_eEE_...positions.txt in it"
