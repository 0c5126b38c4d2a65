"""Run the table: limits of the machine, parity, paired times, peak memory; the result is plain JSON."""

import datetime
import gc
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch

from jmm_fast.bench import cases, parity
from jmm_fast.bench.case import BACKENDS, Case
from jmm_fast.bench.limits import UNITS, limits
from jmm_fast.bench.memory import Alone, MemoryOfCaseError, alone, data_wait, peak_on_gpu
from jmm_fast.bench.parity import Parity
from jmm_fast.bench.roofline import amounts, bound, rates
from jmm_fast.bench.rows import ROWS, Row
from jmm_fast.bench.timing import QUICK, Effort, Spread, on_gpu, pair
from jmm_fast.errors import UserError
from jmm_fast.train.environment import commit, cpu_name, versions

SCHEMA = 1
SLOW = ("/flex", "/compiled", "step/released/")
"""What ``quick`` leaves out, by a part of the case's name: compilers, and steps of many seconds. Peak memory too, which
needs fresh processes."""


def measure(
    ops: Sequence[str] = (),
    *,
    quick: bool = False,
    threads: int | None = None,
    device: str | None = None,
    minutes: float | None = None,
    rows: Sequence[Row] = ROWS,
    say: Callable[[str, int, int], None] = lambda text, done, total: None,
    keep: Callable[[dict], None] = lambda record: None,
) -> dict:
    """Measure the rows of some ops.

    Args:
        ops: workloads to measure; none means all.
        quick: fewer rounds, no peak memory, nothing that takes minutes.
        threads: of torch and of the kernels; None keeps torch's.
        device: take the rows of this kind of device only.
        minutes: no row begins later than this; those with a bar come first then.
        rows: the comparisons; those of ``ops`` are taken.
        say: called before each part with a line about it, the rows done and all rows.
        keep: called with the record so far after each row, ``complete`` False: whatever ends the process, these stay.

    Returns:
        The record: ``schema``, ``time``, ``commit``, ``versions``, ``machine``, ``options``, ``limits``, ``parity``,
        ``rows``, ``steps``, ``failed``, ``passed``, which is false when a parity check of anything measured failed or
        is missing, and ``complete``. A row that breaks off has the error as its ``reason`` and stands in ``failed``;
        the others go on.

    Raises:
        UserError: unknown op, number of threads that this machine lacks, minutes not above 0.
    """
    for op in ops:
        if op not in cases.WORKLOADS:
            raise UserError(f"unknown op {op!r}: expected {', '.join(cases.WORKLOADS)}")
    cores = os.cpu_count() or 1
    if threads is not None and not 1 <= threads <= cores:
        raise UserError(f"threads must be between 1 and {cores}, the cores of this machine, got {threads}")
    if minutes is not None and not minutes > 0:
        raise UserError(f"minutes must be above 0, got {minutes}")
    chosen = [row for row in rows if (not ops or row.ours.op in ops) and device in (None, row.device)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        return _Run(chosen, quick, minutes, say).record(list(ops), device, keep)
    finally:
        torch.set_num_threads(before)


def pages() -> str:
    """``huge`` where torch's CPU allocator was told that it may use huge pages, ``default`` otherwise."""
    return "huge" if os.environ.get("THP_MEM_ALLOC_ENABLE", "0") == "1" else "default"


class _Run:
    def __init__(
        self, rows: list[Row], quick: bool, minutes: float | None, say: Callable[[str, int, int], None]
    ) -> None:
        self.rows, self.quick, self.minutes = rows, quick, minutes
        self.begin = time.monotonic()
        self.done = 0
        self.say = lambda text: say(text, self.done, len(rows))
        self.effort = QUICK if quick else Effort()
        self.threads = torch.get_num_threads()
        self.parities: dict[tuple[str, str, str], Parity] = {}
        self.solitary: dict[tuple[Case, int], Alone] = {}
        self.problems: dict[str, str] = {}
        self.steps: dict[Case, dict] = {}

    def record(self, ops: list[str], device: str | None, keep: Callable[[dict], None]) -> dict:
        self.say("limits of the machine")
        first = limits(problems=self.problems)
        order = range(len(self.rows))
        if self.minutes is not None:
            order = sorted(order, key=lambda number: self.rows[number].bar is None)
        found: dict[int, dict] = {}
        head = {
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
                "minutes": self.minutes,
            },
        }

        def so_far(after: dict[str, float], complete: bool) -> dict:
            rows = [found[number] for number in sorted(found)]
            failed = [f"{row['cases']['ours']} against {row['cases']['against']}" for row in rows if row.get("failed")]
            return head | {
                "limits": {
                    "units": {name: UNITS[name] for name in first},
                    "before": first,
                    "after": after,
                    "problems": dict(self.problems),
                },
                "parity": [_parity_record(one) for one in self.parities.values()],
                "rows": rows,
                "steps": list(self.steps.values()),
                "failed": [*failed, *(f"limit {name}" for name in self.problems)],
                "passed": all(one.passed for one in self.parities.values()),
                "complete": complete,
            }

        for number in order:
            self.done = len(found)
            found[number] = self.row(self.rows[number])
            keep(so_far({}, False))
        return so_far(limits(problems=self.problems), True)

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
        figures: dict = {}
        failed = {}
        try:
            reason = self.left_out(row) or self.parity_reason(row)
            if reason is None:
                self.say(f"{row.ours.op}: {row.what}, against {row.versus}")
                figures = self.peaks(row) if row.quantity == "memory" else self.times(row)
        except MemoryOfCaseError as error:
            # Some GiB of the plain step may be more than there are.
            reason = str(error)
        except Exception as error:
            # A peer that does not compile, a kernel that does not run: the others are still worth knowing.
            reason = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            failed = {"failed": True}
        if reason is None:
            # The bar is decided by what is shown and kept, not by digits that are dropped.
            ratio = figures["ratio"] if row.quantity == "memory" else figures["ratio"]["median"]
            return found | figures | {"measured_text": row.measured_text(ratio), "holds": row.holds(ratio)}
        return found | {"reason": reason, "holds": None} | failed

    def left_out(self, row: Row) -> str | None:
        if row.device == "cuda" and not torch.cuda.is_available():
            return "needs a GPU"
        if row.isa is not None and row.isa != parity.isa():
            return f"needs the instruction set {row.isa}, in use is {parity.isa() or 'none'}"
        slow = row.quantity == "memory" or any(part in f"{row.ours} {row.against}" for part in SLOW)
        if self.quick and slow:
            return "left out by --quick"
        reason = cases.unavailable(row.ours) or cases.unavailable(row.against)
        if reason is None and self.minutes is not None and time.monotonic() - self.begin > 60 * self.minutes:
            return f"left out: {self.minutes:g} minutes were over"
        return reason

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
        pair_of_cases = {"ours": row.ours, "against": row.against}
        work = cases.WORKLOADS[row.ours.op]
        on_cuda = row.device == "cuda"
        sides, peaks = {}, {}
        torch.set_num_threads(row.threads or self.threads)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                for side, case in pair_of_cases.items():
                    if on_cuda and work.counts is not None:
                        # A captured step takes its memory when it is captured, not when it is called.
                        peaks[side] = peak_on_gpu(
                            lambda side=side, case=case: sides.update({side: cases.prepare(case)})
                        )
                    else:
                        sides[side] = cases.prepare(case)
                # Steps of many seconds: what no bar depends on is told by two rounds.
                effort = self.effort if row.bar is not None else replace(self.effort, least=2)
                found = pair(*sides.values(), effort, timed=on_gpu if on_cuda else None)
            seconds = {"ours": found.ours, "against": found.against}
            if on_cuda and work.counts is None:
                peaks = {side: peak_on_gpu(function) for side, function in sides.items()}
            # Beside the rounds and with their threads: a machine that others use too drifts within minutes.
            known = limits(only=bounds_of(pair_of_cases.values(), row.device), repeats=5, problems=self.problems)
            figures = {
                "seconds": {side: spread.record() for side, spread in seconds.items()},
                "ratio": found.speedup.record(),
                "roofline": {
                    side: _roofline(case, row.device, seconds[side].median, known)
                    for side, case in pair_of_cases.items()
                },
                "limits": known,
            }
            if row.ours.contender == "auto" and work.default is not None:
                figures["backend"] = work.default(row.ours)
            if peaks:
                figures["peak_bytes"] = peaks
            if work.counts is not None:
                for side, case in pair_of_cases.items():
                    if case not in self.steps:
                        waits = data_wait(sides[side]) if on_cuda else None
                        self.steps[case] = self.step(case, figures, side, peaks.get(side), waits)
        finally:
            torch.set_num_threads(self.threads)
            sides.clear()
            if on_cuda:
                gc.collect()
                torch.cuda.empty_cache()
        if row.quantity == "share":
            roof = figures["roofline"]["ours"]
            if roof is None or roof["by"] != "products":
                raise RuntimeError("the limit of the matrix units was not measured")
            figures["ratio"] = Spread.of([roof["share"]]).record()
        return figures

    def step(self, case: Case, figures: dict, side: str, peak: int | None, waits: float | None) -> dict:
        """What a step comes to: throughput, share of the limit of the products, memory, waits for batches."""
        seconds, roof = figures["seconds"][side], figures["roofline"][side]
        if peak is None and not self.quick:
            try:
                found = self.alone(case, self.threads)
                peak, waits = found.bytes, found.data_wait
            except MemoryOfCaseError as error:
                self.say(str(error))
        rates_of = {
            f"{what}_per_s": _digits(count / seconds["median"])
            for what, count in cases.WORKLOADS[case.op].counts(case).items()
        }
        return {
            "case": str(case),
            "seconds": seconds,
            **rates_of,
            "flop": None if roof is None else roof["flop"],
            "share_of_products": None if roof is None else roof["share"],
            "peak_bytes": peak,
            "data_wait_s": None if waits is None else _digits(waits),
            "data_wait": None if waits is None else _digits(waits / seconds["median"]),
        }

    def alone(self, case: Case, threads: int) -> Alone:
        if (case, threads) not in self.solitary:
            self.solitary[case, threads] = alone(case, threads)
        return self.solitary[case, threads]

    def peaks(self, row: Row) -> dict:
        threads = row.threads or self.threads
        peaks = {side: self.alone(case, threads).bytes for side, case in (("ours", row.ours), ("against", row.against))}
        return {"bytes": peaks, "ratio": float(f"{peaks['against'] / peaks['ours']:.4g}")}


def bounds_of(some: Iterable[Case], device: str) -> set[str]:
    """Names of the limits that hold for what the cases do."""
    found = set()
    for case in some:
        work = cases.WORKLOADS[case.op].work(case)
        found |= {name for by, names in rates(case, work, device).items() if amounts(work)[by] for name in names}
    return found


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _roofline(case: Case, device: str, seconds: float, known: dict[str, float]) -> dict | None:
    """What ``case`` comes to, the least time for that, what sets it, and its share of the measured time."""
    work = cases.WORKLOADS[case.op].work(case)
    least = bound(case, work, device, known)
    if least is None:
        return None
    return {
        "flop": work.flop,
        "bytes": work.bytes,
        "exps": work.exps,
        "seconds": float(f"{least.seconds:.6g}"),
        "by": least.by,
        "share": _digits(least.seconds / seconds),
    }


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
