"""Reader of a folder of arrays: one ``.npy`` or ``.csv`` file a clip, and a small YAML file that says what they hold.

An ``.npy`` is float or int ``[n, V, 3]``, ``[n, M, V, 3]`` (M bodies) or ``[n, V * 3]``; a ``.csv`` is a line a frame.
The YAML is ``RAW/clips.yaml`` or the file of ``--describe``:

========== ============================================================================================================
fps        frames per second (needed)
layout     a known joint layout; or
joints     names of the joints in the order of the files, and
parents    for each its parent, by number (-1: the root) or by name (null: the root)
unit       ``m`` (default), ``cm``, ``mm``
up         the axis that points up: ``y`` (default) or ``z``; the store has y up
missing    ``nan``: a joint with a NaN (or an empty field of a ``.csv``) is missing, which makes its coordinates and its
           confidence 0; ``none`` (default): NaN is an error
names      pattern of the files' names without ending, e.g. ``{label}_s{subject}_{take}``; with ``/`` it takes in
           folders. ``{label}`` is the class, the other fields become columns: numbers where all are whole numbers
labels     a CSV file with a line a clip, in RAW or beside the YAML: ``file`` (name below RAW, with or without ending),
           ``label``, further columns
classes    names of the classes in order; a label is one of them or its number from 0. Default: those that occur
csv        ``columns``: pattern of the coordinates' columns, default ``{joint}_{axis}`` with axis x, y, z; or their
           V * 3 names in the order of the joints. ``confidence``: pattern or names of V columns in [0, 1].
           ``delimiter``: default ``,``. ``header``: true (default; the first line names the columns), false (there is
           none and a line is V * 3 numbers), or the names as a list
========== ============================================================================================================

Without a label every clip is of one class, which is enough for pretraining.
"""

import csv
import io
import math
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from jmm_fast import skeleton
from jmm_fast.data.collect import FileLog, RawClip
from jmm_fast.data.filetree import FileTree, SourceFile
from jmm_fast.data.readers import common
from jmm_fast.data.store import StoreContents
from jmm_fast.errors import UserError
from jmm_fast.skeleton import Skeleton

_SCALES = {"m": 1.0, "cm": 0.01, "mm": 0.001}
_FIELDS = ("fps", "layout", "joints", "parents", "unit", "up", "missing", "names", "labels", "classes", "csv")
_CSV_FIELDS = ("columns", "confidence", "delimiter", "header")


@dataclass(kw_only=True, slots=True)
class FolderOptions(common.CommonOptions):
    """How to read a folder of arrays."""

    describe: Path | None = None
    """YAML file that says what the files hold; default clips.yaml in RAW."""
    center: bool = True
    """Move each clip so that the first body's spine (ntu25) or root joint starts at the origin."""


