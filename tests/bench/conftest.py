"""The cases of the benchmarks at sizes that take no time."""

import pytest

from jmm_fast.bench import cases, topology_attention
from jmm_fast.bench.limits import limits

TINY = {
    "topology_attention": {
        "decoder": {"bodies": 2, "tokens": 50},
        "encoder": {"bodies": 2, "tokens": 11},
        "decoder_d16": {"bodies": 1, "tokens": 50},
        "decoder_d64": {"bodies": 1, "tokens": 50},
        "gpu_decoder": {"bodies": 2, "tokens": 50},
        "gpu_encoder": {"bodies": 2, "tokens": 11},
    },
    "motion_mask": {name: {"bodies": 2, "frames": 16} for name in ("b96", "b96_paper", "b8", "gpu_b1024")},
    "clip_window": {name: {"clips": 3, "window": 16} for name in ("ntu48", "gpu_ntu512")},
    "motion_loss": {name: {"bodies": 2, "frames": 16} for name in ("full", "masked", "gpu_masked")},
    "token_grid": {
        "gather": {"bodies": 2, "frames": 16, "visible": 9},
        "scatter": {"bodies": 2, "frames": 16, "visible": 9, "width": 8},
        "gpu_scatter": {"bodies": 2, "frames": 16, "visible": 9, "width": 8},
    },
    "block": {
        "decoder": {"bodies": 2, "tokens": 50, "width": 32, "heads": 2},
        "encoder": {"bodies": 2, "tokens": 11, "width": 32, "heads": 2},
        "gpu_decoder": {"bodies": 2, "tokens": 50, "width": 32, "heads": 2},
        "gpu_encoder": {"bodies": 2, "tokens": 11, "width": 32, "heads": 2},
    },
    "feeder": {name: {"clips": 3, "window": 16} for name in ("ntu48", "gpu_ntu48")},
    "step": {name: {"recipe": "demo", "clips": 1, "bodies": 2} for name in ("released", "small", "gpu_released")},
}


@pytest.fixture
def tiny(monkeypatch):
    """Every shape of every workload shrunk, each under its own name; parity of attention at two sizes only."""
    monkeypatch.setattr(topology_attention, "CHECKED", ((1, 32), (75, 32)))
    for op, work in cases.WORKLOADS.items():
        assert TINY[op].keys() == work.shapes.keys()
        for shape, sizes in TINY[op].items():
            monkeypatch.setitem(work.shapes, shape, work.shapes[shape] | sizes)


@pytest.fixture(autouse=True)
def _quick_limits(monkeypatch):
    monkeypatch.setattr(
        "jmm_fast.bench.record.limits", lambda **options: limits(**options | {"size": 64, "repeats": 1})
    )
