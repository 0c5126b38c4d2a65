"""Reader of BVH motion capture: a folder or ``.zip`` of ``.bvh`` files, forward kinematics over all frames at once."""

import fnmatch
import io
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from jmm_fast import skeleton
from jmm_fast.data.collect import FileLog, RawClip
from jmm_fast.data.filetree import FileTree, SourceFile
from jmm_fast.data.mapping import some, spine_joints
from jmm_fast.data.readers import common
from jmm_fast.data.store import StoreContents
from jmm_fast.errors import UserError

MAX_JOINTS = 1024
"""No body has more; a file that opens braces without end is not read to its end."""

_METRES = {"m": 1.0, "cm": 0.01, "mm": 0.001, "inch": 0.0254}
_BLOCK_FRAMES = 1024
_HEAD_BYTES = 4 << 20
_SAME_FPS = 0.002
"""Relative difference of frame rates that is rounding: files give the time of a frame, such as 0.0333."""


@dataclass(kw_only=True, slots=True)
class BvhOptions(common.CommonOptions):
    """How to read BVH files."""

    pattern: str | None = None
    """What a file's name says, e.g. "dataset-{dataset}_{label}_{style}_{take}": {label} is the class, other fields
    become columns, each as short as it can be; with a / in it the pattern stands for the path below the folder. Without
    a pattern the class is the name of the file's folder; of files that all lie in one folder the name without the
    number at its end, or without what follows the last _."""
    unit: Literal["cm", "m", "mm", "inch"] = "cm"
    """Unit of the files' lengths; the store is in metres."""
    up: Literal["y", "z"] = "y"
    """The files' upward axis; in the store y is up."""
    fps: float | None = None
    """Frames per second of the store: of each file the frames nearest in time. Without it all files must agree."""
    root: str | None = None
    """Joint to start the tree at, e.g. Hips below a helper such as joint_Root; joints outside its branch are left
    out."""
    joints: tuple[str, ...] = ()
    """Joints to keep, in the file's order (* and ? are wildcards); a joint hangs on the nearest one kept above it."""
    drop_joints: tuple[str, ...] = ()
    """Joints to leave out, e.g. "*Thumb*"."""
    end_sites: bool = False
    """Keep the ends of the last bones too, named after their joint: Head_end."""
    center: bool = True
    """Move each clip so that the middle of the spine (or else the root joint) starts at the origin."""


@dataclass(kw_only=True, slots=True)
class Hierarchy:
    """The tree of a BVH file.

    Attributes:
        names, parents: of each joint, parents (-1: root) before their children; end sites are joints without channels.
        offsets: float64 ``[J, 3]``.
        channels: of each joint its columns of the motion, in the order of its CHANNELS: ``(kind, axis)`` with kind
            ``position`` or ``rotation`` and axis 0, 1, 2.
        ends: whether a joint is an end site.
    """

    names: list[str] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    offsets: list[Any] = field(default_factory=list)
    channels: list[Any] = field(default_factory=list)
    ends: list[bool] = field(default_factory=list)

    @property
    def num_channels(self) -> int:
        return sum(map(len, self.channels))


@dataclass(kw_only=True, slots=True)
class Motion:
    """A BVH file: its tree, frames per second, and ``values`` float64 ``[n, channels]`` (degrees, the file's unit)."""

    hierarchy: Hierarchy
    fps: float
    values: np.ndarray


