"""Every case of ``jmm_fast.bench`` by itself: op, shape, dtype, direction, contender.

``pytest bench --benchmark-only -k "motion_loss and cpu"`` times some. For ratios use ``jmm-fast bench``: it takes the
two sides in turn, where these times, minutes apart on a machine that drifts, say little about one another.
"""

import math
import time

import pytest
import torch

from jmm_fast.bench import cases

SECONDS = 0.5
"""About how long a case may take after its first calls."""
SLOW = 2.0
"""Seconds of a first call that is not repeated before the rounds."""


@pytest.mark.parametrize("case", cases.all_cases(), ids=str)
def test_case(benchmark, gate, case):
    reason = cases.unavailable(case)
    if reason is not None:
        pytest.skip(reason)
    gate(case)
    run = cases.prepare(case)
    if cases.device(case) == "cuda":
        launch = run

        def run():
            launch()
            torch.cuda.synchronize()

    for _ in range(2):
        begin = time.perf_counter()
        run()
        once = time.perf_counter() - begin
        if once > SLOW:
            break
    iterations = max(1, math.ceil(0.004 / once))
    rounds = min(25, max(1, int(SECONDS / (iterations * once))))
    benchmark.group = f"{case.op}/{case.shape}/{case.dtype}/{case.direction}"
    benchmark.extra_info["case"] = str(case)
    benchmark.pedantic(run, rounds=rounds, iterations=iterations)
