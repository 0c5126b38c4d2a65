"""Linear probe, nearest neighbours, finetuning: scores by hand, protocols, records."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from jmm_fast.data import ClipStore, write_store
from jmm_fast.errors import UserError
from jmm_fast.recipes import released
from jmm_fast.train import evaluate
from jmm_fast.train.config import OptimConfig, load_config
from jmm_fast.train.evaluate import open_source, rank, score
from jmm_fast.train.finetune import finetune
from jmm_fast.train.knn import hips, knn, neighbour_ranking, raw_poses
from jmm_fast.train.metrics import read_lines
from jmm_fast.train.pretrain import pretrain
from jmm_fast.train.probe import probe


def quiet(_text):
    pass


@pytest.fixture
def run(clips, config, tmp_path):
    return pretrain(config, data=clips, out=tmp_path / "run", say=quiet)


def source(run, **settings):
    found = open_source(run, out=None, fallback=released())
    for name, changes in settings.items():
        value = getattr(found.config, name)
        changed = dataclasses.replace(value, **changes) if isinstance(changes, dict) else changes
        found.config = dataclasses.replace(found.config, **{name: changed})
    return found


def test_score_by_hand():
    logits = torch.tensor(
        [[9, 1, 0, 0, 0, 0, 2], [0, 9, 8, 7, 6, 5, 4], [0, 9, 8, 7, 6, 5, 4], [1, 0, 0, 0, 0, 0, 9.0]]
    )
    labels = torch.tensor([0, 5, 6, 6])
    result = score(rank(logits), labels, 7)
    assert (result.top1, result.top5) == (50.0, 75.0)
    assert result.predicted.tolist() == [0, 1, 1, 6]
    assert result.confusion[5, 1] == result.confusion[6, 1] == result.confusion[6, 6] == 1
    assert result.confusion.sum() == 4
    np.testing.assert_array_equal(result.per_class, [100, np.nan, np.nan, np.nan, np.nan, 0, 50])


def test_fewer_than_five_classes():
    result = score(rank(torch.tensor([[0.0, 1.0], [0.0, 1.0]])), torch.tensor([0, 1]), 2)
    assert (result.top1, result.top5) == (50.0, 100.0)


def test_neighbours_by_hand():
    labels = torch.tensor([0, 1, 1, 2])
    similarity = torch.tensor([[0.9, 0.8, 0.7, 0.1], [0.5, 0.1, 0.0, 0.9]])
    assert neighbour_ranking(similarity, labels, 1, 3).tolist() == [[0, 1, 2], [2, 0, 1]]
    # Three votes: class 1 has two of them for the first clip; one each for the second, so the nearest wins.
    assert neighbour_ranking(similarity, labels, 3, 3).tolist() == [[1, 0, 2], [2, 0, 1]]
    # Negative similarities (distances) behave alike; a class without a training clip comes last.
    assert neighbour_ranking(similarity - 10, labels, 3, 4).tolist() == [[1, 0, 2, 3], [2, 0, 1, 3]]
    assert neighbour_ranking(similarity, labels, 99, 3)[0, 0] == 1


def test_raw_poses_of_every_modality(clips):
    store = ClipStore.open(clips)
    ids = torch.arange(12)
    shape = (12, store.max_bodies, 8, 25, 3)
    joint, bone, motion, both = (
        raw_poses(store, ids, 8, modality=name).view(shape) for name in ("joint", "bone", "motion", "bone_motion")
    )
    parents = torch.as_tensor(store.skeleton.bone_parents())
    torch.testing.assert_close(bone, joint - joint[..., parents, :])
    for moved, still in ((motion, joint), (both, bone)):
        torch.testing.assert_close(moved[:, :, :-1], still[:, :, 1:] - still[:, :, :-1])
        assert not moved[:, :, -1].any()


def test_raw_neighbours_and_the_probe_see_the_modality_of_the_run(run, clips):
    lines = {
        modality: [
            knn(source(run, data={"modality": modality}), data=clips, raw=True, say=quiet),
            knn(source(run, data={"modality": modality}), data=clips, say=quiet),
            probe(source(run, data={"modality": modality}, probe={"epochs": 1}), data=clips, say=quiet),
        ]
        for modality in ("joint", "bone")
    }
    assert [line["modality"] for line in lines["bone"]] == ["bone"] * 3
    for joint, bone in zip(lines["joint"], lines["bone"], strict=True):
        assert (joint["top1"], joint["top5"]) != (bone["top1"], bone["top5"]), joint["protocol"]


def test_finetuning_takes_the_labels_that_the_store_names(run, clips, tmp_path):
    store = ClipStore.open(clips)
    split = store.split("xsub")
    chosen = split.train[[0, 3, 5, 6, 9]]
    fields = {name: getattr(store, name) for name in ("class_names", "skeleton", "splits", "names")}
    fields |= {name: getattr(store, name).numpy() for name in ("frames", "offsets", "body_offsets", "labels")}
    subsets = {"xsub": {"0.1": [store.names[clip] for clip in chosen.tolist()]}}
    write_store(tmp_path / "subsets", **fields, label_subsets=subsets)
    said = []
    settings = {"labels": 0.1, "batch_size": 2, "epochs": 1, "warmup_epochs": 0}
    line = finetune(source(run, finetune=settings), data=tmp_path / "subsets", say=said.append)
    assert line["train_clips"] == 5 and f"on 5 of {len(split.train)} training clips" in said[0]
    drawn = finetune(source(run, finetune=settings), data=clips, overwrite=True, say=quiet)
    assert drawn["train_clips"] == len(store.labels[split.train].unique())


def test_pooled_features_leave_out_what_is_missing(gappy_clips, config):
    store = ClipStore.open(gappy_clips)
    encoder = evaluate.Source(folder=None, config=config).encoder("untrained", seed=0)
    ids = torch.arange(6)

    def features(**changes):
        settings = dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))
        feeder = evaluate.batches(
            store, ids, settings, train=False, batch_size=6, seed=0, device=torch.device("cpu"), shuffle=False
        )
        return evaluate.pooled_features(encoder, feeder, device=torch.device("cpu"), dtype="float32", title=""), feeder

    (pooled, _), feeder = features()
    (batch,) = feeder.epoch(0)
    tokens, valid = encoder(batch.clips).detach(), batch.valid(4)
    for clip in range(6):
        bodies = torch.nonzero(batch.clip_of_body == clip)[:, 0].tolist()
        mean = torch.stack([tokens[body][valid[body]].mean(0) for body in bodies]).mean(0)
        torch.testing.assert_close(pooled[clip], mean)


def test_raw_poses_ignore_place_and_heading(clips):
    store = ClipStore.open(clips)
    ids = torch.arange(24)
    still = raw_poses(store, ids, 8)
    assert still.shape == (24, store.max_bodies * 8 * 25 * 3)
    angle = torch.tensor(0.7)
    turn = torch.tensor([[angle.cos(), 0, angle.sin()], [0, 1, 0], [-angle.sin(), 0, angle.cos()]])
    store.frames = store.frames @ turn.T + torch.tensor([0.3, 0.1, -0.2])
    torch.testing.assert_close(raw_poses(store, ids, 8), still, atol=2e-5, rtol=0)
    poses = still.view(24, store.max_bodies, 8, 25, 3)
    left, right = hips(store.skeleton)
    assert {store.skeleton.joint_names[left], store.skeleton.joint_names[right]} == {"left_hip", "right_hip"}
    across = poses[:, 0, 0, left] - poses[:, 0, 0, right]
    assert (across[:, 0] > 0).all()
    torch.testing.assert_close(across[:, 2], torch.zeros(24), atol=1e-6, rtol=0)
    relative = raw_poses(store, ids, 8, root="frame").view_as(poses)
    torch.testing.assert_close(relative[:, 0, :, 0], torch.zeros(24, 8, 3), atol=1e-6, rtol=0)
    alone = store.clip_bodies[ids, 1] == 1
    assert alone.any() and (poses[alone, 1] == 0).all() and (poses[~alone, 1] != 0).any()


@pytest.mark.parametrize(
    ("name", "split", "protocol"),
    [
        ("ui-prmd/ui-prmd-kinect.npz", "subject in 0,2,4,6,8", {"label": "labels,correct"}),
        ("bandai-namco/bandai-namco.npz", "capture_group in 0,1", {"where": "dataset_id in 2"}),
    ],
)
def test_raw_pose_figures_of_the_real_sets(real_data, name, split, protocol):
    """Within 1.5 points of the published 73.5 and 76.1 %, whose resampling took the outermost frames in."""
    from jmm_fast.data.readers.ragged import read

    contents = read(real_data(name), layout="keep", **protocol)
    store = ClipStore.from_contents(contents)
    parts = store.split(split)
    train, test = (raw_poses(store, ids, 32) for ids in (parts.train, parts.test))
    ranking = neighbour_ranking(-torch.cdist(test, train), store.labels[parts.train], 1, store.num_classes)
    top1 = score(ranking, store.labels[parts.test], store.num_classes).top1
    assert abs(top1 - {"ui": 73.5, "ba": 76.1}[name[:2]]) < 1.5


def test_probe_separates_what_the_features_tell(clips, run, monkeypatch):
    """With features that hold the class, the head must learn it: 100 %; with none, no more than chance."""
    for informative in (True, False):

        def features(_encoder, batches, informative=informative, **_):
            labels = torch.cat([batch.labels for batch in batches.epoch(0)])
            told = torch.nn.functional.one_hot(labels, 21).float()
            told = told if informative else torch.zeros_like(told)
            return torch.cat([told[:, :16] - told[:, 5:], 0.01 * torch.ones(len(labels), 0)], 1), labels

        monkeypatch.setattr("jmm_fast.train.probe.pooled_features", features)
        line = probe(source(run, probe={"epochs": 60}), data=clips, say=quiet)
        assert line["top1"] > 80 if informative else line["top1"] < 20


@pytest.mark.parametrize(
    "settings",
    [{"features": "cached"}, {"features": "cached", "augment_views": 2}, {"features": "online"}],
    ids=["cached", "views", "online"],
)
def test_probe_records_and_repeats(clips, run, settings):
    lines = [probe(source(run, probe=settings), data=clips, say=quiet) for _ in range(2)]
    untrained = probe(source(run, probe=settings), data=clips, encoder="untrained", say=quiet)
    records = read_lines(run / "evaluations.jsonl")
    assert records == [*lines, untrained]
    assert lines[0]["top1"] == lines[1]["top1"]
    assert (lines[0]["protocol"], lines[0]["encoder"], untrained["encoder"]) == ("linear", "pretrained", "untrained")
    assert lines[0]["features"] == settings["features"] and lines[0]["split"] == "xsub"
    store = ClipStore.open(clips)
    arrays = np.load(run / "predictions" / "linear-pretrained.npz", allow_pickle=False)
    test = store.split("xsub").test
    assert arrays["clip"].tolist() == test.tolist()
    assert arrays["labels"].tolist() == store.labels[test].tolist()
    assert arrays["class_names"].tolist() == store.class_names
    assert lines[0]["top1"] == round(100 * float((arrays["labels"] == arrays["predicted"]).mean()), 3)
    assert arrays["confusion"].sum() == len(test)


def test_cached_views_are_the_online_ones(clips, run):
    """One cached view and one online epoch see the same crops and rotations, so their features agree."""
    from jmm_fast.train.evaluate import batches, pooled_features

    found = source(run)
    store = ClipStore.open(clips)
    ids = store.split("xsub").train
    encoder = found.encoder("pretrained", seed=0)
    device = torch.device("cpu")
    made = {}
    for shuffle in (False, True):
        views = batches(store, ids, found.config, train=True, batch_size=8, seed=5, device=device, shuffle=shuffle)
        features, _ = pooled_features(encoder, views, device=device, dtype="float32", title="", epoch=3)
        order = torch.cat([batch.index for batch in views.epoch(3)])
        made[shuffle] = features[order.argsort()]
    torch.testing.assert_close(made[False], made[True])


def test_pretrained_is_not_untrained_and_checkpoints_serve(clips, run):
    found = source(run)
    pretrained = found.encoder("pretrained", seed=0).state_dict()
    untrained = found.encoder("untrained", seed=0).state_dict()
    assert not torch.equal(pretrained["patch.weight"], untrained["patch.weight"])
    (run / "model" / "config.json").unlink()
    from_checkpoint = found.encoder("pretrained", seed=0).state_dict()
    assert all(torch.equal(pretrained[name], from_checkpoint[name]) for name in pretrained)
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="holds neither model/ nor a checkpoint"):
        found.encoder("pretrained", seed=0)


def test_knn_of_each_kind(clips, run):
    lines = [
        knn(source(run), data=clips, say=quiet),
        knn(source(run, knn={"k": 5, "standardize": True}), data=clips, encoder="untrained", say=quiet),
        knn(source(run), data=clips, raw=True, say=quiet),
    ]
    assert [(line["protocol"], line["encoder"]) for line in lines] == [
        ("knn", "pretrained"),
        ("knn", "untrained"),
        ("knn", "raw"),
    ]
    assert sorted(path.name for path in (run / "predictions").iterdir()) == [
        "knn-pretrained.npz",
        "knn-raw.npz",
        "knn-untrained.npz",
    ]


def test_knn_among_random_views(clips, run, monkeypatch):
    """Every view of every training clip is a neighbour; views are drawn by clip, so a repeat sees the same ones."""
    seen = []

    def spy(similarity, labels, *rest):
        seen.append((similarity, labels))
        return neighbour_ranking(similarity, labels, *rest)

    monkeypatch.setattr("jmm_fast.train.knn.neighbour_ranking", spy)
    lines = [knn(source(run, knn={"augment_views": views}), data=clips, say=quiet) for views in (0, 2, 2)]
    assert [line["augment_views"] for line in lines] == [0, 2, 2]
    (centre, labels), (views, doubled), (again, _) = seen
    assert torch.equal(doubled, labels.repeat(2)) and views.shape == (len(centre), 2 * len(labels))
    assert torch.equal(views, again)
    first, second = views.chunk(2, dim=1)
    assert not torch.isclose(first, second).all() and not torch.isclose(first, centre).all()


def test_a_clip_is_its_own_neighbour(clips, run):
    """Testing on the training clips finds each of them: 100 %."""
    found = source(run, data={"split": "self"})
    store = ClipStore.open(clips)
    ids = torch.arange(24)
    device = torch.device("cpu")
    views = evaluate.batches(store, ids, found.config, train=False, batch_size=7, seed=0, device=device)
    features, labels = evaluate.pooled_features(
        found.encoder("pretrained", seed=0), views, device=device, dtype="float32", title=""
    )
    assert labels.tolist() == store.labels[:24].tolist()
    unit = torch.nn.functional.normalize(features, dim=1)
    ranking = neighbour_ranking(unit @ unit.T, labels, 1, store.num_classes)
    assert score(ranking, labels, store.num_classes).top1 == 100


def test_finetuning_learns_and_reports_the_last_epoch(clips, run):
    optim = OptimConfig(lr=5e-3, min_lr=0.0, layer_decay=0.8)
    settings = {"epochs": 40, "eval_every": 10, "drop_path": 0.0, "dropout": 0.0, "optim": optim}
    # No test class is ever trained, so every figure must be 0.
    unseen = {"split": "train: label in 0-5; test: label in 6-8"}
    line = finetune(source(run, finetune=settings, data=unseen), data=clips, say=quiet)
    folder = run / "finetune" / "pretrained"
    records = read_lines(folder / "metrics.jsonl")
    epochs = [record for record in records if record["kind"] == "epoch"]
    assert len(epochs) == 40 and epochs[-1]["loss"] < 0.6 * epochs[0]["loss"]
    assert [record["epoch"] for record in epochs if "top1" in record] == [10, 20, 30]
    assert line["top1"] == 0 and line["best_top1"] == 0 and line["best_epoch"] == 40
    assert json.loads((folder / "environment.json").read_text())["data"]["clips"] == 48


def test_finetuning_resumes_exactly(clips, run, monkeypatch):
    from jmm_fast.train import checkpoint, loop

    whole = finetune(source(run), data=clips, say=quiet)
    folder = run / "finetune" / "pretrained"
    final = checkpoint.latest(folder / "checkpoints").tensors
    with pytest.raises(UserError, match="already holds a finetuning: --resume continues it"):
        finetune(source(run), data=clips, say=quiet)
    original = loop.train_step

    def dies(*args, **kwargs):
        if kwargs["step"] == 4:
            raise RuntimeError("crash")
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", dies)
    with pytest.raises(RuntimeError):
        finetune(source(run), data=clips, overwrite=True, say=quiet)
    monkeypatch.setattr(loop, "train_step", original)
    with pytest.raises(UserError, match=r"was started with finetune\.dropout = 0\.3, not 0\.0"):
        finetune(source(run, finetune={"dropout": 0.0}), data=clips, resume=True, say=quiet)
    again = finetune(source(run), data=clips, resume=True, say=quiet)
    resumed = checkpoint.latest(folder / "checkpoints").tensors
    assert all(torch.equal(final[name], resumed[name]) for name in final)
    assert again["top1"] == whole["top1"]


def test_semi_supervised_and_scratch(clips, run):
    line = finetune(source(run, finetune={"labels": 0.1}), data=clips, encoder="scratch", say=quiet)
    store = ClipStore.open(clips)
    classes = len(torch.unique(store.labels[store.split("xsub").train]))
    assert (line["labels"], line["train_clips"], line["encoder"]) == (0.1, classes, "scratch")
    assert (run / "finetune" / "scratch-labels0.1" / "metrics.jsonl").exists()
    assert (run / line["predictions"]).name == "finetune-scratch-labels0.1.npz"
    # The record of a scratch run tells what was used, layer decay included.
    assert load_config(run / "finetune" / "scratch-labels0.1" / "config.yaml").finetune.labels == 0.1


def test_foreign_weights_need_a_place_for_results(clips, run, tmp_path):
    with pytest.raises(UserError, match="say with --out where the results go"):
        open_source(run / "model", out=None, fallback=released())
    found = open_source(run / "model", out=tmp_path / "results", fallback=released())
    assert found.config.model.dim == 16
    found.config = dataclasses.replace(
        found.config, device="cpu", data=dataclasses.replace(found.config.data, split="xsub")
    )
    line = knn(found, data=clips, say=quiet)
    assert read_lines(tmp_path / "results" / "evaluations.jsonl") == [line]
    with pytest.raises(UserError, match="does not exist"):
        open_source(tmp_path / "absent", out=None, fallback=released())


def test_other_joints_and_missing_test_clips_are_refused(clips, run):
    with pytest.raises(UserError, match="no test clip"):
        knn(source(run, data={"split": "all"}), data=clips)
    other = source(run)
    other.config = dataclasses.replace(
        other.config, model=dataclasses.replace(other.config.model, skeleton="coco17", num_joints=17)
    )
    with pytest.raises(UserError, match="has 25 joints"):
        probe(other, data=clips)
