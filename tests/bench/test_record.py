"""The record as JSON, the table as text, the command."""

import json
import os
import platform

import pytest
import torch
from rich.console import Console

from jmm_fast.bench import measure
from jmm_fast.bench.case import Case
from jmm_fast.bench.memory import MemoryOfCaseError
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
        "passed",
    }
    assert record["schema"] == 1
    assert record["machine"]["cores"] == os.cpu_count() and record["machine"]["cpu"]
    assert record["options"] == {
        "ops": ["motion_loss", "motion_mask", "clip_window"],
        "quick": True,
        "threads": torch.get_num_threads(),
        "pages": pages(),
        "device": None,
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
    for row in record["rows"]:
        assert "reason" not in row or row["reason"] in shown(record)
    text = json.dumps(record)
    assert platform.node() not in text and os.getcwd() not in text and os.path.expanduser("~") not in text


def test_threads_of_a_row_and_of_the_run(tiny, monkeypatch):
    seen = {}

    def prepare(case):
        seen[case.contender] = torch.get_num_threads()
        return lambda: 1

    monkeypatch.setattr("jmm_fast.bench.cases.prepare", prepare)
    before = torch.get_num_threads()
    rows = [Row(ours=PLAIN, against=LOSS, threads=1)]
    monkeypatch.setattr("jmm_fast.bench.cases.unavailable", lambda case: None)
    monkeypatch.setattr("jmm_fast.bench.record.BACKENDS", ())
    record = measure(rows=rows, quick=True)
    assert set(seen.values()) == {1} and record["rows"][0]["threads"] == 1
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
    monkeypatch.setattr("jmm_fast.bench.record.limits", dict)
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
    # 96 bodies, 8 heads, two products of 750 x 750 x 32 at two operations each.
    assert row["tflops"] == {"ours": 55.3, "against": 18.43}
    assert "1 ms, 55.3 TFLOP/s" in shown(record)


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
        return 300 if case == PLAIN else 100

    monkeypatch.setattr("jmm_fast.bench.record.peak_memory", peak)
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

    monkeypatch.setattr("jmm_fast.bench.record.peak_memory", killed)
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
        (["--json", "absent/folder/record.json"], "--json must be a file in a folder that exists, got absent"),
        (["--fast"], "unknown option --fast"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    assert main(["bench", *arguments]) == 2
    text = capsys.readouterr().err
    assert message in text and text.count("\n") == 1


def test_an_unknown_op_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr("jmm_fast.bench.record.limits", lambda: pytest.fail("measured"))
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
    }
    captured = capsys.readouterr()
    assert "token_grid" in captured.out and "reference" in captured.out and "limits before and after" in captured.out
    assert "motion_loss: full, float32, forward" in captured.err
