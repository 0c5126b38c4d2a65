"""A clip store as a page to look at and as a sheet of stick figures."""

from collections import Counter
from html import escape
from pathlib import Path

import numpy as np
import torch

from jmm_fast.data import ClipStore
from jmm_fast.data.inspect import length_histogram, log_lines, missing_shares, origin, suspects
from jmm_fast.files import atomic_write_text
from jmm_fast.viz import player, style
from jmm_fast.viz.clips import played_clip, typical_clips
from jmm_fast.viz.page import facts, figure, page, section

PLAYED_CLIPS = 12
LISTED = 50
"""Lines of a list before the page says how many more there are."""


def write_dataset_page(store: ClipStore, out: str | Path) -> Path:
    """Write one self-contained HTML page about a clip store: what it holds, histograms, bad clips, clips to play.

    Args:
        store: the store, whatever numbers it holds.
        out: file to write.

    Raises:
        UserError: nothing can be written, or matplotlib is missing.
    """
    style.require_matplotlib()
    minutes = float(store.lengths.sum()) / store.fps / 60
    lead = (
        f"{store.num_clips:,} clips of {store.num_classes} classes, {minutes:,.0f} minutes at {store.fps:g} frames a "
        f"second, {store.skeleton.num_joints} joints ({store.skeleton.name})."
    )
    clips = [played_clip(store, clip) for clip in typical_clips(store, PLAYED_CLIPS)]
    sections = [
        section("Clips to turn around", player.player(clips)),
        section("What it holds", _facts(store) + _splits(store)),
        section("Lengths and people", figure(lengths(store)) + _people(store)),
        section("Classes", figure(class_counts(store))),
        *([] if store.confidence is None else [section("Missing joints", figure(missing_joints(store)))]),
        section("Clips worth a look", _lines([f"{item.name}: {item.reason}" for item in suspects(store)])),
        section(
            "Left out when it was made",
            _lines([*(f"warning: {text}" for text in store.provenance.get("warnings", ())), *log_lines(store)]),
        ),
    ]
    atomic_write_text(out, page("jmm_fast data set", Path(store.path).stem, lead, sections))
    return Path(out)


@style.styled
def lengths(store: ClipStore):
    """Figure: how many clips have how many frames."""
    bins = length_histogram(store, 40)
    figure = style.new_figure(7.0, 2.2)
    axes = style.inches(figure, 0.65, 0.45, 6.2, 1.6)
    edges = [bins[0][0] - 0.5, *(end + 0.5 for _, end, _ in bins)]
    axes.stairs([count for *_, count in bins], edges, fill=True, color=style.BLUE)
    axes.set_xlabel("frames")
    axes.set_ylabel("clips")
    axes.set_xlim(edges[0], edges[-1])
    return figure


@style.styled
def class_counts(store: ClipStore):
    """Figure: how many clips each class has."""
    counts = torch.bincount(store.labels, minlength=store.num_classes).numpy()
    return _bars(store.class_names, counts, "clips")


@style.styled
def missing_joints(store: ClipStore):
    """Figure: in which part of the poses each joint was not seen."""
    shares = missing_shares(store)
    names = [name.replace("_", " ") for name in shares]
    return _bars(names, 100 * np.array(list(shares.values())), "% of the poses without it")


def _bars(names, values, unit: str):
    names = [style.short_label(name) for name in names]
    room = 0.3 + max(map(len, names)) * 8 * 0.56 / 72
    height = 0.19 * len(names)
    figure = style.new_figure(max(room + 4.2, 6.6), height + 0.6)
    axes = style.inches(figure, room, 0.5, 3.4, height)
    rows = np.arange(len(names))
    axes.barh(rows, values, height=0.66, color=style.BLUE, linewidth=0)
    for row, value in zip(rows, values, strict=True):
        text = f"{value:,}" if isinstance(value, np.integer) else f"{value:.1f}"
        axes.annotate(text, (value, row), (3, 0), textcoords="offset points", va="center", fontsize=7.5)
    axes.set_yticks(rows, names, fontsize=8)
    axes.tick_params(axis="y", length=0, labelcolor=style.INK)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, max(float(np.max(values)), 1e-9) * 1.02)
    axes.set_xlabel(unit)
    return figure


