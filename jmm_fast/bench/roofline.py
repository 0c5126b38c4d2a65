"""The least time that a case can take on this machine, and what sets it.

``max(flop / products, bytes / memory, exps / exponentials)`` with rates of :mod:`jmm_fast.bench.limits`,
measured beside the case.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jmm_fast.bench.case import Case, Work

CACHED = 16e6
"""Bytes up to which a call on the CPU finds its data in the caches, where the call before left them."""


@dataclass(frozen=True, slots=True)
class Bound:
    """Least seconds of a call; ``by`` is ``products``, ``memory`` or ``exponentials``."""

    seconds: float
    by: str


def rates(case: Case, work: Work, device: str) -> dict[str, tuple[str, ...]]:
    """Names of the limits that hold for each part; the highest of several.

    On a CPU a product of bfloat16 numbers may be computed in float32, and torch's float32 product is not the fastest
    there is everywhere; exponentials are polynomials on the units of the products: no limit of their own.
    """
    if device == "cuda":
        return {
            "products": (f"gpu_gemm_{case.dtype}",),
            "memory": ("gpu_copy",),
            "exponentials": ("gpu_exp_float32",),
        }
    half = ("gemm_bfloat16",) if case.dtype == "bfloat16" else ()
    return {
        "products": ("gemm_float32", "onednn_gemm_float32", *half),
        "memory": ("copy_cached" if work.bytes <= CACHED else "copy",),
    }


def amounts(work: Work) -> dict[str, float]:
    """What there is of each part."""
    return {"products": work.flop, "memory": work.bytes, "exponentials": work.exps}


def bound(case: Case, work: Work, device: str, limits: Mapping[str, float]) -> Bound | None:
    """What bounds ``case``; None when nothing that it does was measured.

    Args:
        work: what it comes to.
        device: kind of device that it runs on.
        limits: rates, in 1e9 a second.
    """
    found = []
    for by, names in rates(case, work, device).items():
        known = [limits[name] for name in names if name in limits]
        if amounts(work)[by] and known:
            found.append(Bound(amounts(work)[by] / (max(known) * 1e9), by))
    return max(found, key=lambda one: one.seconds, default=None)
