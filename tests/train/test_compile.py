"""Pretraining through torch.compile: one graph each for mask, forward pass and loss, and the same numbers."""

import dataclasses
import functools
import sys
from pathlib import Path

import pytest
import torch

from jmm_fast.train import pretrain as driver
from jmm_fast.train.config import save_config
from jmm_fast.train.metrics import read_lines
from jmm_fast.train.pretrain import pretrain

sys.path.insert(0, str(Path(__file__).parent))
import ranks


def losses(clips, config, out):
    pretrain(config, data=clips, out=out, say=lambda _: None)
    return torch.tensor([line["loss"] for line in read_lines(out / "metrics.jsonl") if line["kind"] == "train"])


@pytest.fixture
def compiled(monkeypatch):
    """How often a graph was made; fails where one breaks, as ``fullgraph`` says."""
    made = []

    def counting(function, *, fullgraph):
        assert fullgraph

        def backend(module, _inputs):
            made.append(module)
            return module.forward

        torch._dynamo.reset()
        return compile(function, fullgraph=True, backend=backend)

    compile = torch.compile
    monkeypatch.setattr(driver.torch, "compile", counting)
    return made


@pytest.mark.parametrize("data", ["clips", "gappy_clips"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_one_graph_serves_all_epochs_and_numbers_of_bodies(request, config, tmp_path, compiled, data, backend):
    config = dataclasses.replace(config, epochs=5, log_every=1, backend=backend)
    path = request.getfixturevalue(data)
    plain = losses(path, config, tmp_path / "plain")
    ours = losses(path, dataclasses.replace(config, compile=True), tmp_path / "compiled")
    assert len(ours) == 15 and ours[0] > 0
    # Without a compiler behind it, the traced graph does what the code says.
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)
    # The first batch as it is, then any number of bodies, then any epoch.
    assert 1 <= len(compiled) <= 3


def test_compiled_steps_train_as_plain_ones_do(clips, config, tmp_path):
    config = dataclasses.replace(config, log_every=1)
    plain = losses(clips, config, tmp_path / "plain")
    ours = losses(clips, dataclasses.replace(config, compile=True), tmp_path / "compiled")
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)
    assert plain.unique().numel() == 9


def pretrain_compiled(config, data, out, backend):
    """In one of several processes, through a compiler of that name."""
    compile = torch.compile
    driver.torch.compile = lambda function, *, fullgraph: compile(function, fullgraph=fullgraph, backend=backend)
    pretrain(config, data=data, out=out, say=lambda _: None)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_two_processes_compile_as_one_trains(gappy_clips, config, tmp_path, backend):
    config = dataclasses.replace(config, log_every=1)
    plain = losses(gappy_clips, config, tmp_path / "plain")
    out = tmp_path / "compiled"
    work = functools.partial(pretrain_compiled, dataclasses.replace(config, compile=True), gappy_clips, out, backend)
    started = ranks.start(tmp_path / "said", [work] * 2)
    assert started.wait() == [0, 0], started.said(0) + started.said(1)
    ours = torch.tensor([line["loss"] for line in read_lines(out / "metrics.jsonl") if line["kind"] == "train"])
    torch.testing.assert_close(ours, plain, rtol=1e-6 if backend == "eager" else 1e-5, atol=0)
    assert len(ours) == 9


def test_shards_are_not_compiled(clips, config, tmp_path):
    save_config(tmp_path / "tiny.yaml", dataclasses.replace(config, compile=True, shard="full"))
    line = ["pretrain", tmp_path / "tiny.yaml", "--data", clips, "--out", tmp_path / "run"]
    started = ranks.start(tmp_path / "said", [line] * 2)
    assert started.wait() == [2, 2]
    expected = "jmm-fast: error: compile is on and shard is full: expected one of them, compile off or shard none\n"
    assert (started.said(0), started.said(1)) == (expected, "")
    assert not (tmp_path / "run").exists()