def _facts(store: ClipStore) -> str:
    shown = origin(store)
    options = shown.pop("options", {})
    rows = [("File", Path(store.path).name), ("Data hash", store.fingerprint)]
    rows += [(name.replace("_", " ").capitalize(), str(value)) for name, value in shown.items()]
    rows += [("Options", ", ".join(f"{name} {value}" for name, value in options.items()))] if options else []
    return facts(rows)


def _splits(store: ClipStore) -> str:
    if not store.splits:
        return "<p>No split is stored: evaluate with an expression such as <code>COLUMN in 1,3,5</code>.</p>"
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="number">{len(parts["train"]):,}</td>'
        f'<td class="number">{len(parts["test"]):,}</td>'
        f"<td>{escape(', '.join(store.label_subsets.get(name, {})))}</td></tr>"
        for name, parts in store.splits.items()
    )
    return (
        '<div class="wide"><table><thead><tr><th scope="col">split</th><th scope="col" class="number">train</th>'
        '<th scope="col" class="number">test</th><th scope="col">label subsets</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _people(store: ClipStore) -> str:
    crowd = Counter(store.clip_bodies[:, 1].tolist())
    words = ", ".join(
        f"{clips:,} with {bodies} {'person' if bodies == 1 else 'people'}" for bodies, clips in sorted(crowd.items())
    )
    return f"<p>Clips by people in them: {words}.</p>"


def _lines(lines: list[str]) -> str:
    if not lines:
        return "<p>None.</p>"
    items = "".join(f"<li>{escape(line)}</li>" for line in lines[:LISTED])
    more = f"<p>And {len(lines) - LISTED:,} more.</p>" if len(lines) > LISTED else ""
    return f'<ul class="small">{items}</ul>{more}'


@style.styled
def contact_sheet(store: ClipStore, classes: int = 12, frames: int = 9):
    """Figure: one clip of each of the first ``classes`` classes as ``frames`` stick figures, seen from the front.

    Left limbs are red, right limbs blue, the trunk black; further bodies are paler. One scale for the whole picture.
    """
    from matplotlib.collections import LineCollection

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
    played = {clip: played_clip(store, clip) for _, clip in chosen}
    poses = {clip: item.poses for clip, item in played.items()}
    shown = {clip: np.linspace(0, body.shape[1] - 1, frames).round().astype(int) for clip, body in poses.items()}
    # From the camera, whose x axis points to its left, about the first body's root.
    planes = {
        clip: (body - body[:1, :, layout.root : layout.root + 1])[:, shown[clip], :, :2] * (-1, 1)
        for clip, body in poses.items()
    }
    there = {
        clip: np.ones(planes[clip].shape[:3], bool) if item.seen is None else item.seen[:, shown[clip]]
        for clip, item in played.items()
    }
    reach = max(float(np.abs(planes[clip][0][seen[0]]).max(initial=0)) for clip, seen in there.items()) or 1.0
    # One drawing area for all: a hundred small ones take matplotlib half a minute.
    figure = style.new_figure(1.1 * frames, 1.4 * len(chosen))
    axes = figure.add_axes((0, 0, 1, 1))
    for row, (label, clip) in enumerate(chosen):
        for number, body in enumerate(planes[clip]):
            appears = poses[clip][number, shown[clip]].any((1, 2))
            present = (there[clip][number] & appears[:, None])[:, bones].all(-1)
            place = np.stack([np.arange(frames) * 2 * reach, np.full(frames, -row * 2.5 * reach)], axis=1)
            lines = (body[:, bones] + place[:, None, None])[present]
            colours = [colour.get(layout.bones[bone][0], "#1b1f24") for bone in np.nonzero(present)[1]]
            axes.add_collection(LineCollection(lines, colors=colours, linewidths=1.2, alpha=0.5 if number else 1))
        axes.text(-reach, (1.15 - row * 2.5) * reach, f"{store.class_names[label]} ({store.names[clip]})", fontsize=7)
    axes.set_xlim(-1.1 * reach, (2 * frames - 1) * reach)
    axes.set_ylim(-(2.5 * len(chosen) - 1.4) * reach, 1.4 * reach)
    axes.set_aspect("equal")
    axes.set_axis_off()
    return figure
