"""The README's table from records, those of earlier versions included."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORDS = sorted((ROOT / "bench/results").glob("bench_*.json"))


def printed(*arguments):
    command = [sys.executable, ROOT / "bench/readme.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_every_committed_record_gives_its_rows(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    barred = [row for row in record["rows"] if row["bar"] is not None and row["device"] == "cpu"]
    lines = printed(f"measured={path}")[2:]
    assert len(lines) == len(barred) > 10
    for line, row in zip(lines, barred, strict=True):
        assert line.startswith(f"| `{row['op']}` | {row['what']} | {row['against']} | {row['bar_text']} | ")


def row(against, **changes):
    given = {"op": "op", "what": "shape", "against": against, "bar": 1.0, "bar_text": ">= 1x faster", "device": "cuda"}
    return given | {"measured_text": "2.00x faster", "holds": True} | changes


def test_cells(tmp_path):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    unmeasured = {"reason": "needs a GPU", "holds": None}
    one.write_text(json.dumps({"rows": [row("a", backend="cuda"), row("b", holds=False), row("c", bar=None)]}))
    two.write_text(json.dumps({"rows": [row("a", **unmeasured)]}))
    assert printed(f"One={one}", f"Two={two}", "--device", "cuda") == [
        "| op | what | against | bar | One | Two |",
        "|---|---|---|---|---|---|",
        "| `op` | shape | a | >= 1x faster | 2.00x faster (`cuda`) | not yet measured on a GPU |",
        "| `op` | shape | b | >= 1x faster | 2.00x faster, **missed** | not in this record |",
    ]
