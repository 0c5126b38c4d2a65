"""Every case runs, and both sides of every comparison compute the same."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from jmm_fast import ops, reference
from jmm_fast.bench import cases
from jmm_fast.bench import topology_attention as attention
from jmm_fast.bench.case import BACKENDS, Case
from jmm_fast.bench.inputs import clip_lengths, moving_clips
from jmm_fast.bench.limits import UNITS, limits
from jmm_fast.bench.memory import MemoryOfCaseError, peak_bytes, peak_memory
from jmm_fast.bench.numpy_feeder import FEEDERS, dense_sample, fed_by_workers, feed
from jmm_fast.bench.rows import CONTENDERS, ROWS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("case", [case for case in cases.all_cases() if case.contender != "flex"], ids=str)
def test_every_case_runs(tiny, case):
    reason = cases.unavailable(case)
    if reason is not None:
        pytest.skip(reason)
    run = cases.prepare(case)
    run()
    assert run() is not None


def test_rows_name_cases_that_there_are():
    known = set(cases.all_cases())
    for row in ROWS:
        assert {row.ours, row.against} <= known
        assert row.ours.contender in BACKENDS, "what is promised is ours, and checked"
        assert row.against.contender in CONTENDERS
        assert row.ours.op == row.against.op and row.ours.shape == row.against.shape
        assert row.device == cases.device(row.ours)
    assert len({(row.ours, row.against, row.quantity, row.threads) for row in ROWS}) == len(ROWS)


def test_every_promise_of_the_kernels_is_a_row():
    """Op, dtype, direction, peer and bar of each promise."""
    promised = {
        (
            row.ours.op,
            row.ours.dtype,
            row.ours.direction,
            row.against.contender,
            row.against.dtype,
            row.quantity,
        ): row.bar
        for row in ROWS
        if row.bar is not None and row.device == "cpu"
    }
    op, single, half = "topology_attention", "float32", "bfloat16"
    assert promised == {
        (op, single, "forward", "sdpa", single, "time"): 1.0,
        (op, single, "forward_backward", "sdpa", single, "time"): 1.0,
        (op, single, "forward_backward", "sdpa_mask", single, "time"): 3.0,
        (op, single, "forward", "reference", single, "time"): 6.0,
        (op, single, "forward_backward", "reference", single, "time"): 3.5,
        (op, half, "forward", "cpu", single, "time"): 1.8,
        (op, half, "forward_backward", "cpu", single, "time"): 1.8,
        ("motion_mask", single, "forward", "reference", single, "time"): 10.0,
        ("clip_window", single, "forward", "numpy", single, "time"): 30.0,
        ("motion_loss", single, "forward_backward", "reference", single, "time"): 5.0,
        ("step", single, "step", "reference", single, "time"): 2.2,
        ("step", half, "step", "reference", single, "time"): 4.0,
        ("step", single, "step", "reference", single, "memory"): 3.0,
        ("step", half, "step", "reference", single, "memory"): 3.0,
    }


def test_every_promise_for_a_gpu_is_a_row():
    promised = {
        (row.ours.op, row.ours.shape, row.ours.dtype, row.ours.direction, row.against.contender): row.bar_text
        for row in ROWS
        if row.bar is not None and row.device == "cuda"
    }
    bars = {
        "flex": ">= 1.5x faster",
        "sdpa": "<= 1.15x its time",
        "sdpa_mask": ">= 4x faster",
        "reference": ">= 15x faster",
    }
    expected = {
        ("topology_attention", shape, "bfloat16", direction, peer): bar
        for shape in ("gpu_decoder", "gpu_encoder")
        for direction in ("forward", "forward_backward")
        for peer, bar in bars.items()
    }
    expected["motion_mask", "gpu_b1024", "float32", "forward", "reference"] = ">= 15x faster"
    expected["step", "gpu_released", "bfloat16", "step", "reference"] = ">= 8x faster"
    expected["step", "gpu_released", "bfloat16", "step", "auto"] = ">= 40 % of it"
    assert promised == expected


def test_products_of_the_released_step():
    """One sample is two bodies; a forward pass of it takes 19.7 GFLOP with the embeddings and heads, which are 1 %."""
    flop = cases.WORKLOADS["step"].flop(Case("step", "gpu_released", "bfloat16", "step", "auto"))
    assert 0.98 < flop / (48 * 3 * 19.7e9) < 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cases_of_a_gpu_need_one():
    for case in cases.all_cases():
        if cases.device(case) == "cuda":
            assert cases.unavailable(case) == "needs a GPU"
        elif case.contender in ("triton", "cuda"):
            assert cases.unavailable(case) == f"{case.contender} has no kernel for CPU tensors"


def test_cases_by_name():
    case = Case("motion_loss", "full", "float32", "forward", "cpu")
    assert Case.parse(str(case)) == case
    for part in ("op", "shape", "dtype", "direction", "contender"):
        with pytest.raises(ValueError, match=f"{part}.* must be one of .*, got 'none'"):
            cases.prepare(dataclasses.replace(case, **{part: "none"}))


def test_what_cannot_run_says_why():
    case = Case("topology_attention", "decoder", "float32", "forward_backward", "flex")
    assert cases.unavailable(case) == "FlexAttention has no backward pass on the CPU"


def test_a_compiled_peer_needs_a_compiler(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    case = Case("topology_attention", "decoder", "float32", "forward", "flex")
    assert cases.unavailable(case) == "FlexAttention is compiled on first use, and there is no C++ compiler"


@pytest.mark.parametrize("joints_of", ["grid", "body"])
def test_attention_peers_compute_the_same(joints_of):
    q, k, v = torch.randn(3, 2, 2, 30, 16)
    table = torch.randn(2, 25, 25)
    joints = torch.arange(30) % 25 if joints_of == "grid" else torch.randint(0, 25, (2, 30))
    expected = ops.topology_attention(q, k, v, table, joints, backend="reference")
    torch.testing.assert_close(attention.sdpa_mask(q, k, v, table, joints), expected)
    plain = ops.topology_attention(q, k, v, backend="reference")
    torch.testing.assert_close(attention.sdpa(q, k, v, table, joints), plain)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("joints_of", ["grid", "body"])
def test_flex_computes_the_same(monkeypatch, joints_of):
    # Not compiled: the same function, which takes seconds to compile.
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention, "_compiled", lambda: flex_attention)
    q, k, v = torch.randn(3, 2, 2, 30, 16)
    table = torch.randn(2, 25, 25)
    joints = torch.arange(30) % 25 if joints_of == "grid" else torch.randint(0, 25, (2, 30))
    expected = ops.topology_attention(q, k, v, table, joints, backend="reference")
    torch.testing.assert_close(attention.flex(q, k, v, table, joints), expected)


def test_processes_feed_what_one_does():
    samples = [dense_sample(moving_clips(2, frames).numpy() + 1) for frames in (40, 90)]
    fed = fed_by_workers(samples, "numpy", 16, 2, pin_memory=False)
    draws = [np.random.default_rng(worker) for worker in (0, 1)]
    for number in range(6):
        torch.manual_seed(0)  # the angles are torch's, of each process
        expected = feed(samples, "numpy", 16, draws[number % 2])
        found = next(fed)
        assert found.shape == expected.shape == (4, 16, 25, 3)
        # Turned by other angles: the distances to the origin are the same.
        torch.testing.assert_close(found.norm(dim=-1), expected.norm(dim=-1))


@pytest.mark.parametrize("feeder", FEEDERS)
@pytest.mark.parametrize("frames", [20, 64, 90, 300])
def test_feeders_compute_what_clip_window_does(feeder, frames):
    poses = moving_clips(2, frames) + 1
    angles = torch.tensor([0.3, -0.2, 0.1])
    share, place = 0.6, 0.4
    found = FEEDERS[feeder](dense_sample(poses.numpy()), share, place, angles, 120)
    length = max(min(64, frames), int(frames * share))
    begin = int(place * (frames - length + 1))
    expected = reference.clip_window(
        poses.flatten(0, 1),
        torch.tensor([begin, frames + begin]),
        torch.tensor([length, length]),
        angles.expand(2, 3),
        window=120,
    )
    assert found.is_contiguous() and found.shape == (2, 120, 25, 3)
    # A float32 frame place of 300 frames is off by 1e-5 of a frame, which moves a joint by as much of its step.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_lengths_are_spread_as_told():
    lengths = clip_lengths(4000)
    assert lengths.min() >= 32 and lengths.max() <= 300
    assert 57 <= np.quantile(lengths, 0.25) <= 60 and 93 <= np.quantile(lengths, 0.75) <= 96


def test_limits_are_rates():
    found = limits(size=64, repeats=2)
    gpu = {name for name in UNITS if name.startswith("gpu_") and not torch.cuda.is_available()}
    assert found.keys() == UNITS.keys() - gpu and all(value > 0 for value in found.values())


def test_peak_memory_counts_what_a_case_needs():
    # Clips and predictions of 96 bodies are 6.6 MiB; the plain twin keeps a dozen tensors of their size.
    case = Case("motion_loss", "full", "float32", "forward_backward", "reference")
    assert 6 * 2**20 < peak_memory(case, 1) < 300 * 2**20
    assert peak_bytes() > 50 * 2**20, "torch is loaded"


def test_peak_memory_of_a_case_that_fails():
    with pytest.raises(
        MemoryOfCaseError, match=r"memory of motion_loss/none.*: ValueError: shape of motion_loss must be"
    ):
        peak_memory(Case("motion_loss", "none", "float32", "forward", "reference"), 1)


def test_the_benchmarks_of_pytest_take_the_same_cases(tmp_path):
    out = tmp_path / "cases.json"
    command = ["-m", "pytest", "bench", "-q", "--benchmark-only", f"--benchmark-json={out}"]
    # A worker of pytest-xdist tells its children so, and pytest-benchmark measures nothing there.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    result = subprocess.run(
        [sys.executable, *command, "-k", "motion_mask and b8 and reference", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 passed" in result.stdout and f"{sum(1 for _ in cases.all_cases()) - 1} deselected" in result.stdout
    text = out.read_text()
    assert '"case": "motion_mask/b8/float32/forward/reference"' in text and '"node"' not in text
    assert str(ROOT) not in text
