"""Which backend runs an op: one table of ops and backends, one rule of choice, one sentence for each refusal."""

import importlib
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

BACKENDS = ("reference", "cpu", "triton", "cuda")
OPS = ("clip_window", "motion_mask", "token_grid", "topology_attention", "motion_loss")

library = torch.library.Library("jmm_fast", "FRAGMENT")
"""Schemas of all ops are defined here, in Python; C++ and device code only hold implementations."""

_NATIVE = {
    "block": "norm_mlp_forward",
    "clip_window": "clip_window_cpu",
    "motion_loss": "motion_loss_forward",
    "motion_mask": "motion_mask_cpu",
    "token_grid": "token_grid_scatter_forward",
    "topology_attention": "topology_attention_forward",
}
"""Ops that the C++ extension implements for CPU tensors, each with a schema that only the extension can serve."""

_TRITON = ("block", "clip_window", "motion_loss", "token_grid", "topology_attention")
"""Ops that have a Triton kernel, in the module of ``jmm_fast.kernels`` of the same name."""

_CUDA = {"motion_mask": "motion_mask_cuda", "topology_attention": "topology_attention_cuda_forward"}
"""Ops that the CUDA extension implements, each with the schema that it serves."""

_found: dict[tuple[str, str], str | None] = {}


def _extension_reason(module: str, schema: str, key: str) -> str | None:
    """None when the extension ``jmm_fast.module`` is loaded and holds ``schema`` for a dispatch key, else why not."""
    kind = "CUDA" if key == "CUDA" else "C++"
    try:
        importlib.import_module(f"jmm_fast.{module}")
    except ImportError as error:
        record = Path(__file__).parents[1] / "_build.json"
        try:
            reason = json.loads(record.read_text())["targets"][module]["reason"]
        except (OSError, ValueError, KeyError):
            reason = None
        return f"the {kind} extension is not installed ({reason or error})"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"jmm_fast::{schema}", key):
        return f"the installed {kind} extension is older than this version: build it again"
    return None


def _cuda_reason(schema: str) -> str | None:
    """None when the CUDA extension can run ``schema`` here, else why not."""
    reason = _extension_reason("_cuda", schema, "CUDA")
    if reason is None and not torch.cuda.is_available():
        reason = "there is no CUDA GPU on this machine"
    if reason is None:
        # Built for other GPUs, or for a newer driver.
        reason = importlib.import_module("jmm_fast._cuda").load_error()
    return reason


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors: for tests, thousands of times slower."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _triton_reason() -> str | None:
    """None when Triton kernels can run here, else why not."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not torch.cuda.is_available():
        return None if interpreted() else "there is no CUDA GPU on this machine"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"it needs compute capability 8.0, this GPU has {major}.{minor}"


def on_triton(op: str, name: str) -> Callable:
    """The launcher ``name`` in the module of the op's Triton kernels, which is imported when it is first called."""

    def launch(*inputs):
        return getattr(importlib.import_module(f"jmm_fast.kernels.{op}"), name)(*inputs)

    return launch


def unavailable(op: str, backend: str) -> str | None:
    """Why ``backend`` cannot run ``op`` on this installation; None when it can.

    Traced code sees the answer as a constant: whether a kernel is installed does not change while a program runs.
    """
    if (op, backend) not in _found:
        if backend == "reference":
            reason = None
        elif backend == "cpu":
            reason = f"this version has no C++ kernel for {op}"
            if op in _NATIVE:
                reason = _extension_reason("_C", _NATIVE[op], "CPU")
        elif backend == "triton" and op in _TRITON:
            reason = _triton_reason()
        elif backend == "cuda" and op in _CUDA:
            reason = _cuda_reason(_CUDA[op])
        else:
            kind = "Triton" if backend == "triton" else "CUDA C++"
            reason = f"this version has no {kind} kernel for {op}"
        _found[op, backend] = reason
    return _found[op, backend]


# What torch.compiler.assume_constant_result sets; calling it would import torch._dynamo, which programs that compile
# nothing should not wait for.
unavailable._dynamo_marked_constant = True


def shared_memory(device: int) -> int:
    """Bytes of shared memory that a block on a CUDA device may ask for. Traced code sees a constant."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


shared_memory._dynamo_marked_constant = True


def choose(op: str, backend: str, tensor: Tensor, *, unloved: tuple[str, ...] = (), **refusals: str | None) -> str:
    """The backend that runs this call.

    Args:
        op: noun of the op.
        backend: what the caller asked for. ``"auto"`` takes the fastest that can and never raises for that.
        tensor: the input whose device decides.
        unloved: backends that ``"auto"`` passes over though they can, for these sizes.
        refusals: by name of the backend, why its kernel cannot take these arguments (a dtype, a size), if it cannot.

    Raises:
        ValueError: the backend is unknown, or was asked for by name and cannot run; the sentence says why.
    """
    if backend == "reference":
        return backend
    if backend == "auto":
        candidates = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}.get(tensor.device.type, ())
        for kind in candidates:
            if kind not in unloved and refusals.get(kind) is None and unavailable(op, kind) is None:
                return kind
        return "reference"
    if backend not in BACKENDS:
        raise ValueError(f'backend must be "auto", {", ".join(map(repr, BACKENDS))}, got {backend!r}'.replace("'", '"'))
    reason = unavailable(op, backend)
    home = "cpu" if backend == "cpu" or (backend == "triton" and interpreted()) else "cuda"
    if reason is None and tensor.device.type != home:
        reason = f"it runs on {home.upper()} tensors, got a tensor on {tensor.device}"
    if reason is None:
        reason = refusals.get(backend)
    if reason is not None:
        raise ValueError(f'{op}: backend "{backend}" cannot run: {reason}')
    return backend


def backends() -> dict[str, dict[str, str]]:
    """Table of ops and backends: ``backends()[op][backend]`` is ``"available"`` or the reason why it is not."""
    return {op: {backend: unavailable(op, backend) or "available" for backend in BACKENDS} for op in OPS}
