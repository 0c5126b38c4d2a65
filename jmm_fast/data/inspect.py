"""What a clip store holds, as text: the body of ``jmm-fast inspect``. Its pictures are in ``jmm_fast.viz.dataset``."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from jmm_fast.data.scan import scan_clips
from jmm_fast.data.splits import shorten
from jmm_fast.data.store import ClipStore, describe

FAR = 20.0
"""Metres: beyond what a depth camera sees, so a larger coordinate hints at another unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A clip worth a look and why."""

    clip: int
    name: str
    reason: str


def suspects(store: ClipStore) -> list[Finding]:
    """Clips with NaN or infinity, with frames nobody is in, with coordinates beyond 20 m, without any motion, or whose
    poses are those of an earlier clip, number for number."""
    twins = duplicates(store)
    frames = store.frames.numpy()
    edges = store.body_offsets.numpy()
    nonfinite, _, largest = scan_clips(frames, edges)
    first = store.clip_bodies[:, 0].numpy()
    found = []
    for clip, (bad, far) in enumerate(
        zip(np.add.reduceat(nonfinite, first), np.maximum.reduceat(largest, first), strict=True)
    ):
        rows = store.clip(clip)
        reason = None
        if bad:
            reason = f"{bad} NaN or infinite coordinates"
        elif far > FAR:
            reason = f"coordinates up to {far:.0f}: not metres?"
        elif empty := int((rows == 0).flatten(2).all(2).all(0).sum()):
            reason = f"{empty} frames without a body"
        elif not (rows[:, 1:] != rows[:, :-1]).any():
            reason = "nothing moves"
        elif clip in twins:
            reason = f"the same poses as {describe(twins[clip], store.names)}"
        if reason:
            found.append(Finding(clip=clip, name=describe(clip, store.names), reason=reason))
    return found


def duplicates(store: ClipStore) -> dict[int, int]:
    """Clips whose poses equal those of an earlier clip bit for bit -> that clip."""
    frames = store.frames.numpy()
    begins, ends = store.offsets[:-1].tolist(), store.offsets[1:].tolist()
    alike: dict[tuple[int, bytes], list[int]] = {}
    for clip, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        # Length and middle frame tell nearly all clips apart; only the others are read whole.
        alike.setdefault((end - begin, frames[(begin + end) // 2].tobytes()), []).append(clip)
    found: dict[int, int] = {}
    for group in alike.values():
        first: dict[bytes, int] = {}
        for clip in group if len(group) > 1 else ():
            digest = hashlib.sha256(np.ascontiguousarray(frames[begins[clip] : ends[clip]]).data).digest()
            if first.setdefault(digest, clip) != clip:
                found[clip] = first[digest]
    return found


def log_lines(store: ClipStore) -> list[str]:
    """What was left out when the store was made, a line each: file, clip, body and why, as far as they apply."""
    log = store.provenance.get("log")
    if log is None:
        return [f"{item['clip']}: {item['reason']}" for item in store.provenance.get("dropped", [])]
    parts = ("file", "clip", "body")
    return [
        f"{', '.join(item[part] if part == 'file' else f'{part} {item[part]}' for part in parts if item[part])}: "
        f"{item['reason']}"
        for item in log
    ]


def length_histogram(store: ClipStore, bins: int = 12) -> list[tuple[int, int, int]]:
    """Clips by length: ``(from, to, clips)`` in frames, both ends included, equally wide bins."""
    lengths = store.lengths
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high - low + 1) // bins))
    counts = torch.bincount((lengths - low) // width).tolist()
    return [(low + bin * width, min(high, low + (bin + 1) * width - 1), count) for bin, count in enumerate(counts)]


def origin(store: ClipStore) -> dict:
    """Where a store comes from: its provenance without what was left out, and of the options those that were set."""
    told = {name: value for name, value in store.provenance.items() if name not in ("dropped", "log", "warnings")}
    if "options" in told:
        told["options"] = {name: held for name, held in told["options"].items() if held not in (None, [], (), False)}
    return told


def missing_shares(store: ClipStore) -> dict[str, float]:
    """Part of the poses in which each joint was not seen; empty where the store does not tell."""
    if store.confidence is None:
        return {}
    missing = (store.confidence == 0).double().mean(0).tolist()
    return dict(zip(store.skeleton.joint_names, missing, strict=True))


def inspect(store: ClipStore) -> str:
    """Describe a clip store: counts, lengths, classes, columns, splits, clips worth a look, origin.

    Args:
        store: the store, whatever numbers it holds.

    Returns:
        The text, several lines.
    """
    lengths, layout = store.lengths.double(), store.skeleton
    bodies = Counter(store.clip_bodies[:, 1].tolist())
    crowd = ", ".join(f"{clips} with {count} {_plural(count, 'body')}" for count, clips in sorted(bodies.items()))
    quartiles = torch.quantile(lengths, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)).tolist()
    low, high = _span(store.frames)
    lines = [
        store.path,
        f"  data hash    {store.fingerprint[:16]}",
        f"  layout       {layout.name}, {layout.num_joints} joints, root {layout.joint_names[layout.root]}",
        f"  clips        {store.num_clips} ({crowd})",
        f"  frames       {int(lengths.sum())} at {store.fps:g} a second, "
        f"{float(lengths.sum()) / store.fps / 60:.1f} minutes; {len(store.frames)} body poses",
        f"  lengths      {' / '.join(f'{value:.0f}' for value in quartiles)} frames (least, quartiles, most)",
        "  coordinates  "
        + ", ".join(f"{axis} {a:.2f}..{b:.2f}" for axis, a, b in zip("xyz", low, high, strict=True))
        + " m",
        *_confidence(store),
        "",
        "clips by length, in frames",
        *_lengths(store),
        "",
        f"classes ({store.num_classes})",
        *_classes(store),
    ]
    if store.columns:
        lines += ["", "columns", *_columns(store)]
    lines += ["", "splits" if store.splits else 'no stored split: use an expression such as "COLUMN in 1,3,5"']
    for name, parts in store.splits.items():
        lines.append(f"  {name:<14} {len(parts['train'])} train, {len(parts['test'])} test")
    lines += ["", *_problems(store), "", "origin"]
    for name, value in origin(store).items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines.append(f"  {name:<17} {shorten(text, 160)}")
    return "\n".join(lines)


def _span(frames: torch.Tensor) -> tuple[list[float], list[float]]:
    """Least and largest finite coordinate of each axis, block by block."""
    low, high = torch.full((3,), torch.inf), torch.full((3,), -torch.inf)
    for block in frames.split(65536):
        finite = torch.isfinite(block)
        low = torch.minimum(low, block.where(finite, torch.inf).amin((0, 1)))
        high = torch.maximum(high, block.where(finite, -torch.inf).amax((0, 1)))
    return low.tolist(), high.tolist()


def _lengths(store: ClipStore) -> list[str]:
    bins = length_histogram(store)
    most = max(count for *_, count in bins)
    return [f"  {f'{begin}-{end}':>11} {count:>6} {_bar(count, most)}" for begin, end, count in bins]


def _classes(store: ClipStore) -> list[str]:
    counts = torch.bincount(store.labels, minlength=store.num_classes).tolist()
    width = max(map(len, store.class_names))
    return [
        f"  {label:>3} {name:<{width}} {count:>6} {_bar(count, max(counts)) or '  (no clip)'}"
        for label, (name, count) in enumerate(zip(store.class_names, counts, strict=True))
    ]


def _columns(store: ClipStore) -> list[str]:
    lines = []
    for name, column in store.columns.items():
        values, counts = torch.unique(column, return_counts=True)
        names = store.column_values.get(name)
        shown = ", ".join(
            f"{names[int(value)] if names else f'{value:g}'} ({count})"
            for value, count in zip(values[:40].tolist(), counts[:40].tolist(), strict=True)
        )
        lines.append(f"  {name:<14} {len(values)} {_plural(len(values), 'value')}: {shorten(shown, 100)}")
    return lines


def _problems(store: ClipStore) -> list[str]:
    found = suspects(store)
    lines = [f"clips worth a look: {len(found) or 'none'}"]
    lines += [f"  {item.name}: {item.reason}" for item in found[:20]]
    if len(found) > 20:
        lines.append(f"  and {len(found) - 20} more")
    lines += [f"warning: {text}" for text in store.provenance.get("warnings", ())]
    log = log_lines(store)
    if log:
        lines.append(f"left out when the store was made: {len(log)}")
        lines += [f"  {line}" for line in log[:20]]
        if len(log) > 20:
            lines.append(f"  and {len(log) - 20} more: --log FILE writes them all")
    return lines


def _confidence(store: ClipStore) -> list[str]:
    shares = missing_shares(store)
    if not shares:
        return []
    text = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items() if share > 0.005)
    return [f"  missing      {shorten(text, 200) or 'no joint'}"]


def _bar(count: int, most: int) -> str:
    """A bar of at most 40 characters; the least that is there shows as one."""
    return "#" * -(-40 * count // most)


def _plural(count: int, word: str) -> str:
    if count == 1:
        return word
    return f"{word[:-1]}ies" if word.endswith("y") else f"{word}s"
