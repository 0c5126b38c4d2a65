"""The loop: exact resumption at every step, loud failure, a clean stop."""

import dataclasses
import itertools
import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from jmm_fast.errors import UserError
from jmm_fast.train import checkpoint
from jmm_fast.train.config import OptimConfig
from jmm_fast.train.loop import LoopConfig, Stopped, fit, step_seed, train_step
from jmm_fast.train.metrics import MEASURED
from jmm_fast.train.optim import adamw

CONFIG = LoopConfig(
    epochs=3,
    warmup_epochs=1,
    optim=OptimConfig(lr=0.05, min_lr=0.0, clip_grad=1.0),
    seed=7,
    dtype="float32",
    log_every=2,
    checkpoint_every=1,
    keep=99,
)


class Batches:
    """Four batches an epoch, each a function of (epoch, number)."""

    def __len__(self):
        return 4

    def epoch(self, epoch, start=0):
        for number in range(start, 4):
            generator = torch.Generator().manual_seed(100 * epoch + number)
            yield SimpleNamespace(x=torch.randn(8, 5, generator=generator), index=torch.arange(8))


class Kill(Exception):
    """Stands for a crash between two instructions."""


def run(folder, *, die_at=None, hook=None, resume=False, config=CONFIG, fingerprint="data", loss_scale=1.0):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 5))
    optimizer = adamw(model, config.optim)
    calls = itertools.count()

    def loss_of(batch, epoch):
        call = next(calls)
        if call == die_at:
            raise Kill
        if hook is not None:
            hook(call)
        return loss_scale * (model(batch.x) - batch.x).square().mean(), len(batch.x)

    fit(
        model,
        optimizer,
        Batches(),
        loss_of,
        config=config,
        folder=folder,
        device=torch.device("cpu"),
        title="test",
        fingerprint=fingerprint,
        resume=resume,
        say=lambda text: None,
    )
    return {name: value.clone() for name, value in model.state_dict().items()}


def lines(folder):
    """What a run computed, without what it measured."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in MEASURED} for record in records]


@pytest.mark.parametrize("every", [1, 3])
def test_a_crash_at_any_step_changes_nothing(tmp_path, every):
    config = dataclasses.replace(CONFIG, checkpoint_every=every)
    whole = run(tmp_path / "whole", config=config)
    for step in range(12):
        folder = tmp_path / f"crash{step}"
        with pytest.raises(Kill):
            run(folder, die_at=step, config=config)
        resumed = run(folder, resume=True, config=config)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), step
        assert lines(folder) == lines(tmp_path / "whole"), step


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    whole = run(tmp_path)
    before = lines(tmp_path)
    again = run(tmp_path, resume=True)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert lines(tmp_path) == before


def test_without_resume_old_checkpoints_do_not_leak_in(tmp_path):
    whole = run(tmp_path)
    short = dataclasses.replace(CONFIG, epochs=1)
    run(tmp_path, config=short)
    assert checkpoint.steps(tmp_path / "checkpoints") == [1, 2, 3, 4]
    assert max(line["step"] for line in lines(tmp_path)) == 4
    again = run(tmp_path)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_scraps_of_a_killed_writer_are_removed(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    scrap = tmp_path / "checkpoints" / ".step-000000001.safetensors.abc.part"
    scrap.write_bytes(b"half")
    run(tmp_path, resume=True)
    assert not scrap.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(tmp_path, number):
    config = dataclasses.replace(CONFIG, checkpoint_every=100)
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match="stopped after step 6 of 12") as caught:
        run(tmp_path / "run", hook=lambda call: os.kill(os.getpid(), number) if call == 5 else None, config=config)
    assert caught.value.signum == number
    assert signal.getsignal(number) == before
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [4, 6]
    whole = run(tmp_path / "whole", config=config)
    resumed = run(tmp_path / "run", resume=True, config=config)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_stop_does_not_claim_a_checkpoint_that_failed(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, checkpoint_every=100)

    def fails(*_args, **_kwargs):
        raise checkpoint.SafetensorError("Input/output error")

    monkeypatch.setattr(checkpoint, "save_file", fails)
    with pytest.raises(UserError, match=r"cannot write .*step-000000002.*: Input/output error"):
        run(tmp_path, hook=lambda call: os.kill(os.getpid(), signal.SIGTERM) if call == 1 else None, config=config)


def test_other_data_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(UserError, match="other data"):
        run(tmp_path, resume=True, fingerprint="other")


def test_gradient_is_clipped_and_its_norm_returned():
    def step(clip_grad):
        weight = nn.Parameter(torch.zeros(2))
        optimizer = adamw(nn.ParameterDict({"weight": weight}), OptimConfig())
        loss, norm = train_step(
            lambda: (weight * torch.tensor([3.0, 4.0])).sum(),
            optimizer,
            device=torch.device("cpu"),
            rate=1.0,
            seed=0,
            step=0,
            clip_grad=clip_grad,
        )
        assert (loss.item(), norm.item()) == (0.0, 5.0)
        return optimizer.state[weight]["exp_avg"]

    torch.testing.assert_close(step(1.0), 0.1 * torch.tensor([0.6, 0.8]))
    for clip_grad in (None, 5.0, 6.0):
        torch.testing.assert_close(step(clip_grad), 0.1 * torch.tensor([3.0, 4.0]))


def test_bfloat16_computes_in_bfloat16():
    layer = nn.Linear(4, 4)
    optimizer = adamw(layer, OptimConfig())
    seen = []

    def loss_of():
        out = layer(torch.ones(2, 4))
        seen.append(out.dtype)
        return out.float().square().mean()

    train_step(loss_of, optimizer, device=torch.device("cpu"), rate=0.1, seed=0, step=0, dtype="bfloat16")
    assert seen == [torch.bfloat16]
    assert layer.weight.dtype == layer.weight.grad.dtype == torch.float32


def test_step_seeds_differ():
    seeds = {step_seed(seed, step) for seed in range(20) for step in range(500)}
    assert len(seeds) == 20 * 500
    assert all(0 <= seed < 2**63 for seed in seeds)