def parse(data: bytes) -> Motion:
    """The contents of a BVH file.

    Raises:
        UserError: not a BVH file, truncated, or numbers that do not fit; the line says where.
    """
    data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    hierarchy, line, begin = _hierarchy(data)
    found = re.compile(rb"\s*Frames[ \t]*:?[ \t]*([^\s]*)", re.I).match(data, begin)
    if not found:
        raise UserError(f"line {line + 1}: expected Frames: COUNT after MOTION")
    line = _line(data, found.start(1))
    if not re.fullmatch(rb"\d{1,15}", found[1]) or int(found[1]) < 1:
        raise UserError(f"line {line}: expected the number of frames, 1 or more, got {_text(found[1])}")
    frames = int(found[1])
    found = re.compile(rb"\s*Frame[ \t]*Time[ \t]*:?[ \t]*([^\s]*)", re.I).match(data, found.end())
    if not found:
        raise UserError(f"line {line + 1}: expected Frame Time: SECONDS after Frames")
    line = _line(data, found.start(1))
    seconds = _number(found[1])
    if not 1e-5 < seconds < 1e3:
        raise UserError(f"line {line}: expected the seconds of a frame, got {_text(found[1])}")
    values = _values(data, found.end(), frames, hierarchy.num_channels, line)
    rate = 1 / seconds
    whole = round(rate)
    return Motion(
        hierarchy=hierarchy, fps=float(whole) if abs(rate - whole) <= _SAME_FPS * rate else rate, values=values
    )


def positions(hierarchy: Hierarchy, values: np.ndarray) -> np.ndarray:
    """Forward kinematics: where each joint is, float64 ``[n, J, 3]`` in the file's unit and axes.

    With ``R_j`` the product of a joint's rotations in the order of its channels and ``t_j`` its OFFSET, of which
    position channels replace the components: ``G_j = G_parent R_j`` and ``p_j = p_parent + G_parent t_j``.

    Args:
        values: float64 ``[n, channels]``, angles in degrees.
    """
    count = len(hierarchy.names)
    result = np.empty((len(values), count, 3))
    for begin in range(0, len(values), _BLOCK_FRAMES):
        block = values[begin : begin + _BLOCK_FRAMES].T
        angles = np.deg2rad(block)
        cosines, sines = np.cos(angles), np.sin(angles)
        # Columns of G_j and p_j, each [3, frames]: a rotation about one axis mixes the two columns of the others.
        turned: list[list[np.ndarray]] = []
        places: list[np.ndarray] = []
        column = 0
        for joint, parent in enumerate(hierarchy.parents):
            above = turned[parent] if parent >= 0 else [axis[:, None] for axis in np.eye(3)]
            columns = list(above)
            offset: list[Any] = list(hierarchy.offsets[joint])
            for kind, axis in hierarchy.channels[joint]:
                if kind == "position":
                    offset[axis] = block[column]
                else:
                    one, two = (axis + 1) % 3, (axis + 2) % 3
                    cosine, sine = cosines[column], sines[column]
                    columns[one], columns[two] = (
                        cosine * columns[one] + sine * columns[two],
                        cosine * columns[two] - sine * columns[one],
                    )
                column += 1
            place = above[0] * offset[0] + above[1] * offset[1] + above[2] * offset[2]
            places.append(place + places[parent] if parent >= 0 else place)
            turned.append(columns)
            result[begin : begin + block.shape[1], joint] = places[joint].T
    return result


