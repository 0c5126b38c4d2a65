"""What can be measured: a case names it, a workload makes it."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

BACKENDS = ("cpu", "auto", "triton", "cuda")
"""Contenders that are ours: no figure of theirs without a parity check. The others are what they are compared to."""


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to time: an op at a shape, in a dtype and a direction, computed by a contender.

    Attributes:
        op: name of the workload.
        shape: one of the workload's shapes.
        dtype: ``float32`` or ``bfloat16``.
        direction: ``forward`` (without a graph), ``forward_backward`` or ``step``.
        contender: a backend of ours (``cpu``, ``auto``, ``triton``, ``cuda``), ``reference``, or a peer from outside.
    """

    op: str
    shape: str
    dtype: str
    direction: str
    contender: str

    def __str__(self) -> str:
        return f"{self.op}/{self.shape}/{self.dtype}/{self.direction}/{self.contender}"

    @classmethod
    def parse(cls, text: str) -> "Case":
        """The case that ``str`` wrote as ``text``."""
        return cls(*text.split("/"))

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison of the parity rule: the largest error of ``name`` and what it may be."""

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        # A NaN anywhere makes the error NaN, which is below no bound.
        return self.error <= self.bound


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What any way to compute a case has to do; 0 is left out of account.

    Attributes:
        flop: operations of the matrix products, two a term.
        bytes: read and written, see :func:`moved`.
        exps: exponentials of softmax weights.
    """

    flop: float = 0.0
    bytes: float = 0.0
    exps: float = 0.0


def moved(direction: str, *, read: float, written: float, gradients: float = 0.0) -> float:
    """Bytes of a call that holds everything in between on the chip.

    Forward, each input is read once and each result written once. Backward, inputs and the gradients of the results are
    read once more, and ``gradients``, those of the inputs, written.
    """
    once = read + written
    return once if direction == "forward" else 2 * once + gradients


def no_compiler(what: str) -> str | None:
    """Why ``what``, which torch compiles for the CPU on first use, cannot run here; None when it can."""
    if any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        return None
    return f"{what} is compiled on first use, and there is no C++ compiler"


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """All cases of an op.

    Attributes:
        shapes: name -> sizes, as the record keeps them; ``device`` among them where it is not the CPU.
        dtypes, directions, contenders: what is combined with the shapes; ``unavailable`` leaves out what cannot be.
        prepare: makes inputs and returns the function to time. Inputs depend on the case's op, shape and dtype alone,
            so contenders work on equal numbers.
        checks: the parity rule for a dtype and a backend of ours.
        unavailable: why a case cannot run here; None when it can.
        work: what a case comes to, the same for all contenders: what bounds its time.
        counts: how many ``samples`` and ``bodies`` a call of a case takes; None where the shape says so.
        default: which backend a case whose contender is ``auto`` takes here; None where it is several.
    """

    shapes: dict[str, dict[str, Any]]
    dtypes: tuple[str, ...]
    directions: tuple[str, ...]
    contenders: tuple[str, ...]
    prepare: Callable[[Case], Callable[[], object]]
    checks: Callable[[str, str], Iterator[Check]]
    unavailable: Callable[[Case], str | None]
    work: Callable[[Case], Work]
    counts: Callable[[Case], dict[str, int]] | None = None
    default: Callable[[Case], str] | None = None
