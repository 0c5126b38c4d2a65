"""A run folder and a clip store made by hand, as training leaves them."""

import json

import numpy as np
import pytest
import yaml

from jmm_fast import skeleton
from jmm_fast.data import ClipStore, write_store

CLASSES = ["wave <left> & $right$", "squat", "hug"]


@pytest.fixture(scope="session")
def matplotlib():
    return pytest.importorskip("matplotlib", reason="matplotlib is an optional extra")


def moving_clips(lengths=(24, 30, 40), bodies=(1, 1, 2)):
    """Standing NTU-25 figures whose left hand swings; frames, offsets and body offsets."""
    layout = skeleton.get("ntu25")
    rng = np.random.default_rng(0)
    height = np.zeros(25)
    for joint in layout.order():
        parent = layout.parents[joint]
        if parent >= 0:
            height[joint] = height[parent] + (-0.25 if layout.joint_names[joint][-4:] != "head" else 0.25)
    rest = np.stack([rng.normal(scale=0.2, size=25), height, rng.normal(scale=0.05, size=25)], axis=1)
    hand = layout.joint_names.index("left_hand")
    blocks, body_offsets = [], [0]
    for length, count in zip(lengths, bodies, strict=True):
        for body in range(count):
            frames = np.repeat(rest[None], length, axis=0) + 0.002 * rng.normal(size=(length, 25, 3))
            frames[:, hand, 1] += 0.4 * np.sin(np.arange(length) / 3)
            frames[:, :, 0] += body
            blocks.append(frames.astype(np.float32))
            body_offsets.append(body_offsets[-1] + length)
    offsets = np.cumsum([0] + [length * count for length, count in zip(lengths, bodies, strict=True)])
    return np.concatenate(blocks), offsets, np.array(body_offsets)


def make_store(path) -> ClipStore:
    frames, offsets, body_offsets = moving_clips()
    write_store(
        path,
        frames=frames,
        offsets=offsets,
        body_offsets=body_offsets,
        labels=np.array([0, 1, 2]),
        class_names=CLASSES,
        skeleton=skeleton.get("ntu25"),
        fps=10.0,
        splits={"xsub": {"train": [0, 1], "test": [2]}},
    )
    return ClipStore.open(path)


def make_run(folder, store: ClipStore):
    folder.mkdir()
    config = {
        "recipe": "hand<made>",
        "epochs": 4,
        "seed": 3,
        "dtype": "float32",
        "model": {"skeleton": "ntu25", "num_joints": 25, "num_frames": 16, "t_patch": 4, "dim": 8, "depth": 1},
        "mask": {"variant": "released", "mask_ratio": 0.9, "tau": 0.8, "gate": None},
        "data": {"split": "xsub", "batch_size": 2, "modality": "joint"},
        "loss": {"stride": 1, "normalize": True},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [
        {"kind": "train", "step": step, "epoch": step / 10, "loss": 1 / step, "lr": 1e-3, "time": 2.0 * step}
        for step in range(1, 41)
    ]
    lines.insert(10, {"kind": "epoch", "step": 10, "epoch": 1, "loss": 0.3, "time": 20.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    environment = {
        "time": "2026-01-02T03:04:05+00:00",
        "command": ["jmm-fast", "pretrain", "<script>alert(1)</script>"],
        "commit": "0123456789abcdef",
        "versions": {"torch": "2.13.0", "triton": None},
        "device": "cpu",
        "cpu": "some processor",
        "threads": 2,
        "data": {"path": store.path, "fingerprint": store.fingerprint, "clips": store.num_clips},
        "earlier": [],
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    evaluations = [
        {"protocol": "linear", "encoder": "pretrained", "top1": 11.0, "top5": 99.0, "split": "xsub", "seed": 0},
        {"protocol": "linear", "encoder": "pretrained", "top1": 61.25, "top5": 98.0, "split": "xsub", "seed": 0},
        {"protocol": "linear", "encoder": "untrained", "top1": 43.75, "top5": 90.0, "split": "xsub", "seed": 0},
        {"protocol": "knn", "encoder": "raw", "top1": 55.0, "top5": 91.0, "split": "xsub", "seed": 0, "k": 1},
        {"protocol": "finetune", "encoder": "pretrained-labels0.1", "labels": 0.1, "top1": 33.0, "split": "xsub"},
    ]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    (folder / "predictions").mkdir()
    for encoder, predicted in (("pretrained", [0, 0, 1, 2, 2]), ("untrained", [0, 1, 1, 1, 1])):
        np.savez(
            folder / "predictions" / f"linear-{encoder}.npz",
            labels=np.array([0, 0, 1, 1, 2]),
            predicted=np.array(predicted),
            class_names=np.array(CLASSES),
        )
    return folder


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "clips.safetensors")


@pytest.fixture
def run(tmp_path, store):
    return make_run(tmp_path / "run <1>", store)


@pytest.fixture(scope="session")
def reported(tmp_path_factory, matplotlib):
    """A run with its report, for tests that only look."""
    from jmm_fast.viz import write_report

    folder = tmp_path_factory.mktemp("reported")
    run = make_run(folder / "run <1>", make_store(folder / "clips.safetensors"))
    write_report(run)
    return run