class FolderSource:
    """A folder, ``.zip`` or single file of arrays, described by a YAML file (see the module).

    A clip is called by its file's name below RAW without ending. Bodies that are zero throughout are left out.

    Raises:
        UserError: no array, a YAML field that is unknown, missing or not what was expected, a name that does not fit
            the pattern, a file without a label.
    """

    def __init__(self, path: Path, options: FolderOptions) -> None:
        self.where = str(path)
        self._tree = FileTree(path, (".npy", ".csv"))
        self._center = options.center
        if options.describe is not None:
            where, folder = str(options.describe), Path(options.describe).parent
            held = Path(options.describe).read_bytes
        else:
            where, folder = f"{path}: clips.yaml", None
            held = self._tree.beside("clips.yaml")
            if held is None:
                raise UserError(f"{path}: there is no clips.yaml, which says what the files hold (or --describe FILE)")
        try:
            data = held()
        except (OSError, UserError) as error:
            raise UserError(f"{where}: {getattr(error, 'strerror', None) or error}") from None
        told = _Told(where, _yaml(where, data), _FIELDS, "")
        self.fps = told.number("fps")
        if not (math.isfinite(self.fps) and self.fps > 0):
            told.refuse("fps", "a number above 0")
        self.skeleton = _layout(told)
        self._scale = _SCALES[told.choice("unit", tuple(_SCALES))]
        self._z_up = told.choice("up", ("y", "z")) == "z"
        self._nan_is_missing = told.choice("missing", ("none", "nan")) == "nan"
        self._csv = _CsvFormat(_Told(where, told.mapping("csv"), _CSV_FIELDS, "csv."), self.skeleton)
        files = {file.name: file for file in self._tree.files}
        table = None
        if told.text("labels") is not None:
            name = told.text("labels")
            table = _label_table(self._tree, folder, name, where)
            files.pop(name, None)
        self.files: Sequence[SourceFile] = list(files.values())
        if not self.files:
            raise UserError(f"{path}: no .npy or .csv file in it besides {told.text('labels')}")
        names = {form for file in self.files for form in (file.name, str(file.bare))}
        unused = [name for name in table or () if name not in names]
        self._warnings = (
            [f"{told.text('labels')}: {len(unused)} lines have no file, e.g. {unused[0]!r}"] if unused else []
        )
        self._columns = _columns(told, self.files, table, self.where)
        self.class_names, self._labels = _classes(told, self._columns)
        self.identity: Any = [options.center, told.fields, self._columns]

    def read(self, file: SourceFile, log: FileLog) -> list[RawClip]:
        data = self._tree.read(file)
        confidence = None
        if file.name.lower().endswith(".csv"):
            frames, confidence = self._csv.read(data)
        else:
            frames = _array(data, self.skeleton.num_joints)
        if self._nan_is_missing:
            absent = np.isnan(frames).any(axis=-1)
            if confidence is None and absent.any():
                confidence = np.ones(absent.shape, np.float32)
            if confidence is not None:
                confidence[absent] = 0
        if confidence is not None:
            frames[confidence == 0] = 0
        frames *= np.float32(self._scale)
        if self._z_up:
            frames = np.stack([frames[..., 0], frames[..., 2], -frames[..., 1]], axis=-1)
        present = frames.any(axis=(1, 2, 3))
        if not present.all():
            present[0] |= not present.any()
            frames = frames[present]
            confidence = None if confidence is None else confidence[present]
        if self._center:
            common.center_clip(frames, self.skeleton, confidence)
        columns = dict(self._columns[file.name])
        columns.pop("label", None)
        label = self._labels[file.name]
        if label is None:
            raise UserError(
                f"its label {self._columns[file.name]['label']!r} is not one of the {len(self.class_names)} classes"
            )
        return [RawClip(name=str(file.bare), frames=frames, label=label, columns=columns, confidence=confidence)]

    def finish(self, contents: StoreContents) -> list[str]:
        return self._warnings


class _Told:
    """Fields of the YAML file, each checked when it is asked for; ``prefix`` goes before names in messages."""

    def __init__(self, where: str, fields: dict[str, Any], known: Sequence[str], prefix: str) -> None:
        self.where, self.fields, self.prefix = where, fields, prefix
        for name in fields:
            if name not in known:
                raise UserError(f"{where}: unknown field {f'{prefix}{name}'!r}: expected {', '.join(known)}")

    def refuse(self, name: str, expected: str) -> None:
        # Shortened as it is made: what a few aliases of YAML stand for may be endless.
        got = reprlib.repr(self.fields[name]) if name in self.fields else "nothing"
        raise UserError(f"{self.where}: {self.prefix}{name} must be {expected}, got {got}")

    def number(self, name: str) -> float:
        value = self.fields.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.refuse(name, "a number")
        return float(value)

    def text(self, name: str, default: str | None = None) -> str | None:
        value = self.fields.get(name, default)
        if value is not None and (not isinstance(value, str) or not value):
            self.refuse(name, "text")
        return value

    def choice(self, name: str, values: tuple[str, ...]) -> str:
        """One of ``values``, the first where nothing is said."""
        value = self.fields.get(name, values[0])
        if value not in values:
            self.refuse(name, f"one of {', '.join(values)}")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        value = self.fields.get(name, {})
        if not isinstance(value, dict):
            self.refuse(name, "a mapping")
        return value

    def texts(self, name: str) -> list[str] | None:
        value = self.fields.get(name)
        if value is None:
            return None
        # Numbers serve as names: 1: walk.
        right = isinstance(value, list) and value and all(isinstance(item, (str, int)) for item in value)
        if not right or len(set(map(str, value))) < len(value):
            self.refuse(name, "a list of different names")
        return [str(item) for item in value]


