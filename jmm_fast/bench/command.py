"""``jmm-fast bench``: measure, show the table, write the record."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jmm_fast.bench.record import measure
from jmm_fast.bench.table import table
from jmm_fast.files import atomic_write_text

WIDTH = 160
"""Columns of the table where nothing says how wide the page is."""


def bench(
    ops: Sequence[str],
    *,
    quick: bool,
    out: Path | None,
    threads: int | None,
    device: str | None = None,
    minutes: float | None = None,
) -> bool:
    """Measure ``ops`` and print the table; progress goes to stderr.

    ``out`` is written after each row: it keeps what was measured when the process is ended before its time.

    Returns:
        Whether every parity check passed and nothing failed.

    Raises:
        UserError: unknown op, impossible number of threads, a file that cannot be written.
    """
    options = {"quick": quick, "threads": threads, "device": device, "minutes": minutes}

    def keep(record: dict) -> None:
        if out is not None:
            atomic_write_text(out, json.dumps(record, indent=1) + "\n")

    console = Console(stderr=True)
    if console.is_terminal:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=None)

            def show(text: str, done: int, total: int) -> None:
                progress.update(task, description=text, completed=done, total=total)

            record = measure(ops, **options, say=show, keep=keep)
    else:

        def line(text: str, done: int, total: int) -> None:
            print(f"{done}/{total} {text}", file=sys.stderr, flush=True)

        record = measure(ops, **options, say=line, keep=keep)
    keep(record)
    page = Console(width=None if sys.stdout.isatty() else WIDTH)
    page.print(table(record))
    return record["passed"] and not record["failed"]
