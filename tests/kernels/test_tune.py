"""The search for block sizes: every entry exists, the fastest comes first, the table is left as it was."""

import importlib
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("tune", Path(__file__).parents[2] / "bench/tune.py")
tune = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tune)


def entry(**changes):
    return replace(next(item for item in tune.entries() if item.table == "FORWARD"), launch=lambda: None, **changes)


def test_every_entry_serves_something_that_is_shipped():
    for item in tune.entries():
        table = getattr(importlib.import_module(f"jmm_fast.kernels.{item.kernel}"), item.table)["sm_90"]
        candidate = next(iter(item.candidates))
        for shipped in table.values():
            assert len(candidate) == len(shipped), f"{item.kernel}.{item.table}"
        assert any(all(a <= b for a, b in zip(item.key, key, strict=True)) for key in table)


def test_the_fastest_comes_first_and_the_table_stays():
    from jmm_fast.kernels import topology_attention as kernel

    before = dict(kernel.FORWARD["sm_90"])

    def measure(run):
        rows, columns, warps, _ = kernel.FORWARD["sm_90"][item.key]
        if warps == 8:
            raise RuntimeError("out of resource")
        return rows + columns / 1000

    item = entry(candidates=[(128, 64, 4, 3), (16, 64, 4, 3), (16, 32, 4, 3), (16, 16, 8, 1)])
    found = tune.tune(item, "sm_90", measure)
    assert [tuple(one["sizes"]) for one in found][:2] == [(16, 32, 4, 3), (16, 64, 4, 3)]
    assert len(found) == 4 and sum(one["shipped"] for one in found) == 1
    assert kernel.FORWARD["sm_90"] == before


def test_the_table_stays_when_the_search_breaks_off():
    from jmm_fast.kernels import topology_attention as kernel

    before = dict(kernel.FORWARD["sm_90"])

    def interrupted(run):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune.tune(entry(), "sm_90", interrupted)
    assert kernel.FORWARD["sm_90"] == before


def test_the_shipped_sizes_come_first_then_their_neighbours():
    grid = [(rows, warps) for rows in (16, 32, 64, 128) for warps in (2, 4, 8)]
    found = tune.nearest_first((64, 4), grid)
    assert found[0] == (64, 4) and set(found[1:5]) == {(32, 4), (128, 4), (64, 2), (64, 8)}
    assert sorted(found) == sorted(grid) and found[-1] in ((16, 2), (16, 8))
    assert tune.nearest_first((48,), [(16,), (32,), (64,)]) == [(48,), (32,), (64,), (16,)]


def test_the_minutes_are_shared_out_and_a_late_entry_tries_the_shipped_one():
    now = [0.0]

    def measure(run):
        now[0] += 10
        return now[0]

    items = [item for item in tune.entries() if item.kernel == "topology_attention"][:3]
    wanted = [replace(item, launch=lambda: None) for item in items]
    record, written = {"commit": "c", "entries": {}}, []
    options = {"architecture": "sm_90", "measure": measure, "clock": lambda: now[0]}
    write = lambda record: written.append(sorted(record["entries"]))  # noqa: E731
    assert tune.search(wanted, record, write, minutes=3, **options) == []
    # A minute each; the candidate that is begun at its end is finished.
    assert [one["ran"] for one in record["entries"].values()] == [7, 6, 6]
    assert len(written) == 3 and len(written[0]) == 1
    assert tune.search(wanted, record, write, minutes=0, **options) == []
    assert [one["ran"] for one in record["entries"].values()] == [1, 1, 1]


def test_an_entry_that_breaks_off_is_named_and_the_others_go_on():
    def broken():
        raise RuntimeError("no memory\nat all")

    first, second, third = (entry(key=(2, 64, length)) for length in (128, 256, 512))
    first, second = replace(first, launch=broken), replace(second, candidates=[])
    record, ran = {"commit": "c", "entries": {"earlier": 1}}, []

    def measure(run):
        ran.append(run)
        if len(ran) == 1:
            raise ValueError("too many registers")
        return 1.0

    third = replace(third, candidates=[(16, 16, 4, 1)])
    failed = tune.search(
        [first, second, third], record, lambda record: None, architecture="sm_90", minutes=1, measure=measure
    )
    assert failed == ["topology_attention.FORWARD (2, 64, 128)", "topology_attention.FORWARD (2, 64, 256)"]
    assert list(record["entries"]) == ["earlier", "topology_attention.FORWARD (2, 64, 512)"]


def test_parts_by_name():
    every = tune.entries()
    assert tune.chosen([], every) == every
    assert {item.kernel for item in tune.chosen(["block", "clip_window"], every)} == {"block", "clip_window"}
    assert [item.table for item in tune.chosen(["block.MLP"], every)] == ["MLP"]
    assert tune.chosen(["few_tokens"], every) == []
    with pytest.raises(ValueError, match=r"unknown kernel or table 'block.NONE': expected .*block.MLP"):
        tune.chosen(["block.NONE"], every)


def test_backends_are_compared_at_few_tokens():
    ran = []

    def measure(run):
        ran.append(run())
        return float(len(ran))

    found = tune.few_tokens(measure, lengths=(5, 9), backends=("reference", "auto"), bodies=2, device="cpu")
    assert found[1] == {
        "tokens": 9,
        "reference forward": 5.0,
        "reference backward": 6.0,
        "auto forward": 7.0,
        "auto backward": 8.0,
    }
    assert ran[0].shape == (2, 8, 5, 32) and not ran[0].requires_grad
    assert [x.shape for x in ran[1]] == [(2, 5, 3, 8, 32), (8, 25, 25)]
