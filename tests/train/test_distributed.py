"""Several processes do what one does: the same losses, weights and scores, or one line that says why not."""

import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from jmm_fast.data import ClipStore
from jmm_fast.files import locked
from jmm_fast.models import JMMTGT
from jmm_fast.train import checkpoint, distributed
from jmm_fast.train.config import save_config
from jmm_fast.train.evaluate import open_source
from jmm_fast.train.metrics import read_lines
from jmm_fast.train.pretrain import pretrain
from jmm_fast.train.probe import probe

sys.path.insert(0, str(Path(__file__).parent))
import ranks
import recorder


def quiet(_text):
    pass


def change(config, **changes):
    """``config`` with other fields; those of a part as a dict."""
    parts = {
        name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return dataclasses.replace(config, **parts)


@pytest.fixture
def tiny(config):
    return change(config, log_every=1, optim={"clip_grad": 1.0})


def command(config, data, out, *flags):
    recipe = out.with_suffix(".yaml")
    save_config(recipe, config)
    return ["pretrain", recipe, "--data", data, "--out", out, *flags]


def run(size, config, data, out, *flags):
    """A run of ``size`` processes that must succeed; what the first wrote."""
    started = ranks.start(out.parent / f"{out.name}.said", [command(config, data, out, *flags)] * size)
    assert started.wait() == [0] * size, [started.said(rank) for rank in range(size)]
    assert all(started.said(rank) == "" for rank in range(1, size))
    return started.said(0)


def numbers(out, *names):
    return [[line[name] for name in names] for line in read_lines(out / "metrics.jsonl") if line["kind"] == "train"]


def weights(out):
    return JMMTGT.from_pretrained(out).state_dict()


def check_same(out, whole):
    """Losses, gradient norms and weights agree but for rounding, which AdamW enlarges where gradients are small."""
    np.testing.assert_allclose(numbers(out, "loss"), numbers(whole, "loss"), rtol=1e-6)
    np.testing.assert_allclose(numbers(out, "grad_norm"), numbers(whole, "grad_norm"), rtol=1e-5)
    check_close(weights(out), weights(whole), atol=2e-6)


def check_close(ours, theirs, *, atol):
    for name in theirs:
        if name.endswith("qkv.bias"):
            # A bias of the keys does not change attention: its gradient is rounding, and AdamW makes whole steps of it.
            for state in (ours, theirs):
                state[name][len(state[name]) // 3 : 2 * len(state[name]) // 3] = 0
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture(scope="module")
def whole(gappy_clips, tmp_path_factory):
    """``whole(config)``: the same run by one process in one part."""
    made = {}

    def make(config):
        config = change(config, optim={"accumulate": 1}, shard="none")
        key = str(config)
        if key not in made:
            made[key] = pretrain(config, data=gappy_clips, out=tmp_path_factory.mktemp("whole") / "run", say=quiet)
        return made[key]

    return make


TESTED = 21  # clips that are tested on
A_CLIP = 1.01 * 100 / TESTED  # which may stand between two classes, so that rounding decides

FEW = "train: subject in s01; test: subject in s02"  # two clips to train on


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {}),
        (4, {}),
        (3, {"mask": {"variant": "released"}, "model": {"topology": "none"}}),
        (2, {"data": {"batch_size": 40}}),
        (4, {"data": {"split": FEW}}),
        (1, {"optim": {"accumulate": 3}}),
        (2, {"optim": {"accumulate": 2}, "model": {"topology": "free"}}),
        (2, {"shard": "full"}),
        (4, {"shard": "full", "data": {"split": FEW}, "model": {"topology": "free"}}),
        (3, {"shard": "full", "optim": {"accumulate": 2}, "data": {"batch_size": 40}, "backend": "reference"}),
    ],
    ids="two four three ragged without-clips accumulate two-accumulate two-shards four-shards three-shards".split(),
)
def test_the_same_run(gappy_clips, tiny, whole, tmp_path, size, changes):
    tiny = change(tiny, **changes)
    out = tmp_path / "run"
    if size == 1:
        pretrain(tiny, data=gappy_clips, out=out, say=quiet)
    else:
        run(size, tiny, gappy_clips, out)
    check_same(out, whole(tiny))


