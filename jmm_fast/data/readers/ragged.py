"""Reader of the ragged ``.npz`` exchange format: all clips' frames in one array, with offsets."""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jmm_fast import skeleton
from jmm_fast.data.cleaning import Cleaner, center_clips, edges
from jmm_fast.data.readers import common
from jmm_fast.data.store import StoreContents
from jmm_fast.errors import UserError
from jmm_fast.skeleton import Skeleton

_RESERVED = {
    "frames",
    "offsets",
    "body_offsets",
    "labels",
    "label_names",
    "joint_names",
    "parents",
    "ntu25_index",
    "fps",
    "sample",
}
_NAME_COLUMNS = ("names", "name", "source")


@dataclass(kw_only=True, slots=True)
class RaggedOptions(common.CommonOptions):
    """How to read a ragged ``.npz``."""

    layout: str = "auto"
    """Joint layout of the store: auto picks ntu25 by the file's ntu25_index where it has one and keeps the joints
    otherwise; keep; or a known layout, onto which joints are mapped by that index (ntu25) or by their names."""
    center: bool = True
    """Move each clip so that the first body's spine (ntu25) or root joint starts at the origin."""


def read(path: Path, options: RaggedOptions | None = None, **fields: Any) -> StoreContents:
    """Read a ragged ``.npz``.

    Arrays: ``frames`` float32 ``[F, V, 3]`` metres, ``offsets`` int ``[N + 1]``, ``labels`` int ``[N]``,
    ``label_names``, ``joint_names`` ``[V]``, ``parents`` ``[V]`` (-1 = root), optional ``fps``, ``ntu25_index``
    ``[25]``, and any further ``[N]`` column with optional ``COLUMN_names`` for its codes; text columns get codes of
    their own, and ``source`` or ``names`` names the clips. Two people: ``body_offsets`` divides a clip's rows between
    bodies, or clips that share a ``sample`` id are the bodies of one clip. A body shorter than another of its clip is
    absent (zero) at the end.

    Args:
        path: the file.
        options: see :class:`RaggedOptions`; or its fields by keyword.

    Raises:
        UserError: missing or truncated file, missing arrays, wrong types, shapes or offsets; under ``on_error="fail"``
            also the first clip with NaN, fewer than two frames or a label outside ``label_names``.
    """
    options = RaggedOptions(**fields) if options is None else options
    path = Path(path)
    with common.reading(path):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as packed:
                common.refuse_bombs(str(path), packed)
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise UserError(f"{path}: expected an .npz archive, got a single array")
        with archive:
            arrays = {name: archive[name] for name in archive.files}
    where = str(path)
    frames = _array(where, arrays, "frames", "float32 [F,V,3]", lambda a: a.dtype == np.float32 and a.ndim == 3)
    if frames.shape[2] != 3:
        raise UserError(f"{where}: frames must be float32 [F,V,3], got float32 {list(frames.shape)}")
    offsets = _edges(where, arrays, "offsets", len(frames))
    count = len(offsets) - 1
    labels = _array(where, arrays, "labels", f"int [{count}]", lambda a: a.dtype.kind in "iu" and a.shape == (count,))
    labels = labels.astype(np.int64)
    columns, values, names = _columns(where, arrays, count)
    class_names = (
        _texts(where, arrays, "label_names")
        if "label_names" in arrays
        else [f"class {label}" for label in range(int(labels.max(initial=0)) + 1)]
    )
    layout, joints = _layout(where, arrays, frames.shape[1], options.layout)

    if "body_offsets" in arrays:
        body_offsets = _edges(where, arrays, "body_offsets", len(frames))
        missing = ~np.isin(offsets, body_offsets)
        if missing.any():
            raise UserError(f"{where}: body_offsets must hold every clip's first row, {offsets[missing][0]} is missing")
        clip_of_body = np.searchsorted(offsets, body_offsets[:-1], side="right") - 1
    else:
        body_offsets, clip_of_body = offsets, np.arange(count)
    if "sample" in arrays:
        sample = _array(where, arrays, "sample", f"[{count}]", lambda a: a.shape == (count,))
        # Number samples by their first clip, so that the order of the file is kept.
        _, first, group = np.unique(sample, return_index=True, return_inverse=True)
        rank = np.argsort(np.argsort(first))
        clip_of_body = rank[group.reshape(-1)][clip_of_body]
        leaders = np.sort(first)
        differing = labels[first][group.reshape(-1)] != labels
        if differing.any():
            clip = int(np.flatnonzero(differing)[0])
            raise UserError(f"{where}: clip {clip} shares a sample id with a clip of another label")
        labels, names = labels[leaders], [names[clip] for clip in leaders.tolist()]
        columns = {name: column[leaders] for name, column in columns.items()}

    contents = StoreContents(
        frames=frames,
        offsets=offsets,
        labels=labels,
        class_names=class_names,
        skeleton=layout,
        columns=columns,
        column_values=values,
        names=names,
        fps=_fps(where, arrays),
    )
    keep = common.keep_matching(options.where, contents.table(where))
    frames, offsets, body_offsets = _gather(frames, body_offsets, clip_of_body, keep, len(labels), joints)
    names = [names[clip] for clip in keep.tolist()]
    outside = (labels[keep] < 0) | (labels[keep] >= len(class_names))
    problems = {
        clip: f"has label {labels[keep[clip]]}, outside the {len(class_names)} label_names"
        for clip in np.flatnonzero(outside).tolist()
    }
    cleaner = Cleaner(where=where, on_error=options.on_error)
    contents.frames, contents.offsets, contents.body_offsets, kept = cleaner.clean(
        frames, offsets, body_offsets, names, problems
    )
    common.require_clips(kept, cleaner)
    contents.names = [names[clip] for clip in kept.tolist()]
    kept = keep[kept]
    contents.labels = labels[kept]
    contents.columns = {name: column[kept] for name, column in columns.items()}
    common.choose_classes(contents, where, options)
    if options.center:
        center_clips(contents, common.origin_joint(layout))
    contents.splits = common.named_splits(options.split, contents.table(where))
    contents.provenance = common.provenance("ragged", path, options, cleaner)
    return contents


