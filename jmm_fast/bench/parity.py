"""Correct before fast: the rule that a kernel must pass in this very process before a figure of it is shown."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jmm_fast.bench.case import Check


@dataclass(frozen=True, slots=True)
class Parity:
    """Outcome for an op, dtype, backend and instruction set.

    Attributes:
        checks: how many comparisons were made.
        worst: the one with the largest error for its bound; None when there was none.
        problem: why there is no outcome (the check raised); None otherwise.
    """

    op: str
    dtype: str
    contender: str
    isa: str | None
    checks: int
    worst: Check | None
    problem: str | None = None

    @property
    def passed(self) -> bool:
        return self.problem is None and self.worst is not None and self.worst.passed

    @property
    def reason(self) -> str | None:
        """The sentence that stands where a figure would; None when figures may be shown."""
        if self.passed:
            return None
        if self.problem is not None:
            return f"no figure: parity check broke off ({self.problem})"
        if self.worst is None:
            return "no figure: no parity check"
        return f"no figure: parity failed (error {self.worst.error:.3g}, bound {self.worst.bound:.3g})"


def devices() -> tuple[str, ...]:
    """Where the default backends have kernels of their own here."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def isa() -> str | None:
    """Instruction set that the C++ kernels use; None without the extension."""
    try:
        return importlib.import_module("jmm_fast._C").isa()
    except ImportError:
        return None


def isas() -> list[str]:
    """Instruction sets that this build has and this processor runs, in rising order."""
    try:
        return list(importlib.import_module("jmm_fast._C").isas())
    except ImportError:
        return []


def verify(workloads: dict, op: str, dtype: str, contender: str) -> Parity:
    """Run the parity rule of a workload for one dtype and backend, with the instruction set in use."""
    worst, count = None, 0
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for check in workloads[op].checks(dtype, contender):
                count += 1
                if worst is None or _badness(check) > _badness(worst):
                    worst = check
    except Exception as error:  # a kernel that does not compile has an error of Triton's own
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return Parity(op, dtype, contender, isa(), count, worst, problem)
    return Parity(op, dtype, contender, isa(), count, worst)


def _badness(check: Check) -> float:
    if check.passed:
        return check.error / check.bound if check.bound else 0.0
    return float("inf")


def compare(
    names: Sequence[str],
    ours: Sequence[Tensor],
    same: Sequence[Tensor],
    exact: Sequence[Tensor],
    eps: float,
    *,
    where: str = "",
) -> Iterator[Check]:
    """``max|ours - exact| <= 2 (max|same - exact| + eps max|exact|)``; three times for gradients.

    Args:
        names: one a tensor; that of a gradient begins with ``d``.
        ours, same, exact: results of the kernel, of the reference in the kernel's dtype, of the reference in float64.
        eps: rounding of the dtype.
        where: put before the name, to tell problems apart.

    Yields:
        A ``Check`` a tensor. A gradient's chain is half as long again as that of the result, hence its factor.
    """
    for name, a, b, c in zip(names, ours, same, exact, strict=True):
        if c.numel():
            factor = 3 if name.startswith("d") else 2
            yield Check(where + name, _largest(a - c), factor * (_largest(b - c) + eps * _largest(c)))


def compare_rms(
    names: Sequence[str],
    ours: Sequence[Tensor],
    same: Sequence[Tensor],
    exact: Sequence[Tensor],
    eps: float,
    *,
    where: str = "",
) -> Iterator[Check]:
    """``rms(ours - exact) <= 2 (rms(same - exact) + eps rms(exact))`` for every tensor, gradients as well.

    For whole networks. Hundreds of gradients of many thousand elements each always have one whose largest rounding is
    three times that of another order of summation, while their mean square errors agree within a few percent; an
    element that is wrong, and not merely rounded, stands out in the mean square too.
    """
    for name, a, b, c in zip(names, ours, same, exact, strict=True):
        yield Check(where + name, _rms(a - c), 2 * (_rms(b - c) + eps * _rms(c)))


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def results(function: Callable[..., Tensor], inputs: Sequence[Tensor | None], seed: Tensor) -> list[Tensor]:
    """Output of ``function`` and its gradients in every input that is there, for the output gradient ``seed``."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, [x for x in leaves if x is not None], seed)
    return [out.detach(), *gradients]
