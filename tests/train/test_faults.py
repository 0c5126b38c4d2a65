"""Runs that are disturbed: full and read-only disks, two runs in one folder, signals, failing checkpoints, profiles."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch

from jmm_fast.errors import UserError
from jmm_fast.files import locked
from jmm_fast.models import JMMTGT
from jmm_fast.train import checkpoint, loop
from jmm_fast.train.config import save_config
from jmm_fast.train.metrics import read_lines
from jmm_fast.train.pretrain import pretrain


def quiet(_text):
    pass


def at_step(monkeypatch, number, action):
    """Call ``action`` before step ``number``."""
    original = loop.train_step

    def acts(*args, **kwargs):
        if kwargs["step"] == number:
            action()
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", acts)


def state(run):
    return JMMTGT.from_pretrained(run).state_dict()


def test_training_goes_on_while_a_checkpoint_is_written(clips, config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, checkpoint_every=2, epochs=1, warmup_epochs=0)
    go, original = threading.Event(), checkpoint.save_file

    def waits(*args, **kwargs):
        # Step 3 of the loop lets it go on: it waits for ever where the loop waits for it.
        assert go.wait(60)
        original(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", waits)
    at_step(monkeypatch, 2, go.set)
    pretrain(config, data=clips, out=tmp_path / "run", say=quiet)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [2, 3]


def test_a_checkpoint_that_fails_ends_the_run(clips, config, tmp_path, monkeypatch):
    original = checkpoint.save_file

    def full(tensors, path, **kwargs):
        if "step-000000004" in path.name:
            raise checkpoint.SafetensorError("No space left on device (os error 28)")
        original(tensors, path, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"cannot write .*step-000000004.*No space left"):
        pretrain(config, data=clips, out=tmp_path / "run", say=quiet)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [2, 3]
    assert not list((tmp_path / "run").rglob("*.part"))
    monkeypatch.setattr(checkpoint, "save_file", original)
    pretrain(config, data=clips, out=tmp_path / "run", resume=True, say=quiet)
    whole = pretrain(config, data=clips, out=tmp_path / "whole", say=quiet)
    assert all(torch.equal(value, state(tmp_path / "run")[name]) for name, value in state(whole).items())


SMALL_DISK = """
import json, os, subprocess, sys
from pathlib import Path
from jmm_fast.cli import main
from jmm_fast.train import checkpoint

recipe, clips, disk = sys.argv[1:]
run = Path(disk, "run")
arguments = ["pretrain", recipe, "--data", clips, "--out", str(run)]
codes = [main(arguments)]
left = [str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()]
latest = checkpoint.latest(run / "checkpoints").record["step"]
steps = checkpoint.steps(run / "checkpoints")
subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
codes.append(main([*arguments, "--resume"]))
model = (run / "model" / "model.safetensors").exists()
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
codes.append(main([*arguments, "--overwrite"]))
codes.append(main([*arguments[:-1], str(Path(disk, "other"))]))
model = model and (run / "model" / "model.safetensors").exists()
print(json.dumps({"codes": codes, "left": left, "latest": latest, "steps": steps, "model": model}))
"""


def test_a_full_and_a_read_only_disk(clips, config, tmp_path):
    """On a file system of its own, in a mount namespace: it holds the first checkpoints, not all of them."""
    disk = tmp_path / "disk"
    disk.mkdir()
    namespace = ["unshare", "--map-root-user", "--mount"]
    mount = f"mount -t tmpfs -o size=500k tmpfs {disk}"
    if (
        shutil.which("unshare") is None
        or subprocess.run([*namespace, "sh", "-c", mount], capture_output=True).returncode
    ):
        pytest.skip("no small file system can be mounted here (unshare --map-root-user --mount)")
    config = dataclasses.replace(config, keep=99, log_every=1)
    save_config(tmp_path / "tiny.yaml", config)
    script = f'{mount} && exec "$@"'
    arguments = [sys.executable, "-c", SMALL_DISK, str(tmp_path / "tiny.yaml"), str(clips), str(disk)]
    done = subprocess.run(
        [*namespace, "sh", "-c", script, "sh", *arguments], capture_output=True, text=True, check=True, timeout=300
    )
    found = json.loads(done.stdout.splitlines()[-1])
    errors = [line for line in done.stderr.splitlines() if line.startswith("jmm-fast: error:")]
    assert "Traceback" not in done.stderr, done.stderr
    assert found["codes"] == [2, 0, 2, 2], done.stderr
    assert re.search(r"cannot write .*: .*No space left on device", errors[0])
    assert re.search(r"cannot write .*run/\.lock: Read-only file system", errors[1])
    assert re.search(r"cannot write .*other/\.lock: Read-only file system", errors[2])
    assert found["latest"] == found["steps"][-1] and len(found["steps"]) >= 2
    assert not [name for name in found["left"] if name.endswith(".part")]
    assert found["model"]


SMALL_FILES = """
import resource, sys
from jmm_fast.cli import main

