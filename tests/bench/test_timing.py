"""Paired timing against a clock that is told what to say."""

import pytest
import torch

from jmm_fast.bench.memory import peak_on_gpu
from jmm_fast.bench.timing import Effort, Spread, on_gpu, pair


class Machine:
    """Functions of known cost on a machine that becomes slower with every call."""

    def __init__(self, drift=1.0):
        self.now, self.speed, self.drift, self.calls = 0.0, 1.0, drift, []

    def clock(self):
        return self.now

    def function(self, name, cost):
        def run():
            self.now += cost * self.speed
            self.speed *= self.drift
            self.calls.append(name)

        return run


def test_who_begins_changes_from_round_to_round():
    machine = Machine()
    pair(machine.function("a", 1.0), machine.function("b", 2.0), Effort(seconds=1e9, least=4, most=4), machine.clock)
    assert "".join(machine.calls) == "aabb" + "ab" + "ba" + "ab" + "ba"


def test_the_ratio_stays_where_the_machine_drifts():
    machine = Machine(drift=1.02)
    effort = Effort(seconds=1e9, least=20, most=20)
    found = pair(machine.function("a", 1.0), machine.function("b", 3.0), effort, machine.clock)
    assert found.speedup.median == pytest.approx(3.0, rel=0.02)
    assert found.ours.upper > 1.4 * found.ours.lower
    assert found.speedup.rounds == found.ours.rounds == 20


def test_rounds_fill_the_time_within_their_bounds():
    def rounds(cost, **effort):
        machine = Machine()
        found = pair(machine.function("a", cost), machine.function("b", cost), Effort(**effort), machine.clock)
        return found.ours.rounds

    assert rounds(0.5, seconds=10, least=3, most=100) == 10
    assert rounds(60.0, seconds=10, least=3, most=100) == 3
    assert rounds(0.01, seconds=10, least=3, most=100) == 100


def test_quick_functions_are_repeated_within_a_round():
    machine = Machine()
    effort = Effort(seconds=1e9, least=5, most=5, sample=0.01)
    found = pair(machine.function("a", 0.001), machine.function("b", 0.02), effort, machine.clock)
    assert machine.calls.count("a") == 2 + 5 * 10 and machine.calls.count("b") == 2 + 5
    assert found.ours.median == pytest.approx(0.001) and found.speedup.median == pytest.approx(20)


def test_a_function_of_seconds_is_not_called_for_nothing():
    machine = Machine()
    pair(machine.function("a", 10.0), machine.function("b", 3.0), Effort(seconds=1.0, least=2, most=9), machine.clock)
    assert machine.calls.count("a") == machine.calls.count("b") == 1 + 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_clock_and_memory_of_a_gpu():
    x = torch.rand(1 << 22, device="cuda")
    once, twice = (on_gpu(lambda count=count: [x.exp() for _ in range(count)], 50) for count in (20, 40))
    assert 1.5 < twice / once < 2.5
    assert x.nbytes <= peak_on_gpu(lambda: x.exp()) < 2 * x.nbytes


def test_spread():
    assert Spread.of([4.0]) == Spread(4.0, 4.0, 4.0, 1)
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([1 / 3, 1 / 3]).record() == {"median": 0.333333, "lower": 0.333333, "upper": 0.333333, "rounds": 2}
