"""What made a result: versions, machine, commit, data, command line."""

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from jmm_fast.errors import UserError
from jmm_fast.files import atomic_write_text
from jmm_fast.train import distributed

PACKAGES = ("torch", "numpy", "safetensors", "tyro", "PyYAML", "rich", "triton", "matplotlib", "tensorboard")


def versions() -> dict[str, str | None]:
    """Installed version of this package and of those it uses; None where absent."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("jmm-fast", *PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """Commit of the checkout that this package runs from, with ``+`` when it has local changes; None outside one."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        run = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip() or None


def cpu_name() -> str:
    """Model of the processor; family and number too, as virtual machines often tell no more than the brand."""
    found = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    name = found.get("model name") or platform.processor() or platform.machine()
    return f"{name} (family {found['cpu family']}, model {found['model']})" if "cpu family" in found else name


def device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is the first GPU, or the CPU where there is none.

    Of several processes on a machine each takes a GPU of its own.

    Raises:
        UserError: unknown device, or one that this machine lacks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device is {name!r}: expected auto, cpu, cuda or cuda:N") from error
    if found.type not in ("cpu", "cuda"):
        raise UserError(f"device is {name!r}: expected auto, cpu, cuda or cuda:N")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device is {name!r}: this machine has {torch.cuda.device_count()} GPUs that torch can use")
    if found.type == "cuda" and distributed.size() > 1:
        if found.index is not None:
            raise UserError(f"device is {name!r}: expected auto, cpu or cuda, as several processes run")
        found = torch.device("cuda", distributed.device_index(torch.cuda.device_count()))
        torch.cuda.set_device(found)
    return found


def describe(store, on: torch.device) -> dict:
    """One launch of a run, as it goes into ``environment.json``."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "commit": commit(),
        "versions": versions(),
        "device": torch.cuda.get_device_name(on) if on.type == "cuda" else "cpu",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": distributed.size(),
        "system": platform.platform(),
        "data": {"path": str(store.path), "fingerprint": store.fingerprint, "clips": store.num_clips},
    }


def record(path: Path, launch: dict) -> None:
    """Write ``launch`` to ``environment.json``; the launches before it stay in its ``earlier`` list."""
    earlier = []
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        earlier = [*before.pop("earlier", []), before]
    except (OSError, ValueError):
        pass
    atomic_write_text(path, json.dumps(launch | {"earlier": earlier}, indent=2) + "\n")