def _array(where: str, arrays: dict[str, np.ndarray], name: str, expected: str, right: Any) -> np.ndarray:
    if name not in arrays:
        raise UserError(f"{where}: array {name} ({expected}) is missing: it holds {', '.join(arrays)}")
    array = arrays[name]
    if not right(array):
        raise UserError(f"{where}: {name} must be {expected}, got {array.dtype} {list(array.shape)}")
    return array


def _edges(where: str, arrays: dict[str, np.ndarray], name: str, rows: int) -> np.ndarray:
    array = _array(where, arrays, name, "int [N+1]", lambda a: a.dtype.kind in "iu" and a.ndim == 1 and len(a) > 1)
    array = array.astype(np.int64)
    falls = np.flatnonzero(np.diff(array) < 0)
    if len(falls):
        at = int(falls[0])
        raise UserError(f"{where}: {name} must not decrease, but {name}[{at + 1}] = {array[at + 1]} < {array[at]}")
    if array[0] != 0 or array[-1] != rows:
        raise UserError(f"{where}: {name} must run from 0 to the {rows} rows of frames, got {array[0]} to {array[-1]}")
    return array


def _texts(where: str, arrays: dict[str, np.ndarray], name: str) -> list[str]:
    return _array(where, arrays, name, "text [K]", lambda a: a.dtype.kind == "U" and a.ndim == 1).tolist()


def _fps(where: str, arrays: dict[str, np.ndarray]) -> float:
    if "fps" not in arrays:
        return 30.0
    return float(
        _array(where, arrays, "fps", "one number", lambda a: a.size == 1 and a.dtype.kind in "iuf").reshape(())
    )


def _columns(where: str, arrays: dict[str, np.ndarray], count: int):
    """Further per-clip columns, names of their codes, and names of the clips."""
    columns: dict[str, np.ndarray] = {}
    values: dict[str, list[str]] = {}
    names = [f"clip {clip}" for clip in range(count)]
    for name, array in arrays.items():
        if name in _RESERVED or (name.endswith("_names") and name.removesuffix("_names") in arrays):
            continue
        if array.shape != (count,):
            raise UserError(f"{where}: column {name} must be [{count}], one value per clip, got {list(array.shape)}")
        if name in _NAME_COLUMNS and array.dtype.kind == "U":
            names = array.tolist()
        elif array.dtype.kind == "U":
            texts, codes = np.unique(array, return_inverse=True)
            columns[name], values[name] = codes.reshape(-1).astype(np.int64), texts.tolist()
        elif array.dtype.kind in "iub":
            columns[name] = array.astype(np.int64)
        elif array.dtype.kind == "f":
            columns[name] = array.astype(np.float64)
        else:
            raise UserError(f"{where}: column {name} must hold numbers or text, got {array.dtype}")
        if f"{name}_names" in arrays:
            texts = _texts(where, arrays, f"{name}_names")
            column = columns.get(name)
            if column is None or column.dtype != np.int64 or (column < 0).any() or (column >= len(texts)).any():
                raise UserError(f"{where}: column {name} must hold codes of the {len(texts)} {name}_names")
            values[name] = texts
    return columns, values, names


def _layout(where: str, arrays: dict[str, np.ndarray], joints: int, wanted: str) -> tuple[Skeleton, np.ndarray | None]:
    """The store's layout and, where joints are picked, which."""
    if wanted in ("auto", "ntu25") and "ntu25_index" in arrays:
        index = _array(where, arrays, "ntu25_index", "int [25]", lambda a: a.dtype.kind in "iu" and a.shape == (25,))
        if index.min() < 0 or index.max() >= joints:
            raise UserError(f"{where}: ntu25_index must hold joints of 0..{joints - 1}")
        return skeleton.get("ntu25"), index.astype(np.int64)
    parents = _array(
        where, arrays, "parents", f"int [{joints}]", lambda a: a.dtype.kind in "iu" and a.shape == (joints,)
    )
    joint_names = _texts(where, arrays, "joint_names") if "joint_names" in arrays else None
    try:
        return skeleton.find(parents.tolist(), joint_names), None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _gather(
    frames: np.ndarray,
    body_offsets: np.ndarray,
    clip_of_body: np.ndarray,
    keep: np.ndarray,
    count: int,
    joints: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of the kept clips, bodies of a clip together and padded with zeros to one length."""
    rows = np.diff(body_offsets)
    place = np.full(count, -1)
    place[keep] = np.arange(len(keep))
    order = np.argsort(place[clip_of_body], kind="stable")
    order = order[place[clip_of_body[order]] >= 0]
    clip = place[clip_of_body[order]]
    longest = np.zeros(len(keep), dtype=np.int64)
    np.maximum.at(longest, clip, rows[order])
    padded = longest[clip]
    body_edges = edges(padded)
    clip_edges = edges(np.bincount(clip, weights=padded, minlength=len(keep)).astype(np.int64))
    within = np.arange(body_edges[-1]) - np.repeat(body_edges[:-1], padded)
    absent = within >= np.repeat(rows[order], padded)
    source = np.repeat(body_offsets[:-1][order], padded) + within
    source[absent] = 0
    if len(source) != len(frames) or (source != np.arange(len(source))).any():
        frames = frames[source]
        frames[absent] = 0
    if joints is not None:
        frames = frames[:, joints]
    return frames, clip_edges, body_edges