@pytest.mark.parametrize(
    ("size", "changes"),
    [(2, {}), (4, {"data": {"batch_size": 40}}), (4, {"data": {"split": FEW}})],
    ids=["two", "ragged", "without-clips"],
)
def test_the_same_run_by_captured_steps(gappy_clips, tiny, whole, tmp_path, size, changes):
    tiny = change(tiny, epochs=16, **changes)
    out = tmp_path / "run"
    work = functools.partial(recorder.pretrain_captured, tiny, gappy_clips, out)
    started = ranks.start(tmp_path / "said", [work] * size)
    assert started.wait() == [0] * size, [started.said(rank) for rank in range(size)]
    check_same(out, whole(tiny))


def test_a_signal_stops_all_and_fewer_go_on(gappy_clips, tiny, whole, tmp_path):
    """SIGTERM reaches one of four processes, SIGUSR1 another: all stop after the same step; two finish the run."""
    tiny = change(tiny, epochs=20)
    out = tmp_path / "run"
    started = ranks.start(tmp_path / "said", [command(tiny, gappy_clips, out)] * 4)
    wait_for_steps(started, out, 2)
    os.kill(started.processes[1].pid, signal.SIGUSR1)
    os.kill(started.processes[2].pid, signal.SIGTERM)
    assert started.wait() == [128 + signal.SIGTERM] * 4
    assert re.search(r"checkpoint of step \d+ of 60 asked for by a signal", started.said(0))
    assert "checkpoint saved: --resume continues" in started.said(0)
    assert all(started.said(rank) == "" for rank in range(1, 4))
    (stopped,) = checkpoint.steps(out / "checkpoints")[-1:]
    assert stopped < 60 and f"stopped after step {stopped} of 60" in started.said(0)
    assert f"continuing after step {stopped} of 60" in run(2, tiny, gappy_clips, out, "--resume")
    check_same(out, whole(tiny))


def test_killed_together_and_continued_by_fewer(gappy_clips, tiny, whole, tmp_path):
    """``kill -9`` of all: 4 processes, then 2 from the checkpoint before a damaged one, then 1; shards come and go."""
    tiny = change(tiny, epochs=30, checkpoint_every=1, keep=3)
    out = tmp_path / "run"
    for number, (size, flags) in enumerate([(4, ["--shard", "full"]), (2, ["--resume"])]):
        started = ranks.start(tmp_path / f"said{number}", [command(tiny, gappy_clips, out, *flags)] * size)
        wait_for_steps(started, out, 10 * number + 5)
        for process in started.processes:
            process.kill()
        assert started.wait() == [-signal.SIGKILL] * size
        *_, before, newest = sorted((out / "checkpoints").glob("step-*"))
        with open(newest, "r+b") as file:
            file.seek(-5, os.SEEK_END)
            file.write(b"wrong")
    assert "continuing after step" in started.said(0) and "is damaged" in started.said(0)
    text = run(1, tiny, gappy_clips, out, "--resume", "--shard", "full")
    assert f"{newest} is damaged: its checksum does not match; trying the checkpoint before it" in text
    assert f"continuing after step {int(before.stem[5:])} of 90" in text
    check_same(out, whole(tiny))


def wait_for_steps(started, out, count):
    limit = time.monotonic() + ranks.LIMIT
    while len(read_lines(out / "metrics.jsonl")) < count:
        assert time.monotonic() < limit and all(process.is_alive() for process in started.processes), started.said(0)
        time.sleep(0.002)


