"""Metrics: lines survive a kill, a resumed run continues them without gaps or repeats."""

import json

import pytest

from jmm_fast.errors import UserError
from jmm_fast.train.metrics import Metrics, cut_after, read_lines


def test_lines_and_their_continuation(tmp_path):
    metrics = Metrics(tmp_path)
    for step in (1, 2, 3, 4):
        metrics.write("train", step, loss=1.0 / step)
    # No close: kill -9 gives no chance.
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    again = Metrics(tmp_path, step=2)
    again.write("train", 3, loss=5.0)
    again.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 0.5), (3, 5.0)]


def test_cut_after_nothing(tmp_path):
    cut_after(tmp_path / "metrics.jsonl", 3)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_cut_line_is_not_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste')
    assert read_lines(path) == [{"step": 1}]
    assert read_lines(tmp_path / "absent") == []


def test_tensorboard_events(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    metrics = Metrics(tmp_path)
    metrics.write("train", 1, loss=0.25)
    metrics.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.25)]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    metrics = Metrics(tmp_path)
    monkeypatch.setattr(metrics, "_file", open("/dev/full", "a"))
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
        metrics.write("train", 1, loss=0.5)
