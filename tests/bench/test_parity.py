"""The parity rule, and that no figure leaves without it."""

import json

import pytest
import torch

from jmm_fast import ops
from jmm_fast.bench import cases, measure, parity
from jmm_fast.bench.case import Check
from jmm_fast.cli import main
from jmm_fast.ops.backend import unavailable

needs_kernel = pytest.mark.skipif(
    unavailable("topology_attention", "cpu") is not None, reason="the C++ extension is not built"
)


def test_the_rule():
    exact = torch.tensor([1.0, -4.0], dtype=torch.float64)
    same = exact + torch.tensor([0.0, 0.01])
    (check,) = parity.compare(("out",), [exact + 0.0215], [same], [exact], 0.001)
    assert check.bound == pytest.approx(2 * (0.01 + 0.001 * 4)) and check.error == pytest.approx(0.0215)
    assert check.passed
    (gradient,) = parity.compare(("dq",), [exact + 0.03], [same], [exact], 0.001, where="N=1 ")
    assert gradient.bound == pytest.approx(1.5 * check.bound) and gradient.name == "N=1 dq" and gradient.passed
    (failed,) = parity.compare(("out",), [exact + 0.03], [same], [exact], 0.001)
    assert not failed.passed


def test_what_is_not_a_number_passes_no_bound():
    exact = torch.zeros(2, dtype=torch.float64)
    (check,) = parity.compare(("out",), [torch.tensor([0.0, float("nan")])], [torch.zeros(2)], [exact], 1e-7)
    assert not check.passed
    found = parity.Parity("op", "float32", "cpu", None, 1, check)
    assert not found.passed and "error nan" in found.reason


def test_the_mean_square_rule_sees_one_wrong_element_of_many():
    exact = torch.randn(100_000, dtype=torch.float64)
    single = exact.float()
    eps = torch.finfo(torch.float32).eps
    (check,) = parity.compare_rms(("dw",), [single], [single], [exact], eps)
    assert check.passed
    wrong = single.clone()
    wrong[7] += 1e-3
    (check,) = parity.compare_rms(("dw",), [wrong], [single], [exact], eps)
    assert not check.passed


def test_a_check_that_breaks_off_or_checks_nothing_is_no_pass():
    def broken(dtype, contender):
        raise RuntimeError("boom\nand more")
        yield

    works = {"op": type("Work", (), {"checks": staticmethod(broken)})}
    found = parity.verify(works, "op", "float32", "cpu")
    assert found.reason == "no figure: parity check broke off (RuntimeError: boom and more)"
    works = {"op": type("Work", (), {"checks": staticmethod(lambda dtype, contender: iter(()))})}
    assert parity.verify(works, "op", "float32", "cpu").reason == "no figure: no parity check"


def test_the_worst_check_is_kept():
    checks = [Check("a", 1.0, 4.0), Check("b", 3.0, 4.0), Check("c", 0.0, 0.0), Check("d", 1e-9, 4.0)]
    works = {"op": type("Work", (), {"checks": staticmethod(lambda dtype, contender: iter(checks))})}
    found = parity.verify(works, "op", "float32", "cpu")
    assert found.passed and found.worst.name == "b" and found.checks == 4 and found.reason is None
    checks.append(Check("e", 1e-9, 0.0))
    found = parity.verify(works, "op", "float32", "cpu")
    assert found.worst.name == "e" and found.reason == "no figure: parity failed (error 1e-09, bound 0)"


def test_verifying_leaves_the_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    parity.verify(cases.WORKLOADS, "token_grid", "float32", "reference")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("op", ["clip_window", "motion_mask", "motion_loss", "token_grid", "feeder"])
def test_the_reference_passes_its_own_rule(op):
    found = parity.verify(cases.WORKLOADS, op, "float32", "reference")
    assert found.passed and found.checks > 0, found


@pytest.fixture
def wrong_kernel(monkeypatch):
    """The C++ attention, a twentieth too large: more than bfloat16 rounds."""
    right = ops.topology_attention

    def wrong(*args, backend="auto", **kwargs):
        out = right(*args, backend=backend, **kwargs)
        return out * 1.05 if backend == "cpu" else out

    monkeypatch.setattr(ops, "topology_attention", wrong)


def figures(record):
    """Every key of a row that could hold a figure."""
    return [key for row in record["rows"] for key in ("seconds", "bytes", "ratio", "measured_text") if key in row]


@needs_kernel
def test_a_wrong_kernel_gets_no_figure(tiny, wrong_kernel):
    record = measure(["topology_attention"], quick=True)
    assert record["passed"] is False and not figures(record)
    told = [row["reason"] for row in record["rows"] if "left out" not in row["reason"]]
    assert told and all(text.startswith("no figure: parity failed (error ") for text in told if "needs" not in text)
    assert {row["holds"] for row in record["rows"]} == {None}
    assert not any(found["passed"] for found in record["parity"])


@needs_kernel
def test_the_command_of_a_wrong_kernel_fails_without_a_figure(tiny, wrong_kernel, capsys, tmp_path):
    out = tmp_path / "record.json"
    assert main(["bench", "topology_attention", "--quick", "--json", str(out)]) == 1
    shown = capsys.readouterr().out
    assert "no figure: parity failed (error" in shown and "bound" in shown and "FAILED" in shown
    assert " ms" not in shown and " us" not in shown
    assert not figures(json.loads(out.read_text()))


@needs_kernel
def test_the_right_kernel_gets_its_figures(tiny):
    record = measure(["topology_attention"], quick=True)
    assert record["passed"] is True and figures(record)
