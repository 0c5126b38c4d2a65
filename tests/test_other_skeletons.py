"""Data that is not NTU's from the raw file to a probe, by the command line alone."""

import json
import pickle

import numpy as np
import pytest
import torch

from jmm_fast import skeleton
from jmm_fast.cli import main
from jmm_fast.data import ClipStore

CLASSES = 3
SMALL = (
    "--epochs 2 --warmup-epochs 0 --data.batch-size 8 --data.min-length 8 --model.num-frames 16 --model.dim 16 "
    "--model.depth 1 --model.heads 2 --model.decoder-dim 16 --model.decoder-depth 1 --model.decoder-heads 2"
).split()


def swing(clip: int, frames: int) -> np.ndarray:
    """What makes a class: how fast and how far something swings; radians ``[frames]``."""
    label = clip % CLASSES
    return 0.3 * (label + 1) * np.sin(np.arange(frames) * (0.1 + 0.15 * label) + clip)


def coco_pickle(path) -> None:
    """24 clips of 17 key points in pixels with scores; in every fourth clip the left ankle is out of the picture."""
    rng = np.random.default_rng(0)
    names = list(skeleton.get("coco17").joint_names)
    pose = rng.uniform(200, 400, (17, 2))
    annotations = []
    for clip in range(24):
        frames = 20 + clip % 5
        points = pose + rng.normal(0, 2, (1, frames, 17, 2))
        points[0, :, names.index("right_wrist"), 1] += 100 * swing(clip, frames)
        score = rng.uniform(0.6, 1, (1, frames, 17))
        if clip % 4 == 0:
            points[0, :, names.index("left_ankle")] = 0
            score[0, :, names.index("left_ankle")] = 0
        annotations.append(
            {
                "frame_dir": f"clip{clip:02}",
                "total_frames": frames,
                "label": clip % CLASSES,
                "img_shape": (480, 640),
                "keypoint": points.astype(np.float16),
                "keypoint_score": score.astype(np.float16),
            }
        )
    split = {
        "mine_train": [item["frame_dir"] for item in annotations[:16]],
        "mine_val": [item["frame_dir"] for item in annotations[16:]],
    }
    path.write_bytes(pickle.dumps({"split": split, "annotations": annotations}))


def mocap_folder(folder) -> None:
    """24 files of the 31-joint skeleton of the CMU recordings, each joint with three rotations."""
    layout = skeleton.get("cmu31")
    rng = np.random.default_rng(0)
    children = {joint: [child for child, parent in layout.bones if parent == joint] for joint in range(31)}
    order: list[int] = []

    def branch(joint: int, indent: str) -> str:
        order.append(joint)
        offset = rng.uniform(-5, 5, 3) + np.array([0, 15, 0])
        head = "ROOT" if joint == layout.root else "JOINT"
        text = f"{indent}{head} {layout.joint_names[joint]}\n{indent}{{\n"
        text += f"{indent}  OFFSET {offset[0]:.4f} {offset[1]:.4f} {offset[2]:.4f}\n"
        place = "Xposition Yposition Zposition " if joint == layout.root else ""
        text += f"{indent}  CHANNELS {6 if place else 3} {place}Zrotation Yrotation Xrotation\n"
        for child in children[joint]:
            text += branch(child, indent + "  ")
        if not children[joint]:
            text += f"{indent}  End Site\n{indent}  {{\n{indent}    OFFSET 0 3 0\n{indent}  }}\n"
        return text + f"{indent}}}\n"

    hierarchy = "HIERARCHY\n" + branch(layout.root, "")
    for clip in range(24):
        frames = 20 + clip % 5
        angles = rng.normal(0, 1, (frames, 31, 3))
        angles[:, order.index(layout.joint_names.index("rhumerus")), 0] += 60 * swing(clip, frames)
        rows = np.concatenate([np.tile([0.0, 90, 0], (frames, 1)), angles.reshape(frames, -1)], axis=1)
        motion = "\n".join(" ".join(f"{value:.5f}" for value in row) for row in rows)
        text = f"{hierarchy}MOTION\nFrames: {frames}\nFrame Time: 0.033333\n{motion}\n"
        (folder / f"move{clip % CLASSES}_{clip:02}.bvh").write_text(text)


@pytest.mark.parametrize("kind", ["coco17", "cmu31"])
def test_from_the_raw_file_to_a_probe(kind, tmp_path, capsys):
    raw, data, run = tmp_path / "raw", str(tmp_path / "clips.safetensors"), str(tmp_path / "run")
    if kind == "coco17":
        coco_pickle(raw)
        assert main(["prepare", "pyskl", str(raw), "--out", data]) == 0
        split = "mine"
    else:
        raw.mkdir()
        mocap_folder(raw)
        assert main(["prepare", "bvh", str(raw), "--out", data, "--pattern", "{label}_{take}"]) == 0
        split = "take in 0-15"
    store = ClipStore.open(data)
    layout = skeleton.get(kind)
    assert (store.num_clips, store.num_classes) == (24, CLASSES)
    assert set(store.skeleton.joint_names) == set(layout.joint_names) and store.skeleton.hops().max() > 5
    if kind == "coco17":
        ankle = store.skeleton.joint_names.index("left_ankle")
        missing = (store.confidence == 0).nonzero()
        assert set(missing[:, 1].tolist()) == {ankle}
    assert main(["inspect", data]) == 0
    assert main(["pretrain", "small", "--data", data, "--out", run, "--split", split, *SMALL]) == 0
    assert main(["probe", run, "--data", data, "--features", "cached", "--epochs", "30"]) == 0
    assert main(["probe", run, "--data", data, "--features", "cached", "--encoder", "untrained", "--epochs", "3"]) == 0
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert config["num_joints"] == layout.num_joints and config["skeleton"] == store.skeleton.name
    scores = [json.loads(line) for line in (tmp_path / "run/evaluations.jsonl").read_text().splitlines()]
    assert [score["encoder"] for score in scores] == ["pretrained", "untrained"]
    assert all(0 <= score["top1"] <= 100 for score in scores)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(losses) >= 2 and all(np.isfinite(losses))
    capsys.readouterr()


def test_onto_another_layout(tmp_path):
    """The same key points as NTU's 25 joints: a network of that layout takes them."""
    coco_pickle(tmp_path / "raw")
    data = str(tmp_path / "clips.safetensors")
    assert main(["prepare", "pyskl", str(tmp_path / "raw"), "--out", data, "--layout", "ntu25"]) == 0
    store = ClipStore.open(data)
    assert store.skeleton.name == "ntu25" and store.confidence.shape[1] == 25
    assert torch.isfinite(store.frames).all()
    run = str(tmp_path / "run")
    assert main(["pretrain", "small", "--data", data, "--out", run, "--split", "mine", *SMALL]) == 0
