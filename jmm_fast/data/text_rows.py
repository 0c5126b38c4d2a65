"""Numbers of a text, a line a row: what skeletons look like in several data sets."""

import math
import re

import numpy as np

from jmm_fast.errors import UserError

try:
    from jmm_fast import _host
except ImportError:
    # Built without a compiler: the same in Python, slower.
    _host = None

_NUMBER = re.compile(rb"[+-]?(?:(\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|inf(?:inity)?|nan)", re.IGNORECASE)


def parse_rows(data: bytes, columns: int) -> np.ndarray:
    """Read ``data``, ``columns`` numbers a line, between blanks or single commas; float32 ``[rows, columns]``.

    Lines end in LF or CRLF, a comma may follow a line's last number, blank lines at the end do not count. ``nan`` and
    ``inf`` are numbers.

    Raises:
        UserError: which line is not ``columns`` numbers, and why.
    """
    if _host is None:
        return parse_rows_python(data, columns)
    try:
        return _host.parse_rows(data, columns)
    except ValueError as error:
        raise UserError(str(error)) from None


def parse_rows_python(data: bytes, columns: int) -> np.ndarray:
    """:func:`parse_rows` in Python."""
    rows = []
    body = data.rstrip()
    for line, text in enumerate(body.split(b"\n") if body else (), start=1):
        row: list[float] = []
        for field in _fields(text):
            if not field:
                raise UserError(f"line {line}: value {len(row) + 1} is empty")
            if len(row) == columns:
                break
            row.append(_number(field, line, len(row) + 1))
        else:
            if len(row) == columns:
                rows.append(row)
                continue
        count = len(text.replace(b",", b" ").split())
        raise UserError(f"line {line}: expected {columns} numbers, got {count}")
    # The cast to float32 may overflow to infinity, which is for the caller to refuse.
    with np.errstate(over="ignore"):
        return np.array(rows, dtype=np.float64).reshape(-1, columns).astype(np.float32)


def _fields(text: bytes):
    parts = text.split(b",")
    if len(parts) > 1 and not parts[-1].strip():
        parts.pop()
    for part in parts:
        yield from part.split() or ([b""] if len(parts) > 1 or b"," in text else [])


def _number(field: bytes, line: int, value: int) -> float:
    found = _NUMBER.fullmatch(field)
    number = float(field) if found else math.nan
    if found and not (
        found[1] and (math.isinf(number) or (number == 0 and any(digit in b"123456789" for digit in found[1])))
    ):
        return number
    shown = "".join(chr(byte) if 32 <= byte < 127 else "?" for byte in field[:24])
    raise UserError(f"line {line}: value {value} {'is out of range' if found else 'is not a number'}: {shown}")
