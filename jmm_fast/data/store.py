"""The clip store: one memory-mapped ``.safetensors`` file per data set.

Tensors: ``frames`` float32 ``[F, V, 3]`` in metres; ``offsets`` int64 ``[N + 1]``, rows of each clip;
``body_offsets`` int64 ``[M + 1]``, rows of each body; ``labels`` int64 ``[N]``; ``column/NAME`` ``[N]``, whatever else
is known of a clip; where a data set tells, ``confidence`` float16 ``[F, V]`` in [0, 1], how surely each joint was seen
(0: it is missing).
The rows of a clip are its bodies one after the other, all with the same number of frames; a body's rows are zero where
it is absent. The header holds the joint layout, class names, names of column codes, splits, clip names, frame rate and
provenance as JSON. No pickle, no zero padding.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from jmm_fast.data.splits import ColumnTable, Split, split_masks, stratified_fraction
from jmm_fast.errors import UserError
from jmm_fast.files import atomic_path
from jmm_fast.skeleton import Skeleton

FORMAT = "jmm_fast.clips"
VERSION = "1"
MIN_FRAMES = 2
"""Motion needs two frames, so a clip must hold at least as many."""

_DTYPES = {
    np.dtype(np.float16): "F16",
    np.dtype(np.float32): "F32",
    np.dtype(np.float64): "F64",
    np.dtype(np.int64): "I64",
}


@dataclass(kw_only=True, slots=True)
class StoreContents:
    """A data set in memory, as a reader makes it and :func:`write_store` writes it.

    Attributes:
        frames: float32 ``[F, V, 3]`` metres, or a list of such blocks in row order (a big set need never be copied). A
            block may also be anything with ``shape``, ``dtype``, ``nbytes`` and ``__array__``: it is read when written.
        offsets: int64 ``[N + 1]``, rows of each clip.
        body_offsets: int64 ``[M + 1]``, rows of each body; default one body a clip.
        labels: int64 ``[N]``, index into ``class_names``.
        class_names: one name per class.
        skeleton: joint layout of the frames.
        confidence: float16 ``[F, V]`` in [0, 1], or a list of blocks as ``frames``; 0: the joint is missing in this
            frame. None: every joint was seen.
        columns: int64, float32 or float64 ``[N]`` by name.
        column_values: names of a column's codes 0, 1, ..., for columns that have them.
        names: one name per clip; default ``clip 0``, ``clip 1``, ...
        fps: frames per second.
        splits: name -> {"train": clip indices, "test": clip indices}.
        provenance: anything JSON: where the data came from, how it was made, which clips were dropped and why.
        label_subsets: split -> fraction -> names of the training clips that keep their labels.
    """

    frames: np.ndarray | list[np.ndarray]
    offsets: np.ndarray
    labels: np.ndarray
    class_names: list[str]
    skeleton: Skeleton
    body_offsets: np.ndarray | None = None
    confidence: np.ndarray | list[np.ndarray] | None = None
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    column_values: dict[str, list[str]] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    fps: float = 30.0
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    label_subsets: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    @property
    def num_clips(self) -> int:
        return len(self.offsets) - 1

    def table(self, where: str) -> ColumnTable:
        """What split expressions over these clips may speak of; ``where`` names the file in messages."""
        return ColumnTable(
            where=where,
            columns={"label": self.labels, **self.columns},
            values={"label": self.class_names, **self.column_values},
        )


def write_store(path: str | os.PathLike, contents: StoreContents | None = None, **fields: Any) -> None:
    """Write a clip store, whole or not at all.

    Args:
        path: file to write; conventionally ``.safetensors``.
        contents: the data set; or pass the fields of :class:`StoreContents` by keyword.

    Raises:
        UserError: inconsistent contents (one line says what), an unwritable folder, a full disk.

    The bytes depend on the contents alone: equal data makes equal files.
    """
    contents = StoreContents(**fields) if contents is None else contents
    blocks = contents.frames if isinstance(contents.frames, list) else [contents.frames]
    body_offsets = contents.offsets if contents.body_offsets is None else contents.body_offsets
    tensors = {
        "offsets": np.asarray(contents.offsets),
        "body_offsets": np.asarray(body_offsets),
        "labels": np.asarray(contents.labels),
        **{f"column/{name}": np.asarray(column) for name, column in contents.columns.items()},
    }
    names = contents.names or [f"clip {clip}" for clip in range(contents.num_clips)]
    header = {
        "skeleton": {
            "name": contents.skeleton.name,
            "joint_names": contents.skeleton.joint_names,
            "parents": contents.skeleton.parents,
            "pairs": contents.skeleton.pairs,
            "bone_targets": contents.skeleton.bone_targets,
        },
        "class_names": list(contents.class_names),
        "column_values": {name: list(values) for name, values in contents.column_values.items()},
        "names": list(names),
        "fps": float(contents.fps),
        "splits": {
            name: {part: np.asarray(ids).tolist() for part, ids in split.items()}
            for name, split in contents.splits.items()
        },
        "provenance": contents.provenance,
        "label_subsets": contents.label_subsets,
    }
    frame_shapes = [block.shape for block in blocks]
    if not blocks or any(block.dtype != np.float32 or block.shape[1:] != blocks[0].shape[1:] for block in blocks):
        raise UserError(f"{path}: frames must be float32 [F,V,3], got {frame_shapes[:3]}")
    rows = sum(len(block) for block in blocks)
    confidence = contents.confidence if isinstance(contents.confidence, list) else [contents.confidence]
    if contents.confidence is not None:
        shape = [sum(len(block) for block in confidence), *confidence[0].shape[1:]]
        if shape != [rows, blocks[0].shape[1]] or any(block.dtype != np.float16 for block in confidence):
            raise UserError(f"{path}: confidence must be float16 [{rows},{blocks[0].shape[1]}], got {shape}")
    _check(
        str(path), (rows, *blocks[0].shape[1:]), {key: torch.as_tensor(value) for key, value in tensors.items()}, header
    )

    # Widest numbers first: every tensor then starts at a multiple of its own element size.
    small = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    entries: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "version": VERSION,
            **{key: json.dumps(value, ensure_ascii=False, default=_plain) for key, value in header.items()},
        }
    }
    position = 0
    for name, tensor in small:
        end = position + tensor.nbytes
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": [position, end]}
        position = end
    end = position + sum(block.nbytes for block in blocks)
    entries["frames"] = {"dtype": "F32", "shape": [rows, *blocks[0].shape[1:]], "data_offsets": [position, end]}
    if contents.confidence is not None:
        size = rows * blocks[0].shape[1] * 2
        entries["confidence"] = {
            "dtype": "F16",
            "shape": [rows, blocks[0].shape[1]],
            "data_offsets": [end, end + size],
        }
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in small:
            file.write(np.ascontiguousarray(tensor).data)
        for block in blocks:
            file.write(np.ascontiguousarray(block).data)
        for block in confidence if contents.confidence is not None else ():
            file.write(np.ascontiguousarray(block).data)


class ClipStore:
    """A data set opened for reading; frames stay on disk until they are touched.

    Attributes:
        path: the file, or a description for a store made in memory.
        frames: float32 ``[F, V, 3]`` metres, memory mapped.
        confidence: float16 ``[F, V]``, memory mapped, or None where the data set does not tell.
        offsets, body_offsets, labels: int64 ``[N + 1]``, ``[M + 1]``, ``[N]``.
        clip_bodies: int64 ``[N, 2]``, first body and number of bodies of each clip.
        lengths: int64 ``[N]``, frames of each clip.
        columns: per-clip tensors by name; column_values: names of their codes.
        class_names, names, skeleton, fps, provenance: as in :class:`StoreContents`.
        splits: name -> {"train": int64 ids, "test": int64 ids}.
        label_subsets: split -> fraction -> names of the training clips that keep their labels.
    """

    def __init__(self, path: str, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> None:
        self.path = path
        self.frames = tensors["frames"]
        self.confidence = tensors.get("confidence")
        self.skeleton = _check(path, self.frames.shape, tensors, header)
        self.offsets, self.body_offsets, self.labels = (tensors[name] for name in ("offsets", "body_offsets", "labels"))
        self.columns = {
            name.removeprefix("column/"): tensor for name, tensor in tensors.items() if name.startswith("column/")
        }
        self.column_values: dict[str, list[str]] = header["column_values"]
        self.class_names: list[str] = header["class_names"]
        self.names: list[str] = header["names"]
        self.fps: float = header["fps"]
        self.provenance: dict[str, Any] = header["provenance"]
        self.label_subsets: dict[str, dict[str, list[str]]] = header["label_subsets"]
        self.splits = {
            name: {part: torch.as_tensor(ids, dtype=torch.int64) for part, ids in split.items()}
            for name, split in header["splits"].items()
        }
        first = torch.searchsorted(self.body_offsets, self.offsets[:-1])
        last = torch.searchsorted(self.body_offsets, self.offsets[1:])
        self.clip_bodies = torch.stack([first, last - first], dim=1)
        self.lengths = (self.offsets[1:] - self.offsets[:-1]) // self.clip_bodies[:, 1]

    @classmethod
    def open(cls, path: str | os.PathLike, check_values: bool = True) -> "ClipStore":
        """Open and check a store.

        Args:
            path: a file that :func:`write_store` wrote.
            check_values: also read every value once and refuse NaN and infinity.

        Raises:
            UserError: missing, truncated, not a clip store, of another version, with tensors of a wrong type or
                shape, or holding a clip that cannot be used; one line names the file, the field and the clip.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file: expected a clip store made by 'jmm-fast prepare'")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                keys = list(file.keys())
                if metadata.get("format") == FORMAT:
                    tensors = {key: file.get_tensor(key) for key in keys}
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path}: not a whole .safetensors file: {_first_line(error)}") from error
        if metadata.get("format") != FORMAT:
            raise UserError(f"{path}: not a clip store: it holds {', '.join(sorted(keys)[:5]) or 'nothing'}")
        if metadata.get("version") != VERSION:
            raise UserError(
                f"{path}: clip store version {metadata.get('version')}, this program reads {VERSION}: prepare it again"
            )
        header = {}
        for key in ("skeleton", "class_names", "column_values", "names", "fps", "splits", "provenance"):
            try:
                header[key] = json.loads(metadata[key])
            except (KeyError, ValueError) as error:
                raise UserError(f"{path}: header field {key} is missing or not JSON") from error
        try:
            header["label_subsets"] = json.loads(metadata.get("label_subsets", "{}"))
        except ValueError as error:
            raise UserError(f"{path}: header field label_subsets is not JSON") from error
        if "frames" not in tensors or tensors["frames"].dtype != torch.float32:
            found = tensors["frames"].dtype if "frames" in tensors else "nothing"
            raise UserError(f"{path}: frames must be float32 [F,V,3], got {found}")
        store = cls(str(path), tensors, header)
        if check_values:
            store.check_values()
        return store

    @classmethod
    def from_contents(cls, contents: StoreContents, path: str = "clips in memory") -> "ClipStore":
        """A store that lives in memory alone; same checks as :meth:`open`."""
        frames = contents.frames
        frames = np.concatenate(frames) if isinstance(frames, list) else frames
        tensors = {
            "frames": torch.as_tensor(frames),
            "offsets": torch.as_tensor(contents.offsets),
            "body_offsets": torch.as_tensor(
                contents.offsets if contents.body_offsets is None else contents.body_offsets
            ),
            "labels": torch.as_tensor(contents.labels),
            **{f"column/{name}": torch.as_tensor(column) for name, column in contents.columns.items()},
        }
        confidence = contents.confidence
        if confidence is not None:
            confidence = np.concatenate(confidence) if isinstance(confidence, list) else confidence
            tensors["confidence"] = torch.as_tensor(confidence)
        header = {
            "skeleton": contents.skeleton,
            "class_names": list(contents.class_names),
            "column_values": dict(contents.column_values),
            "names": list(contents.names) or [f"clip {clip}" for clip in range(contents.num_clips)],
            "fps": contents.fps,
            "splits": contents.splits,
            "provenance": contents.provenance,
            "label_subsets": contents.label_subsets,
        }
        if tensors["frames"].dtype != torch.float32:
            raise UserError(f"{path}: frames must be float32 [F,V,3], got {tensors['frames'].dtype}")
        store = cls(path, tensors, header)
        store.check_values()
        return store

    @property
    def num_clips(self) -> int:
        """Number of clips ``N``."""
        return len(self.labels)

    @property
    def num_bodies(self) -> int:
        """Number of bodies ``M`` in all clips together."""
        return len(self.body_offsets) - 1

    @property
    def max_bodies(self) -> int:
        """Bodies in the fullest clip."""
        return int(self.clip_bodies[:, 1].max())

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return self.num_clips

    def clip(self, index: int) -> torch.Tensor:
        """Frames of clip ``index``, float32 ``[bodies, n, V, 3]``; a view of the mapped file."""
        if not 0 <= index < self.num_clips:
            raise UserError(f"{self.path}: no clip {index}: there are {self.num_clips}, counted from 0")
        bodies = int(self.clip_bodies[index, 1])
        rows = self.frames[self.offsets[index] : self.offsets[index + 1]]
        return rows.unflatten(0, (bodies, -1))

    def table(self) -> ColumnTable:
        """What split expressions over this store may speak of."""
        return ColumnTable(
            where=self.path,
            columns={"label": self.labels.numpy(), **{name: column.numpy() for name, column in self.columns.items()}},
            values={"label": self.class_names, **self.column_values},
        )

    def split(self, spec: str | None = None) -> Split:
        """Train and test clips.

        Args:
            spec: a stored split; an expression over columns, ``"subject in 1,3,5"`` (those train, the rest test);
                ``"train: EXPR; test: EXPR"``; any of these followed by ``within EXPR``; ``"all"``. None takes the
                one stored split where there is only one.

        Raises:
            UserError: unknown split, column or value (the line lists those there are), or no clip left.
        """
        if not spec:
            if len(self.splits) != 1:
                names = ", ".join(self.splits) or "none"
                raise UserError(f"{self.path}: say which split: stored ones are {names}")
            spec = next(iter(self.splits))
        stored = {name: (parts["train"].numpy(), parts["test"].numpy()) for name, parts in self.splits.items()}
        train, test = split_masks(spec, self.table(), stored)
        return Split(
            name=spec, train=torch.as_tensor(np.flatnonzero(train)), test=torch.as_tensor(np.flatnonzero(test))
        )

    def labelled(self, split: Split, fraction: float, seed: int) -> torch.Tensor:
        """The training clips of ``split`` that keep their labels when only ``fraction`` of them may.

        Those that the store names for this split and fraction (``label_subsets``: published lists, or made once by
        ``prepare --label-fractions``), else :func:`jmm_fast.data.stratified_fraction` with ``seed``; all at 1.

        Returns:
            int64 clip indices, ascending.

        Raises:
            UserError: ``fraction`` is not in (0, 1], or the stored subset names no training clip of the split.
        """
        named = self.label_subsets.get(split.name, {}).get(f"{fraction:g}")
        if named is None or fraction == 1:
            return stratified_fraction(self.labels, split.train, fraction, seed)
        held = set(named)
        chosen = split.train[[self.names[clip] in held for clip in split.train.tolist()]]
        if not len(chosen):
            raise UserError(f"{self.path}: label subset {fraction:g} of split {split.name!r} names no training clip")
        return chosen

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over everything but the bulk of the frames, of which 256 evenly spaced blocks enter."""
        digest = hashlib.sha256()
        head = {
            "skeleton": [self.skeleton.name, self.skeleton.joint_names, self.skeleton.parents],
            "class_names": self.class_names,
            "column_values": self.column_values,
            "names": self.names,
            "fps": self.fps,
            "shape": list(self.frames.shape),
            "splits": {
                name: {part: ids.tolist() for part, ids in split.items()} for name, split in self.splits.items()
            },
        }
        if self.label_subsets:
            head["label_subsets"] = self.label_subsets
        digest.update(json.dumps(head, sort_keys=True).encode())
        for name, tensor in [
            ("offsets", self.offsets),
            ("body_offsets", self.body_offsets),
            ("labels", self.labels),
            *sorted(self.columns.items()),
        ]:
            digest.update(name.encode())
            digest.update(tensor.numpy().tobytes())
        for row in np.unique(np.linspace(0, len(self.frames), 256, endpoint=False, dtype=np.int64)).tolist():
            digest.update(self.frames[row : row + 16].numpy().tobytes())
            if self.confidence is not None:
                digest.update(self.confidence[row : row + 16].numpy().tobytes())
        return digest.hexdigest()

    def check_values(self) -> None:
        """Read every frame once; :class:`UserError` naming the first clip with a NaN or an infinity."""
        if self.confidence is not None and not ((self.confidence >= 0) & (self.confidence <= 1)).all():
            raise UserError(f"{self.path}: confidence must lie in [0, 1]")
        for begin in range(0, len(self.frames), 65536):
            block = self.frames[begin : begin + 65536]
            # A sum is not finite when an element is not: one pass at memory speed, a second only in doubt.
            if not torch.isfinite(block.sum()):
                bad = torch.nonzero(~torch.isfinite(block).flatten(1).all(1))
                if len(bad):
                    clip = int(torch.searchsorted(self.offsets, begin + bad[0, 0], right=True)) - 1
                    raise UserError(f"{self.path}: {describe(clip, self.names)} holds NaN or infinite coordinates")


def describe(clip: int, names: Sequence[str]) -> str:
    """How messages call a clip: its index and, where it says more, its name."""
    name = names[clip] if clip < len(names) else ""
    return f"clip {clip}" if name in ("", f"clip {clip}") else f"clip {clip} ({name})"


def _check(
    where: str, shape: Sequence[int], tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]
) -> Skeleton:
    """Everything but the values of the frames; returns the layout. Raises UserError."""
    if len(shape) != 3 or shape[2] != 3 or shape[0] < 1:
        raise UserError(f"{where}: frames must be float32 [F,V,3], got shape {list(shape)}")
    for name in ("offsets", "body_offsets", "labels"):
        if name not in tensors:
            raise UserError(f"{where}: {name} is missing: it holds {', '.join(sorted(tensors))}")
        tensor = tensors[name]
        if tensor.dtype != torch.int64 or tensor.dim() != 1:
            raise UserError(f"{where}: {name} must be int64 and one-dimensional, got {_kind(tensor)}")
    confidence = tensors.get("confidence")
    if confidence is not None and (confidence.dtype != torch.float16 or confidence.shape != (shape[0], shape[1])):
        raise UserError(f"{where}: confidence must be float16 [{shape[0]},{shape[1]}], got {_kind(confidence)}")
    offsets, body_offsets, labels = (tensors[name] for name in ("offsets", "body_offsets", "labels"))
    count, names = len(labels), header["names"]
    if count < 1 or len(offsets) != count + 1:
        raise UserError(f"{where}: offsets must be [N+1] for the {count} labels, got {len(offsets)}")
    if len(names) != count:
        raise UserError(f"{where}: names must hold one name per clip ({count}), got {len(names)}")
    for name, edges in (("offsets", offsets), ("body_offsets", body_offsets)):
        if len(edges) < 2 or edges[0] != 0 or edges[-1] != shape[0]:
            raise UserError(f"{where}: {name} must run from 0 to the {shape[0]} rows of frames, got {_ends(edges)}")
        falls = torch.nonzero(edges[1:] < edges[:-1])
        if len(falls):
            raise UserError(
                f"{where}: {name} must not decrease, but entry {int(falls[0]) + 1} is below entry {int(falls[0])}"
            )
    short = torch.nonzero(offsets[1:] - offsets[:-1] < MIN_FRAMES)
    if len(short):
        clip = int(short[0])
        frames = int(offsets[clip + 1] - offsets[clip])
        raise UserError(f"{where}: {describe(clip, names)} has {frames} frames, expected at least {MIN_FRAMES}")
    position = torch.searchsorted(body_offsets, offsets)
    if (body_offsets[position] != offsets).any():
        clip = int(torch.nonzero(body_offsets[position] != offsets)[0])
        raise UserError(f"{where}: body_offsets must hold the first row of every clip, {int(offsets[clip])} is missing")
    owner = torch.searchsorted(offsets, body_offsets[:-1], right=True) - 1
    rows = body_offsets[1:] - body_offsets[:-1]
    even = rows * (position[1:] - position[:-1])[owner] == (offsets[1:] - offsets[:-1])[owner]
    wrong = torch.nonzero(~even | (rows < MIN_FRAMES))
    if len(wrong):
        clip = int(owner[wrong[0]])
        raise UserError(
            f"{where}: {describe(clip, names)}: its bodies must have the same number of frames, at least "
            f"{MIN_FRAMES}, got {rows[owner == clip].tolist()}"
        )
    classes = len(header["class_names"])
    outside = torch.nonzero((labels < 0) | (labels >= classes))
    if len(outside):
        clip = int(outside[0])
        raise UserError(
            f"{where}: {describe(clip, names)} has label {int(labels[clip])}, outside the {classes} class names"
        )
    for name, tensor in tensors.items():
        if name.startswith("column/"):
            if tensor.shape != (count,) or tensor.dtype not in (torch.int64, torch.float32, torch.float64):
                raise UserError(f"{where}: {name} must be int64 or float [{count}], got {_kind(tensor)}")
            codes = header["column_values"].get(name.removeprefix("column/"))
            if codes is not None and (tensor.dtype != torch.int64 or tensor.min() < 0 or tensor.max() >= len(codes)):
                raise UserError(f"{where}: {name} must hold codes of its {len(codes)} value names")
    for name, split in header["splits"].items():
        if set(split) != {"train", "test"}:
            raise UserError(f"{where}: split {name} must hold train and test, got {', '.join(split)}")
        ids = np.concatenate([np.asarray(part, dtype=np.int64) for part in split.values()])
        if len(ids) and (ids.min() < 0 or ids.max() >= count):
            raise UserError(f"{where}: split {name} must hold clips of 0..{count - 1}")
        if len(np.unique(ids)) != len(ids):
            raise UserError(f"{where}: split {name} holds a clip twice")
    for split, fractions in header["label_subsets"].items():
        for fraction, held in fractions.items():
            if not set(held) <= set(names):
                raise UserError(f"{where}: label subset {fraction} of {split} holds a clip that is not in the store")
    layout = header["skeleton"]
    if not isinstance(layout, Skeleton):
        try:
            layout = Skeleton(
                name=layout["name"],
                joint_names=tuple(layout["joint_names"]),
                parents=tuple(layout["parents"]),
                pairs=tuple(map(tuple, layout["pairs"])),
                bone_targets=tuple(map(tuple, layout["bone_targets"])),
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"{where}: header field skeleton is not a joint layout") from error
    if layout.num_joints != shape[1]:
        raise UserError(f"{where}: frames have {shape[1]} joints, its layout {layout.name} has {layout.num_joints}")
    return layout


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _ends(edges: torch.Tensor) -> str:
    return f"{int(edges[0])} to {int(edges[-1])}" if len(edges) else "none"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _plain(value: Any) -> Any:
    """Numpy numbers and arrays as JSON."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"cannot store {type(value).__name__} in the header")
