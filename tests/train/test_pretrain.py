"""Pretraining: what a run leaves, what it refuses, exact resumption of the real network."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from jmm_fast.data import ClipStore, write_store
from jmm_fast.data.readers.synthetic import SyntheticOptions, read
from jmm_fast.errors import UserError
from jmm_fast.models import JMMTGT
from jmm_fast.skeleton import Skeleton
from jmm_fast.train import checkpoint, loop
from jmm_fast.train.config import load_config, to_dict
from jmm_fast.train.metrics import read_lines
from jmm_fast.train.pretrain import pretrain


def state(run):
    return JMMTGT.from_pretrained(run).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_and_what_it_leaves(clips, config, tmp_path, said):
    config = dataclasses.replace(config, epochs=12)
    out = pretrain(config, data=clips, out=tmp_path / "run", say=said.append)
    store = ClipStore.open(clips)
    steps = 12 * (len(store.split("xsub").train) // 8)

    assert load_config(out / "config.yaml") == config
    environment = json.loads((out / "environment.json").read_text())
    assert environment["data"]["fingerprint"] == store.fingerprint
    # The build after a + is not part of every package's own version.
    assert environment["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    records = read_lines(out / "metrics.jsonl")
    train = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in train] == [*range(2, steps + 1, 2)]
    assert {"epoch", "loss", "lr", "samples_per_s", "time"} <= train[0].keys()
    assert all(0 <= record["data_wait"] < 1 and record["peak_memory"] > 50 * 2**20 for record in train)
    (kept,) = {record["activation_memory"] for record in train}
    assert 50_000 < kept < 2 * 2**20
    epochs = [record for record in records if record["kind"] == "epoch"]
    assert [record["epoch"] for record in epochs] == [*range(1, 13)]
    assert epochs[-1]["loss"] < 0.98 * epochs[0]["loss"]
    assert checkpoint.steps(out / "checkpoints")[-1] == steps
    assert same(state(out), JMMTGT.from_pretrained(out / "model").state_dict())
    assert said[-1] == f"model written to {out / 'model'}"


def test_the_seed_decides(clips, config, tmp_path):
    runs = [
        state(pretrain(dataclasses.replace(config, seed=seed), data=clips, out=tmp_path / name, say=lambda _: None))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_what_is_missing_decides_nothing(gappy_clips, config, tmp_path):
    """Other numbers in the missing places, the same weights; but not where confidence is thrown away."""
    contents = ClipStore.open(gappy_clips)
    garbage = contents.frames.clone()
    garbage[contents.confidence == 0] = torch.randn(3)
    fields = {name: getattr(contents, name) for name in ("class_names", "skeleton", "splits", "names")}
    fields |= {name: getattr(contents, name).numpy() for name in ("offsets", "body_offsets", "labels", "confidence")}
    write_store(tmp_path / "garbage", frames=garbage.numpy(), **fields)
    write_store(tmp_path / "untold", frames=garbage.numpy(), **{**fields, "confidence": None})
    plain, other, untold = (
        state(pretrain(config, data=data, out=tmp_path / f"run{number}", say=lambda _: None))
        for number, data in enumerate((gappy_clips, tmp_path / "garbage", tmp_path / "untold"))
    )
    assert same(plain, other)
    assert not same(plain, untold)


def test_full_confidence_is_as_none(clips, config, tmp_path):
    store = ClipStore.open(clips)
    fields = {name: getattr(store, name) for name in ("class_names", "skeleton", "splits", "names")}
    fields |= {name: getattr(store, name).numpy() for name in ("frames", "offsets", "body_offsets", "labels")}
    confidence = np.full(store.frames.shape[:2], 0.3, np.float16)
    write_store(tmp_path / "told", confidence=confidence, **fields)
    confidence[7, 3] = 0.1
    write_store(tmp_path / "nearly", confidence=confidence, **fields)
    low = dataclasses.replace(config, data=dataclasses.replace(config.data, min_confidence=0.2))
    plain, told, nearly = (
        state(pretrain(settings, data=data, out=tmp_path / f"run{number}", say=lambda _: None))
        for number, (settings, data) in enumerate(
            ((config, clips), (low, tmp_path / "told"), (low, tmp_path / "nearly"))
        )
    )
    assert same(plain, told)
    assert not same(plain, nearly) or 7 >= store.offsets[store.split("xsub").train[0]]


@pytest.mark.parametrize("step", [0, 1, 4, 8])
def test_resuming_is_exact(clips, config, tmp_path, monkeypatch, step):
    whole = state(pretrain(config, data=clips, out=tmp_path / "whole", say=lambda _: None))
    original = loop.train_step

    def dies(*args, **kwargs):
        if kwargs["step"] == step:
            raise RuntimeError("crash")
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", dies)
    with pytest.raises(RuntimeError, match="crash"):
        pretrain(config, data=clips, out=tmp_path / "run", say=lambda _: None)
    monkeypatch.setattr(loop, "train_step", original)
    # The pace of writing may change, the weights may not.
    eager = dataclasses.replace(config, log_every=1, checkpoint_every=1)
    assert same(whole, state(pretrain(eager, data=clips, out=tmp_path / "run", resume=True, say=lambda _: None)))


def test_an_existing_run_is_not_overwritten_unasked(clips, config, tmp_path):
    out = tmp_path / "run"
    before = state(pretrain(config, data=clips, out=out, say=lambda _: None))
    with pytest.raises(UserError, match="already holds a run: --resume continues it, --overwrite removes it"):
        pretrain(config, data=clips, out=out)
    with pytest.raises(UserError, match="exclude each other"):
        pretrain(config, data=clips, out=out, resume=True, overwrite=True)
    assert same(before, state(out))
    (out / "evaluations.jsonl").write_text("{}\n")
    (out / "mine.txt").write_text("kept")
    pretrain(dataclasses.replace(config, seed=1), data=clips, out=out, overwrite=True, say=lambda _: None)
    assert not same(before, state(out))
    assert not (out / "evaluations.jsonl").exists()
    assert (out / "mine.txt").read_text() == "kept"


def test_a_folder_of_something_else_is_left_alone(clips, config, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match=r"holds no run \(it has thesis\.tex\)"):
            pretrain(config, data=clips, out=tmp_path, **flags)
    with pytest.raises(UserError, match="is a file"):
        pretrain(config, data=clips, out=tmp_path / "thesis.tex")


def test_a_resumed_run_keeps_its_settings_and_data(clips, config, tmp_path):
    out = pretrain(config, data=clips, out=tmp_path / "run", say=lambda _: None)
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=0.5))
    with pytest.raises(UserError, match=r"was started with optim\.lr = 0\.001, not 0\.5"):
        pretrain(other, data=clips, out=out, resume=True)
    write_store(tmp_path / "other.safetensors", read(options=SyntheticOptions(clips=48, seed=1)))
    with pytest.raises(UserError, match="other data"):
        pretrain(config, data=tmp_path / "other.safetensors", out=out, resume=True)


def test_a_truncated_checkpoint_falls_back(clips, config, tmp_path, said):
    out = pretrain(config, data=clips, out=tmp_path / "run", say=said.append)
    whole = state(out)
    newest = sorted((out / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    said.clear()
    pretrain(config, data=clips, out=out, resume=True, say=said.append)
    assert any(f"{newest} is not a whole checkpoint" in line for line in said)
    assert any(line.startswith("continuing after step 8 of 9") for line in said)
    assert same(whole, state(out))


def test_a_checkpoint_of_another_shape_is_one_line(clips, config, tmp_path):
    out = pretrain(config, data=clips, out=tmp_path / "run", say=lambda _: None)
    wide = dataclasses.replace(config, model=dataclasses.replace(config.model, dim=32))
    pretrain(wide, data=clips, out=tmp_path / "wide", say=lambda _: None)
    for path in (out / "checkpoints").iterdir():
        path.unlink()
    for path in (tmp_path / "wide" / "checkpoints").iterdir():
        path.rename(out / "checkpoints" / path.name)
    with pytest.raises(UserError, match="belongs to a network of another shape") as caught:
        pretrain(config, data=clips, out=out, resume=True, say=lambda _: None)
    assert "\n" not in str(caught.value)


def test_joints_follow_the_data(config, tmp_path):
    chain = Skeleton.from_parents([-1, 0, 1, 2], name="custom")
    torch.manual_seed(0)
    write_store(
        tmp_path / "chain.safetensors",
        frames=torch.randn(80, 4, 3).numpy(),
        offsets=torch.arange(0, 81, 10).numpy(),
        labels=torch.tensor([0, 1] * 4).numpy(),
        class_names=["a", "b"],
        skeleton=chain,
        columns={"subject": torch.arange(8).numpy()},
    )
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, split="subject in 0-3", batch_size=4, min_length=4)
    )
    out = pretrain(config, data=tmp_path / "chain.safetensors", out=tmp_path / "run", say=lambda _: None)
    model = load_config(out / "config.yaml").model
    assert (model.num_joints, model.parents) == (4, (-1, 0, 1, 2))
    asked = dataclasses.replace(config, model=dataclasses.replace(config.model, skeleton="coco17", num_joints=17))
    with pytest.raises(UserError, match=r"has 4 joints \(custom\), the network has 17 \(coco17\)"):
        pretrain(asked, data=tmp_path / "chain.safetensors", out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("variant", ["released", "mamp"])
def test_other_variants_bfloat16_and_empty_bodies(clips, config, tmp_path, variant):
    config = dataclasses.replace(
        config,
        epochs=1,
        warmup_epochs=0,
        dtype="bfloat16",
        mask=dataclasses.replace(config.mask, variant=variant),
        model=dataclasses.replace(config.model, topology="none"),
        data=dataclasses.replace(config.data, empty_bodies="keep", modality="bone"),
    )
    out = pretrain(config, data=clips, out=tmp_path / "run", say=lambda _: None)
    assert to_dict(load_config(out / "config.yaml")) == to_dict(config)
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in state(out).values())


def test_a_small_split_is_one_batch(clips, config, tmp_path):
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, split="subject in 0,2 within label in 0-9", batch_size=64)
    )
    out = pretrain(config, data=clips, out=tmp_path / "run", say=lambda _: None)
    assert read_lines(out / "metrics.jsonl")[-1]["step"] == config.epochs


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [("backend", "triton", "backend is 'triton'"), ("device", "tpu", "device is 'tpu'")],
)
def test_what_cannot_run_is_refused_before_anything_is_written(clips, config, tmp_path, field, value, complaint):
    with pytest.raises(UserError, match=complaint):
        pretrain(dataclasses.replace(config, **{field: value}), data=clips, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
