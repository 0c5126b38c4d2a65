"""Reader of the dense ``.npz`` of MAMP, CTR-GCN and JMM-TGT: ``x_train, y_train, x_test, y_test``, zero padded."""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jmm_fast import skeleton
from jmm_fast.data.cleaning import Cleaner, center_clips, edges
from jmm_fast.data.readers import common
from jmm_fast.data.store import StoreContents
from jmm_fast.errors import UserError

_BLOCK_BYTES = 64 << 20


@dataclass(kw_only=True, slots=True)
class NpzOptions(common.CommonOptions):
    """How to read a dense ``.npz``."""

    joints: str = "ntu25"
    """Joint layout of the rows."""
    bodies: int = 2
    """Bodies side by side in a row."""
    center: bool = False
    """Move each clip so that the first body's spine (ntu25) or root joint starts at the origin; the published files are
    centred already."""


def read(path: Path, options: NpzOptions | None = None, **fields: Any) -> StoreContents:
    """Read a dense ``.npz``.

    ``x_train`` and ``x_test`` are ``[N, T, bodies * V * 3]`` in metres, zero padded at the end; ``y_train`` and
    ``y_test`` are one-hot ``[N, classes]`` or int ``[N]``. The archive is read as a stream, 64 MB at a time, and frames
    without a body and absent second bodies are left out on the way: memory holds the compact clips once and never the
    padded array. The split ``default`` keeps the file's train and test; the column ``part`` says where a clip was.

    Raises:
        UserError: missing or truncated file, missing arrays, wrong types or shapes; under ``on_error="fail"`` also the
            first clip with NaN, fewer than two frames or a label row that is not one-hot.
    """
    options = NpzOptions(**fields) if options is None else options
    path = Path(path)
    where = str(path)
    layout = skeleton.get(options.joints)
    if options.bodies < 1:
        raise UserError(f"--bodies must be at least 1, got {options.bodies}")
    cleaner = Cleaner(where=where, on_error=options.on_error)
    blocks, clip_rows, body_rows, labels, part_of, names = [], [], [], [], [], []
    with common.reading(path), zipfile.ZipFile(path) as archive:
        common.refuse_bombs(where, archive)
        targets = {part: _labels(where, archive, f"y_{part}") for part in ("train", "test")}
        classes = {part: classes for part, (_, classes, _) in targets.items()}
        if any(targets[part][2] for part in targets):
            classes = dict.fromkeys(classes, max(classes.values()))
        elif classes["train"] != classes["test"]:
            raise UserError(
                f"{where}: y_train has {classes['train']} classes but y_test has {classes['test']}, expected the same"
            )
        for code, part in enumerate(("train", "test")):
            target = targets[part][0]
            for begin, dense in _stream(where, archive, f"x_{part}", len(target), layout.num_joints, options.bodies):
                clips, bodies, frames = dense.shape[:3]
                label = target[begin : begin + clips]
                part_names = [f"{part} {begin + clip}" for clip in range(clips)]
                problems = {
                    int(clip): f"has no class: its row of y_{part} is not one-hot" for clip in np.flatnonzero(label < 0)
                }
                block, clip_edges, body_edges, kept = cleaner.clean(
                    dense.reshape(-1, *dense.shape[3:]),
                    np.arange(clips + 1) * (bodies * frames),
                    np.arange(clips * bodies + 1) * frames,
                    part_names,
                    problems,
                )
                blocks.append(block)
                clip_rows.append(np.diff(clip_edges))
                body_rows.append(np.diff(body_edges))
                labels.append(label[kept])
                part_of.append(np.full(len(kept), code))
                names.extend(part_names[clip] for clip in kept.tolist())
    part_column = np.concatenate(part_of).astype(np.int64)
    common.require_clips(part_column, cleaner)
    contents = StoreContents(
        frames=blocks,
        offsets=edges(np.concatenate(clip_rows)),
        body_offsets=edges(np.concatenate(body_rows)),
        labels=np.concatenate(labels),
        class_names=[f"A{label + 1:03d}" for label in range(max(classes.values()))],
        skeleton=layout,
        columns={"part": part_column},
        column_values={"part": ["train", "test"]},
        names=names,
    )
    if options.where is not None:
        _keep(contents, common.keep_matching(options.where, contents.table(where)))
    common.choose_classes(contents, where, options)
    if options.center:
        _join(contents)
        center_clips(contents, common.origin_joint(layout))
    part = contents.columns["part"]
    if (part == 0).any() and (part == 1).any():
        contents.splits["default"] = {"train": np.flatnonzero(part == 0), "test": np.flatnonzero(part == 1)}
    contents.splits |= common.named_splits(options.split, contents.table(where))
    contents.provenance = common.provenance("npz", path, options, cleaner)
    return contents


