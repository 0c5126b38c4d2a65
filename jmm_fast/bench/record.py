"""Run the table: limits of the machine, parity, paired times, peak memory; the result is plain JSON."""

import datetime
import os
import platform
from collections.abc import Callable, Sequence

import torch

from jmm_fast.bench import cases, parity
from jmm_fast.bench.case import BACKENDS, Case
from jmm_fast.bench.limits import UNITS, limits
from jmm_fast.bench.memory import MemoryOfCaseError, peak_memory, peak_on_gpu
from jmm_fast.bench.parity import Parity
from jmm_fast.bench.rows import ROWS, Row
from jmm_fast.bench.timing import QUICK, Effort, Spread, on_gpu, pair
from jmm_fast.errors import UserError
from jmm_fast.train.environment import commit, cpu_name, versions

SCHEMA = 1
SLOW = ("/flex", "step/released/")
"""What ``quick`` leaves out, by a part of the case's name: compilers, and steps of many seconds. Peak memory too, which
needs fresh processes."""


def measure(
    ops: Sequence[str] = (),
    *,
    quick: bool = False,
    threads: int | None = None,
    device: str | None = None,
    rows: Sequence[Row] = ROWS,
    say: Callable[[str, int, int], None] = lambda text, done, total: None,
) -> dict:
    """Measure the rows of some ops.

    Args:
        ops: workloads to measure; none means all.
        quick: fewer rounds, no peak memory, nothing that takes minutes.
        threads: of torch and of the kernels; None keeps torch's.
        device: take the rows of this kind of device only.
        rows: the comparisons; those of ``ops`` are taken.
        say: called before each part with a line about it, the rows done and all rows.

    Returns:
        The record: ``schema``, ``time``, ``commit``, ``versions``, ``machine``, ``options``, ``limits``, ``parity``,
        ``rows`` and ``passed``, which is false when a parity check of anything measured failed or is missing.

    Raises:
        UserError: unknown op, number of threads that this machine lacks.
    """
    for op in ops:
        if op not in cases.WORKLOADS:
            raise UserError(f"unknown op {op!r}: expected {', '.join(cases.WORKLOADS)}")
    cores = os.cpu_count() or 1
    if threads is not None and not 1 <= threads <= cores:
        raise UserError(f"threads must be between 1 and {cores}, the cores of this machine, got {threads}")
    chosen = [row for row in rows if (not ops or row.ours.op in ops) and device in (None, row.device)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        return _Run(chosen, quick, say).record(list(ops), device)
    finally:
        torch.set_num_threads(before)


def pages() -> str:
    """``huge`` where torch's CPU allocator was told that it may use huge pages, ``default`` otherwise."""
    return "huge" if os.environ.get("THP_MEM_ALLOC_ENABLE", "0") == "1" else "default"


class _Run:
    def __init__(self, rows: list[Row], quick: bool, say: Callable[[str, int, int], None]) -> None:
        self.rows, self.quick = rows, quick
        self.done = 0
        self.say = lambda text: say(text, self.done, len(rows))
        self.effort = QUICK if quick else Effort()
        self.threads = torch.get_num_threads()
        self.parities: dict[tuple[str, str, str], Parity] = {}
        self.memories: dict[Case, int] = {}

    def record(self, ops: list[str], device: str | None) -> dict:
        self.say("limits of the machine")
        self.limits = first = limits()
        rows = []
        for row in self.rows:
            self.done = len(rows)
            rows.append(self.row(row))
        return {
            "schema": SCHEMA,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "versions": versions(),
            "machine": {
                "cpu": cpu_name(),
                "cores": os.cpu_count(),
                "isa": parity.isa(),
                "isas": parity.isas(),
                "torch_isa": torch.backends.cpu.get_cpu_capability(),
                "system": platform.system(),
                "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            },
            "options": {
                "ops": ops,
                "quick": self.quick,
                "threads": self.threads,
                "pages": pages(),
                "device": device,
            },
            "limits": {"units": {name: UNITS[name] for name in first}, "before": first, "after": limits()},
            "parity": [_parity_record(found) for found in self.parities.values()],
            "rows": rows,
            "passed": all(found.passed for found in self.parities.values()),
        }

    def row(self, row: Row) -> dict:
        """The row with its figures, or with the reason why it has none."""
        found = {
            "op": row.ours.op,
            "what": row.what,
            "against": row.versus,
            "quantity": row.quantity,
            "bar": row.bar,
            "bar_text": row.bar_text,
            "device": row.device,
            "isa": row.isa,
            "threads": row.threads or self.threads,
            "cases": {"ours": str(row.ours), "against": str(row.against)},
        }
        reason = self.left_out(row) or self.parity_reason(row)
        figures: dict = {}
        if reason is None:
            self.say(f"{row.ours.op}: {row.what}, against {row.versus}")
            try:
                figures = self.peaks(row) if row.quantity == "memory" else self.times(row)
            except MemoryOfCaseError as error:
                # Some GiB of the plain step may be more than there are.
                reason = str(error)
        if reason is None:
            # The bar is decided by what is shown and kept, not by digits that are dropped.
            ratio = figures["ratio"] if row.quantity == "memory" else figures["ratio"]["median"]
            return found | figures | {"measured_text": row.measured_text(ratio), "holds": row.holds(ratio)}
        return found | {"reason": reason, "holds": None}

    def left_out(self, row: Row) -> str | None:
        if row.device == "cuda" and not torch.cuda.is_available():
            return "needs a GPU"
        if row.isa is not None and row.isa != parity.isa():
            return f"needs the instruction set {row.isa}, in use is {parity.isa() or 'none'}"
        slow = row.quantity == "memory" or any(part in f"{row.ours} {row.against}" for part in SLOW)
        if self.quick and slow:
            return "left out by --quick"
        return cases.unavailable(row.ours) or cases.unavailable(row.against)

    def parity_reason(self, row: Row) -> str | None:
        for case in (row.ours, row.against):
            if case.contender not in BACKENDS:
                continue
            key = (case.op, case.dtype, case.contender)
            if key not in self.parities:
                self.say(f"parity of {case.op}, {case.dtype}, {case.contender}")
                self.parities[key] = parity.verify(cases.WORKLOADS, *key)
            if not self.parities[key].passed:
                return self.parities[key].reason
        return None

    def times(self, row: Row) -> dict:
        torch.set_num_threads(row.threads or self.threads)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                sides = {"ours": cases.prepare(row.ours), "against": cases.prepare(row.against)}
                timed = on_gpu if row.device == "cuda" else None
                found = pair(*sides.values(), self.effort, timed=timed)
        finally:
            torch.set_num_threads(self.threads)
        figures = {
            "seconds": {"ours": found.ours.record(), "against": found.against.record()},
            "ratio": found.speedup.record(),
        }
        if row.device == "cuda":
            figures["peak_bytes"] = {side: peak_on_gpu(function) for side, function in sides.items()}
        flop = cases.WORKLOADS[row.ours.op].flop
        if row.device == "cuda" and flop is not None:
            figures["tflops"] = {
                side: float(f"{flop(row.ours) / spread['median'] / 1e12:.4g}")
                for side, spread in figures["seconds"].items()
            }
        if row.quantity == "share":
            share = figures["tflops"]["ours"] * 1e3 / self.limits["gpu_gemm_bfloat16"]
            figures["ratio"] = Spread.of([float(f"{share:.4g}")]).record()
        return figures

    def peaks(self, row: Row) -> dict:
        peaks = {}
        for side, case in (("ours", row.ours), ("against", row.against)):
            if case not in self.memories:
                self.memories[case] = peak_memory(case, row.threads or self.threads)
            peaks[side] = self.memories[case]
        return {"bytes": peaks, "ratio": float(f"{peaks['against'] / peaks['ours']:.4g}")}


def _parity_record(found: Parity) -> dict:
    worst = found.worst
    return {
        "op": found.op,
        "dtype": found.dtype,
        "contender": found.contender,
        "isa": found.isa,
        "passed": found.passed,
        "checks": found.checks,
        "worst": None if worst is None else {"name": worst.name, "error": worst.error, "bound": worst.bound},
        "problem": found.problem,
    }