@pytest.mark.parametrize("shard", ["none", "full"])
def test_all_stop_at_a_loss_that_is_not_finite(gappy_clips, tiny, tmp_path, shard):
    config = change(tiny, optim={"lr": 1e30, "min_lr": 1e30, "clip_grad": None}, log_every=3, shard=shard)
    out = tmp_path / "run"
    with locked(out):
        assert re.search(
            r"run is being written by process \d+ on .*: two runs",
            refused(tmp_path / "held", [command(config, gappy_clips, out)] * 2),
        )
    started = ranks.start(tmp_path / "said", [command(config, gappy_clips, out)] * 2)
    assert started.wait() == [2, 2], [started.said(rank) for rank in range(2)]
    assert re.search(r"error: the (loss|norm of the gradient) is (nan|inf) at step \d ", started.said(0))
    assert started.said(1) == ""
    (batch,) = json.loads((out / "nonfinite.json").read_text())["batches"]
    assert len(set(batch["clips"])) == config.data.batch_size


@pytest.mark.parametrize("shard", ["none", "full"])
def test_a_dead_process_ends_the_others(gappy_clips, tiny, tmp_path, shard):
    out = tmp_path / "run"
    config = change(tiny, epochs=1000, shard=shard)
    started = ranks.start(tmp_path / "said", [command(config, gappy_clips, out)] * 3)
    wait_for_steps(started, out, 3)
    started.processes[1].kill()
    assert started.wait() == [2, -signal.SIGKILL, 2]
    for rank in (0, 2):
        lines = [line for line in started.said(rank).splitlines() if "error" in line]
        assert len(lines) == 1 and "lost contact with the other processes" in lines[0], started.said(rank)
        assert "Traceback" not in started.said(rank)


def programs(code, line):
    """Two processes that end as programs do, with all that Python does then."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ranks.free_port())}
    place |= {"OMP_NUM_THREADS": "1", "JMM_FAST_TIMEOUT": str(ranks.LIMIT / 2)}
    line = [
        sys.executable,
        "-c",
        f"{code}\nimport sys\nfrom jmm_fast.cli import main\nsys.exit(main(sys.argv[1:]))",
        *line,
    ]
    return [
        subprocess.Popen(
            [str(word) for word in line],
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


# What threads of the group may do to an interpreter that is taken down.
FRAGILE = """
import atexit, os
atexit.register(os.abort)
"""


@pytest.mark.parametrize("dies", [0, 1])
def test_the_survivor_ends_at_once_with_its_checkpoint_written(gappy_clips, tiny, tmp_path, dies):
    out = tmp_path / "run"
    started = programs(FRAGILE, command(change(tiny, epochs=1000, checkpoint_every=1), gappy_clips, out))
    limit = time.monotonic() + ranks.LIMIT
    while len(read_lines(out / "metrics.jsonl")) < 5:
        assert time.monotonic() < limit and all(process.poll() is None for process in started)
        time.sleep(0.005)
    started[dies].kill()
    said = [process.communicate(timeout=ranks.LIMIT)[1] for process in started]
    assert started[dies].returncode == -signal.SIGKILL and started[1 - dies].returncode == 2, said
    assert "lost contact with the other processes" in said[1 - dies] and "Traceback" not in said[1 - dies]
    if dies == 1:
        assert not list(out.rglob("*.part"))
        newest = checkpoint.steps(out / "checkpoints")[-1]
        assert checkpoint.load(out / "checkpoints" / f"step-{newest:09d}.safetensors").record["step"] == newest


A_BUG = """
import time, torch
from jmm_fast.train import pretrain
def broken(*_args, **_more):
    if torch.distributed.get_rank() == 0:
        torch.distributed.all_reduce(torch.ones(1), async_op=True)
        raise RuntimeError("a bug")
    time.sleep(600)