def _open(where: str, archive: zipfile.ZipFile, name: str):
    """The member's stream, positioned at its numbers, and its shape and type."""
    try:
        file = archive.open(f"{name}.npy")
    except KeyError:
        held = ", ".join(sorted(member.removesuffix(".npy") for member in archive.namelist()))
        raise UserError(f"{where}: array {name} is missing: it holds {held or 'nothing'}") from None
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    if fortran and len(shape) > 1:
        raise UserError(f"{where}: {name} must be stored in C order")
    if dtype.hasobject or dtype.kind not in "iufb":
        raise UserError(f"{where}: {name} must hold numbers, got {dtype}")
    return file, shape, dtype


def _read_exactly(where: str, file: Any, name: str, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise UserError(f"{where}: {name} is truncated: {size - len(data)} bytes of it are missing")
    return data


def _labels(where: str, archive: zipfile.ZipFile, name: str) -> tuple[np.ndarray, int, bool]:
    """Labels int64 ``[N]`` (-1 where a row is not one-hot), the number of classes, and whether it is only a bound."""
    file, shape, dtype = _open(where, archive, name)
    with file:
        data = _read_exactly(where, file, name, int(np.prod(shape)) * dtype.itemsize)
    array = np.frombuffer(data, dtype=dtype).reshape(shape)
    if array.ndim == 1 and dtype.kind in "iu":
        return np.maximum(array.astype(np.int64), -1), int(array.max(initial=-1)) + 1, True
    if array.ndim != 2:
        raise UserError(f"{where}: {name} must be one-hot [N,classes] or int [N], got {dtype} {list(shape)}")
    one_hot = ((array != 0).sum(axis=1) == 1) & (array.max(axis=1, initial=0) == 1)
    return np.where(one_hot, array.argmax(axis=1), -1).astype(np.int64), shape[1], False


def _stream(
    where: str, archive: zipfile.ZipFile, name: str, clips: int, joints: int, bodies: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of clips as (first clip, float32 ``[n, bodies, T, V, 3]``)."""
    file, shape, dtype = _open(where, archive, name)
    with file:
        width = bodies * joints * 3
        if dtype.kind != "f" or len(shape) != 3 or shape[0] != clips or shape[2] != width:
            raise UserError(f"{where}: {name} must be float [{clips},T,{width}], got {dtype} {list(shape)}")
        frames = shape[1]
        row_bytes = frames * width * dtype.itemsize
        step = max(1, _BLOCK_BYTES // max(1, row_bytes))
        for begin in range(0, clips, step):
            count = min(step, clips - begin)
            data = np.frombuffer(_read_exactly(where, file, name, count * row_bytes), dtype=dtype)
            dense = data.reshape(count, frames, bodies, joints, 3).transpose(0, 2, 1, 3, 4)
            yield begin, np.ascontiguousarray(dense, dtype=np.float32)
        if file.read(1):
            raise UserError(f"{where}: {name} holds more bytes than its shape {list(shape)} says")


def _join(contents: StoreContents) -> None:
    """Put the blocks of frames into one array."""
    if isinstance(contents.frames, list):
        contents.frames = np.concatenate(contents.frames)


def _keep(contents: StoreContents, keep: np.ndarray) -> None:
    """Leave only the clips ``keep``."""
    _join(contents)
    clip_of_body = np.searchsorted(contents.offsets, contents.body_offsets[:-1], side="right") - 1
    held = np.zeros(contents.num_clips, dtype=bool)
    held[keep] = True
    contents.frames = contents.frames[np.repeat(held, np.diff(contents.offsets))]
    contents.body_offsets = edges(np.diff(contents.body_offsets)[held[clip_of_body]])
    contents.offsets = edges(np.diff(contents.offsets)[keep])
    contents.labels = contents.labels[keep]
    contents.columns = {name: column[keep] for name, column in contents.columns.items()}
    contents.names = [contents.names[clip] for clip in keep.tolist()]
