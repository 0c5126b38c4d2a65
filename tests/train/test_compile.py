"""Pretraining through torch.compile: one graph each for mask, forward pass and loss, and the same numbers."""

import dataclasses

import pytest
import torch

from jmm_fast.train import pretrain as driver
from jmm_fast.train.metrics import read_lines
from jmm_fast.train.pretrain import pretrain


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
