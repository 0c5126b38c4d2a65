"""Peak memory of a case: what a fresh process needs beyond one that has merely loaded torch.

``python -m jmm_fast.bench.memory CASE THREADS`` prints the two peaks in bytes as JSON.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable

from jmm_fast.bench.case import Case
from jmm_fast.memory import peak_bytes

CALLS = 2
"""Calls of the case: a training step allocates the optimiser's state only at the end of the first."""


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


def peak_memory(case: Case, threads: int) -> int:
    """Bytes of the case, inputs included, at the peak of a fresh process over the process with torch loaded.

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
    return found["peak"] - found["baseline"]


def main(text: str, threads: str) -> None:
    import torch

    from jmm_fast.bench.cases import prepare

    torch.set_num_threads(int(threads))
    baseline = peak_bytes()
    run = prepare(Case.parse(text))
    for _ in range(CALLS):
        run()
    print(json.dumps({"baseline": baseline, "peak": peak_bytes()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
