"""The record as a table to read."""

from collections.abc import Mapping

from rich.console import Group
from rich.table import Table
from rich.text import Text

VERDICTS = {True: ("holds", "green"), False: ("missed", "red"), None: ("", "")}


def table(record: Mapping) -> Group:
    """The rows of a record, its limits and its parity checks, for ``rich``."""
    machine, limits = record["machine"], record["limits"]
    head = [
        f"{machine['cpu']}, {machine['cores']} cores, {record['options']['threads']} threads, "
        f"instruction set {machine['isa'] or 'none (no C++ extension)'}, {record['options']['pages']} pages, "
        f"torch {record['versions']['torch']}",
        "limits before and after: "
        + "; ".join(
            f"{name} {limits['before'][name]:.3g} and {limits['after'][name]:.3g} {unit}"
            for name, unit in limits["units"].items()
        ),
    ]
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("what", "against", "bar", "measured", "ours", "other", ""):
        numbers = title in ("ours", "other")
        rows.add_column(title, justify="right" if numbers else "left", no_wrap=numbers or title == "what")
    op = None
    for row in record["rows"]:
        if row["op"] != op:
            op = row["op"]
            rows.add_row(Text(op, style="bold"))
        verdict, style = VERDICTS[row["holds"]]
        if "reason" in row:
            failed = row["reason"].startswith("no figure")
            rows.add_row(
                "  " + row["what"],
                row["against"],
                row["bar_text"],
                Text(row["reason"], style="red" if failed else "dim"),
            )
            continue
        if row["quantity"] != "memory":
            sides = [
                duration(row["seconds"][side]["median"])
                + (f", {row['tflops'][side]:.3g} TFLOP/s" if "tflops" in row else "")
                for side in ("ours", "against")
            ]
        else:
            sides = [f"{row['bytes'][side] / 2**20:.0f} MiB" for side in ("ours", "against")]
        rows.add_row(
            "  " + row["what"],
            row["against"],
            row["bar_text"],
            row["measured_text"],
            *sides,
            Text(verdict, style=style),
        )
    checks = [_check_line(found) for found in record["parity"]]
    return Group(*map(Text, head), "", rows, "", *map(Text, checks))


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