class _BvhSource:
    """All files of a folder; see :class:`jmm_fast.data.collect.ClipSource`."""

    class_names = None

    def __init__(self, path: Path, options: BvhOptions) -> None:
        self.where = str(path)
        self._options = options
        self._tree = FileTree(path, (".bvh",))
        self.files = self._tree.files
        self.identity = common.plain(options)
        self._pattern = None if options.pattern is None else _compile(options.pattern)
        folders = [str(PurePosixPath(file.name).parent) for file in self.files]
        self._common = os.path.commonpath(folders) or "."
        if options.fps is not None and not 0 < options.fps < math.inf:
            raise UserError(f"--fps must be more than 0, got {options.fps}")
        self._first, motion = self._first_whole()
        self.fps = motion.fps if options.fps is None else options.fps
        self._kept = self._select(motion.hierarchy)
        try:
            _, names, parents = self._kept
            self.skeleton = skeleton.find(parents, names)
            self._spine = spine_joints(self.skeleton)
        except UserError as error:
            raise UserError(f"{self.where}: {self._first}: {error}") from error

    def _first_whole(self) -> tuple[str, Motion]:
        """Name and contents of the first file that can be read: all others must have its joints."""
        refused = None
        for file in self.files:
            try:
                motion = parse(self._tree.read(file))
                self._select(motion.hierarchy)
                return file.name, motion
            except UserError as error:
                refused = refused or UserError(f"{self.where}: {file.name}: {error}")
                if self._options.on_error == "fail":
                    break
        raise refused

    def read(self, file: SourceFile, log: FileLog) -> list[RawClip]:
        motion = parse(self._tree.read(file))
        kept, names, parents = self._select(motion.hierarchy)
        if (names, parents) != self._kept[1:]:
            raise UserError(_difference(names, parents, *self._kept[1:], self._first))
        label, columns = self._label(file)
        step = motion.fps / self.fps
        if self._options.fps is None and abs(step - 1) > _SAME_FPS:
            raise UserError(
                f"has {motion.fps:g} frames per second, but {self._first} has {self.fps:g}: --fps resamples all to one"
            )
        if step < 1 - _SAME_FPS:
            raise UserError(f"has {motion.fps:g} frames per second, expected at least --fps {self.fps:g}")
        values = motion.values
        if step > 1 + _SAME_FPS:
            count = int((len(values) - 1) / step + 1e-6) + 1
            values = values[np.rint(np.arange(count) * step).astype(np.int64)]
        place = positions(motion.hierarchy, values)[:, kept] * _METRES[self._options.unit]
        if self._options.up == "z":
            place = place[..., [0, 2, 1]] * [1, 1, -1]
        if self._options.center:
            place -= place[0, self._spine].mean(axis=0)
        frames = place.astype(np.float32)[None]
        return [RawClip(name=str(file.bare), frames=frames, label=label, columns=columns)]

    def finish(self, contents: StoreContents) -> list[str]:
        return []

    def _select(self, hierarchy: Hierarchy) -> tuple[list[int], tuple[str, ...], tuple[int, ...]]:
        """Joints of the file that are kept, their names and their parents among them."""
        options = self._options
        keep = [options.end_sites or not end for end in hierarchy.ends]
        if options.root is not None:
            if options.root not in hierarchy.names:
                raise UserError(f"--root: there is no joint {options.root!r}, but {some(hierarchy.names)}")
            below = [False] * len(keep)
            for joint, parent in enumerate(hierarchy.parents):
                below[joint] = hierarchy.names[joint] == options.root or (parent >= 0 and below[parent])
            keep = [one and two for one, two in zip(keep, below, strict=True)]
        for option, patterns in (("--joints", options.joints), ("--drop-joints", options.drop_joints)):
            hit = [False] * len(keep)
            for pattern in patterns:
                found = [fnmatch.fnmatchcase(name, pattern) for name in hierarchy.names]
                if not any(found):
                    raise UserError(f"{option}: there is no joint {pattern!r}, but {some(hierarchy.names)}")
                hit = [one or two for one, two in zip(hit, found, strict=True)]
            if patterns:
                wanted = option == "--joints"
                keep = [one and two == wanted for one, two in zip(keep, hit, strict=True)]
        kept = [joint for joint, keeps in enumerate(keep) if keeps]
        place = {joint: number for number, joint in enumerate(kept)}
        parents = []
        for joint in kept:
            parent = hierarchy.parents[joint]
            while parent >= 0 and parent not in place:
                parent = hierarchy.parents[parent]
            parents.append(place.get(parent, -1))
        roots = [hierarchy.names[joint] for joint, parent in zip(kept, parents, strict=True) if parent < 0]
        if len(roots) != 1:
            raise UserError(f"the joints that are kept must be one tree, but {some(roots) or 'none'} have none above")
        return kept, tuple(hierarchy.names[joint] for joint in kept), tuple(parents)

    def _label(self, file: SourceFile) -> tuple[str, dict[str, int | str]]:
        path = file.bare
        if self._pattern is not None:
            text = str(path) if "/" in self._options.pattern else path.name
            found = self._pattern.fullmatch(text)
            if not found:
                raise UserError(f"the name {text!r} does not fit --pattern {self._options.pattern!r}")
            fields = found.groupdict()
            label = fields.pop("label")
            return label, {name: int(text) if _whole(text) else text for name, text in fields.items()}
        if str(path.parent) != self._common:
            return path.parent.name, {}
        bare = re.sub(r"[\W_]*\d+$", "", path.name)
        if bare == path.name:
            bare = path.name.rpartition("_")[0]
        return bare or path.name, {}


