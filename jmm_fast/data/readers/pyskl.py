"""Reader of the pickle of pyskl and mmaction2: ``{"split": ..., "annotations": [...]}``, 2D or 3D keypoints."""

import math
import re
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jmm_fast import skeleton
from jmm_fast.data.cleaning import Cleaner, center_rows, edges
from jmm_fast.data.mapping import spine_joints
from jmm_fast.data.readers import common
from jmm_fast.data.splits import ColumnTable
from jmm_fast.data.store import StoreContents
from jmm_fast.data.unpickle import load_plain, value
from jmm_fast.errors import UserError
from jmm_fast.skeleton import Skeleton

_BLOCK_BYTES = 64 << 20
_MOST_CLASSES = 1 << 16
_LAYOUTS = {17: "coco17", 18: "openpose18", 25: "ntu25"}


@dataclass(kw_only=True, slots=True)
class PysklOptions(common.CommonOptions):
    """How to read a pickle of pyskl or mmaction2."""

    joints: str = "auto"
    """Joint layout of the keypoints; auto: coco17, openpose18 or ntu25 by their number."""
    class_names: Path | None = None
    """Text file with the name of each class, a line each, in the order of the labels."""
    image_height: float | None = None
    """Height in pixels that 2D keypoints are divided by; without it each clip's own img_shape."""
    fps: float = 30.0
    """Frames per second of the recordings, which the file does not tell."""
    center: bool = True
    """Move each clip so that the middle of the spine starts at the origin: of coco17 and openpose18 the middle of the
    hips and shoulders."""


def read(path: Path, options: PysklOptions | None = None, **fields: Any) -> StoreContents:
    """Read a pickle of pyskl or mmaction2, without running anything it names (:mod:`jmm_fast.data.unpickle`).

    Each annotation has ``frame_dir`` (the clip's name), ``label`` and ``keypoint`` ``[M, T, V, C]``. ``C`` = 3: metres,
    as they are. ``C`` = 2: pixels, ``(x / h, 1 - y / h, 0)`` with ``h`` the height of the image, so that a person who
    fills it is about 1 tall and y is up. ``keypoint_score`` ``[M, T, V]``, clipped to [0, 1], becomes the confidence. A
    joint of score 0 or whose coordinates are all zero is missing: at zero, confidence 0. Frames and bodies without a
    joint are left out. Parts ``X_train`` and ``X_val`` or ``X_test`` of ``split`` become the split ``X``; ``train`` and
    ``test`` alone ``default``; where both are there, the test part is ``test`` and ``val`` is left out with a warning,
    as is any other part.

    Args:
        path: the file.
        options: see :class:`PysklOptions`; or its fields by keyword.

    Raises:
        UserError: missing or truncated file, one that asks for anything but arrays and containers, fields missing or of
            the wrong kind; under ``on_error="fail"`` also the first clip that cannot be used.
    """
    options = PysklOptions(**fields) if options is None else options
    path = Path(path)
    where = str(path)
    for name in ("fps", "image_height"):
        given = getattr(options, name)
        if given is not None and not 0 < given < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be more than 0, got {given}")
    annotations, parts = _contents(where, load_plain(path))
    names = [_field(where, annotation, at, "frame_dir", str) for at, annotation in enumerate(annotations)]
    labels = np.array([_field(where, annotation, at, "label", int) for at, annotation in enumerate(annotations)])
    if options.class_names is not None:
        class_names = _class_names(options.class_names)
    elif labels.max() >= _MOST_CLASSES:
        raise UserError(
            f"{where}: annotation {labels.argmax()} has label {labels.max()}, expected below {_MOST_CLASSES}"
        )
    else:
        class_names = [f"class {label}" for label in range(int(labels.max()) + 1)]
    layout = _layout(where, annotations, options.joints)
    table = ColumnTable(where=where, columns={"label": labels}, values={"label": class_names})
    keep = deque(common.keep_matching(options.where, table).tolist())

    cleaner = Cleaner(where=where, on_error=options.on_error)
    spine = spine_joints(layout)
    blocks, scores, clip_rows, body_rows, kept = [], [], [], [], []
    seen: set[str] = set()
    tells = False
    while keep:
        chosen, block, block_scores, problems, size = [], [], [], {}, 0
        while keep and size < _BLOCK_BYTES:
            at = keep.popleft()
            frames = np.zeros((0, 0, layout.num_joints, 3), np.float32)
            score, knows = frames[..., 0].astype(np.float16), False
            try:
                if not 0 <= labels[at] < len(class_names):
                    raise UserError(f"has label {labels[at]}, outside the {len(class_names)} classes")
                if names[at] in seen:
                    raise UserError("has the frame_dir of another clip, expected one name a clip")
                frames, score, knows = _bodies(annotations[at], layout, options.image_height)
            except UserError as error:
                problems[len(chosen)] = str(error)
            seen.add(names[at])
            annotations[at] = None
            tells |= knows
            chosen.append(at)
            block.append(frames)
            block_scores.append(score.reshape(-1, layout.num_joints))
            size += frames.nbytes
        rows, clip_edges, body_edges, usable = cleaner.clean(
            np.concatenate([frames.reshape(-1, layout.num_joints, 3) for frames in block]),
            edges(np.array([len(frames) * frames.shape[1] for frames in block])),
            edges(np.array([frames.shape[1] for frames in block for _ in frames], dtype=np.int64)),
            [names[at] for at in chosen],
            problems,
        )
        score = np.concatenate(block_scores)[cleaner.kept_rows]
        if options.center:
            center_rows(rows, clip_edges, spine, score > 0)
        blocks.append(rows)
        scores.append(score)
        clip_rows.append(np.diff(clip_edges))
        body_rows.append(np.diff(body_edges))
        kept += [chosen[clip] for clip in usable.tolist()]
    common.require_clips(np.array(kept), cleaner)
    contents = StoreContents(
        frames=blocks,
        offsets=edges(np.concatenate(clip_rows)),
        body_offsets=edges(np.concatenate(body_rows)),
        confidence=scores if tells else None,
        labels=labels[kept],
        class_names=class_names,
        skeleton=layout,
        names=[names[at] for at in kept],
        fps=options.fps,
    )
    common.choose_classes(contents, where, options)
    contents.splits, warnings = _splits(where, parts, contents.names)
    contents.splits |= common.named_splits(options.split, contents.table(where))
    contents.provenance = common.provenance("pyskl", path, options, cleaner)
    if warnings:
        contents.provenance["warnings"] = warnings
    return contents


