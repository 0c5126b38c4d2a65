"""Texts of ``jmm-fast doctor`` and ``jmm-fast inspect``."""

import importlib.util
import json
import os
from collections import Counter
from pathlib import Path

import torch

from jmm_fast.data import ClipStore
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


def store_text(store: ClipStore) -> str:
    """Counts, lengths, classes, columns, splits and origin of a clip store."""
    lengths = store.lengths.double()
    bodies = Counter(store.clip_bodies[:, 1].tolist())
    crowd = ", ".join(
        f"{clips} with {count} bod{'y' if count == 1 else 'ies'}" for count, clips in sorted(bodies.items())
    )
    seconds = float(lengths.sum()) / store.fps
    layout = store.skeleton
    lines = [
        f"{store.path}",
        f"  data hash    {store.fingerprint[:16]}",
        f"  layout       {layout.name}, {layout.num_joints} joints, root {layout.joint_names[layout.root]}",
        f"  clips        {store.num_clips} ({crowd})",
        f"  frames       {int(lengths.sum())} at {store.fps:g} a second ({seconds / 60:.0f} minutes), "
        f"{store.frames.shape[0]} body poses",
        f"  lengths      {int(lengths.min())} to {int(lengths.max())} frames, median {int(lengths.median())}",
    ]
    low, high = store.frames.amin((0, 1)).tolist(), store.frames.amax((0, 1)).tolist()
    spans = ", ".join(f"{axis} {a:.2f}..{b:.2f}" for axis, a, b in zip("xyz", low, high, strict=True))
    lines.append(f"  coordinates  {spans} m")

    counts = torch.bincount(store.labels, minlength=store.num_classes).tolist()
    lines += ["", f"classes ({store.num_classes})"]
    width = max(map(len, store.class_names), default=0)
    lines += [
        f"  {label:>3} {name:<{width}} {count:>6}"
        for label, (name, count) in enumerate(zip(store.class_names, counts, strict=True))
    ]
    empty = sum(count == 0 for count in counts)
    if empty:
        lines.append(f"  {empty} classes have no clip")

    if store.columns:
        lines += ["", "columns"]
        for name, column in store.columns.items():
            values = torch.unique(column)
            names = store.column_values.get(name)
            shown = [names[int(v)] if names else f"{v:g}" for v in values[:12].tolist()]
            more = f", ... ({len(values)} values)" if len(values) > 12 else ""
            lines.append(f"  {name:<14} {', '.join(shown)}{more}")

    lines += ["", "splits" if store.splits else 'no stored split: give an expression, --split "COLUMN in 1,3,5"']
    for name, parts in store.splits.items():
        lines.append(f"  {name:<14} {len(parts['train'])} train, {len(parts['test'])} test")

    if store.provenance:
        lines += ["", "origin"]
        for name, value in store.provenance.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            lines.append(f"  {name:<14} {text if len(text) <= 160 else text[:157] + '...'}")
    return "\n".join(lines)