def open(path: Path, options: BvhOptions | None = None) -> _BvhSource:
    """The BVH files below ``path`` as clips: one file, one clip of one body.

    Raises:
        UserError: no such folder or file, options that do not fit, or a first file that cannot be read.
    """
    return _BvhSource(Path(path), BvhOptions() if options is None else options)


def _hierarchy(data: bytes) -> tuple[Hierarchy, int, int]:
    """The tree, the line of MOTION and where the motion begins in ``data``."""
    found = re.search(rb"^[ \t]*MOTION[ \t]*$", data, re.M | re.I)
    head = data if found is None else data[: found.start()]
    if len(head) > _HEAD_BYTES:
        raise UserError(f"expected MOTION within {_HEAD_BYTES} bytes")
    tree = Hierarchy()
    sites: dict[int, int] = {}
    above: list[int] = []
    opens = False
    last = 0
    for line, text in _statements(head):
        if last == 0:
            if text.upper() != "HIERARCHY":
                raise UserError(f"line {line}: expected HIERARCHY, got {_text(text)}")
            last = line
            continue
        last = line
        words = text.split()
        word = words[0].upper()
        if opens != (text == "{"):
            raise UserError(
                f"line {line}: expected {{ after joint {tree.names[-1]}, got {_text(text)}"
                if opens
                else f"line {line}: expected a joint before {{"
            )
        if text == "{":
            above.append(len(tree.names) - 1)
            opens = False
        elif text == "}":
            if not above:
                raise UserError(f"line {line}: expected MOTION, got a }} that closes nothing")
            joint = above.pop()
            if tree.offsets[joint] is None:
                raise UserError(f"line {line}: joint {tree.names[joint]} has no OFFSET")
        elif word in ("ROOT", "JOINT", "END", "ENDSITE"):
            if (word == "ROOT") != (not above) or (word == "ROOT" and tree.names):
                raise UserError(f"line {line}: expected one ROOT around all joints, got {_text(text)}")
            name = " ".join(words[1:])
            if word.startswith("END"):
                sites[above[-1]] = number = sites.get(above[-1], 0) + 1
                name = f"{tree.names[above[-1]]}_end{number if number > 1 else ''}"
            if not name or name in tree.names:
                raise UserError(f"line {line}: expected a name of its own for each joint, got {_text(text)}")
            if len(tree.names) == MAX_JOINTS:
                raise UserError(f"line {line}: more than {MAX_JOINTS} joints")
            tree.names.append(name)
            tree.parents.append(above[-1] if above else -1)
            tree.offsets.append(None)
            tree.channels.append(())
            tree.ends.append(word.startswith("END"))
            opens = True
        elif word == "OFFSET" and above:
            numbers = [_number(word.encode()) for word in words[1:]]
            if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
                raise UserError(f"line {line}: expected OFFSET and 3 numbers, got {_text(text)}")
            tree.offsets[above[-1]] = numbers
        elif word == "CHANNELS" and above:
            tree.channels[above[-1]] = _channels(line, words)
        else:
            raise UserError(f"line {line}: expected JOINT, End Site, OFFSET, CHANNELS, {{ or }}, got {_text(text)}")
    if last == 0:
        raise UserError("line 1: expected HIERARCHY, got an empty file" if not data.strip() else "has no HIERARCHY")
    if opens or above or found is None:
        what = f"joint {tree.names[above[-1]]} is not closed" if above else "MOTION is missing"
        raise UserError(f"line {last}: the file ends or MOTION begins too early: {what}")
    if not tree.num_channels:
        raise UserError(f"line {last}: no joint has CHANNELS")
    return tree, _line(data, found.start()), found.end()


