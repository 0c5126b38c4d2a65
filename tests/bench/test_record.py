"""The record as JSON, the table as text, the command."""

import json
import os
import platform

import pytest
import torch
from rich.console import Console

from jmm_fast.bench import cases, measure
from jmm_fast.bench.case import Case
from jmm_fast.bench.limits import limits
from jmm_fast.bench.memory import Alone, MemoryOfCaseError
from jmm_fast.bench.record import pages
from jmm_fast.bench.rows import ROWS, Row
from jmm_fast.bench.table import duration, table
from jmm_fast.cli import main
from jmm_fast.errors import UserError

LOSS = Case("motion_loss", "full", "float32", "forward", "cpu")
PLAIN = Case("motion_loss", "full", "float32", "forward", "reference")


def shown(record, width=200):
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table(record))
    return capture.get()


def test_the_record_holds_what_a_reader_needs(tiny):
    record = measure(["motion_loss", "motion_mask", "clip_window"], quick=True)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record.keys() == {
        "schema",
        "time",
        "commit",
        "versions",
        "machine",
        "options",
        "limits",
        "parity",
        "rows",
        "steps",
        "failed",
        "passed",
        "complete",
    }
    assert record["failed"] == [] and record["complete"] is True and record["steps"] == []
    assert record["schema"] == 1
    assert record["machine"]["cores"] == os.cpu_count() and record["machine"]["cpu"]
    assert record["options"] == {
        "ops": ["motion_loss", "motion_mask", "clip_window"],
        "quick": True,
        "threads": torch.get_num_threads(),
        "pages": pages(),
        "device": None,
        "minutes": None,
    }
    assert record["versions"]["torch"] == torch.__version__
    for moment in ("before", "after"):
        assert record["limits"][moment].keys() == record["limits"]["units"].keys()
    measured = [row for row in record["rows"] if "reason" not in row]
    assert len(record["rows"]) == sum(row.ours.op in record["options"]["ops"] for row in ROWS)
    for row in measured:
        for side in ("ours", "against"):
            spread = row["seconds"][side]
            assert 0 < spread["lower"] <= spread["median"] <= spread["upper"] and spread["rounds"] >= 2
        assert row["ratio"]["rounds"] == row["seconds"]["ours"]["rounds"]
        assert row["holds"] is (None if row["bar"] is None else row["ratio"]["median"] >= row["bar"])
        assert row["measured_text"] in shown(record)
        for side in ("ours", "against"):
            roof = row["roofline"][side]
            assert roof["by"] == "memory" and roof["bytes"] > 0
            assert roof["share"] == pytest.approx(roof["seconds"] / row["seconds"][side]["median"], rel=1e-3)
    for row in record["rows"]:
        assert "reason" not in row or row["reason"] in shown(record)
    text = json.dumps(record)
    assert platform.node() not in text and os.getcwd() not in text and os.path.expanduser("~") not in text


def test_threads_of_a_row_and_of_the_run(tiny, monkeypatch):
    seen = {}

    def prepare(case):
        seen[case.contender] = torch.get_num_threads()
        return lambda: 1

    threads_of_limits = []

    def limits_of(**options):
        threads_of_limits.append(torch.get_num_threads())
        return limits(**options | {"size": 64, "repeats": 1})

    monkeypatch.setattr("jmm_fast.bench.record.limits", limits_of)

    monkeypatch.setattr("jmm_fast.bench.cases.prepare", prepare)
    before = torch.get_num_threads()
    rows = [Row(ours=PLAIN, against=LOSS, threads=1)]
    monkeypatch.setattr("jmm_fast.bench.cases.unavailable", lambda case: None)
    monkeypatch.setattr("jmm_fast.bench.record.BACKENDS", ())
    record = measure(rows=rows, quick=True)
    assert set(seen.values()) == {1} and record["rows"][0]["threads"] == 1
    # What one thread is measured against is what one thread can do.
    assert threads_of_limits == [before, 1, before] and record["rows"][0]["limits"].keys() == {"copy_cached"}
    assert torch.get_num_threads() == before


