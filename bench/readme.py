"""The README's table of speed, from records of ``jmm-fast bench --json``.

    python bench/readme.py "Zen 5, torch as it comes=bench/results/bench_zen5_default_pages.json" \\
        "Zen 5, huge pages=bench/results/bench_zen5.json"

Rows that have a bar, a column for each record. What a record could not measure stays in the table with the reason.
"""

import argparse
import json
from pathlib import Path

UNMEASURED = {"needs a GPU": "not yet measured on a GPU"}


def cell(row: dict | None) -> str:
    if row is None:
        return "not in this record"
    if "reason" in row:
        return UNMEASURED.get(row["reason"], row["reason"])
    text = row["measured_text"].replace(" less memory", " less")
    if "backend" in row:
        text += f" (`{row['backend']}`)"
    return text if row["holds"] else text + ", **missed**"


def rows(record: dict) -> dict[tuple, dict]:
    """Rows with a bar, by what they compare."""
    return {
        (row["op"], row["what"], row["against"], row["bar_text"]): row
        for row in record["rows"]
        if row["bar"] is not None
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", metavar="TITLE=FILE")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="rows of this kind of device")
    args = parser.parse_args()
    columns = {
        title: rows(json.loads(Path(file).read_text()))
        for title, _, file in (item.rpartition("=") for item in args.records)
    }
    print("| op | what | against | bar |", *(f" {title} |" for title in columns), sep="")
    print("|---" * (4 + len(columns)) + "|")
    first = next(iter(columns.values()))
    for key, row in first.items():
        if row["device"] == args.device:
            op, what, against, bar = key
            cells = " | ".join(cell(found.get(key)) for found in columns.values())
            print(f"| `{op}` | {what} | {against} | {bar} | {cells} |")


if __name__ == "__main__":
    main()
