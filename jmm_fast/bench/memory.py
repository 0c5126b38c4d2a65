"""A case by itself: the memory that it takes, and how long a step waits for its batch.

``python -m jmm_fast.bench.memory CASE THREADS`` prints the peaks of a process that has merely loaded torch and of one
that computed the case, in bytes, and the waits as JSON.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from jmm_fast.bench.case import Case
from jmm_fast.memory import peak_bytes

CALLS = 2
"""Least calls of the case: a training step allocates the optimiser's state only at the end of the first."""

SECONDS, MOST = 2.0, 30
"""About how long, and how many at most, steps follow one another to tell how long they wait for their batches."""


@dataclass(frozen=True, slots=True)
class Alone:
    """A case in a process of its own.

    Attributes:
        bytes: at the peak, inputs included, beyond the process with torch loaded.
        data_wait: see :func:`data_wait`; None for a case without a stream of batches.
    """

    bytes: int
    data_wait: float | None


class MemoryOfCaseError(RuntimeError):
    """The process that was to be measured failed or was killed."""


def peak_on_gpu(function: Callable[[], object]) -> int:
    """Bytes that a call of ``function`` takes on the GPU at its peak, beyond what was held before it."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def data_wait(run) -> float:
    """Mean seconds that a step waits for its batch while steps follow one another.

    Args:
        run: a :class:`jmm_fast.bench.step.Step`. Its stream begins anew: nothing lies ready that was made during other
            work. The first wait, of which nothing could be made ahead, is left out.
    """
    run.restart()
    begin = time.perf_counter()
    while len(run.waited) < CALLS or (len(run.waited) < MOST and time.perf_counter() - begin < SECONDS):
        run()
    return statistics.mean(run.waited[1:])


def alone(case: Case, threads: int) -> Alone:
    """Compute the case in a fresh process.

    Raises:
        MemoryOfCaseError: the process failed; the last line that it wrote says why.
    """
    result = subprocess.run(
        [sys.executable, "-m", "jmm_fast.bench.memory", str(case), str(threads)],
        capture_output=True,
        text=True,
        env={**os.environ, "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE", "1")},
    )
    if result.returncode:
        last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise MemoryOfCaseError(f"memory of {case}: {last}")
    found = json.loads(result.stdout.splitlines()[-1])
    return Alone(found["peak"] - found["baseline"], found["data_wait"])


def main(text: str, threads: str) -> None:
    import torch

    from jmm_fast.bench.cases import WORKLOADS, prepare

    torch.set_num_threads(int(threads))
    baseline = peak_bytes()
    run = prepare(Case.parse(text))
    wait = None
    if WORKLOADS[Case.parse(text).op].counts is not None:
        wait = data_wait(run)
    else:
        for _ in range(CALLS):
            run()
    print(json.dumps({"baseline": baseline, "peak": peak_bytes(), "data_wait": wait}))


if __name__ == "__main__":
    main(*sys.argv[1:])
