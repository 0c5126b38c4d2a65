"""Every case there is, by name."""

import itertools
from collections.abc import Callable, Iterator

import torch

from jmm_fast.bench import (
    block,
    clip_window,
    feeder,
    motion_loss,
    motion_mask,
    step,
    token_grid,
    topology_attention,
)
from jmm_fast.bench.case import Case, Workload

WORKLOADS: dict[str, Workload] = {
    "topology_attention": topology_attention.WORKLOAD,
    "motion_mask": motion_mask.WORKLOAD,
    "clip_window": clip_window.WORKLOAD,
    "motion_loss": motion_loss.WORKLOAD,
    "token_grid": token_grid.WORKLOAD,
    "block": block.WORKLOAD,
    "feeder": feeder.WORKLOAD,
    "step": step.WORKLOAD,
}
"""The ops, a transformer block (``block``), a batch of clips (``feeder``) and the pretraining step (``step``)."""


HOMES = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
"""Kind of device that a backend is for, where it is for one."""


def all_cases() -> Iterator[Case]:
    """Shape by shape, dtype, direction and contender of every workload, those that cannot run here included."""
    for op, work in WORKLOADS.items():
        for parts in itertools.product(work.shapes, work.dtypes, work.directions, work.contenders):
            yield Case(op, *parts)


def check(case: Case) -> None:
    """Raise ``ValueError`` naming the part of ``case`` that no workload has."""
    if case.op not in WORKLOADS:
        raise ValueError(f"op must be one of {', '.join(WORKLOADS)}, got {case.op!r}")
    work = WORKLOADS[case.op]
    for part, known in (
        ("shape", tuple(work.shapes)),
        ("dtype", work.dtypes),
        ("direction", work.directions),
        ("contender", work.contenders),
    ):
        if getattr(case, part) not in known:
            raise ValueError(f"{part} of {case.op} must be one of {', '.join(known)}, got {getattr(case, part)!r}")


def prepare(case: Case) -> Callable[[], object]:
    """Inputs of ``case`` made, the function to time returned.

    Raises:
        ValueError: no such case.
    """
    check(case)
    return WORKLOADS[case.op].prepare(case)


def device(case: Case) -> str:
    """Kind of device that ``case`` runs on."""
    return WORKLOADS[case.op].shapes[case.shape].get("device", "cpu")


def unavailable(case: Case) -> str | None:
    """Why ``case`` cannot run here; None when it can."""
    check(case)
    kind = device(case)
    if kind == "cuda" and not torch.cuda.is_available():
        return "needs a GPU"
    if HOMES.get(case.contender, kind) != kind:
        return f"{case.contender} has no kernel for {kind.upper()} tensors"
    return WORKLOADS[case.op].unavailable(case)
