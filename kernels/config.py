"""What all launchers share: the architecture, the interpreter, and how a table of block sizes is read."""

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import triton.language as tl
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")

ARCHITECTURES = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100"}
"""Compute capabilities with sizes of their own; another one takes those of the newest that is not newer."""

ANY = 1 << 30
"""A bound in a table that nothing exceeds."""

TARGET = "sm_90"
"""Whose sizes tensors outside a GPU take: in the interpreter, and when kernels are compiled ahead of time."""


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on tensors of the CPU (``TRITON_INTERPRET=1`` before import)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def architecture(device: int) -> str:
    """Name of the sizes that fit a CUDA device."""
    capability = torch.cuda.get_device_capability(device)
    known = [name for least, name in sorted(ARCHITECTURES.items()) if least <= capability]
    return known[-1] if known else "sm_80"


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Type of the operands of matrix products: that of the tensors; float32 in the interpreter, whose bfloat16
    arithmetic is wrong."""
    if interpreted():
        return tl.float32
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def on_device(launch: Callable[_P, _R]) -> Callable[_P, _R]:
    """A launcher that runs on the GPU of its first tensor, whichever is the current one."""

    @functools.wraps(launch)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, Tensor))):
            return launch(*args, **kwargs)

    return guarded


def choose(table: dict[str, dict[tuple[int, ...], tuple]], x: Tensor, *sizes: int) -> tuple:
    """The entry of a kernel's table for the device of ``x``: the first whose key is nowhere below bytes an element of
    ``x``, its last size, and ``sizes``."""
    name = architecture(x.get_device()) if x.is_cuda else TARGET
    wanted = (x.element_size(), x.shape[-1], *sizes)
    return next(
        entry for bound, entry in table[name].items() if all(a <= b for a, b in zip(wanted, bound, strict=True))
    )