pretrain.pretrain = broken
"""


def test_a_bug_in_one_process_does_not_wait_for_the_others(clips, tiny, tmp_path):
    first, second = programs(A_BUG, command(tiny, clips, tmp_path / "run"))
    try:
        said = first.communicate(timeout=ranks.LIMIT / 4)[1]
        assert first.returncode == 1 and second.poll() is None
        assert said.count("Traceback") == 1 and said.rstrip().endswith("RuntimeError: a bug")
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


def interrupted_in_an_exchange():
    """The first process asks for a sum; the second never does."""
    if distributed.rank() == 0:
        torch.distributed.all_reduce(torch.ones(1), async_op=True)
        raise KeyboardInterrupt
    time.sleep(ranks.LIMIT)


def test_an_interrupt_does_not_wait_for_the_others(tmp_path):
    started = ranks.start(tmp_path, [interrupted_in_an_exchange] * 2)
    first, second = started.processes
    first.join(ranks.LIMIT / 4)
    assert not first.is_alive() and second.is_alive()
    second.kill()
    assert started.wait() == [1, -signal.SIGKILL]


def refused(tmp_path, commands):
    """What the first of several processes said in one line when all were refused."""
    started = ranks.start(tmp_path / "said", commands)
    assert started.wait() == [2] * len(commands), started.said(0)
    assert all(started.said(rank) == "" for rank in range(1, len(commands)))
    (line,) = started.said(0).splitlines()
    return line


def test_other_data_and_other_settings_are_refused(gappy_clips, clips, tiny, tmp_path):
    out = tmp_path / "run"
    commands = [command(tiny, data, out) for data in (gappy_clips, clips)]
    assert "rank 1 has other data in" in refused(tmp_path, commands)
    commands = [command(tiny, clips, out, "--optim.lr", rate) for rate in ("0.001", "0.002")]
    assert "rank 1 has optim.lr = 0.002, rank 0 has 0.001: expected the same" in refused(tmp_path, commands)
    commands = [command(tiny, data, out) for data in (clips, tmp_path / "absent")]
    line = refused(tmp_path, commands)
    assert "rank 1: " in line and "absent" in line
    commands = [command(change(tiny, data={"batch_size": 2}), clips, out)] * 3
    line = refused(tmp_path, commands)
    assert "data.batch_size is 2: it is the batch of all processes, expected at least 3 processes" in line
    assert not out.exists()


def test_what_one_process_says_of_all(clips, tiny, tmp_path):
    commands = [command(change(tiny, optim={"lr": 1e30, "min_lr": 0.0}), clips, tmp_path / "run")] * 2
    started = ranks.start(tmp_path / "said", commands)
    assert started.wait() == [2, 2]
    assert "error: the loss is" in started.said(0) and "Traceback" not in started.said(0)
    assert started.said(1) == ""


def predictions(run, name):
    with np.load(run / "predictions" / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays}


@pytest.mark.parametrize(
    ("size", "name", "flags"),
    [
        (2, "linear-pretrained", ["probe", "--features", "cached"]),
        (3, "linear-pretrained", ["probe", "--features", "online"]),
        (2, "knn-pretrained", ["knn", "--k", "3"]),
    ],
)
def test_the_same_evaluation(gappy_clips, tiny, whole, tmp_path, size, name, flags):
    run = whole(tiny)
    found = []
    for count in (1, size):
        out = tmp_path / str(count)
        line = [flags[0], run, "--data", gappy_clips, "--out", out, *flags[1:]]
        started = ranks.start(tmp_path / f"said{count}", [line] * count)
        assert started.wait() == [0] * count, [started.said(rank) for rank in range(count)]
        assert all(started.said(rank) == "" for rank in range(1, count))
        (record,) = read_lines(out / "evaluations.jsonl")
        found.append((predictions(out, name), record["top1"], record["top5"], record["test_clips"]))
    (one, *scores), (many, *others) = found
    assert scores == others
    assert all(np.array_equal(one[key], many[key], equal_nan=one[key].dtype.kind == "f") for key in one)


def test_the_same_finetuning(gappy_clips, tiny, whole, tmp_path):
    """Drop path, dropout and batch normalisation included; 3 does not divide the batch."""
    run = whole(tiny)
    made = []
    for count, shard in ((1, "none"), (3, "none"), (2, "full")):
        out = tmp_path / str(count)
        flags = ["--epochs", "4", "--eval-every", "2", "--optim.clip-grad", "1.0", "--label-smoothing", "0.1"]
        line = ["finetune", run, "--data", gappy_clips, "--out", out, *flags, "--shard", shard]
        started = ranks.start(tmp_path / f"said{count}", [line] * count)
        assert started.wait() == [0] * count, [started.said(rank) for rank in range(count)]
        folder = out / "finetune" / "pretrained"
        (line,) = read_lines(out / "evaluations.jsonl")
        tested = [line["top1"] for line in read_lines(folder / "metrics.jsonl") if "top1" in line]
        tensors = checkpoint.latest(folder / "checkpoints").tensors
        made.append((numbers(folder, "loss", "grad_norm"), tensors, [*tested, line["top1"]]))
    (losses, one, scores), *others = made
    # Batch normalisation takes out the bias before it, which is noise for the same reason, and remembers it as a mean.
    noise = ("model/fc1.bias", "model/norm.running_mean")
    kept = [name for name in one if name.startswith("model/") and name not in noise]
    for found, many, tested in others:
        np.testing.assert_allclose(found, losses, rtol=1e-5)
        check_close(*({name: state[name] for name in kept} for state in (many, one)), atol=5e-6)
        assert len(tested) == 2 and np.allclose(tested, scores, rtol=0, atol=A_CLIP)


def test_probes_on_schedule(clips, config, tmp_path):
    """They change no weight and report what the commands report afterwards."""
    plain = pretrain(config, data=clips, out=tmp_path / "plain", say=quiet)
    out = pretrain(change(config, probe_every=2, epochs=3), data=clips, out=tmp_path / "run", say=quiet)
    assert all(torch.equal(weights(out)[name], value) for name, value in weights(plain).items())
    epochs = [line for line in read_lines(out / "metrics.jsonl") if line["kind"] == "epoch"]
    assert ["linear_top1" in line for line in epochs] == [False, True, False]
    last = pretrain(change(config, probe_every=3), data=clips, out=tmp_path / "last", say=quiet)
    found = [line for line in read_lines(last / "metrics.jsonl") if "knn_top1" in line]
    source = open_source(last, out=None, fallback=config)
    line = probe(source, data=clips, say=quiet)
    assert [round(found[0]["linear_top1"], 3), found[0]["epoch"]] == [line["top1"], 3]
    assert len(ClipStore.open(clips).split("xsub").test) == TESTED
    for shard in ("none", "full"):
        many = tmp_path / shard
        run(2, change(config, probe_every=3, shard=shard), clips, many)
        (shared,) = [line for line in read_lines(many / "metrics.jsonl") if "knn_top1" in line]
        assert abs(shared["linear_top1"] - found[0]["linear_top1"]) <= A_CLIP
        assert abs(shared["knn_top1"] - found[0]["knn_top1"]) <= A_CLIP


def test_torchrun_starts_again_after_a_death(gappy_clips, tiny, whole, tmp_path):
    """One of two processes is killed; torchrun starts both anew, and the run ends as if nothing had been."""
    tiny = change(tiny, epochs=20)
    out = tmp_path / "run"
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
    ]
    line += ["-m", "jmm_fast", *map(str, command(tiny, gappy_clips, out, "--resume"))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "JMM_FAST_TIMEOUT": "60"}
    with open(tmp_path / "said", "w") as said, subprocess.Popen(line, stdout=said, stderr=said, env=environment) as run:
        limit = time.monotonic() + ranks.LIMIT
        while len(read_lines(out / "metrics.jsonl")) < 4:
            assert time.monotonic() < limit and run.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.005)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        (second,) = [pid for pid in children if b"\0LOCAL_RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
        os.kill(int(second), signal.SIGKILL)
        code = run.wait(timeout=ranks.LIMIT)
    text = (tmp_path / "said").read_text()
    assert code == 0, text
    assert text.count("continuing after step") == text.count("model written to") == 1
    check_same(out, whole(tiny))