def test_a_row_for_a_gpu_is_listed_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    record = measure(rows=[Row(ours=LOSS, against=PLAIN, bar=2.0, device="cuda")], quick=True)
    (row,) = record["rows"]
    assert row["reason"] == "needs a GPU" and row["holds"] is None and row["bar"] == 2.0
    assert record["passed"] is True and not record["parity"]
    assert "needs a GPU" in shown(record)


def test_a_row_for_a_gpu_tells_rates_and_memory(monkeypatch):
    """The GPU's clock and its memory are made up: what is recorded of them is looked at."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(
        "jmm_fast.bench.record.limits",
        lambda **_: {"gpu_gemm_bfloat16": 700e3, "gpu_copy": 4e3, "gpu_exp_float32": 4e3},
    )
    monkeypatch.setattr("jmm_fast.bench.record.BACKENDS", ())
    monkeypatch.setattr("jmm_fast.bench.cases.unavailable", lambda case: None)
    monkeypatch.setattr("jmm_fast.bench.cases.prepare", lambda case: case)
    seconds = {"triton": 1e-3, "flex": 3e-3}
    monkeypatch.setattr("jmm_fast.bench.record.on_gpu", lambda case, calls: seconds[case.contender])
    monkeypatch.setattr("jmm_fast.bench.record.peak_on_gpu", lambda case: len(case.contender))
    ours, against = (Case("topology_attention", "gpu_decoder", "bfloat16", "forward", name) for name in seconds)
    rows = [Row(ours=ours, against=against, bar=1.5, device="cuda"), Row(ours=LOSS, against=PLAIN)]
    record = measure(rows=rows, device="cuda")
    (row,) = record["rows"]
    assert row["ratio"]["median"] == 3.0 and row["holds"] is True
    assert row["peak_bytes"] == {"ours": 6, "against": 4}
    # 96 bodies, 8 heads, two products of 750 x 750 x 32 at two operations each, an exponential for each score.
    roof = row["roofline"]["ours"]
    assert roof["flop"] == 96 * 8 * 750**2 * 32 * 2 * 2 and roof["exps"] == 96 * 8 * 750**2
    assert roof["by"] == "exponentials" and roof["seconds"] == pytest.approx(96 * 8 * 750**2 / 4e12)
    assert roof["share"] == 0.108 and row["roofline"]["against"]["share"] == 0.036
    assert "11 %, exponentials" in shown(record)


def test_a_row_for_an_instruction_set_that_is_not_in_use(monkeypatch):
    monkeypatch.setattr("jmm_fast.bench.parity.isa", lambda: "baseline")
    record = measure(rows=[Row(ours=LOSS, against=PLAIN, isa="avx512bf16")], quick=True)
    assert record["rows"][0]["reason"] == "needs the instruction set avx512bf16, in use is baseline"


def test_what_cannot_run_here_is_listed_with_its_reason(monkeypatch):
    monkeypatch.setattr("jmm_fast.bench.cases.unavailable", lambda case: "no kernel" if case == LOSS else None)
    record = measure(rows=[Row(ours=LOSS, against=PLAIN)], quick=True)
    assert record["rows"][0]["reason"] == "no kernel" and record["passed"] is True


def test_peak_memory_of_both_sides(monkeypatch):
    asked = []

    def peak(case, threads):
        asked.append((case, threads))
        return Alone(300 if case == PLAIN else 100, None)

    monkeypatch.setattr("jmm_fast.bench.record.alone", peak)
    monkeypatch.setattr("jmm_fast.bench.cases.unavailable", lambda case: None)
    monkeypatch.setattr("jmm_fast.bench.record.BACKENDS", ())
    rows = [
        Row(ours=LOSS, against=PLAIN, bar=3.0, quantity="memory"),
        Row(ours=LOSS, against=PLAIN, bar=3.1, quantity="memory"),
    ]
    record = measure(rows=rows)
    assert [row["holds"] for row in record["rows"]] == [True, False]
    assert record["rows"][0]["bytes"] == {"ours": 100, "against": 300} and record["rows"][0]["ratio"] == 3.0
    assert [case for case, _ in asked] == [LOSS, PLAIN], "each case once"
    assert "3.00x less" in shown(record) and "missed" in shown(record)


def test_a_side_that_memory_does_not_suffice_for(monkeypatch):
    def killed(case, threads):
        raise MemoryOfCaseError(f"memory of {case}: exit code -9")

    monkeypatch.setattr("jmm_fast.bench.record.alone", killed)
    monkeypatch.setattr("jmm_fast.bench.cases.unavailable", lambda case: None)
    monkeypatch.setattr("jmm_fast.bench.record.BACKENDS", ())
    record = measure(rows=[Row(ours=LOSS, against=PLAIN, bar=3.0, quantity="memory")])
    assert record["rows"][0]["reason"] == f"memory of {LOSS}: exit code -9" and record["rows"][0]["holds"] is None


def test_words_of_a_bar():
    less = Row(ours=LOSS, against=PLAIN, bar=1.0, at_most=True)
    assert less.bar_text == "<= 1x its time" and less.measured_text(2.0) == "0.50x its time"
    assert less.holds(1.0) and not less.holds(0.99)
    more = Row(ours=LOSS, against=PLAIN, bar=3.5)
    assert more.bar_text == ">= 3.5x faster" and more.measured_text(3.456) == "3.46x faster"
    assert more.measured_text(41.23) == "41.2x faster"
    assert Row(ours=LOSS, against=PLAIN).holds(0.1) is None


def test_durations():
    assert [duration(x) for x in (12.34, 1.0, 0.4567, 0.0123, 99.9e-6)] == [
        "12.3 s",
        "1 s",
        "457 ms",
        "12.3 ms",
        "99.9 us",
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing"], "unknown op 'nothing': expected topology_attention, motion_mask"),
        (["--threads", "0"], "threads must be between 1 and"),
        (["--threads", "100000"], "threads must be between 1 and"),
        (["--minutes", "0"], "minutes must be above 0, got 0"),
        (["--json", "absent/folder/record.json"], "--json must be a file in a folder that exists, got absent"),
        (["--fast"], "unknown option --fast"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    assert main(["bench", *arguments]) == 2
    text = capsys.readouterr().err
    assert message in text and text.count("\n") == 1


def test_an_unknown_op_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr("jmm_fast.bench.record.limits", lambda **_: pytest.fail("measured"))
    with pytest.raises(UserError):
        measure(["motion_loss", "nothing"])


def test_the_command_prints_the_table_and_writes_the_record(tiny, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")  # the command changes it; the test puts it back
    out = tmp_path / "record.json"
    arguments = ["--quick", "--threads", "1", "--pages", "default", "--json", str(out)]
    assert main(["bench", "token_grid", "motion_loss", *arguments]) == 0
    record = json.loads(out.read_text())
    assert record["options"] == {
        "ops": ["token_grid", "motion_loss"],
        "quick": True,
        "threads": 1,
        "pages": "default",
        "device": None,
        "minutes": None,
    }
    captured = capsys.readouterr()
    assert "token_grid" in captured.out and "reference" in captured.out and "limits before and after" in captured.out
    assert "motion_loss: full, float32, forward" in captured.err


STEP = Case("step", "small", "float32", "step", "auto")
PLAIN_STEP = Case("step", "small", "float32", "step", "reference")


def test_a_step_tells_throughput_share_memory_and_waits(tiny, monkeypatch):
    monkeypatch.setattr("jmm_fast.bench.record.alone", lambda case, threads: Alone(3 << 20, 0.001))
    monkeypatch.setattr("jmm_fast.bench.record.BACKENDS", ())
    rows = [Row(ours=STEP, against=PLAIN_STEP, bar=2.0), Row(ours=STEP, against=PLAIN_STEP, quantity="memory")]
    record = measure(rows=rows)
    assert [step["case"] for step in record["steps"]] == [str(STEP), str(PLAIN_STEP)], "each once"
    flop = cases.WORKLOADS["step"].work(STEP).flop
    beside = record["rows"][0]["limits"]
    assert beside.keys() == {"gemm_float32", "onednn_gemm_float32"}
    best = max(beside.values()) * 1e9
    for side, step in zip(("ours", "against"), record["steps"], strict=True):
        seconds = record["rows"][0]["seconds"][side]["median"]
        assert step["seconds"]["median"] == seconds and step["flop"] == flop
        # The tiny step is one clip of two bodies.
        assert step["samples_per_s"] == pytest.approx(1 / seconds, rel=1e-3)
        assert step["bodies_per_s"] == pytest.approx(2 / seconds, rel=1e-3)
        assert step["share_of_products"] == pytest.approx(flop / best / seconds, rel=1e-3)
        assert step["peak_bytes"] == 3 << 20 and step["data_wait_s"] == 0.001
        assert step["data_wait"] == pytest.approx(0.001 / seconds, rel=1e-3)
        assert f"{step['samples_per_s']:.3g}" in shown(record) and "3 MiB" in shown(record)
    assert "small, float32, default backends" in shown(record) and "small, float32, reference" in shown(record)


def test_a_step_whose_process_was_killed_has_no_peak(tiny, monkeypatch):
    def killed(case, threads):
        raise MemoryOfCaseError(f"memory of {case}: exit code -9")

    monkeypatch.setattr("jmm_fast.bench.record.alone", killed)
    monkeypatch.setattr("jmm_fast.bench.record.BACKENDS", ())
    record = measure(rows=[Row(ours=STEP, against=PLAIN_STEP)])
    assert [step["peak_bytes"] for step in record["steps"]] == [None, None] and record["failed"] == []
    assert record["steps"][0]["samples_per_s"] > 0 and "small, float32, reference" in shown(record)


@pytest.fixture
def broken_token_grid(tiny, monkeypatch):
    """A kernel that breaks off when it is timed, as one that is too large for a GPU would."""
    right = cases.WORKLOADS["token_grid"].prepare

    def prepare(case):
        if case.op == "token_grid":
            raise RuntimeError("out of resource:\nshared memory")
        return cases.WORKLOADS[case.op].prepare(case)

    assert right is not None
    monkeypatch.setattr("jmm_fast.bench.cases.prepare", prepare)


def test_a_case_that_breaks_off_is_named_and_the_others_go_on(broken_token_grid, capsys, tmp_path):
    out = tmp_path / "record.json"
    assert main(["bench", "token_grid", "motion_loss", "--quick", "--device", "cpu", "--json", str(out)]) == 1
    record = json.loads(out.read_text())
    broken = [row for row in record["rows"] if row.get("failed")]
    assert [row["op"] for row in broken] == ["token_grid"] * 2 and record["complete"] is True
    assert {row["reason"] for row in broken} == {"failed: RuntimeError: out of resource: shared memory"}
    assert record["failed"] == [f"{row['cases']['ours']} against {row['cases']['against']}" for row in broken]
    assert all("seconds" in row for row in record["rows"] if row["op"] == "motion_loss")
    told = " ".join(capsys.readouterr().out.split())
    assert "failed: token_grid/gather/float32/forward/cpu against token_grid/gather/float32/forward/reference" in told


def test_what_was_measured_stays_when_the_command_is_ended(tiny, monkeypatch, tmp_path):
    right = cases.WORKLOADS["motion_loss"].prepare
    calls = []

    def prepare(case):
        calls.append(case)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return right(case)

    monkeypatch.setattr("jmm_fast.bench.cases.prepare", prepare)
    out = tmp_path / "record.json"
    assert main(["bench", "motion_loss", "--quick", "--device", "cpu", "--json", str(out)]) == 130
    record = json.loads(out.read_text())
    assert record["complete"] is False and len(record["rows"]) == 1 and "seconds" in record["rows"][0]


def test_minutes_end_the_table_and_bars_come_first(tiny, monkeypatch):
    now = [0.0]
    order = []

    def prepare(case):
        now[0] += 31
        order.append(case.direction)
        return lambda: 1

    monkeypatch.setattr("jmm_fast.bench.record.time.monotonic", lambda: now[0])
    monkeypatch.setattr("jmm_fast.bench.cases.prepare", prepare)
    monkeypatch.setattr("jmm_fast.bench.cases.unavailable", lambda case: None)
    monkeypatch.setattr("jmm_fast.bench.record.BACKENDS", ())
    there, back = (
        [Case("motion_loss", "full", "float32", direction, name) for name in ("cpu", "reference")]
        for direction in ("forward", "forward_backward")
    )
    rows = [
        Row(ours=there[0], against=there[1]),
        Row(ours=back[0], against=back[1], bar=1e-9),
        Row(ours=there[1], against=there[0]),
    ]
    record = measure(rows=rows, quick=True, minutes=1)
    assert order == ["forward_backward"] * 2, "two sides of half a minute each"
    assert [row.get("reason") for row in record["rows"]] == [late := "left out: 1 minutes were over", None, late]
    assert record["failed"] == [] and record["complete"] is True
    assert record["options"]["minutes"] == 1


def test_a_step_on_a_gpu(tiny, monkeypatch):
    """On the CPU, clock and memory of a GPU made up: memory is that of making the step, waits are measured at once."""
    work = cases.WORKLOADS["step"]
    monkeypatch.setitem(work.shapes, "gpu_released", work.shapes["gpu_released"] | {"device": "cpu"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    rates = {"gpu_gemm_float32": 50.0, "gpu_gemm_bfloat16": 700.0}
    monkeypatch.setattr("jmm_fast.bench.record.limits", lambda **_: rates)
    monkeypatch.setattr("jmm_fast.bench.record.BACKENDS", ())
    monkeypatch.setattr("jmm_fast.bench.cases.unavailable", lambda case: None)
    made = []

    def on_gpu(step, calls):
        step()
        return 0.25 if step is made[0] else 0.5

    def peak_on_gpu(function):
        function()
        return 9 << 20

    right = cases.prepare
    monkeypatch.setattr("jmm_fast.bench.cases.prepare", lambda case: made.append(right(case)) or made[-1])
    monkeypatch.setattr("jmm_fast.bench.record.on_gpu", on_gpu)
    monkeypatch.setattr("jmm_fast.bench.record.peak_on_gpu", peak_on_gpu)
    monkeypatch.setattr("jmm_fast.bench.memory.MOST", 4)
    ours, plain = (Case("step", "gpu_released", "bfloat16", "step", name) for name in ("auto", "reference"))
    rows = [
        Row(ours=ours, against=plain, bar=2.0, device="cuda"),
        Row(ours=ours, against=ours, bar=0.4, quantity="share", device="cuda"),
    ]
    record = measure(rows=rows[:1], device="cuda")
    assert record["failed"] == [] and record["rows"][0]["holds"] is True
    assert [step["case"] for step in record["steps"]] == [str(ours), str(plain)]
    share = work.work(ours).flop / 700e9 / 0.25
    for step, slower in zip(record["steps"], (1, 2), strict=True):
        assert step["samples_per_s"] == 4 / slower and step["bodies_per_s"] == 8 / slower
        assert step["share_of_products"] == pytest.approx(share / slower, rel=1e-3)
        assert step["peak_bytes"] == 9 << 20 and 0 <= step["data_wait_s"] < 1
    made.clear()
    (row,) = measure(rows=rows[1:], device="cuda")["rows"]
    assert row["ratio"]["median"] == pytest.approx(share, rel=1e-3) and row["holds"] is (share >= 0.4)
    assert row["measured_text"] == f"{100 * row['ratio']['median']:.0f} % of it"
