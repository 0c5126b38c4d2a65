"""Paired timing: two functions in turn, so that the machine's drift hits both and their ratio stays."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of some rounds."""

    median: float
    lower: float
    upper: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper, len(values))

    def record(self) -> dict:
        """As JSON, to six digits."""
        return {key: float(f"{value:.6g}") if key != "rounds" else value for key, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Pair:
    """Seconds of a call of either side, and ``against / ours`` of each round: above 1, ours is faster."""

    ours: Spread
    against: Spread
    speedup: Spread


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: about how long a pair may take.
        least, most: rounds.
        sample: a round of a quick function repeats it for about this long; the clock and the scheduler are coarser
            than a call.
    """

    seconds: float = 3.0
    least: int = 3
    most: int = 41
    sample: float = 0.004


SLOW = 2.0
"""Seconds of a call from which on the first one suffices to say how often it is repeated."""

QUICK = Effort(seconds=0.8, least=2, most=15, sample=0.002)


def on_gpu(function: Callable[[], object], calls: int) -> float:
    """Seconds of a call on the GPU's own clock, from an idle GPU to an idle GPU."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def pair(
    ours: Callable[[], object],
    against: Callable[[], object],
    effort: Effort,
    clock: Callable[[], float] = time.perf_counter,
    timed: Callable[[Callable[[], object], int], float] | None = None,
) -> Pair:
    """Time ``ours`` and ``against`` in turn; who begins changes from round to round.

    Args:
        ours, against: functions without arguments. Each is called before the first round.
        effort: how many rounds.
        clock: seconds; for tests.
        timed: seconds of a call of a function that is called so many times; None reads the clock.
    """

    def by_clock(function: Callable[[], object], calls: int) -> float:
        begin = clock()
        for _ in range(calls):
            function()
        return (clock() - begin) / calls

    seconds = timed or by_clock
    sides = (ours, against)
    calls = []
    for side in sides:
        # The first call builds what is built once: compiled code, packed weights, thread pools.
        first = seconds(side, 1)
        once = first if first > SLOW else seconds(side, 1)
        calls.append(max(1, math.ceil(effort.sample / max(once, 1e-9))))
    times: tuple[list[float], list[float]] = ([], [])
    begin = clock()
    while len(times[0]) < effort.most:
        number = len(times[0])
        spent = clock() - begin
        if number >= effort.least and spent + spent / number > effort.seconds:
            break
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            times[side].append(seconds(sides[side], calls[side]))
    ratios = [b / a for a, b in zip(*times, strict=True)]
    return Pair(Spread.of(times[0]), Spread.of(times[1]), Spread.of(ratios))