def _statements(head: bytes) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(io.StringIO(head.decode("utf-8-sig", errors="replace")), 1):
        for text in re.findall(r"[{}]|[^{}]+", line):
            if text.strip():
                yield number, text.strip()


def _channels(line: int, words: list[str]) -> tuple[tuple[str, int], ...]:
    if len(words) < 2 or words[1] != str(len(words) - 2):
        said = words[1] if len(words) > 1 else "none"
        raise UserError(f"line {line}: expected CHANNELS, their number and as many names, got {said}: {words[2:]}")
    channels = []
    for word in words[2:]:
        found = re.fullmatch(r"([XYZ])(position|rotation)", word, re.I)
        if not found:
            raise UserError(f"line {line}: unknown channel {_text(word)}, expected Xposition, ... or Zrotation")
        channels.append((found[2].lower(), "XYZ".index(found[1].upper())))
    if len(set(channels)) != len(channels):
        raise UserError(f"line {line}: expected each channel once, got {' '.join(words[2:])}")
    return tuple(channels)


def _values(data: bytes, begin: int, frames: int, channels: int, line: int) -> np.ndarray:
    """The numbers of the motion ``[frames, channels]``; looks at single lines only when something is wrong."""
    # A number and the space before it take two bytes, so a made-up count of frames costs nothing.
    if 2 * frames * channels <= len(data) - begin:
        try:
            values = np.fromstring(data[begin:], sep=" ")
        except (ValueError, DeprecationWarning):
            values = np.empty(0)
        if len(values) == frames * channels and np.isfinite(values).all():
            return values.reshape(frames, channels)
    rows, number = 0, line
    for number, text in enumerate(io.BytesIO(data[begin:]), line):
        words = text.split()
        if not words:
            continue
        bad = next((word for word in words if not math.isfinite(_number(word))), None)
        if bad is not None:
            raise UserError(f"line {number}: expected finite numbers, got {_text(bad)}")
        if len(words) != channels:
            raise UserError(f"line {number}: expected {channels} numbers of a frame, got {len(words)}")
        rows += 1
    raise UserError(f"line {number}: the file ends after {rows} frames, but Frames says {frames}")


def _number(word: bytes) -> float:
    """The number that ``word`` is; NaN where it is none."""
    try:
        return float(word) if b"_" not in word else math.nan
    except ValueError:
        return math.nan


def _line(data: bytes, position: int) -> int:
    return data.count(b"\n", 0, position) + 1


def _text(word: bytes | str) -> str:
    text = word.decode("utf-8", errors="replace") if isinstance(word, bytes) else word
    return repr(text if len(text) <= 40 else text[:40] + "...")


def _whole(text: str) -> bool:
    return re.fullmatch(r"\d{1,18}", text, re.ASCII) is not None


def _compile(pattern: str) -> re.Pattern:
    """``{name}`` texts as a regular expression with named groups."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    names = parts[1::2]
    if "label" not in names or len(set(names)) != len(names) or not all(re.fullmatch(r"[^\W\d]\w*", n) for n in names):
        raise UserError(f"--pattern needs {{label}} and different names in the other braces, got {pattern!r}")
    return re.compile(
        "".join(re.escape(part) if at % 2 == 0 else f"(?P<{part}>[^/]+?)" for at, part in enumerate(parts))
    )


def _difference(names: tuple, parents: tuple, first_names: tuple, first_parents: tuple, first: str) -> str:
    more, fewer = [name for name in names if name not in first_names], [n for n in first_names if n not in names]
    if more or fewer:
        parts = [f"{some(found)} {word}" for found, word in ((fewer, "missing"), (more, "too many")) if found]
        what = ", ".join(parts)
    else:
        what = "their order or their parents differ"
    return f"expected the joints of {first}: {what}; --joints and --drop-joints choose those that all have"
