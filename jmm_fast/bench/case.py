"""What can be measured: a case names it, a workload makes it."""

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
class Workload:
    """All cases of an op.

    Attributes:
        shapes: name -> sizes, as the record keeps them; ``device`` among them where it is not the CPU.
        dtypes, directions, contenders: what is combined with the shapes; ``unavailable`` leaves out what cannot be.
        prepare: makes inputs and returns the function to time. Inputs depend on the case's op, shape and dtype alone,
            so contenders work on equal numbers.
        checks: the parity rule for a dtype and a backend of ours.
        unavailable: why a case cannot run here; None when it can.
        flop: operations of the matrix products of a case, the same for all contenders; None where their rate would say
            nothing.
    """

    shapes: dict[str, dict[str, Any]]
    dtypes: tuple[str, ...]
    directions: tuple[str, ...]
    contenders: tuple[str, ...]
    prepare: Callable[[Case], Callable[[], object]]
    checks: Callable[[str, str], Iterator[Check]]
    unavailable: Callable[[Case], str | None]
    flop: Callable[[Case], float] | None = None
