"""Splits: which clips train and which test, by stored name or by an expression over the columns."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from jmm_fast.errors import UserError
from jmm_fast.reference import philox

_SET_TERM = re.compile(r"^(?P<column>[\w.]+)\s+(?P<operator>not\s+in|in)\s+(?P<value>.+)$")
_COMPARISON = re.compile(r"^(?P<column>[\w.]+)\s*(?P<operator>==|!=|<=|>=|=|<|>)\s*(?P<value>.+)$")
_RANGE = re.compile(r"^(\d+)\s*-\s*(\d+)$")
_COMPARE = {
    "==": np.equal,
    "=": np.equal,
    "!=": np.not_equal,
    "<": np.less,
    "<=": np.less_equal,
    ">": np.greater,
    ">=": np.greater_equal,
}

GRAMMAR = (
    "COLUMN in 1,3,5-9 | COLUMN not in a,b | COLUMN >= 2, joined by '&'; EXPR trains and the rest tests; "
    "'train: EXPR; test: EXPR' names both; 'SPLIT within EXPR' keeps only some clips; 'all' trains on every clip"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Clip indices of one protocol: ``train`` and ``test``, int64 tensors in ascending order, and what it is called."""

    name: str
    train: torch.Tensor
    test: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnTable:
    """What an expression may speak of.

    Attributes:
        where: the file, for messages.
        columns: per-clip numbers ``[N]`` by name; ``label`` is the class.
        values: names of a column's codes 0, 1, ..., where it has them.
    """

    where: str
    columns: Mapping[str, np.ndarray]
    values: Mapping[str, Sequence[str]]

    @property
    def count(self) -> int:
        return len(self.columns["label"])

    def column(self, name: str, expression: str) -> tuple[str, np.ndarray]:
        name = "label" if name == "labels" else name
        if name not in self.columns:
            raise UserError(
                f"{self.where}: {expression!r} asks for a column {name!r}; there are {', '.join(self.columns)}"
            )
        return name, self.columns[name]


def matching(expression: str, table: ColumnTable) -> np.ndarray:
    """Clips for which every ``&``-joined term holds, bool ``[N]``.

    Values are numbers, ranges ``3-7`` (both ends included) or the names of a column's codes.

    Raises:
        UserError: not an expression, an unknown column (the line lists those there are) or an unknown value name.
    """
    keep = np.ones(table.count, dtype=bool)
    for term in expression.split("&"):
        found = _SET_TERM.match(term.strip()) or _COMPARISON.match(term.strip())
        if not found:
            raise UserError(f"{table.where}: cannot read {expression!r}: expected {GRAMMAR}")
        name, column = table.column(found["column"], expression)
        operator = " ".join(found["operator"].split())
        if operator in ("in", "not in"):
            inside = np.zeros(table.count, dtype=bool)
            for text in found["value"].split(","):
                inside |= _equals(column, name, text.strip(), table, expression)
            keep &= inside if operator == "in" else ~inside
        else:
            value = _number(name, found["value"].strip(), table, expression)
            keep &= _COMPARE[operator](column, value)
    return keep


def _equals(column: np.ndarray, name: str, text: str, table: ColumnTable, expression: str) -> np.ndarray:
    span = _RANGE.match(text)
    if span and text not in table.values.get(name, ()):
        return (column >= int(span[1])) & (column <= int(span[2]))
    return column == _number(name, text, table, expression)


def _number(name: str, text: str, table: ColumnTable, expression: str) -> float:
    names = list(table.values.get(name, ()))
    if text in names:
        return names.index(text)
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        held = ", ".join(names) if names else "numbers only"
        raise UserError(
            f"{table.where}: {expression!r}: column {name} has no value {text!r}; it has {shorten(held)}"
        ) from None


def split_masks(spec: str, table: ColumnTable, stored: Mapping[str, tuple[np.ndarray, np.ndarray]]):
    """Train and test clips of ``spec`` as two bool ``[N]``; see :data:`GRAMMAR`.

    Raises:
        UserError: neither a stored split nor an expression; no clip to train on or none to test on; a clip in both.
    """
    base, _, within = spec.partition(" within ")
    base = base.strip()
    everything = base == "all" and "all" not in stored
    if base in stored:
        train, test = (np.zeros(table.count, dtype=bool) for _ in range(2))
        train[stored[base][0]] = True
        test[stored[base][1]] = True
    elif everything:
        train, test = np.ones(table.count, dtype=bool), np.zeros(table.count, dtype=bool)
    elif re.match(r"^train\s*:", base):
        train_text, separator, test_text = base.partition(";")
        key, colon, test_text = test_text.partition(":")
        if not separator or not colon or key.strip() != "test":
            raise UserError(f"{table.where}: cannot read split {spec!r}: expected 'train: EXPR; test: EXPR'")
        train, test = matching(train_text.partition(":")[2], table), matching(test_text, table)
    elif re.search(r"\sin\s|[=<>&]", base):
        train = matching(base, table)
        test = ~train
    else:
        names = ", ".join(stored) or "none"
        raise UserError(
            f"{table.where}: unknown split {spec!r}: stored splits are {names}; or an expression such as "
            f"'COLUMN in 1,3,5' over {', '.join(table.columns)}"
        )
    if within:
        inside = matching(within, table)
        train, test = train & inside, test & inside
    if (train & test).any():
        clip = int(np.flatnonzero(train & test)[0])
        raise UserError(f"{table.where}: split {spec!r} puts clip {clip} into both train and test")
    for part, chosen in (("train", train), ("test", test)):
        if not chosen.any() and not (everything and part == "test"):
            raise UserError(f"{table.where}: split {spec!r} leaves no clip to {part}")
    return train, test


def stratified_fraction(labels: torch.Tensor, ids: torch.Tensor, fraction: float, seed: int) -> torch.Tensor:
    """Keep ``fraction`` of the clips of every class, at least one each.

    Args:
        labels: int64 ``[N]``, class of every clip of the set.
        ids: int64, clips to choose from.
        fraction: in (0, 1]; ``round(fraction * count)`` clips of each class stay, but never fewer than one.
        seed: fixes the choice. It depends on the seed and each clip's index alone, so every rank and every machine
            draws the same subset.

    Returns:
        The chosen ids in ascending order.

    Raises:
        UserError: ``fraction`` is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise UserError(f"labels fraction must be above 0 and at most 1, got {fraction}")
    # An epoch number no run reaches keeps this draw apart from the order of the clips.
    draw = philox.uniform(seed, philox.ORDER, ids, 2**31 - 1, 1)[:, 0]
    chosen = [ids[:0]]
    for label in torch.unique(labels[ids]).tolist():
        of_class = torch.nonzero(labels[ids] == label)[:, 0]
        count = max(1, round(fraction * len(of_class)))
        first = torch.argsort(draw[of_class], stable=True)[:count]
        chosen.append(ids[of_class[first]])
    return torch.cat(chosen).sort().values


def shorten(text: str, limit: int = 200) -> str:
    """``text``, cut with an ellipsis when one line could not hold it."""
    return text if len(text) <= limit else text[:limit].rsplit(",", 1)[0] + ", ..."
