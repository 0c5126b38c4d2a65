"""What a clip store holds, as text and as a picture: the body of ``jmm-fast inspect``."""

import json
import os
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from jmm_fast.data.scan import scan_clips
from jmm_fast.data.splits import shorten
from jmm_fast.data.store import ClipStore, describe
from jmm_fast.errors import UserError
from jmm_fast.files import atomic_path

FAR = 20.0
"""Metres: beyond what a depth camera sees, so a larger coordinate hints at another unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A clip worth a look and why."""

    clip: int
    name: str
    reason: str


def suspects(store: ClipStore) -> list[Finding]:
    """Clips with NaN or infinity, with frames nobody is in, with coordinates beyond 20 m, or without any motion."""
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
        if reason:
            found.append(Finding(clip=clip, name=describe(clip, store.names), reason=reason))
    return found


def inspect(path: str | os.PathLike, picture: str | os.PathLike | None = None) -> str:
    """Describe a clip store: counts, lengths, classes, columns, splits, clips worth a look, origin.

    Args:
        path: the store.
        picture: also draw some clips as stick figures into this file (needs matplotlib).

    Returns:
        The text, several lines.

    Raises:
        UserError: not a readable store, or a picture is asked for and matplotlib is not installed.
    """
    store = ClipStore.open(path, check_values=False)
    lengths, layout = store.lengths.double(), store.skeleton
    bodies = Counter(store.clip_bodies[:, 1].tolist())
    crowd = ", ".join(f"{clips} with {count} {_plural(count, 'body')}" for count, clips in sorted(bodies.items()))
    quartiles = torch.quantile(lengths, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)).tolist()
    low, high = _span(store.frames)
    lines = [
        f"{path}",
        f"  data hash    {store.fingerprint[:16]}",
        f"  layout       {layout.name}, {layout.num_joints} joints, root {layout.joint_names[layout.root]}",
        f"  clips        {store.num_clips} ({crowd})",
        f"  frames       {int(lengths.sum())} at {store.fps:g} a second, "
        f"{float(lengths.sum()) / store.fps / 60:.1f} minutes; {len(store.frames)} body poses",
        f"  lengths      {' / '.join(f'{value:.0f}' for value in quartiles)} frames (least, quartiles, most)",
        "  coordinates  "
        + ", ".join(f"{axis} {a:.2f}..{b:.2f}" for axis, a, b in zip("xyz", low, high, strict=True))
        + " m",
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
    for name, value in store.provenance.items():
        if name != "dropped":
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            lines.append(f"  {name:<17} {shorten(text, 160)}")
    if picture is not None:
        draw(store, picture)
        lines += ["", f"picture: {picture}"]
    return "\n".join(lines)


def _span(frames: torch.Tensor) -> tuple[list[float], list[float]]:
    """Least and largest finite coordinate of each axis, block by block."""
    low, high = torch.full((3,), torch.inf), torch.full((3,), -torch.inf)
    for block in frames.split(65536):
        finite = torch.isfinite(block)
        low = torch.minimum(low, block.where(finite, torch.inf).amin((0, 1)))
        high = torch.maximum(high, block.where(finite, -torch.inf).amax((0, 1)))
    return low.tolist(), high.tolist()


def _classes(store: ClipStore) -> list[str]:
    counts = torch.bincount(store.labels, minlength=store.num_classes).tolist()
    width = max(map(len, store.class_names))
    return [
        f"  {label:>3} {name:<{width}} {count:>6}{'   (no clip)' if count == 0 else ''}"
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
    dropped = store.provenance.get("dropped", [])
    if dropped:
        lines.append(f"left out when the store was made: {len(dropped)}")
        lines += [f"  {item['clip']} {item['reason']}" for item in dropped[:20]]
        if len(dropped) > 20:
            lines.append(f"  and {len(dropped) - 20} more")
    return lines


def _plural(count: int, word: str) -> str:
    if count == 1:
        return word
    return f"{word[:-1]}ies" if word.endswith("y") else f"{word}s"


def draw(store: ClipStore, path: str | os.PathLike, classes: int = 12, frames: int = 9) -> None:
    """One clip of each of the first ``classes`` classes as ``frames`` stick figures, seen from the front.

    Left limbs are red, right limbs blue, the trunk black; further bodies are paler. One scale for the whole picture.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.collections import LineCollection
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('a picture needs matplotlib: pip install "jmm_fast[viz]"') from error
    layout = store.skeleton
    colour = {}
    for left, right in layout.pairs:
        colour[left], colour[right] = "#b3262d", "#2163a5"
    bones = np.array(layout.bones)
    chosen = [
        (label, int(torch.nonzero(store.labels == label)[0]))
        for label in range(store.num_classes)
        if (store.labels == label).any()
    ][:classes]
    poses = {clip: store.clip(clip).numpy() for _, clip in chosen}
    shown = {clip: np.linspace(0, body.shape[1] - 1, frames).round().astype(int) for clip, body in poses.items()}
    # From the camera, whose x axis points to its left, about the first body's root.
    planes = {
        clip: np.nan_to_num((body - body[:1, :, layout.root : layout.root + 1])[:, shown[clip], :, :2] * (-1, 1))
        for clip, body in poses.items()
    }
    reach = max(float(np.abs(plane[0]).max()) for plane in planes.values()) or 1.0
    # One drawing area for all: a hundred small ones take matplotlib half a minute.
    figure = Figure(figsize=(1.1 * frames, 1.4 * len(chosen)), layout="constrained")
    axes = figure.add_subplot()
    for row, (label, clip) in enumerate(chosen):
        for number, body in enumerate(planes[clip]):
            present = poses[clip][number, shown[clip]].any((1, 2))
            place = np.stack([np.arange(frames) * 2 * reach, np.full(frames, -row * 2.5 * reach)], axis=1)
            lines = (body[:, bones] + place[:, None, None])[present].reshape(-1, 2, 2)
            colours = [colour.get(child, "#1b1f24") for child, _ in layout.bones] * int(present.sum())
            axes.add_collection(LineCollection(lines, colors=colours, linewidths=1.2, alpha=0.5 if number else 1))
        title = f"{store.class_names[label]} ({store.names[clip]})"
        axes.text(-reach, (1.15 - row * 2.5) * reach, title, fontsize=7, parse_math=False)
    axes.set_xlim(-1.1 * reach, (2 * frames - 1) * reach)
    axes.set_ylim(-(2.5 * len(chosen) - 1.4) * reach, 1.4 * reach)
    axes.set_aspect("equal")
    axes.set_axis_off()
    FigureCanvasAgg(figure)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
