"""The search for block sizes: every entry exists, the fastest comes first, the table is left as it was."""

import importlib
import importlib.util
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("tune", Path(__file__).parents[2] / "bench/tune.py")
tune = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tune)


def entry(**changes):
    from dataclasses import replace

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
