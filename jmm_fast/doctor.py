"""What ``jmm-fast doctor`` says: what is installed, what runs here, what is missing."""

import importlib.util
import json
import os
from pathlib import Path

import torch

from jmm_fast.ops import backends
from jmm_fast.train.environment import commit, cpu_name, versions

# What an absent optional package costs, and the extra that brings it.
OPTIONAL = {
    "matplotlib": ("figures and reports", "viz"),
    "tensorboard": ("TensorBoard events", "tensorboard"),
}
FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")


def doctor() -> str:
    """Versions, machine, backends of each op with the reasons why they do not run, and what is missing."""
    lines = ["versions"]
    lines += [f"  {name:<12} {version or 'not installed'}" for name, version in versions().items()]
    checkout = commit()
    if checkout:
        lines.append(f"  {'commit':<12} {checkout}")
    lines += ["", "machine", f"  processor    {cpu_name()}", f"  cores        {os.cpu_count()}, torch uses "]
    lines[-1] += f"{torch.get_num_threads()} threads"
    lines.append(
        f"  instructions {', '.join(_instruction_sets()) or 'unknown'}; torch uses "
        f"{torch.backends.cpu.get_cpu_capability()}"
    )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            lines.append(
                f"  cuda:{index}       {about.name}, {about.total_memory / 2**30:.0f} GiB, compute capability "
                f"{about.major}.{about.minor}"
            )
    else:
        built = torch.version.cuda
        lines.append(
            f"  GPU          none ({f'torch is built for CUDA {built}' if built else 'torch is built for CPUs'})"
        )

    lines += ["", "backends"]
    for op, table in backends().items():
        lines.append(f"  {op}")
        lines += [f"    {backend:<10} {state}" for backend, state in table.items()]

    lines += ["", "build"]
    record = Path(__file__).with_name("_build.json")
    try:
        built = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        built = None
        lines.append("  no record: the package was not installed by its setup.py")
    if built:
        lines += [
            f"  {name:<12} {built[name]}" for name in ("platform", "torch", "compiler", "cmake") if built.get(name)
        ]
        for name, target in built.get("targets", {}).items():
            state = "built" if target.get("built") else f"not built: {target.get('reason')}"
            lines.append(f"  {name:<12} {state} ({target.get('purpose')})")
        if built.get("torch") not in (None, torch.__version__):
            lines.append(f"  note         built against torch {built['torch']}, running with {torch.__version__}")

    missing = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    lines += ["", "optional packages"]
    for name in OPTIONAL:
        purpose, extra = OPTIONAL[name]
        state = (
            f"missing: no {purpose}; pip install 'jmm-fast[{extra}]'" if name in missing else f"installed: {purpose}"
        )
        lines.append(f"  {name:<12} {state}")
    return "\n".join(lines)


def _instruction_sets() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            held = set(line.partition(":")[2].split())
            return [flag for flag in FLAGS if flag in held]
    return []
