"""Pickles of numpy arrays and built-in containers, read without running anything they name.

A pickle is a program that calls what it imports by name. Here a name is looked up in a table of stand-ins of our own
that only store or copy data; any other name ends the reading. So neither numpy's own unpickling code nor a dtype's
state from the file is trusted either.
"""

import functools
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jmm_fast.errors import UserError


def load_plain(path: Path) -> Any:
    """The object in the pickle ``path``; arrays and numpy scalars in it must go through :func:`value`.

    Raises:
        UserError: no such file, truncated or not a pickle, or one that asks for anything but numpy arrays of numbers or
            text and built-in containers; the line names what it asks for. Nothing has been run then.
    """
    try:
        with open(path, "rb") as file:
            return _Unpickler(file, encoding="latin1").load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except EOFError:
        raise UserError(f"{path}: not a whole pickle: it ends too early") from None
    except Exception as error:
        # Bytes that are no pickle make the unpickler fail in any way: as a TypeError, a KeyError, out of memory, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: not a whole pickle: {reason[:100]}") from error


def value(item: Any) -> Any:
    """``item`` of a loaded pickle, as an array where it stands for one; everything else as it is."""
    return item.array if isinstance(item, _Array) else item


class _Dtype:
    """Stands for ``numpy.dtype``; of its state only the byte order is read."""

    __slots__ = ("dtype",)

    def __init__(self, text: Any, *_: Any) -> None:
        text = text.decode("latin1") if isinstance(text, bytes) else text
        if not isinstance(text, str) or not re.fullmatch(r"[<>=|]?([biufc]\d{1,2}|[SU]\d{1,6}|\?)", text):
            raise UserError(f"it holds numpy data of type {str(text)[:40]!r}, expected numbers or text")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for an ``ndarray``, which a pickle makes empty and fills afterwards."""

    __slots__ = ("array",)

    def __init__(self, *_: Any) -> None:
        self.array = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.array = _from_buffer(data, dtype, shape, "F" if fortran else "C")


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any = "C") -> np.ndarray:
    data = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray) or order not in ("C", "F"):
        raise UserError("it holds a numpy array without numbers")
    if not isinstance(shape, tuple) or len(shape) > 8 or not all(type(size) is int and size >= 0 for size in shape):
        raise UserError("it holds a numpy array without a shape")
    if math.prod(shape) * dtype.dtype.itemsize != len(data):
        raise UserError(f"it holds an array {list(shape)} of {len(data)} bytes, which do not fit")
    return np.frombuffer(data, dtype.dtype).reshape(shape, order=order) if data else np.empty(shape, dtype.dtype)


def _buffered(*arguments: Any) -> _Array:
    result = _Array()
    result.array = _from_buffer(*arguments)
    return result


def _scalar(dtype: Any, data: Any = b"") -> Any:
    return _from_buffer(data, dtype, (1,))[0].item()


def _encode(text: Any, encoding: Any = "") -> bytes:
    if encoding != "latin1" or not isinstance(text, str):
        raise UserError("it holds text of an unexpected encoding")
    return text.encode("latin1")


def _no_bytes(*arguments: Any) -> bytes:
    if arguments:
        raise UserError("it makes bytes, expected them as they are")
    return b""


def _hashed(kind: type, items: Any = ()) -> Any:
    if not isinstance(items, list | tuple):
        raise UserError("it holds a set of nothing that can be listed")
    _check_keys(items)
    return kind(items)


def _check_keys(keys: Any) -> None:
    # The hash of tuples in tuples, a hundred thousand deep, would overrun the interpreter's stack.
    if not all(isinstance(key, str | bytes | int | float | None) for key in keys):
        raise UserError("it holds a set, or the keys of a dict, of other things than text and numbers")


_STAND_INS: dict[tuple[str, str], Callable] = {
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _buffered for core in ("core", "_core")},
    **{(room, "bytes"): _no_bytes for room in ("builtins", "__builtin__")},
    **{
        (room, kind.__name__): functools.partial(_hashed, kind)
        for room in ("builtins", "__builtin__")
        for kind in (set, frozenset)
    },
}


def _with_checked_keys(code: bytes, keys: slice) -> Callable[[Any], None]:
    step = pickle._Unpickler.dispatch[code[0]]

    def load(self: Any) -> None:
        _check_keys(self.stack[keys])
        step(self)

    return load


def _load_bytearray8(self: Any) -> None:
    # A made-up length must not be filled with zeros before it is found that the file is shorter.
    self.append(self.read(int.from_bytes(self.read(8), "little")))


class _Unpickler(pickle._Unpickler):
    """The unpickler written in Python, as fast on large arrays; that in C cannot be told what may be hashed."""

    dispatch: ClassVar[dict] = {
        **pickle._Unpickler.dispatch,
        pickle.SETITEM[0]: _with_checked_keys(pickle.SETITEM, slice(-2, -1)),
        pickle.SETITEMS[0]: _with_checked_keys(pickle.SETITEMS, slice(None, None, 2)),
        pickle.DICT[0]: _with_checked_keys(pickle.DICT, slice(None, None, 2)),
        pickle.ADDITEMS[0]: _with_checked_keys(pickle.ADDITEMS, slice(None)),
        pickle.FROZENSET[0]: _with_checked_keys(pickle.FROZENSET, slice(None)),
        pickle.BYTEARRAY8[0]: _load_bytearray8,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _STAND_INS:
            # A pickle may also set attributes of what it looked up: a wrapper of its own keeps ours as they are.
            return functools.partial(_STAND_INS[module, name])
        if (module, name) == ("numpy", "ndarray"):
            return "ndarray"
        asked = f"{module}.{name}"[:80]
        raise UserError(f"it asks for {asked!r}, expected numpy arrays and built-in containers only; nothing was run")