class _CsvFormat:
    """Which columns of a ``.csv`` hold what."""

    def __init__(self, told: _Told, layout: Skeleton) -> None:
        self._joints = layout.num_joints
        self._delimiter = told.text("delimiter", ",")
        if len(self._delimiter) != 1 or self._delimiter in '"\r\n':
            told.refuse("delimiter", "one character")
        header = told.fields.get("header", True)
        self._header = None if isinstance(header, bool) else told.texts("header")
        self._has_header = header is True
        self._named = header is not False
        self._coordinates = self._names(told, "columns", layout, "{joint}_{axis}" if self._named else None, 3)
        self._confidence = self._names(told, "confidence", layout, None, 1)
        if not self._named and (self._coordinates or self._confidence):
            raise UserError(
                f"{told.where}: csv.columns and csv.confidence name columns, but csv.header is false: give the names "
                "as a list"
            )
        if self._header is not None:
            self._find(self._header, f"{told.where}: csv.header")

    def _names(self, told: _Told, name: str, layout: Skeleton, default: str | None, each: int) -> list[str] | None:
        value = told.fields.get(name, default)
        if isinstance(value, str):
            fields = ("joint", "axis")[: 2 if each == 3 else 1]
            for field in fields:
                if f"{{{field}}}" not in value:
                    told.refuse(name, f"a pattern with {' and '.join(f'{{{field}}}' for field in fields)}")
            return [
                value.replace("{joint}", joint).replace("{axis}", axis)
                for joint in layout.joint_names
                for axis in "xyz"[:each]
            ]
        names = told.texts(name) if value is not None else None
        if names is not None and len(names) != each * self._joints:
            told.refuse(name, f"{each * self._joints} names for {self._joints} joints, got {len(names)}")
        return names

    def _find(self, header: list[str], where: str) -> tuple[list[int], list[int]]:
        wanted = (self._coordinates or []), (self._confidence or [])
        for name in (*wanted[0], *wanted[1]):
            if header.count(name) != 1:
                raise UserError(
                    f"{where}: expected one column {name!r}, got {header.count(name)} in {str(header)[:200]}"
                )
        return tuple([header.index(name) for name in names] for names in wanted)

    def read(self, data: bytes) -> tuple[np.ndarray, np.ndarray | None]:
        """float32 ``[1, n, V, 3]`` and, where the file tells, confidence ``[1, n, V]``; empty fields are NaN."""
        lines = _csv_lines(data, self._delimiter)
        header = self._header
        if self._has_header:
            try:
                header = [name.strip() for name in next(lines)[1]]
            except StopIteration:
                raise UserError("it is empty, expected a line of column names") from None
        width = len(header) if self._named else 3 * self._joints
        coordinates, confidences = self._find(header, "line 1") if self._named else (list(range(width)), [])
        wanted = coordinates + confidences
        rows = []
        for number, fields in lines:
            if len(fields) != width:
                raise UserError(f"line {number}: expected {width} fields, got {len(fields)}")
            row = []
            for place in wanted:
                value = _number(fields[place])
                if value is None:
                    column = f"column {header[place]!r}" if self._named else f"field {place + 1}"
                    raise UserError(f"line {number}: {column}: expected a number, got {fields[place][:24]!r}")
                row.append(value)
            for place, value in zip(confidences, row[len(coordinates) :], strict=True):
                if not (0 <= value <= 1 or math.isnan(value)):
                    raise UserError(
                        f"line {number}: column {header[place]!r}: expected a confidence in 0..1, got {value:g}"
                    )
            rows.append(row)
        with np.errstate(over="ignore"):
            table = np.array(rows, dtype=np.float64).reshape(-1, len(wanted)).astype(np.float32)
        frames = table[:, : len(coordinates)].reshape(1, -1, self._joints, 3).copy()
        # A joint whose confidence is not told was not seen.
        confidence = np.nan_to_num(table[None, :, len(coordinates) :], nan=0) if confidences else None
        return frames, confidence


