"""``kill -9`` at any moment, then ``--resume``: the same final weights as a run that was never interrupted."""

import multiprocessing
import random
import subprocess
import sys
import time

import pytest
import torch

from jmm_fast.cli import main
from jmm_fast.models import JMMTGT
from jmm_fast.train.config import save_config
from jmm_fast.train.metrics import read_lines


def arguments(recipe, clips, out, *flags):
    return ["pretrain", str(recipe), "--data", str(clips), "--out", str(out), *flags]


def losses(run):
    return [(line["kind"], line["step"], line["loss"]) for line in read_lines(run / "metrics.jsonl")]


def check(run, whole):
    ours, theirs = JMMTGT.from_pretrained(run).state_dict(), JMMTGT.from_pretrained(whole).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses(run) == losses(whole)
    assert not list(run.rglob("*.part"))


@pytest.fixture
def recipe(config, tmp_path):
    config.epochs, config.checkpoint_every, config.log_every = 20, 2, 1
    save_config(tmp_path / "tiny.yaml", config)
    return tmp_path / "tiny.yaml"


def test_killed_while_training(clips, recipe, tmp_path, monkeypatch):
    """Four kills among the steps of one run."""
    # A server that has imported everything forks each launch: no time goes into importing torch again and again.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jmm_fast.train.pretrain", "jmm_fast.recipes", "torch.utils.tensorboard"])

    def launch(out, *flags):
        process = context.Process(target=main, args=(arguments(recipe, clips, out, *flags),))
        process.start()
        return process

    def finish(process):
        process.join(timeout=120)
        assert process.exitcode == 0

    whole, run = tmp_path / "whole", tmp_path / "run"
    finish(launch(whole))
    assert losses(whole)[-1][1] == 60
    chance = random.Random(0)
    for after in (0, 10, 30, 55):
        process = launch(run, "--resume")
        limit = time.monotonic() + 60
        while len(read_lines(run / "metrics.jsonl")) < after:
            assert process.is_alive() and time.monotonic() < limit
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -9
        assert not (run / "model").exists()
    finish(launch(run, "--resume"))
    check(run, whole)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(clips, recipe, tmp_path, monkeypatch):
    """Any moment from the start of the process to its end, the writing of the first and last files included."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def launch(out, *flags):
        command = [sys.executable, "-m", "jmm_fast", *arguments(recipe, clips, out, *flags)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish(process):
        text, _ = process.communicate(timeout=120)
        assert process.returncode == 0, text

    whole = tmp_path / "whole"
    began = time.monotonic()
    finish(launch(whole))
    duration = time.monotonic() - began
    chance = random.Random(1)
    killed = 0
    for number in range(20):
        run = tmp_path / f"run{number}"
        process = launch(run)
        # Importing takes most of the time of so small a run: three of four kills fall into what comes after.
        time.sleep(chance.uniform(0, duration) if number % 4 == 0 else chance.uniform(0.5, 1.0) * duration)
        process.kill()
        process.communicate()
        killed += process.returncode == -9
        finish(launch(run, "--resume"))
        check(run, whole)
    assert killed >= 10
