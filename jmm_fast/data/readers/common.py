"""Options and steps that readers of recorded data share."""

import hashlib
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jmm_fast import skeleton
from jmm_fast.data.cleaning import Cleaner, OnError
from jmm_fast.data.mapping import joint_mapping
from jmm_fast.data.splits import ColumnTable, matching, split_masks, stratified_fraction
from jmm_fast.data.store import StoreContents
from jmm_fast.data.transform import ClipTransform, bone_lengths, missing_joints
from jmm_fast.errors import UserError
from jmm_fast.skeleton import Skeleton


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
    layout: str = "keep"
    """Joint layout of the store: keep, or one of the known layouts, onto which joints are mapped by their names (the
    joint itself, the nearest one, the middle of two, or missing)."""
    joint_map: Path | None = None
    """YAML file that overrides the mapping onto --layout: TARGET: SOURCE, TARGET: [SOURCE, SOURCE] for the middle, or
    TARGET: null for a missing joint."""
    fill_gaps: int = 0
    """In data with confidences, put a joint that is missing for at most so many frames on a straight line between where
    it was before and after; its confidence stays 0."""
    view: bool = False
    """Turn each clip so that its first body stands upright and faces the camera when it first appears."""
    bones: bool = False
    """Give all bodies the bone lengths of the first clip, directions as they are."""
    label_fractions: tuple[float, ...] = ()
    """Label subsets to store for each split, e.g. 0.01 0.05 0.1: that part of every class's training clips, by name."""
    label_seed: int = 0
    """Fixes the label subsets."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what numpy and zipfile say about a broken file into one line."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        ValueError,
        NotImplementedError,
        MemoryError,  # of a header that announces more numbers than there can be
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a whole .npz file: {reason}") from error


def refuse_bombs(where: str, archive: zipfile.ZipFile) -> None:
    """UserError for an archive that would fill the memory with next to nothing: over 1 GB from less than its 200th."""
    for member in archive.infolist():
        if member.file_size > 1 << 30 and member.file_size > 200 * member.compress_size:
            raise UserError(
                f"{where}: {member.filename} has {member.compress_size} bytes and would unpack to {member.file_size}: "
                "no recording is packed like that"
            )


def choose_classes(contents: StoreContents, where: str, options: CommonOptions) -> None:
    """Classes as ``--label`` makes them, or those that ``--where`` leaves a clip of."""
    if options.label is not None:
        _relabel(contents, where, options.label)
    elif options.where is not None:
        _close_up_labels(contents)


def _relabel(contents: StoreContents, where: str, columns: str) -> None:
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


def _close_up_labels(contents: StoreContents) -> None:
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


def transform(
    options: CommonOptions, source: Skeleton, first: Callable[[], tuple[np.ndarray, np.ndarray | None]]
) -> ClipTransform:
    """What ``options`` ask to be done to every clip.

    Args:
        source: layout of the clips as the reader gives them.
        first: called when bone lengths are needed: frames ``[M, n, V, 3]`` and confidence of the first clip.

    Raises:
        UserError: an unknown layout, a joint map that does not fit, or a negative gap.
    """
    if options.fill_gaps < 0:
        raise UserError(f"--fill-gaps must be 0 or more frames, got {options.fill_gaps}")
    mapping = None
    if options.layout not in ("auto", "keep", source.name):
        mapping = joint_mapping(source, skeleton.get(options.layout), options.joint_map)
    elif options.joint_map is not None:
        raise UserError("--joint-map needs --layout, the layout to map onto")
    chain = ClipTransform(source=source, gaps=options.fill_gaps, mapping=mapping, view=options.view)
    if options.bones:
        frames, confidence = chain(*first())
        missing = None if confidence is None else missing_joints(frames, confidence)
        lengths = bone_lengths(frames, chain.skeleton, missing)
        chain = replace(chain, bones=tuple(lengths.tolist()))
    return chain


def transform_contents(contents: StoreContents, options: CommonOptions) -> None:
    """Do to clips in memory what ``options`` ask for."""
    frames = np.concatenate(contents.frames) if isinstance(contents.frames, list) else contents.frames
    body_offsets = contents.offsets if contents.body_offsets is None else contents.body_offsets
    first_body = np.searchsorted(body_offsets, contents.offsets)

    def clip(array: np.ndarray, number: int) -> np.ndarray:
        rows = array[contents.offsets[number] : contents.offsets[number + 1]]
        return rows.reshape(first_body[number + 1] - first_body[number], -1, *array.shape[1:])

    confidence = contents.confidence
    if confidence is not None:
        confidence = np.concatenate(confidence) if isinstance(confidence, list) else confidence
        confidence = confidence.astype(np.float32)

    def both(number: int) -> tuple[np.ndarray, np.ndarray | None]:
        return clip(frames, number), None if confidence is None else clip(confidence, number)

    chain = transform(options, contents.skeleton, lambda: both(0))
    if chain == ClipTransform(source=contents.skeleton):
        return
    done = [chain(*both(number)) for number in range(contents.num_clips)]
    contents.frames = [part.reshape(-1, *part.shape[2:]) for part, _ in done]
    if any(part is not None for _, part in done):
        contents.confidence = [part.reshape(-1, part.shape[-1]).astype(np.float16) for _, part in done]
    contents.skeleton = chain.skeleton


def add_label_subsets(contents: StoreContents, options: CommonOptions) -> None:
    """Store which training clips keep their labels, for each split and each of ``options.label_fractions``."""
    labels = torch.as_tensor(contents.labels)
    for split, parts in contents.splits.items():
        train = torch.as_tensor(np.asarray(parts["train"]))
        for fraction in options.label_fractions:
            chosen = stratified_fraction(labels, train, fraction, options.label_seed).tolist()
            contents.label_subsets.setdefault(split, {})[f"{fraction:g}"] = [contents.names[clip] for clip in chosen]


def plain(options: Any) -> dict[str, Any]:
    """Options as JSON; of a file only its name, as folders differ from machine to machine."""

    def shown(value: Any) -> Any:
        if isinstance(value, tuple):
            return [shown(item) for item in value]
        return value.name if isinstance(value, Path) else value

    return {name: shown(value) for name, value in asdict(options).items()}


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
        "options": plain(options),
        **cleaner.report(),
    }


def origin_joint(layout: Skeleton) -> int:
    """The joint that centring puts at the origin: the spine of ntu25, the root of another layout."""
    return layout.joint_names.index("spine_mid") if layout.name == "ntu25" else layout.root


def center_clip(frames: np.ndarray, layout: Skeleton, confidence: np.ndarray | None = None) -> None:
    """Move a clip, in place, so that the first body's :func:`origin_joint` starts at the origin.

    What is taken off is where that joint lies in the first frame in which it is seen; a clip without such a frame stays
    as it is. Frames without a body, and joints whose confidence is 0, stay at zero.

    Args:
        frames: float32 ``[M, n, V, 3]``; confidence: float32 ``[M, n, V]`` or None.
    """
    joint = origin_joint(layout)
    seen = np.broadcast_to(frames.any(axis=(2, 3))[..., None], frames.shape[:3])
    if confidence is not None:
        seen = seen & (confidence > 0)
    if seen[0, :, joint].any():
        # Infinite coordinates are refused later, with the name of the clip.
        with np.errstate(invalid="ignore"):
            frames -= np.where(seen[..., None], frames[0, int(np.argmax(seen[0, :, joint])), joint], 0)
