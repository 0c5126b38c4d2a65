"""``kill -9`` at any moment, then ``--resume``: the same final weights as a run that was never interrupted."""

import multiprocessing
import random
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


@pytest.fixture
def launch(clips, recipe, monkeypatch):
    """Start a pretraining process; a server that has imported everything forks it, so torch is imported only once."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jmm_fast.train.pretrain", "jmm_fast.recipes", "torch.utils.tensorboard"])

    def start(out, *flags):
        process = context.Process(target=main, args=(arguments(recipe, clips, out, *flags),))
        process.start()
        return process

    start.context = context
    return start


def finish(process):
    process.join(timeout=300)
    assert process.exitcode == 0


def kill(process, run, after, delay) -> bool:
    """Kill ``process`` ``delay`` seconds after its metrics have ``after`` lines; False when it had ended by then."""
    limit = time.monotonic() + 300
    while len(read_lines(run / "metrics.jsonl")) < after and process.is_alive():
        assert time.monotonic() < limit
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.join()
    return process.exitcode == -9


def test_killed_while_training(launch, tmp_path):
    """Four kills among the steps of one run."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    finish(launch(whole))
    assert losses(whole)[-1][1] == 60
    chance = random.Random(0)
    for after in (0, 10, 30, 55):
        assert kill(launch(run, "--resume"), run, after, chance.uniform(0, 0.02))
        assert not (run / "model").exists()
    finish(launch(run, "--resume"))
    check(run, whole)


HALF_WRITTEN = """
import time
from pathlib import Path
from jmm_fast.cli import main
from jmm_fast.train import checkpoint

original = checkpoint.save_file

def stuck(tensors, path, **kwargs):
    original(tensors, path, **kwargs)
    if "step-000000020" in Path(path).name:
        with open(path, "r+b") as file:
            file.truncate(file.seek(0, 2) // 2)
        time.sleep(600)

checkpoint.save_file = stuck
main(arguments)
"""


def test_killed_while_a_checkpoint_is_written(clips, recipe, launch, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    finish(launch(whole))
    process = launch.context.Process(target=exec, args=(HALF_WRITTEN, {"arguments": arguments(recipe, clips, run)}))
    process.start()
    limit = time.monotonic() + 300
    # Training has gone on to where the next checkpoint waits for this one.
    while not any(line["step"] == 21 for line in read_lines(run / "metrics.jsonl")):
        assert time.monotonic() < limit and process.is_alive()
        time.sleep(0.001)
    process.kill()
    process.join()
    assert [path.name[:16] for path in run.rglob("*.part")] == [".step-000000020."]
    finish(launch(run, "--resume"))
    check(run, whole)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(launch, tmp_path):
    """Twenty runs, each killed once: before anything is written, among the steps, while the model is written."""
    whole = tmp_path / "whole"
    finish(launch(whole))
    lines = len(losses(whole))
    chance = random.Random(1)
    killed, tries = 0, 0
    while killed < 20:
        run = tmp_path / f"run{tries}"
        tries += 1
        assert tries < 100
        # Every fourth kill aims at the start or at the end, where the other files are written.
        after = chance.choice([0, lines]) if tries % 4 == 0 else chance.randint(1, lines - 1)
        if not kill(launch(run), run, after, chance.uniform(0, 0.05)):
            continue
        killed += 1
        finish(launch(run, "--resume"))
        check(run, whole)
