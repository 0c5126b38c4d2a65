"""Which backend runs an op: one table of ops and backends, one rule of choice, one sentence for each refusal."""

import functools
import importlib
import json
from pathlib import Path

import torch
from torch import Tensor

BACKENDS = ("reference", "cpu", "triton", "cuda")
OPS = ("clip_window", "motion_mask", "token_grid", "topology_attention", "motion_loss")

library = torch.library.Library("jmm_fast", "FRAGMENT")
"""Schemas of all ops are defined here, in Python; C++ and device code only hold implementations."""

_NATIVE = {"topology_attention"}  # ops that the C++ extension implements for CPU tensors


@functools.cache
def _extension_reason() -> str | None:
    """None when the C++ extension ``jmm_fast._C`` is loaded, else why it cannot be."""
    try:
        importlib.import_module("jmm_fast._C")
    except ImportError as error:
        record = Path(__file__).parents[1] / "_build.json"
        try:
            reason = json.loads(record.read_text()).get("reasons", {}).get("_C")
        except (OSError, ValueError):
            reason = None
        return f"the C++ extension is not installed ({reason or error})"
    return None


@functools.cache
def _unavailable(op: str, backend: str) -> str | None:
    """Why ``backend`` cannot run ``op`` on this installation; None when it can."""
    if backend == "reference":
        return None
    if backend == "cpu":
        return _extension_reason() if op in _NATIVE else f"this version has no C++ kernel for {op}"
    if backend == "triton":
        return f"this version has no Triton kernel for {op}"
    return f"this version has no CUDA C++ kernel for {op}"


# Traced code sees the answer as a constant: whether a kernel is installed does not change while a program runs.
unavailable = torch.compiler.assume_constant_result(_unavailable)


def choose(op: str, backend: str, tensor: Tensor, refusal: str | None = None) -> str:
    """The backend that runs this call.

    Args:
        op: noun of the op.
        backend: what the caller asked for. ``"auto"`` takes the fastest that can and never raises for that.
        tensor: the input whose device decides.
        refusal: why the C++ kernel cannot take these arguments (a dtype, a size), if it cannot.

    Raises:
        ValueError: the backend is unknown, or was asked for by name and cannot run; the sentence says why.
    """
    if backend == "reference":
        return backend
    if backend == "auto":
        on_cpu = tensor.device.type == "cpu"
        return "cpu" if on_cpu and refusal is None and unavailable(op, "cpu") is None else "reference"
    if backend not in BACKENDS:
        raise ValueError(f'backend must be "auto", {", ".join(map(repr, BACKENDS))}, got {backend!r}'.replace("'", '"'))
    reason = unavailable(op, backend)
    if reason is None and tensor.device.type != "cpu":
        reason = f"it runs on CPU tensors, got a tensor on {tensor.device}"
    if reason is None:
        reason = refusal
    if reason is not None:
        raise ValueError(f'{op}: backend "{backend}" cannot run: {reason}')
    return backend


def backends() -> dict[str, dict[str, str]]:
    """Table of ops and backends: ``backends()[op][backend]`` is ``"available"`` or the reason why it is not."""
    return {op: {backend: _unavailable(op, backend) or "available" for backend in BACKENDS} for op in OPS}
