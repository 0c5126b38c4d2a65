"""Reading back what a run left behind."""

import json
import math

import numpy as np
import pytest

from jmm_fast.errors import UserError
from jmm_fast.viz.records import (
    read_config,
    read_environment,
    read_evaluations,
    read_predictions,
    read_training,
    running_mean,
)


def test_training_takes_the_last_line_of_a_step_and_leaves_out_a_cut_one(run):
    path = run / "metrics.jsonl"
    again = {"kind": "train", "step": 40, "epoch": 4.0, "loss": 7.0, "lr": 1e-4}
    path.write_text(path.read_text() + json.dumps(again) + '\n{"kind": "train", "step": 41, "ep')
    log = read_training(run)
    assert log["step"].tolist() == list(range(1, 41))
    assert log["loss"][0] == 1.0 and log["loss"][-1] == 7.0
    assert log["epoch"][-1] == 4.0
    assert math.isnan(log["time"][-1]) and log["time"][0] == 2.0


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "holds no training line"),
        ('{"kind": "epoch", "step": 1}\n', "holds no training line"),
        ('{"kind": "train", "step": 1, "epoch": 1, "loss": "x", "lr": 1}\n', "no number under 'loss'"),
        ("{broken\n{}\n", "line 1 is not JSON"),
        ("[1]\n", "line 1 is not a JSON object"),
    ],
)
def test_damaged_metrics_are_one_line(run, text, said):
    (run / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=said) as error:
        read_training(run)
    assert "metrics.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        read_training(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"metrics\.jsonl is missing"):
        read_training(tmp_path)
    assert read_config(tmp_path) == {} and read_environment(tmp_path) == {} and read_evaluations(tmp_path) == []


@pytest.mark.parametrize("name, text", [("config.yaml", "a: [1"), ("config.yaml", "3"), ("environment.json", "{")])
def test_damaged_settings_are_one_line(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=name) as error:
        (read_config if name == "config.yaml" else read_environment)(tmp_path)
    assert "\n" not in str(error.value)


def test_predictions_count_and_divide(run):
    data = read_predictions(run / "predictions" / "linear-pretrained.npz")
    assert data.counts.tolist() == [[2, 0, 0], [0, 1, 1], [0, 0, 1]]
    assert data.class_accuracy.tolist() == [1.0, 0.5, 1.0]


def test_class_without_clips_has_no_accuracy():
    data = read_predictions({"labels": [0, 2], "predicted": [0, 1], "class_names": ["a", "b", "c"]})
    assert data.class_accuracy[0] == 1 and np.isnan(data.class_accuracy[1]) and data.class_accuracy[2] == 0


@pytest.mark.parametrize(
    "change, said",
    [
        ({"labels": [0, 3]}, "labels must lie in 0..1, got 0..3"),
        ({"predicted": [-1, 0]}, "predicted must lie in 0..1, got -1..0"),
        ({"predicted": [0]}, "must be \\[N\\]"),
        ({"labels": [], "predicted": []}, "N >= 1"),
    ],
)
def test_inconsistent_predictions(change, said):
    with pytest.raises(UserError, match=said):
        read_predictions({"labels": [0, 1], "predicted": [0, 1], "class_names": ["a", "b"]} | change)


def test_unreadable_predictions(tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"cannot read .*x\.npz"):
        read_predictions(path)
    np.savez(path, labels=np.zeros(2))
    with pytest.raises(UserError, match="holds no array 'predicted'"):
        read_predictions(path)
    with pytest.raises(UserError, match="cannot read"):
        read_predictions(tmp_path / "absent.npz")


def test_running_mean():
    values = np.array([1.0, 2, 3, 4, 5])
    assert running_mean(values, 3).tolist() == [1.5, 2, 3, 4, 4.5]
    assert running_mean(values, 1).tolist() == values.tolist()
    assert running_mean(np.array([1.0, math.nan, 5.0]), 3).tolist() == [1, 3, 5]
    assert np.isnan(running_mean(np.array([math.nan]), 1)).all()