arguments = sys.argv[1:]
# Python ignores the signal that comes with it. The first files of a run fit, a checkpoint does not.
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
first = main(arguments)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(first, main([*arguments, "--resume"]))
"""


def test_files_that_may_not_grow(clips, config, tmp_path):
    """What a full disk does, where no disk can be made: writing fails half-way through a file."""
    save_config(tmp_path / "tiny.yaml", config)
    arguments = ["pretrain", str(tmp_path / "tiny.yaml"), "--data", str(clips), "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", SMALL_FILES, *arguments], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.splitlines()[-1] == "2 0", done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("jmm-fast: error:")]
    assert re.search(r"cannot write .*step-000000002\.safetensors: .*File too large", error)
    assert "Traceback" not in done.stderr and not list((tmp_path / "run").rglob("*.part"))
    whole = pretrain(config, data=clips, out=tmp_path / "whole", say=quiet)
    assert all(torch.equal(value, state(tmp_path / "run")[name]) for name, value in state(whole).items())


def test_a_folder_without_permission(clips, config, tmp_path):
    (tmp_path / "run").mkdir(mode=0o555)
    if os.access(tmp_path / "run", os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(UserError, match=r"cannot write .*\.lock: Permission denied"):
        pretrain(config, data=clips, out=tmp_path / "run", say=quiet)


def test_two_runs_cannot_write_one_folder(clips, config, tmp_path, monkeypatch):
    out = tmp_path / "run"
    complaints = []

    def second():
        for flags in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(UserError, match=rf"{out} is being written by process {os.getpid()} on ") as caught:
                pretrain(config, data=clips, out=out, say=quiet, **flags)
            complaints.append(str(caught.value))

    at_step(monkeypatch, 1, second)
    pretrain(config, data=clips, out=out, say=quiet)
    assert len(complaints) == 2 and "\n" not in complaints[0]
    assert state(out)
    with pytest.raises(UserError, match="already holds a run"):
        pretrain(config, data=clips, out=out, say=quiet)


HOLDS = """
import sys
from jmm_fast.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_lock_of_a_dead_process_is_no_lock(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"by process {process.pid} on .*: two runs"), locked(tmp_path):
        pass
    process.kill()
    process.communicate()
    assert (tmp_path / ".lock").exists()
    for _ in range(2):
        with locked(tmp_path):
            pass


def test_sigusr1_saves_and_goes_on(clips, config, tmp_path, monkeypatch, said):
    config = dataclasses.replace(config, checkpoint_every=100, keep=99)
    before = signal.getsignal(signal.SIGUSR1)
    at_step(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    out = pretrain(config, data=clips, out=tmp_path / "run", say=said.append)
    assert signal.getsignal(signal.SIGUSR1) == before
    assert checkpoint.steps(out / "checkpoints") == [3, 5, 6, 9]
    assert "checkpoint of step 5 of 9 asked for by a signal" in said


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_the_thread_that_makes_batches_ends_with_the_run(clips, config, tmp_path, monkeypatch, error):
    seen = []

    def fails():
        seen.extend(thread.name for thread in threading.enumerate())
        raise error

    # The first of an epoch's three batches is in use, the second is made, the third must wait.
    at_step(monkeypatch, 3, fails)
    config = dataclasses.replace(config, prefetch=1)
    with pytest.raises(error):
        pretrain(config, data=clips, out=tmp_path / "run", say=quiet)
    assert "prefetch" in seen
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}


def test_a_profile(clips, config, tmp_path, said):
    out = pretrain(config, data=clips, out=tmp_path / "run", profile=True, say=said.append)
    assert f"profile written to {out / 'profile'}" in said
    table = (out / "profile" / "table.txt").read_text().splitlines()
    count, whole = re.fullmatch(r"(\d+) steps on cpu, (\d+\.\d+) ms each", table[0]).groups()
    assert int(count) == 5
    rows = {line[:12].strip(): float(line[12:22]) for line in table[3:10]}
    assert list(rows) == [*loop.PARTS, "rest"]
    assert sum(rows.values()) == pytest.approx(float(whole), abs=0.05)
    assert min(rows.values()) >= 0 and rows["forward"] > 0 and rows["backward"] > 0
    assert any("aten::addmm" in line or "jmm_fast::" in line for line in table[10:])
    memory = r"peak memory of the process: \d+ MiB; activations kept for the backward pass: (\d+\.\d) MiB"
    kept = read_lines(out / "metrics.jsonl")[0]["activation_memory"]
    assert re.fullmatch(memory, table[11])[1] == f"{kept / 2**20:.1f}" != "0.0"
    events = json.loads((out / "profile" / "trace.json").read_text())["traceEvents"]
    assert {"data wait", "forward", "backward", "update"} <= {event.get("name") for event in events}
    # What is measured is the run itself.
    plain = pretrain(config, data=clips, out=tmp_path / "plain", say=quiet)
    assert all(torch.equal(value, state(plain)[name]) for name, value in state(out).items())


def test_a_run_too_short_for_a_profile(clips, config, tmp_path, said):
    config = dataclasses.replace(config, epochs=1, warmup_epochs=0)
    out = pretrain(config, data=clips, out=tmp_path / "run", profile=True, say=said.append)
    assert "no profile: the run ended before its step 8" in said
    assert not (out / "profile").exists()


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# The first steps fill caches and pools. MiB; measured: 0.7 over 600 steps, 2.5 over 10,000.
@pytest.mark.parametrize(
    ("steps", "settled", "most"), [pytest.param(10_000, 1000, 8, marks=pytest.mark.slow), (600, 200, 8)]
)
def test_memory_does_not_grow(clips, config, tmp_path, monkeypatch, steps, settled, most):
    epochs = steps // 3 + 1
    config = dataclasses.replace(config, epochs=epochs, warmup_epochs=1, log_every=10, checkpoint_every=50)
    original, seen = loop.train_step, {}

    def measures(*args, **kwargs):
        if kwargs["step"] % (settled // 2) == 0:
            seen[kwargs["step"]] = resident()
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", measures)
    pretrain(config, data=clips, out=tmp_path / "run", say=quiet)
    print({step: f"{size / 2**20:.1f} MiB" for step, size in seen.items()})
    assert max(seen) >= steps
    # Earlier, the process may give back what other tests left.
    assert max(size for step, size in seen.items() if step >= settled) - seen[settled] < most * 2**20
