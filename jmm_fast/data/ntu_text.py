"""The text of an NTU RGB+D ``.skeleton`` file as arrays."""

import re
from dataclasses import dataclass

import numpy as np

from jmm_fast.errors import UserError

try:
    from jmm_fast import _host
except ImportError:
    # Built without a compiler: plain Python reads the same, some hundred times slower.
    _host = None

JOINTS = 25
_NUMBER = re.compile(rb"[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|nan|inf|infinity)", re.IGNORECASE)
_WHOLE = re.compile(rb"-?0*(\d{1,19})")


@dataclass(frozen=True, slots=True, kw_only=True)
class NtuText:
    """What a file holds; a row is one body in one frame, in the order of the file.

    Attributes:
        frames: as the first line says.
        frame: int64 ``[rows]``, from 0.
        body: int64 ``[rows]``, the sensor's id of the body.
        line: int64 ``[rows]``, line of the body's first joint, from 1.
        joints: float32 ``[rows, 25, 3]`` metres, the nearest double rounded to float; NaN and infinity where the text
            says so.
        rest: first line with text after the last frame; 0: there is none.
    """

    frames: int
    frame: np.ndarray
    body: np.ndarray
    line: np.ndarray
    joints: np.ndarray
    rest: int


def parse_ntu(data: bytes) -> NtuText:
    """Read ``data``, which may be anything; takes no more memory than its length can justify.

    Raises:
        UserError: not such a text: the line and what was expected there.
    """
    if _host is None:
        return parse_ntu_python(data)
    try:
        frames, frame, body, line, joints, rest = _host.parse_ntu(data)
    except ValueError as error:
        raise UserError(str(error)) from None
    return NtuText(frames=frames, frame=frame, body=body, line=line, joints=joints, rest=rest)


def parse_ntu_python(data: bytes) -> NtuText:
    """:func:`parse_ntu` without C++."""
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    number = 0

    def expected(what: str, found: bytes | int | None) -> UserError:
        if found is None:
            text = "the end of the file"
        elif isinstance(found, int):
            text = str(found)
        else:
            shown = "".join(chr(byte) if 32 <= byte < 127 else "?" for byte in found[:20])
            text = f"'{shown}{'...' if len(found) > 20 else ''}'"
        return UserError(f"line {number}: expected {what}, got {text}")

    def following(what: str) -> bytes:
        nonlocal number
        number += 1
        if number > len(lines):
            raise expected(what, None)
        return lines[number - 1]

    def fields(what: str, count: int) -> list[bytes]:
        found = following(what).split()
        if len(found) != count:
            raise expected(what, len(found))
        return found

    def count(what: str) -> int:
        text = following(what).strip()
        value = _whole(text)
        if value is None or value < 0:
            raise expected(what, text)
        return value

    frames = count("the number of frames")
    rows: list[tuple[int, int, int]] = []
    coordinates: list[float] = []
    for frame in range(frames):
        for _ in range(count("the number of bodies of a frame")):
            text = fields("10 values of a body", 10)[0]
            body = _whole(text)
            if body is None:
                raise expected("the id of a body, a whole number", text)
            joints = count("the number of joints")
            if joints != JOINTS:
                raise expected(f"{JOINTS} joints", joints)
            rows.append((frame, body, number + 1))
            for _ in range(JOINTS):
                for text in fields("12 numbers of a joint", 12)[:3]:
                    if not _NUMBER.fullmatch(text):
                        raise expected("a coordinate", text)
                    coordinates.append(float(text))
    rest = next((at + 1 for at in range(number, len(lines)) if lines[at].strip()), 0)
    columns = np.array(rows, dtype=np.int64).reshape(-1, 3)
    with np.errstate(over="ignore"):
        values = np.array(coordinates, dtype=np.float64).astype(np.float32)
    return NtuText(
        frames=frames,
        frame=columns[:, 0].copy(),
        body=columns[:, 1].copy(),
        line=columns[:, 2].copy(),
        joints=values.reshape(-1, JOINTS, 3),
        rest=rest,
    )


def _whole(text: bytes) -> int | None:
    """The whole number that ``text`` is; None when it is none or does not fit 64 bits."""
    found = _WHOLE.fullmatch(text)
    if found is None:
        return None
    value = int(found[1]) * (-1 if text.startswith(b"-") else 1)
    return value if -(2**63) <= value < 2**63 else None