def _contents(where: str, held: Any) -> tuple[list, dict[str, list[str]]]:
    """Annotations and split parts; the older form of the file is the list of annotations alone."""
    annotations, parts = (held.get("annotations"), held.get("split", {})) if isinstance(held, dict) else (held, {})
    if not isinstance(annotations, list) or not annotations:
        has = f"a dict of {_keys(held)}" if isinstance(held, dict) else type(held).__name__
        raise UserError(f"{where}: expected a dict with a list of annotations that is not empty, got {has}")
    if not isinstance(parts, dict):
        raise UserError(f"{where}: split must be a dict of lists of frame_dir, got {type(parts).__name__}")
    for name, part in parts.items():
        if not _is_name(name) or not isinstance(part, list | tuple | set) or not all(map(_is_name, part)):
            named = f"part {name}" if _is_name(name) else "a part"
            raise UserError(f"{where}: split must be a dict of lists of frame_dir, but {named} is not")
    return annotations, parts


def _is_name(item: Any) -> bool:
    # Half a character, such as a lone surrogate, could not be written.
    return isinstance(item, str) and item != "" and item.isprintable()


def _keys(held: dict) -> str:
    return ", ".join([key for key in held if _is_name(key)][:8]) or "nothing known"


def _field(where: str, annotation: Any, at: int, name: str, kind: type) -> Any:
    if not isinstance(annotation, dict) or name not in annotation:
        has = _keys(annotation) if isinstance(annotation, dict) else type(annotation).__name__
        raise UserError(f"{where}: annotation {at} must have frame_dir, label and keypoint, got {has}")
    item = value(annotation[name])
    item = item.item() if isinstance(item, np.ndarray) and item.size == 1 else item
    if not (_is_name(item) if kind is str else isinstance(item, int) and abs(item) < 1 << 31):
        expected = "text" if kind is str else "a whole number"
        raise UserError(f"{where}: annotation {at}: {name} must be {expected}, got {type(item).__name__}")
    return item


def _layout(where: str, annotations: list, wanted: str) -> Skeleton:
    if wanted != "auto":
        return skeleton.get(wanted)
    for annotation in annotations:
        keypoint = value(annotation.get("keypoint"))
        if isinstance(keypoint, np.ndarray) and keypoint.ndim == 4:
            if keypoint.shape[2] not in _LAYOUTS:
                raise UserError(f"{where}: keypoint has {keypoint.shape[2]} joints: say with --joints which they are")
            return skeleton.get(_LAYOUTS[keypoint.shape[2]])
    raise UserError(f"{where}: no annotation has a keypoint [M,T,V,C]")


