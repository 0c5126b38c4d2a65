"""The figures of a run. Each function returns a matplotlib ``Figure``; :func:`jmm_fast.viz.style.save` writes it."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jmm_fast.errors import UserError
from jmm_fast.skeleton import Skeleton
from jmm_fast.viz import style
from jmm_fast.viz.records import Predictions, read_predictions, read_training, running_mean

# More points than this cannot be told apart at the width of a page and only make the file large.
_CURVE_POINTS = 1500
_FRONT_TURN = np.deg2rad(30)


@style.styled
def loss_curve(run: str | Path):
    """Training loss (every logged value and its running mean) above the learning rate, against the epoch.

    Source: ``RUN/metrics.jsonl``. The running mean covers about 1/40 of the log, centred. Values that are not finite
    are left out of the curve and counted in a note.

    Raises:
        UserError: no readable training log, or matplotlib is missing.
    """
    log = read_training(run)
    epoch, loss, rate = log["epoch"], log["loss"], log["lr"]
    window = max(1, len(loss) // 40) | 1
    smooth = running_mean(loss, window)
    finite = np.isfinite(loss)
    if not finite.any():
        raise UserError(f"{run}: no logged loss is finite, nothing to draw")
    thin = slice(None, None, max(1, len(loss) // _CURVE_POINTS))

    figure = style.new_figure(8.4, 4.3)
    top = style.inches(figure, 0.75, 1.45, 6.9, 2.4)
    bottom = style.inches(figure, 0.75, 0.55, 6.9, 0.6, sharex=top)

    every = 1 if len(loss) < 2 else int(np.median(np.diff(log["step"])))
    top.plot(epoch[thin], loss[thin], color=style.GREY_MARK, linewidth=0.7, alpha=0.55)
    top.plot(epoch[thin], smooth[thin], color=style.BLUE, linewidth=1.8, solid_capstyle="round")
    _headline(figure, "Pretraining loss", "mean squared error on masked tokens")
    last = smooth[np.isfinite(smooth)][-1]
    top.annotate(
        f"{last:.3g}",
        (epoch[-1], last),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        color=style.BLUE,
        fontweight="bold",
        annotation_clip=False,
    )
    notes = [f"logged every {every} steps" if every > 1 else "logged every step"]
    if window > 1:
        notes.append(f"blue: mean of {window} values")
    if not finite.all():
        notes.append(f"{np.count_nonzero(~finite)} values not finite, left out")
    figure.text(1 - 0.75 / 8.4, 1 - 0.26 / 4.3, "; ".join(notes), color=style.MUTED, fontsize=8, ha="right")
    # A few huge first values would flatten the rest of the curve to a line.
    low, high = np.nanmin(loss[finite]), np.nanquantile(loss[finite], 0.995)
    high = max(high, np.nanmax(smooth))
    margin = 0.06 * (high - low) or max(abs(high), 1e-6) * 0.05
    top.set_ylim(low - margin, high + margin)
    end = np.ceil(epoch[-1]) if epoch[-1] - epoch[0] > 2 else epoch[-1]
    top.set_xlim(epoch[0], end if end > epoch[0] else epoch[0] + 1)
    top.grid(axis="y")
    top.tick_params(length=0, labelbottom=False)
    top.spines["left"].set_visible(False)

    bottom.plot(epoch[thin], rate[thin], color=style.INK, linewidth=1.2)
    bottom.fill_between(epoch[thin], 0, rate[thin], color=style.INK, alpha=0.07, linewidth=0)
    peak = float(np.max(rate)) or 1.0
    bottom.set_ylim(0, peak * 1.15)
    bottom.set_yticks([0, peak], ["0", f"{peak:.2g}"])
    bottom.tick_params(length=0)
    bottom.spines["left"].set_visible(False)
    bottom.set_xlabel("epoch")
    figure.text(0.75 / 8.4, 1.22 / 4.3, "Learning rate", color=style.MUTED, fontsize=8)
    return figure


@style.styled
def confusion_matrix(predictions: str | Path | Mapping | Predictions, *, title: str = "Confusion matrix"):
    """Confusion matrix with class names, rows normalised to 100 %, and the accuracy of each class beside it.

    ``predictions``: ``RUN/predictions/*.npz``, or a mapping with ``labels [N]``, ``predicted [N]``, ``class_names``.
    Up to 24 classes the cells carry their percentage; with more, the colours and the bars speak alone.

    Raises:
        UserError: unreadable or inconsistent predictions, or matplotlib is missing.
    """
    data = predictions if isinstance(predictions, Predictions) else read_predictions(predictions)
    counts, accuracy = data.counts, data.class_accuracy
    support = counts.sum(axis=1)
    classes = len(data.class_names)
    share = np.divide(counts, support[:, None], out=np.zeros(counts.shape), where=support[:, None] > 0)
    names = [style.short_label(name) for name in data.class_names]

    cell = 0.46 if classes <= 12 else 0.34 if classes <= 24 else 0.17 if classes <= 60 else 0.125
    font = min(9.0, cell * 72 * 0.62) if classes > 24 else 9.0
    label_room = 0.25 + max(len(name) for name in names) * font * 0.56 / 72
    side, bars = cell * classes, 1.5
    left, below, above = label_room + 0.3, label_room + 0.35, 0.85
    width, height = left + side + 0.25 + bars + 0.55, below + side + above
    top1 = np.trace(counts) / counts.sum()
    note = f"{counts.sum()} test clips, {classes} classes, top-1 {100 * top1:.1f} %; each row adds up to 100 %"
    # Few classes with long names make a plot narrower than the line above it.
    figure = style.new_figure(max(width, left + len(note) * 8 * 0.56 / 72 + 0.1), height)

    axes = style.inches(figure, left, below, side, side)
    axes.imshow(share, cmap=style.share_colormap(), vmin=0, vmax=1, aspect="auto", interpolation="none")
    for edge in axes.spines.values():
        edge.set_visible(True)
    axes.set_xticks(range(classes), names, rotation=90, fontsize=font)
    axes.set_yticks(range(classes), names, fontsize=font)
    axes.tick_params(length=0, pad=3, labelcolor=style.INK)
    axes.set_xlabel("predicted class", labelpad=6)
    axes.set_ylabel("true class", labelpad=6)
    step = 1 if classes <= 24 else 5
    axes.set_xticks(np.arange(step, classes, step) - 0.5, minor=True)
    axes.set_yticks(np.arange(step, classes, step) - 0.5, minor=True)
    axes.grid(which="minor", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    if classes <= 24:
        for row, column in zip(*np.nonzero(counts), strict=True):
            value = share[row, column]
            axes.text(
                column,
                row,
                f"{100 * value:.0f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if value > 0.45 else style.INK,
            )

    beside = style.inches(figure, left + side + 0.25, below, bars, side)
    shown = np.nan_to_num(accuracy)
    rows = np.arange(classes)
    beside.barh(rows, np.ones(classes), height=0.62, color=style.HAIRLINE, alpha=0.5, linewidth=0)
    beside.barh(rows, shown, height=0.62, color=style.BLUE, linewidth=0)
    for row in rows:
        text = "no clips" if support[row] == 0 else f"{100 * accuracy[row]:.0f}"
        beside.text(1.04, row, text, va="center", fontsize=min(font, 8.5), color=style.INK)
    beside.set_ylim(classes - 0.5, -0.5)
    beside.set_xlim(0, 1)
    beside.set_axis_off()
    figure.text(
        (left + side + 0.25) / figure.get_size_inches()[0],
        1 - (above - 0.12) / height,
        "recognised, %",
        fontsize=8,
        color=style.MUTED,
    )
    _headline(figure, title, note, left=left, stacked=True)
    return figure


@style.styled
def class_accuracy(predictions: Mapping[str, str | Path | Mapping | Predictions], *, title: str = "Accuracy per class"):
    """Accuracy of every class under one or more classifiers, as dots on a common scale, best class first.

    ``predictions``: name -> predictions as :func:`confusion_matrix` takes them. The first named is the one that
    orders the classes and is drawn solid; the others are drawn as open marks and joined to it by a line.

    Raises:
        UserError: nothing given, classifiers over different classes, or matplotlib is missing.
    """
    read = {
        name: item if isinstance(item, Predictions) else read_predictions(item) for name, item in predictions.items()
    }
    if not read:
        raise UserError("class_accuracy needs at least one classifier's predictions")
    first = next(iter(read.values()))
    for name, data in read.items():
        if data.class_names != first.class_names:
            raise UserError(f"{name} has other classes than {next(iter(read))}: they cannot share one figure")
    accuracy = np.stack([data.class_accuracy for data in read.values()])
    tested = np.flatnonzero(~np.isnan(accuracy[0]))
    order = tested[np.argsort(-accuracy[0, tested], kind="stable")]
    names = [style.short_label(first.class_names[index]) for index in order]

    row = 0.24
    left = 0.45 + max(len(name) for name in names) * 9 * 0.56 / 72
    side, above, below = row * len(order), 0.85, 0.5
    width, height = left + 4.6 + 0.6, above + side + below
    figure = style.new_figure(width, height)
    axes = style.inches(figure, left, below, 4.6, side)
    rows = np.arange(len(order))
    markers = ("o", "o", "D", "s", "^")
    values = 100 * accuracy[:, order]
    if len(read) > 1:
        axes.hlines(rows, np.nanmin(values, axis=0), np.nanmax(values, axis=0), color=style.HAIRLINE, linewidth=2.2)
    for index, name in reversed(list(enumerate(read))):
        solid = index == 0
        axes.scatter(
            values[index],
            rows,
            s=34 if solid else 24,
            marker=markers[index % len(markers)],
            facecolor=style.BLUE if solid else style.PAPER,
            edgecolor=style.BLUE if solid else style.MUTED,
            linewidth=1.2,
            zorder=3 + solid,
            label=name,
            clip_on=False,
        )
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_yticks(rows, names)
    axes.tick_params(length=0)
    axes.tick_params(axis="y", labelcolor=style.INK, labelsize=9, pad=9)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xlabel("recognised test clips, %")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles[::-1],
        labels[::-1],
        loc="lower left",
        bbox_to_anchor=((left - 0.1) / width, 1 - (above - 0.06) / height),
        ncols=len(read),
        frameon=False,
        borderpad=0,
        handletextpad=0.1,
        columnspacing=1.2,
        fontsize=8.5,
        labelcolor=style.MUTED,
    )
    _headline(figure, title, "", left=left)
    return figure


@style.styled
def masked_clip(
    poses,
    probability,
    mask,
    *,
    t_patch: int,
    skeleton: Skeleton,
    title: str = "",
    note: str = "",
    seconds: float | None = None,
    snapshots: int = 8,
):
    """One body as stick figures over time, and under them the joint x time grid the mask was drawn on.

    A token is one joint over ``t_patch`` frames; token ``l = t' * V + v``. Colour is ``probability * L``: the weight of
    this token in the draw, against the average token's. Tokens that stayed visible carry an ink ring (figures)
    or frame (grid). The figures are seen from the horizontal direction in which the body and its movement spread
    most, y up, in metres; marks on the upper edge of the grid show the columns they were taken from.

    Args:
        poses: ``[T, V, 3]`` metres, y up; ``T`` a multiple of ``t_patch``.
        probability: ``[L]``, ``L = T / t_patch * V``, adding up to one.
        mask: bool ``[L]``, True = hidden.
        t_patch: frames per token.
        skeleton: joint names and bones.
        title, note: headline and the line under it.
        seconds: length of the clip, for the time axis; frame numbers without it.
        snapshots: how many stick figures.

    Raises:
        UserError: shapes that do not belong together, poses that are not finite, or matplotlib is missing.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Rectangle

    poses, weight, hidden = check_masked_clip(poses, probability, mask, t_patch=t_patch, skeleton=skeleton)
    frames, joints = poses.shape[:2]
    steps = frames // t_patch
    snapshots = max(1, min(snapshots, steps))
    across, height_above, depth = project(poses, skeleton)
    height_above = height_above - height_above.min()

    left, right, width = 1.35, 0.25, 11.0
    plot_width = width - left - right
    columns = np.floor((np.arange(snapshots) + 0.5) / snapshots * steps).astype(int)
    taken = np.minimum(columns * t_patch + t_patch // 2, frames - 1)
    # Each figure stands in the middle of its share of the width; the marks above the grid say which column it shows.
    shown = across[taken] - 0.5 * (across[taken].max(axis=1) + across[taken].min(axis=1))[:, None]
    reach = max(2 * np.abs(shown).max(), 1e-3)
    tall = max(height_above[taken].max(), 1e-3)
    slot = plot_width / snapshots
    scale = min(0.92 * slot / reach, 2.9 / tall)  # inches per metre
    band = tall * scale + 0.25
    row = 0.165 if joints <= 30 else 0.13
    grid_height = row * joints
    above, gap, below = 0.95, 0.3, 0.55
    total = above + band + gap + grid_height + below
    figure = style.new_figure(width, total)

    factor = style.weight_range(weight)
    position = style.weight_position(weight, factor)
    colors = style.weight_colormap()

    # Stick figures, drawn in metres: the axes' limits are its size in inches over the scale, so both axes agree.
    axes = style.inches(figure, left, below + grid_height + gap, plot_width, band)
    axes.set_xlim(0, plot_width / scale)
    axes.set_ylim(-0.12 / scale, (band - 0.12) / scale)
    axes.axhline(0, color=style.HAIRLINE, linewidth=0.8, zorder=0)
    centres = (np.arange(snapshots) + 0.5) * slot / scale
    bones = np.array(skeleton.bones, dtype=np.int64).reshape(-1, 2)
    grid_position, grid_hidden = position.reshape(steps, joints), hidden.reshape(steps, joints)
    for column, frame, centre, figure_across in zip(columns, taken, centres, shown, strict=True):
        points = np.stack([figure_across + centre, height_above[frame]], axis=1)
        axes.add_collection(
            LineCollection(points[bones], colors=style.BONE, linewidths=1.6, capstyle="round", zorder=1)
        )
        far_first = np.argsort(depth[frame])
        axes.scatter(
            *points[far_first].T,
            c=colors(grid_position[column][far_first]),
            s=17,
            edgecolors=style.PAPER,
            linewidths=0.4,
            zorder=2,
            clip_on=False,
        )
        _rings(axes, points[~grid_hidden[column]])
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set_visible(False)
    axes.set_xticks([])
    metre_step = 0.5 if tall < 3 else 1.0
    axes.set_yticks(np.arange(0, tall + 1e-6, metre_step))
    axes.tick_params(length=0)
    axes.set_ylabel("height, m")

    grid = style.inches(figure, left, below, plot_width, grid_height)
    rows = limb_order(skeleton)
    grid.imshow(
        grid_position.T[rows],
        cmap=colors,
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="none",
        extent=(-0.5, steps - 0.5, joints - 0.5, -0.5),
    )
    for line, joint in enumerate(rows):
        for step in np.flatnonzero(~grid_hidden[:, joint]):
            grid.add_patch(
                Rectangle((step - 0.42, line - 0.4), 0.84, 0.8, facecolor="none", edgecolor="black", linewidth=1.3)
            )
    grid.set_yticks(range(joints), [skeleton.joint_names[joint].replace("_", " ") for joint in rows], fontsize=7.5)
    grid.tick_params(length=0, labelcolor=style.INK)
    for edge in grid.spines.values():
        edge.set_visible(False)
    grid.set_xlim(-0.5, steps - 0.5)
    grid.set_ylim(joints - 0.5, -0.5)
    ticks, labels, unit = _time_ticks(frames, t_patch, seconds)
    grid.set_xticks(ticks, labels)
    grid.tick_params(axis="x", labelcolor=style.MUTED)
    grid.set_xlabel(unit)
    for column in columns:
        grid.plot(
            [column], [-1.0], marker="v", markersize=4, color=style.MUTED, clip_on=False, linestyle="none", zorder=4
        )

    _headline(figure, title or "What the mask hid", note, left=left, stacked=True)
    _weight_legend(figure, width, total, factor, colors)
    return figure


def _weight_legend(figure, width: float, total: float, factor: float, colors) -> None:
    """Colour scale and ring legend in the upper right corner."""
    bar = style.inches(figure, width - 2.2, total - 0.42, 1.8, 0.1)
    bar.imshow(np.linspace(0, 1, 128)[None], cmap=colors, vmin=0, vmax=1, aspect="auto", extent=(0, 1, 0, 1))
    bar.set_yticks([])
    bar.set_xticks([0, 0.5, 1], [f"≤ {1 / factor:.2g}×", "1×", f"≥ {factor:.2g}×"], fontsize=7.5)
    bar.tick_params(length=0, pad=2)
    for edge in bar.spines.values():
        edge.set_visible(False)
    figure.text(
        1 - 2.3 / width,
        1 - 0.37 / total,
        "weight of being masked, against the average token",
        ha="right",
        va="center",
        fontsize=8,
        color=style.MUTED,
    )
    marks = style.inches(figure, width - 2.2, total - 0.85, 2.0, 0.18)
    marks.set_axis_off()
    marks.set_xlim(0, 2.0)
    marks.set_ylim(0, 1)
    marks.scatter([0.06, 0.86], [0.5, 0.5], s=17, color=colors(0.8))
    marks.text(0.16, 0.5, "masked", va="center", fontsize=8, color=style.MUTED)
    _rings(marks, np.array([[0.86, 0.5]]))
    marks.text(0.98, 0.5, "visible to encoder", va="center", fontsize=8, color=style.MUTED)


def _rings(axes, points: np.ndarray) -> None:
    """Mark visible tokens: an ink ring that stands off the dot, so that it shows on any paper and around any colour."""
    axes.scatter(*points.T, s=58, facecolor="none", edgecolor=style.INK, linewidth=1.2, zorder=3, clip_on=False)


def check_masked_clip(
    poses, probability, mask, *, t_patch: int, skeleton: Skeleton
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Check one body's arrays; give poses ``[T,V,3]``, weight ``probability * L`` ``[L]`` and bool mask ``[L]``."""
    poses = np.asarray(poses, dtype=np.float64)
    joints = skeleton.num_joints
    if poses.ndim != 3 or poses.shape[1:] != (joints, 3):
        raise UserError(f"poses must be [T, {joints}, 3] for skeleton {skeleton.name}, got {list(poses.shape)}")
    if t_patch < 1 or poses.shape[0] == 0 or poses.shape[0] % t_patch:
        raise UserError(f"poses must hold a multiple of t_patch = {t_patch} frames, got {poses.shape[0]}")
    if not np.isfinite(poses).all():
        raise UserError("poses hold NaN or Inf, which cannot be drawn")
    tokens = poses.shape[0] // t_patch * joints
    probability = np.asarray(probability, dtype=np.float64)
    mask = np.asarray(mask)
    if probability.shape != (tokens,) or mask.shape != (tokens,):
        raise UserError(
            f"probability and mask must be [{tokens}] (one per token), "
            f"got {list(probability.shape)} and {list(mask.shape)}"
        )
    return poses, probability * tokens, mask.astype(bool)


def view_yaw(poses: np.ndarray, skeleton: Skeleton) -> float:
    """Angle ``a`` of the level camera that shows most of poses ``[T,V,3]`` (y up), in radians.

    Joints beyond the skeleton's, such as those of a second body, count too.

    The image's axes are ``cos(a) x + sin(a) z`` (to the right) and y; ``cos(a) z - sin(a) x`` points to the viewer.
    Of all horizontal directions the camera takes the one whose image has the largest variance, counting the body's
    shape and its joints' movement alike. Where the skeleton tells left from right, it is the one of the two opposite
    cameras that the body faces, moved by up to 30 degrees towards the front: seen exactly from the side, arms and legs
    would cover each other.
    """
    flat = poses[..., (0, 2)]
    shape = flat - flat.mean(axis=1, keepdims=True)
    movement = shape - shape.mean(axis=0, keepdims=True)
    spread = np.zeros((2, 2))
    for part in (shape, movement):
        covariance = np.einsum("tvi,tvj->ij", part, part)
        trace = np.trace(covariance)
        if trace > 1e-12:
            spread += covariance / trace
    x, z = np.linalg.eigh(spread)[1][:, -1]
    yaw = np.arctan2(z, x)
    if skeleton.pairs:
        pairs = np.array(skeleton.pairs)
        left = (flat[:, pairs[:, 0]] - flat[:, pairs[:, 1]]).mean(axis=(0, 1))
        # A body that faces the viewer has its left on the right of the image: its frontal yaw is the angle of `left`.
        off_front = np.angle(np.exp(1j * (yaw - np.arctan2(left[1], left[0]))))
        if abs(off_front) > np.pi / 2:
            yaw, off_front = yaw + np.pi, off_front - np.copysign(np.pi, off_front)
        yaw -= np.clip(off_front, -_FRONT_TURN, _FRONT_TURN)
    return float(np.angle(np.exp(1j * yaw)))


def project(poses: np.ndarray, skeleton: Skeleton) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Poses ``[T,V,3]`` as :func:`view_yaw` sees them: (right, up, towards the viewer) in metres, ``[T,V]`` each."""
    yaw = view_yaw(poses, skeleton)
    x, y, z = np.moveaxis(poses, -1, 0)
    return np.cos(yaw) * x + np.sin(yaw) * z, y, np.cos(yaw) * z - np.sin(yaw) * x


def limb_order(skeleton: Skeleton) -> list[int]:
    """Joints depth first from the root, so that the rows of a limb lie together."""
    children: dict[int, list[int]] = {}
    for joint, parent in enumerate(skeleton.parents):
        children.setdefault(parent, []).append(joint)
    order, open_joints = [], [skeleton.parents.index(-1)]
    while open_joints:
        joint = open_joints.pop()
        order.append(joint)
        open_joints.extend(reversed(children.get(joint, ())))
    return order


def _time_ticks(frames: int, t_patch: int, seconds: float | None) -> tuple[np.ndarray, list[str], str]:
    """Tick places in units of tokens, their labels, and what they count."""
    steps = frames // t_patch
    if seconds is None:
        numbers = np.linspace(0, frames, 6)
        return numbers / t_patch - 0.5, [f"{number:.0f}" for number in numbers], "frame of the window"
    choices = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
    step = next((choice for choice in choices if seconds / choice <= 8), seconds / 6)
    numbers = np.arange(0, seconds + 1e-6, step)
    return numbers / seconds * steps - 0.5, [f"{number:g}" for number in numbers], "seconds"


def _headline(figure, title: str, note: str, *, left: float = 0.75, stacked: bool = False) -> None:
    """Title and a muted line after or under it, at the left edge of the plot."""
    width, height = figure.get_size_inches()
    figure.text(left / width, 1 - 0.3 / height, title, fontsize=11, fontweight="bold", va="baseline")
    if note and stacked:
        figure.text(left / width, 1 - 0.5 / height, note, fontsize=8, color=style.MUTED, va="baseline")
    elif note:
        figure.text(left / width, 1 - 0.45 / height, note, fontsize=8, color=style.MUTED, va="baseline")