def _csv_lines(data: bytes, delimiter: str):
    """Line number and fields of each line that is not blank."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"byte {error.start} is not UTF-8 text") from None
    lines = csv.reader(io.StringIO(text), delimiter=delimiter)
    try:
        for fields in lines:
            if fields:
                yield lines.line_num, fields
    except csv.Error as error:
        raise UserError(f"line {lines.line_num}: {error}") from None


def _number(text: str) -> float | None:
    text = text.strip()
    if not text:
        return math.nan
    try:
        # Python's own spelling 1_000 is a slip here.
        return None if "_" in text else float(text)
    except ValueError:
        return None


def _array(data: bytes, joints: int) -> np.ndarray:
    """float32 ``[M, n, V, 3]`` of an ``.npy`` file."""
    expected = f"[n,{joints},3], [n,M,{joints},3] or [n,{joints * 3}]"
    try:
        array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception as error:
        # What numpy makes of a damaged header is not only its own errors: Python's tokenizer and parser speak too.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"not a whole .npy array: {reason}") from error
    shaped = (
        array.shape[1:] in ((joints, 3), (joints * 3,)) or (array.ndim == 4 and array.shape[2:] == (joints, 3))
    ) and 0 not in array.shape[1:]
    if array.dtype.kind not in "fiu" or not shaped:
        raise UserError(f"expected float {expected}, got {array.dtype} {list(array.shape)}")
    with np.errstate(over="ignore"):
        frames = array.astype(np.float32).reshape(len(array), array.shape[1] if array.ndim == 4 else 1, joints, 3)
    return np.ascontiguousarray(frames.transpose(1, 0, 2, 3))


def _yaml(where: str, data: bytes) -> dict[str, Any]:
    try:
        fields = yaml.safe_load(data)
    except Exception as error:
        # Besides its own errors PyYAML lets through what its makers of values trip over.
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        reason = getattr(error, "problem", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{where}: {line}not YAML: {reason}") from None
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise UserError(f"{where}: expected fields such as 'fps: 30', got {type(fields).__name__}")
    return fields


def _layout(told: _Told) -> Skeleton:
    name, joints = told.text("layout"), told.texts("joints")
    if (name is None) == (joints is None):
        raise UserError(
            f"{told.where}: expected either layout, one of {', '.join(skeleton.names())}, or joints and parents"
        )
    try:
        if name is not None:
            if "parents" in told.fields:
                raise UserError("parents go with joints, not with layout")
            return skeleton.get(name)
        parents = told.fields.get("parents")
        if not isinstance(parents, list) or len(parents) != len(joints):
            told.refuse("parents", f"a list of {len(joints)} parents, one for each joint")
        known = {joint: place for place, joint in enumerate(joints)}
        numbers = []
        for joint, parent in zip(joints, parents, strict=True):
            place = -1 if parent is None else known.get(parent, -2) if isinstance(parent, str) else parent
            if isinstance(place, bool) or not isinstance(place, int) or place == -2:
                raise UserError(f"parents: that of {joint} must be a joint or its number, got {parent!r}")
            numbers.append(place)
        return Skeleton.from_parents(numbers, joints)
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(told.where) else f"{told.where}: {text}") from None


def _pattern(told: _Told) -> re.Pattern | None:
    text = told.text("names")
    if text is None:
        return None
    parts = re.split(r"\{(\w*)\}", text)
    fields = parts[1::2]
    if not all(re.fullmatch(r"[A-Za-z]\w*", field, re.ASCII) for field in fields) or len(set(fields)) < len(fields):
        told.refuse("names", "a pattern with each {field} once")
    return re.compile(
        "".join(f"(?P<{part}>[^/]+?)" if place % 2 else re.escape(part) for place, part in enumerate(parts))
    )


def _columns(
    told: _Told, files: Sequence[SourceFile], table: dict | None, where: str
) -> dict[str, dict[str, int | str]]:
    """What is known of each file by its name and by the table of labels."""
    pattern = _pattern(told)
    depth = (told.text("names") or "").count("/") + 1
    known: dict[str, dict[str, str]] = {}
    for file in files:
        fields: dict[str, str] = {}
        if pattern is not None:
            stem = "/".join(file.bare.parts[-depth:])
            found = pattern.fullmatch(stem)
            if not found:
                raise UserError(f"{where}: {file.name} does not fit the names {told.text('names')!r} of {told.where}")
            fields |= found.groupdict()
        if table is not None:
            row = table.get(file.name) or table.get(str(file.bare))
            if row is None:
                raise UserError(f"{where}: {file.name} has no line in {told.text('labels')}")
            fields |= row
        known[file.name] = fields
    for name in next(iter(known.values())):
        if name != "label" and all(re.fullmatch(r"\d{1,15}", fields[name], re.ASCII) for fields in known.values()):
            for fields in known.values():
                fields[name] = int(fields[name])
    return known


def _label_table(tree: FileTree, folder: Path | None, name: str, where: str) -> dict[str, dict[str, str]]:
    """Fields by file of the labels CSV."""
    read: Callable[[], bytes] | None = tree.beside(name)
    if read is None and folder is not None and (folder / name).is_file():
        read = (folder / name).read_bytes
    if read is None:
        raise UserError(f"{where}: labels: there is no file {name}")
    where = f"{tree.path}: {name}"
    try:
        lines = _csv_lines(read(), ",")
        header = [field.strip() for field in next(lines, (1, []))[1]]
        if "file" not in header or "label" not in header or len(set(header)) < len(header):
            raise UserError(f"line 1: expected columns file, label and others, each once, got {str(header)[:200]}")
        table: dict[str, dict[str, str]] = {}
        for number, fields in lines:
            if len(fields) != len(header):
                raise UserError(f"line {number}: expected {len(header)} fields, got {len(fields)}")
            row = {column: field.strip() for column, field in zip(header, fields, strict=True)}
            file = row.pop("file")
            if file in table:
                raise UserError(f"line {number}: file {file!r} has a line already")
            table[file] = row
    except OSError as error:
        raise UserError(f"{where}: {error.strerror or error}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return table


def _classes(told: _Told, columns: dict[str, dict[str, Any]]) -> tuple[list[str], dict[str, int | None]]:
    """Names of the classes and each file's class; None where a label is not among them."""
    classes = told.texts("classes")
    labels = {file: fields.get("label") for file, fields in columns.items()}
    counts = Counter(labels.values())
    if None in counts:
        if classes is not None:
            raise UserError(f"{told.where}: classes needs {{label}} in names, or labels")
        return ["unlabelled"], dict.fromkeys(labels, 0)
    if classes is None:
        # Numbers in their own order, so that 10 comes after 9.
        classes = sorted(counts, key=lambda text: (int(text), text) if text.isdecimal() else (math.inf, text))
    index = {name: place for place, name in enumerate(classes)}
    for text in counts:
        if text not in index and re.fullmatch(r"\d{1,9}", text, re.ASCII) and int(text) < len(classes):
            index[text] = int(text)
    return classes, {file: index.get(label) for file, label in labels.items()}
