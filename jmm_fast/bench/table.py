"""The record as a table to read."""

from collections.abc import Mapping, Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from jmm_fast.bench.case import Case
from jmm_fast.bench.rows import CONTENDERS

VERDICTS = {True: ("holds", "green"), False: ("missed", "red"), None: ("", "")}


def table(record: Mapping) -> Group:
    """The rows of a record, its steps, its limits and its parity checks, for ``rich``."""
    machine, limits = record["machine"], record["limits"]
    head = [
        f"{machine['cpu']}, {machine['cores']} cores, {record['options']['threads']} threads, "
        f"instruction set {machine['isa'] or 'none (no C++ extension)'}, {record['options']['pages']} pages, "
        f"torch {record['versions']['torch']}",
        "limits before and after: "
        + "; ".join(
            f"{name} {limits['before'][name]:.3g} and {_number(limits['after'].get(name))} {unit}"
            for name, unit in limits["units"].items()
        ),
    ]
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("what", "against", "bar", "measured", "ours", "other", "roofline", ""):
        numbers = title in ("ours", "other")
        rows.add_column(title, justify="right" if numbers else "left", no_wrap=numbers or title == "what")
    op = None
    for row in record["rows"]:
        if row["op"] != op:
            op = row["op"]
            rows.add_row(Text(op, style="bold"))
        verdict, style = VERDICTS[row["holds"]]
        if "reason" in row:
            failed = row["reason"].startswith(("no figure", "failed"))
            rows.add_row(
                "  " + row["what"],
                row["against"],
                row["bar_text"],
                Text(row["reason"], style="red" if failed else "dim"),
            )
            continue
        if row["quantity"] != "memory":
            sides = [duration(row["seconds"][side]["median"]) for side in ("ours", "against")]
        else:
            sides = [f"{row['bytes'][side] / 2**20:.0f} MiB" for side in ("ours", "against")]
        rows.add_row(
            "  " + row["what"],
            row["against"],
            row["bar_text"],
            row["measured_text"],
            *sides,
            _roof(row.get("roofline")),
            Text(verdict, style=style),
        )
    steps = ["", _steps(record["steps"])] if record["steps"] else []
    checks = [_check_line(found) for found in record["parity"]]
    failed = [Text(f"failed: {name}", style="red") for name in record["failed"]]
    return Group(*map(Text, head), "", rows, *steps, "", *map(Text, checks), *failed)


def _roof(sides: Mapping | None) -> str:
    """Ours: the share, and what bounds it."""
    if sides is None or sides["ours"] is None:
        return ""
    return f"{_percent(sides['ours']['share'])}, {sides['ours']['by']}"


def _steps(steps: Sequence[Mapping]) -> Table:
    """What each step comes to, ours and the others."""
    found = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("step", "samples/s", "bodies/s", "of the products' limit", "peak memory", "waits for its batch"):
        found.add_column(title, justify="left" if title == "step" else "right", no_wrap=True)
    for step in steps:
        case = Case.parse(step["case"])
        peak, wait, share = step["peak_bytes"], step["data_wait"], step["share_of_products"]
        found.add_row(
            f"  {case.shape}, {case.dtype}, {CONTENDERS[case.contender]}",
            f"{step['samples_per_s']:.3g}",
            f"{step['bodies_per_s']:.3g}",
            "" if share is None else _percent(share),
            "" if peak is None else f"{peak / 2**20:.0f} MiB",
            "" if wait is None else f"{duration(step['data_wait_s'])}, {100 * wait:.2g} %",
        )
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"


def _check_line(found: Mapping) -> str:
    name = f"parity {found['op']}, {found['dtype']}, {found['contender']}, {found['isa']}: "
    worst = found["worst"]
    if found["problem"]:
        return name + f"broke off, {found['problem']}"
    if worst is None:
        return name + "MISSING"
    of = f"error {worst['error']:.2g}, bound {worst['bound']:.2g}, {worst['name']}"
    return name + (f"passed, {found['checks']} checks, the closest: {of}" if found["passed"] else f"FAILED, {of}")


def duration(seconds: float) -> str:
    """Three digits with the unit that suits: ``1.23 s``, ``45.6 ms``, ``789 us``."""
    unit, size = ("s", 1.0) if seconds >= 1 else ("ms", 1e-3) if seconds >= 1e-3 else ("us", 1e-6)
    value = seconds / size
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