def _bodies(annotation: dict, layout: Skeleton, height: float | None) -> tuple[np.ndarray, np.ndarray, bool]:
    """Frames float32 ``[M, T, V, 3]``, confidence float16 ``[M, T, V]``, and whether that says more than presence."""
    keypoint = _array(annotation, "keypoint")
    joints = layout.num_joints
    if keypoint.ndim != 4 or keypoint.shape[2] != joints or keypoint.shape[3] not in (2, 3) or not keypoint.size:
        raise UserError(f"has keypoint {list(keypoint.shape)}, expected [M,T,{joints},2 or 3] that is not empty")
    total = value(annotation.get("total_frames", keypoint.shape[1]))
    if not isinstance(total, int) or total != keypoint.shape[1]:
        said = total if isinstance(total, int) else type(total).__name__
        raise UserError(f"has keypoint of {keypoint.shape[1]} frames, but total_frames is {said}")
    seen = keypoint.any(axis=3)
    with np.errstate(over="ignore"):
        keypoint = keypoint.astype(np.float32)
    frames = np.zeros((*keypoint.shape[:3], 3), np.float32)
    if keypoint.shape[3] == 3:
        frames[:] = keypoint
    else:
        height = np.float32(_height(annotation) if height is None else height)
        frames[..., 0], frames[..., 1] = keypoint[..., 0] / height, 1 - keypoint[..., 1] / height
    confidence = seen.astype(np.float16)
    if annotation.get("keypoint_score") is not None:
        score = _array(annotation, "keypoint_score")
        if score.shape != seen.shape or not np.isfinite(score).all():
            raise UserError(f"has keypoint_score {list(score.shape)}, expected finite numbers {list(seen.shape)}")
        confidence *= np.clip(score, 0, 1).astype(np.float16)
    frames[confidence == 0] = 0
    # That a whole body is absent says its zero row already.
    return frames, confidence, bool((confidence[seen.any(axis=2)] != 1).any())


def _array(annotation: dict, name: str) -> np.ndarray:
    array = value(annotation.get(name))
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iuf":
        kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise UserError(f"has {name} of {kind}, expected an array of numbers")
    return array


def _height(annotation: dict) -> float:
    shape = value(annotation.get("img_shape", annotation.get("original_shape")))
    first = value(shape[0]) if isinstance(shape, tuple | list | np.ndarray) and len(shape) == 2 else None
    if not isinstance(first, int | float | np.number) or not 0 < first < math.inf:
        raise UserError("has 2D keypoints but no img_shape (height, width): say --image-height")
    return float(first)


def _class_names(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names or len(set(names)) != len(names):
        raise UserError(f"{path}: expected a class name a line, each another")
    return names


def _splits(where: str, parts: dict[str, list[str]], names: list[str]) -> tuple[dict[str, dict], list[str]]:
    """Pairs of parts as stored splits, and a line for each part that is left out."""
    index = {name: clip for clip, name in enumerate(names)}
    pairs: dict[str, dict[str, str]] = {}
    warnings = []
    for name in parts:
        found = re.fullmatch(r"(?:(.+)_)?(train|val|test)(\d*)", name)
        if found:
            key = "".join(filter(None, (found[1], "_" if found[1] and found[3] else "", found[3]))) or "default"
            pairs.setdefault(key, {})[found[2]] = name
        else:
            warnings.append(f"part {name} of split is left out: expected NAME_train with NAME_val or NAME_test")
    splits = {}
    for key, pair in pairs.items():
        test = pair.get("test", pair.get("val"))
        if "train" not in pair or test is None:
            warnings.append(f"part {next(iter(pair.values()))} of split is left out: there is no other half")
            continue
        if len(pair) == 3:
            warnings.append(f"part {pair['val']} of split is left out: {pair['test']} is the test part")
        train_ids, test_ids = (
            sorted({index[name] for name in parts[part] if name in index}) for part in (pair["train"], test)
        )
        both = set(train_ids).intersection(test_ids)
        if both:
            raise UserError(f"{where}: split: {names[min(both)]} is in both {pair['train']} and {test}")
        if not train_ids or not test_ids:
            warnings.append(f"split {key} is left out: {pair['train']} or {test} names none of the clips")
            continue
        splits[key] = {"train": np.array(train_ids), "test": np.array(test_ids)}
    return splits, warnings
