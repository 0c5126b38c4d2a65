"""Every case runs, and both sides of every comparison compute the same."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from jmm_fast import ops, reference
from jmm_fast.bench import cases
from jmm_fast.bench import limits as limits_module
from jmm_fast.bench import topology_attention as attention
from jmm_fast.bench.case import BACKENDS, Case
from jmm_fast.bench.inputs import clip_lengths, moving_clips
from jmm_fast.bench.limits import UNITS, limits
from jmm_fast.bench.memory import CALLS, MemoryOfCaseError, alone, data_wait, peak_bytes
from jmm_fast.bench.numpy_feeder import FEEDERS, dense_sample, fed_by_workers, feed
from jmm_fast.bench.rows import CONTENDERS, ROWS
from jmm_fast.data.prefetch import ahead

ROOT = Path(__file__).resolve().parents[2]


COMPILED = ("flex", "compiled")
"""Take half a minute to compile on the CPU."""


@pytest.mark.parametrize("case", [case for case in cases.all_cases() if case.contender not in COMPILED], ids=str)
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


def test_each_bar_of_attention_on_a_gpu_is_that_of_what_auto_takes(monkeypatch):
    """What ``ops.topology_attention`` chooses for the case's tensors, with and without the CUDA kernel."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from jmm_fast.ops import backend

    right = backend.choose

    class Chosen(Exception):
        """Before anything is launched."""

    def choose(*args, **kwargs):
        raise Chosen(right(*args, **kwargs))

    op = sys.modules["jmm_fast.ops.topology_attention"]
    monkeypatch.setattr(op, "choose", choose)
    monkeypatch.setattr(op, "_room", lambda dim, joints, device: 128)
    barred = {row.ours for row in ROWS if row.ours.op == "topology_attention" and row.device == "cuda" and row.bar}
    assert {case.contender for case in barred} == {"auto"} and len(barred) == 4
    for built in (None, "not built"):
        monkeypatch.setitem(backend._found, ("topology_attention", "cuda"), built)
        monkeypatch.setitem(backend._found, ("topology_attention", "triton"), None)
        found = {}
        for case in barred:
            size = cases.WORKLOADS[case.op].shapes[case.shape]
            with FakeTensorMode():
                q = torch.empty(2, 8, size["tokens"], 32, device="cuda", dtype=case.torch_dtype)
                table = torch.empty(8, 25, 25, device="cuda")
                joints = torch.empty(size["tokens"], device="cuda", dtype=torch.int64)
                with pytest.raises(Chosen) as chosen:
                    ops.topology_attention(q, q, q, table, joints)
            found[case.shape] = cases.WORKLOADS[case.op].default(case)
            assert found[case.shape] == str(chosen.value)
        assert found == {"gpu_decoder": "triton", "gpu_encoder": "triton" if built else "cuda"}


def test_products_of_the_released_step():
    """One sample is two bodies; a forward pass of it takes 19.7 GFLOP with the embeddings and heads, which are 1 %."""
    flop = cases.WORKLOADS["step"].work(Case("step", "gpu_released", "bfloat16", "step", "auto")).flop
    assert 0.98 < flop / (48 * 3 * 19.7e9) < 1


def test_a_step_takes_batches_of_its_store(tiny):
    run = cases.prepare(Case("step", "released", "float32", "step", "auto"))
    losses = [run().item() for _ in range(6)]
    # Four batches, in an order drawn once for each time round; the network learns a little with each.
    assert len(run.waited) == 6 and all(wait >= 0 for wait in run.waited) and len(set(losses)) == 6
    plain = cases.prepare(Case("step", "released", "float32", "step", "reference"))
    expected = [plain().item() for _ in range(6)]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=0)


def test_steps_that_wait_for_their_batches_say_so(tiny, monkeypatch):
    """Batches that take longer to make than a step: what was made during other work does not count."""
    run = cases.prepare(Case("step", "small", "float32", "step", "auto"))
    items = run._items

    def slow(epoch):
        for batch in items(epoch):
            time.sleep(0.2)
            yield batch

    run._items = lambda epoch: ahead(slow(epoch), 2)
    run.restart()
    next(run._stream)
    time.sleep(0.5)  # two batches lie ready
    monkeypatch.setattr("jmm_fast.bench.memory.SECONDS", 0.8)
    spent = time.perf_counter()
    wait = data_wait(run)
    spent = time.perf_counter() - spent
    assert CALLS <= len(run.waited) <= 1 + spent / 0.2
    step = spent / len(run.waited) - 0.2
    assert 0.2 - 2 * step - 0.05 < wait < 0.25


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_compiled_step_is_the_reference(tiny, monkeypatch, dtype):
    made = []

    def backend(module, _inputs):
        made.append(module)
        return module.forward

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, **options, backend=backend))
    case = Case("step", "released", dtype, "step", "compiled")
    run = cases.prepare(case)
    assert len(made) == 1 and not run.waited, "compiled before it is timed"
    plain = cases.prepare(dataclasses.replace(case, contender="reference"))
    # The step that compiled took the first batch, and the stream began anew.
    plain()
    plain.restart()
    losses = [run() for _ in range(3)]
    assert len(made) == 1 and len(run.waited) == 3
    torch.testing.assert_close(losses, [plain() for _ in range(3)])


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
    case = Case("step", "released", "bfloat16", "step", "compiled")
    assert cases.unavailable(case) == "the step is compiled on first use, and there is no C++ compiler"


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


def test_a_limit_that_cannot_be_measured_leaves_the_others(monkeypatch):
    def broken():
        raise RuntimeError("no\nsuch unit")

    monkeypatch.setattr(limits_module, "_exponentials", broken)
    problems = {}
    found = limits(size=64, repeats=1, problems=problems)
    assert problems == {"exp_float32": "RuntimeError: no such unit"} and "exp_float32" not in found
    assert found["gemm_float32"] > 0 and found["copy_cached"] > 0
    with pytest.raises(RuntimeError):
        limits(size=64, repeats=1)


def test_peak_memory_counts_what_a_case_needs():
    # Clips and predictions of 96 bodies are 6.6 MiB; the plain twin keeps a dozen tensors of their size.
    case = Case("motion_loss", "full", "float32", "forward_backward", "reference")
    found = alone(case, 1)
    assert 6 * 2**20 < found.bytes < 300 * 2**20 and found.data_wait is None
    assert peak_bytes() > 50 * 2**20, "torch is loaded"


def test_a_step_in_a_process_of_its_own_says_how_long_it_waits():
    found = alone(Case("step", "small", "bfloat16", "step", "auto"), 1)
    assert found.bytes > 20 * 2**20 and 0 <= found.data_wait < 1


def test_peak_memory_of_a_case_that_fails():
    with pytest.raises(
        MemoryOfCaseError, match=r"memory of motion_loss/none.*: ValueError: shape of motion_loss must be"
    ):
        alone(Case("motion_loss", "none", "float32", "forward", "reference"), 1)


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
