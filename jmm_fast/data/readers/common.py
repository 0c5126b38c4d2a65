"""Options and steps that readers of recorded data share."""

import hashlib
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jmm_fast.data.cleaning import Cleaner, OnError
from jmm_fast.data.splits import ColumnTable, matching, split_masks
from jmm_fast.data.store import StoreContents
from jmm_fast.errors import UserError


@dataclass(kw_only=True, slots=True)
class CommonOptions:
    """Choices every reader of recorded clips takes."""

    where: str | None = None
    """Keep only clips for which this holds, e.g. "dataset_id in 2"; classes without a clip left are closed up."""
    label: str | None = None
    """Make classes of one or more columns, e.g. "labels,correct": one class per combination that occurs."""
    split: tuple[str, ...] = ()
    """Splits to store, NAME=EXPRESSION, e.g. "odd=subject in 0,2,4": those clips train, the rest test."""
    on_error: OnError = "fail"
    """What to do with a clip that holds NaN, fewer than 2 frames or an unknown label: fail (stop and name it) or drop
    (leave it out and count it)."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what numpy and zipfile say about a broken file into one line."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a whole .npz file: {reason}") from error


def relabel(contents: StoreContents, where: str, columns: str) -> None:
    """Replace the labels by one class per combination of the ``columns`` that occurs; keep the old as a column."""
    table = contents.table(where)
    parts = [table.column(name.strip(), columns) for name in columns.split(",")]
    for name, column in parts:
        if column.dtype != np.int64:
            raise UserError(f"{where}: --label {columns!r}: column {name} must be whole numbers, got {column.dtype}")
    codes, labels = np.unique(np.stack([column for _, column in parts], axis=1), axis=0, return_inverse=True)

    def text(name: str, code: int) -> str:
        values = table.values.get(name)
        return values[code] if values else f"{name}={code}"

    names = [" / ".join(text(name, code) for (name, _), code in zip(parts, row, strict=True)) for row in codes.tolist()]
    contents.columns["original_label"] = contents.labels
    contents.column_values["original_label"] = contents.class_names
    contents.labels, contents.class_names = labels.reshape(-1).astype(np.int64), names


def close_up_labels(contents: StoreContents) -> None:
    """Renumber the classes that occur and forget the others."""
    present, labels = np.unique(contents.labels, return_inverse=True)
    contents.class_names = [contents.class_names[label] for label in present.tolist()]
    contents.labels = labels.reshape(-1).astype(np.int64)


def named_splits(specs: tuple[str, ...], table: ColumnTable) -> dict[str, dict[str, Any]]:
    """``NAME=EXPRESSION`` texts as stored splits."""
    splits = {}
    for text in specs:
        found = re.match(r"^\s*([\w.-]+)\s*=\s*(.+)$", text)
        if not found or re.match(r"^\s*=", found[2]):
            raise UserError(f"--split must be NAME=EXPRESSION, e.g. 'odd=subject in 0,2,4', got {text!r}")
        train, test = split_masks(found[2], table, {})
        splits[found[1]] = {"train": np.flatnonzero(train), "test": np.flatnonzero(test)}
    return splits


def keep_matching(where_expression: str | None, table: ColumnTable) -> np.ndarray:
    """Clips that ``--where`` keeps, int64 indices; UserError when none."""
    if where_expression is None:
        return np.arange(table.count)
    keep = np.flatnonzero(matching(where_expression, table))
    if not len(keep):
        raise UserError(f"{table.where}: --where {where_expression!r} leaves no clip")
    return keep


def require_clips(kept: np.ndarray, cleaner: Cleaner) -> None:
    if not len(kept):
        raise UserError(f"{cleaner.where}: no usable clip is left of {len(cleaner.dropped)}")


def provenance(reader: str, path: Path, options: Any, cleaner: Cleaner) -> dict[str, Any]:
    """Where a store came from, without dates or folders: the same input makes the same file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {
        "reader": reader,
        "source": path.name,
        "source_sha256": digest.hexdigest(),
        "options": asdict(options),
        **cleaner.report(),
    }
