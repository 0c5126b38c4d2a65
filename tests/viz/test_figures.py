"""Figures: what is drawn, not only that something is."""

import builtins
import itertools
import json

import numpy as np
import pytest

from jmm_fast import skeleton
from jmm_fast.errors import UserError
from jmm_fast.skeleton import Skeleton
from jmm_fast.viz import class_accuracy, confusion_matrix, figures, loss_curve, masked_clip, save, style
from jmm_fast.viz.clips import masked_clip_of_run, typical_clips

pytestmark = pytest.mark.usefixtures("matplotlib")

LAYOUT = skeleton.get("ntu25")


def texts(figure) -> list[str]:
    from matplotlib.text import Text

    figure.canvas.draw()
    return [item.get_text() for item in figure.findobj(Text) if item.get_text()]


def visible_everything_inside(figure) -> None:
    """No text reaches beyond the paper."""
    from matplotlib.text import Text

    figure.canvas.draw()
    paper = figure.bbox
    for item in figure.findobj(Text):
        if item.get_text() and item.get_visible():
            box = item.get_window_extent()
            assert box.x0 >= paper.x0 - 1 and box.x1 <= paper.x1 + 1, item.get_text()
            assert box.y0 >= paper.y0 - 1 and box.y1 <= paper.y1 + 1, item.get_text()


def tick_labels(axes):
    return axes.get_yticklabels(), axes.get_xticklabels()


def predictions(classes: int, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, 12 * classes)
    predicted = np.where(rng.random(len(labels)) < 0.7, labels, rng.integers(0, classes, len(labels)))
    names = [f"A{index:03d} put something inside pocket / take it out {index}" for index in range(classes)]
    return {"labels": labels, "predicted": predicted, "class_names": names}


def test_loss_curve_draws_every_value_and_the_schedule(run):
    figure = loss_curve(run)
    top, bottom = figure.axes
    raw, smooth = top.lines
    assert raw.get_xdata()[-1] == 4.0 and len(raw.get_xdata()) == 40
    assert raw.get_ydata()[0] == 1.0
    assert np.ptp(smooth.get_ydata()) <= np.ptp(raw.get_ydata())
    assert bottom.lines[0].get_ydata().max() == 1e-3
    visible_everything_inside(figure)


def test_loss_curve_survives_nan_and_single_line(run):
    path = run / "metrics.jsonl"
    line = {"kind": "train", "step": 5, "epoch": 1.0, "loss": 0.5, "lr": 1e-3}
    path.write_text(json.dumps(line) + "\n" + json.dumps(line | {"step": 6, "loss": float("nan")}) + "\n")
    assert any("1 values not finite" in text for text in texts(loss_curve(run)))
    path.write_text(json.dumps(line | {"loss": float("inf")}) + "\n")
    with pytest.raises(UserError, match="no logged loss is finite"):
        loss_curve(run)


@pytest.mark.parametrize("classes", [2, 20, 60])
def test_confusion_matrix_is_labelled_and_fits(classes):
    data = predictions(classes)
    figure = confusion_matrix(data)
    rows, columns = ([item.get_text() for item in labels] for labels in tick_labels(figure.axes[0]))
    assert rows == columns and len(rows) == classes
    assert all(name.endswith(f"out {index}") and len(name) <= 40 for index, name in enumerate(rows))
    image = figure.axes[0].images[0].get_array()
    assert image.shape == (classes, classes)
    np.testing.assert_allclose(image.sum(axis=1), 1)
    figure.canvas.draw()
    boxes = [item.get_window_extent() for item in tick_labels(figure.axes[0])[0]]
    assert all(above.y0 >= below.y1 - 1 for above, below in itertools.pairwise(boxes)), "labels overlap"
    visible_everything_inside(figure)


def test_confusion_matrix_says_where_there_are_no_clips():
    assert "no clips" in texts(confusion_matrix({"labels": [0], "predicted": [0], "class_names": ["a", "b"]}))


def test_class_accuracy_orders_by_the_first(run):
    first, second = predictions(5), predictions(5, seed=1)
    second["class_names"] = first["class_names"]
    figure = class_accuracy({"one": first, "two": second})
    axes = figure.axes[0]
    drawn = {
        item.get_label(): item.get_offsets()[:, 0] for item in axes.collections if item.get_label() in ("one", "two")
    }
    assert (np.diff(drawn["one"]) <= 0).all() and len(drawn["two"]) == 5
    visible_everything_inside(figure)
    with pytest.raises(UserError, match="other classes"):
        class_accuracy({"one": first, "two": predictions(4)})
    with pytest.raises(UserError, match="at least one"):
        class_accuracy({})


def arrays(steps: int = 6, t_patch: int = 4, seed: int = 0):
    rng = np.random.default_rng(seed)
    poses = rng.normal(scale=0.3, size=(steps * t_patch, 25, 3))
    probability = rng.random(steps * 25)
    mask = rng.random(steps * 25) < 0.9
    return poses, probability / probability.sum(), mask


def test_masked_clip_marks_exactly_the_visible_tokens():
    from matplotlib.patches import Rectangle

    poses, probability, mask = arrays()
    figure = masked_clip(poses, probability, mask, t_patch=4, skeleton=LAYOUT, title="a $title$", seconds=0.8)
    grid = figure.axes[1]
    frames = [patch for patch in grid.patches if isinstance(patch, Rectangle)]
    order = figures.limb_order(LAYOUT)
    marked = {(round(patch.get_x() + 0.42), order[round(patch.get_y() + 0.4)]) for patch in frames}
    assert marked == {(token // 25, token % 25) for token in np.flatnonzero(~mask)}
    labels = [item.get_text() for item in grid.get_yticklabels()]
    assert labels == [LAYOUT.joint_names[joint].replace("_", " ") for joint in order]
    image = grid.images[0].get_array()
    heaviest = np.argmax(probability)
    assert image[order.index(heaviest % 25), heaviest // 25] == image.max()
    assert "a $title$" in texts(figure)
    visible_everything_inside(figure)


def test_stick_figures_are_in_metres_and_to_scale():
    poses, probability, mask = arrays()
    figure = masked_clip(poses, probability, mask, t_patch=4, skeleton=LAYOUT, snapshots=3)
    axes = figure.axes[0]
    figure.canvas.draw()
    one = axes.transData.transform([[0, 0], [1, 1]])
    assert np.diff(one[:, 0])[0] == pytest.approx(np.diff(one[:, 1])[0], rel=1e-6)
    bones = [item for item in axes.collections if hasattr(item, "get_segments")]
    assert len(bones) == 3 and all(len(item.get_segments()) == len(LAYOUT.bones) for item in bones)
    across, up, _ = figures.project(poses, LAYOUT)
    child, parent = LAYOUT.bones[0]
    drawn = bones[0].get_segments()[0]
    frame = 6  # middle of the first third of six tokens of four frames
    assert abs(drawn[0] - drawn[1])[0] == pytest.approx(abs(across[frame, child] - across[frame, parent]))
    assert abs(drawn[0] - drawn[1])[1] == pytest.approx(abs(up[frame, child] - up[frame, parent]))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"poses": np.zeros((8, 24, 3))}, r"poses must be \[T, 25, 3\]"),
        ({"poses": np.zeros((7, 25, 3))}, "multiple of t_patch = 4"),
        ({"poses": np.full((8, 25, 3), np.nan)}, "NaN or Inf"),
        ({"mask": np.zeros(49, bool)}, r"must be \[50\]"),
        ({"probability": np.zeros((50, 1))}, r"must be \[50\]"),
    ],
)
def test_masked_clip_refuses(change, said):
    given = {"poses": np.zeros((8, 25, 3)), "probability": np.full(50, 0.02), "mask": np.zeros(50, bool)} | change
    with pytest.raises(UserError, match=said):
        masked_clip(**given, t_patch=4, skeleton=LAYOUT)


def test_a_body_at_rest_and_a_single_joint_can_be_drawn():
    still = masked_clip(np.zeros((8, 25, 3)), np.full(50, 0.02), np.ones(50, bool), t_patch=4, skeleton=LAYOUT)
    assert np.ptp(still.axes[1].images[0].get_array()) == 0
    one = Skeleton.from_parents([-1])
    masked_clip(np.zeros((4, 1, 3)), np.ones(1), np.zeros(1, bool), t_patch=4, skeleton=one).canvas.draw()


def test_the_view_is_level_rigid_and_from_the_front():
    poses, *_ = arrays()
    left, right = np.array(LAYOUT.pairs).T
    poses[:, left, 0] += 2.0  # the body's left lies towards +x, so it faces +z
    across, up, towards = figures.project(poses, LAYOUT)
    assert np.array_equal(up, poses[..., 1])
    np.testing.assert_allclose(across**2 + towards**2, (poses[..., (0, 2)] ** 2).sum(-1))
    assert (across[:, left] - across[:, right]).mean() > 1.7
    for turn in (0.5, 2.0, -2.5):  # the picture does not depend on where the camera that recorded it stood
        rotation = np.array([[np.cos(turn), 0, np.sin(turn)], [0, 1, 0], [-np.sin(turn), 0, np.cos(turn)]])
        np.testing.assert_allclose(figures.project(poses @ rotation.T, LAYOUT)[0], across, atol=1e-9)


def test_colour_scale_is_symmetric_about_the_average():
    weight = np.array([0.5, 1.0, 2.0])
    assert style.weight_position(weight, 2.0).tolist() == [0, 0.5, 1]
    assert style.weight_position(np.array([0.0, 9.0]), 2.0).tolist() == [0, 1]
    assert style.weight_range(np.ones(10)) == pytest.approx(1.1)
    assert 3.5 < style.weight_range(np.array([0.25] * 50 + [1.0] * 50)) <= 4.0 + 1e-9


def test_mask_of_a_run_is_the_one_of_training(run, store):
    import torch

    from jmm_fast import ops

    clip = masked_clip_of_run(run, store, 2, epoch=1)
    assert clip.poses.shape == (2, 16, 25, 3) and clip.mask.shape == (2, 100)
    assert clip.seconds == pytest.approx(4.0) and clip.class_name == "hug"
    drawn = ops.motion_mask(
        torch.from_numpy(clip.poses), seed=3, epoch=1, clip_ids=torch.tensor([2, 2 + (1 << 32)]), backend="reference"
    )
    assert np.array_equal(clip.mask, drawn.mask.numpy())
    np.testing.assert_allclose(clip.probability.sum(axis=1), 1, rtol=1e-5)
    hand = LAYOUT.joint_names.index("left_hand")
    weight = clip.probability[0].reshape(4, 25)
    assert (weight[1:, hand] == weight[1:].max(axis=1)).all()  # the one joint that moves
    with pytest.raises(UserError, match="no clip 3"):
        masked_clip_of_run(run, store, 3)


def test_mask_of_a_run_sees_what_the_run_sees(run, store):
    """Modality and confidence decide the mask that is drawn, as they do in training."""
    import torch

    from jmm_fast import ops
    from jmm_fast.data.batches import to_modality

    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("modality: joint", "modality: bone\n  min_confidence: 0.5"))
    store.confidence = torch.ones(store.frames.shape[:2], dtype=torch.float16)
    wrist = LAYOUT.joint_names.index("left_wrist")
    store.confidence[:, wrist] = 0.5
    clip = masked_clip_of_run(run, store, 2, epoch=1)
    parents = torch.as_tensor(LAYOUT.bone_parents())
    valid = torch.ones(2, 4, 25, dtype=torch.bool)
    valid[:, :, [wrist, *torch.nonzero(parents == wrist)[:, 0].tolist()]] = False
    drawn = ops.motion_mask(
        to_modality(torch.from_numpy(clip.poses), "bone", parents),
        seed=3,
        epoch=1,
        clip_ids=torch.tensor([2, 2 + (1 << 32)]),
        valid=valid.flatten(1),
        backend="reference",
    )
    assert np.array_equal(clip.mask, drawn.mask.numpy())
    assert clip.mask.reshape(2, 4, 25)[:, :, wrist].all()


def test_mask_of_a_run_needs_settings(run, store, tmp_path):
    (run / "config.yaml").write_text("model: {num_joints: 24}")
    with pytest.raises(UserError, match=r"25 joints, the model of .* has 24"):
        masked_clip_of_run(run, store, 0)
    (run / "config.yaml").write_text("model: {num_joints: 25, num_frames: 16, t_patch: 4}")
    with pytest.raises(UserError, match=r"config\.yaml has no field data\.modality"):
        masked_clip_of_run(run, store, 0)


def test_typical_clips_cover_classes_and_two_bodies(store):
    assert typical_clips(store, 3) == [0, 1, 2]
    assert typical_clips(store, 9) == [0, 1, 2]
    assert typical_clips(store, 1) == [2]  # room for one: the clip with two bodies


def test_save_is_whole_or_absent_and_knows_its_formats(run, tmp_path):
    figure = loss_curve(run)
    path = save(figure, tmp_path / "new" / "loss.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert save(figure, tmp_path / "loss.svg").read_text().startswith("<?xml")
    with pytest.raises(UserError, match=r"\.png, \.svg or \.pdf"):
        save(figure, tmp_path / "loss.bmp")
    assert sorted(item.name for item in tmp_path.glob("*loss*")) == ["loss.svg"]


def test_inline_svg_has_no_address_and_follows_the_page(run):
    svg = style.inline_svg(loss_curve(run))
    assert svg.startswith("<svg") and svg.endswith("</svg>")
    assert "var(--ink)" in svg and "var(--blue)" in svg and style.INK not in svg
    for line in svg.split('"'):
        assert not line.startswith(("http:", "https:")) or "www.w3.org" in line  # names of XML namespaces alone


def test_drawing_leaves_matplotlib_settings_alone(run):
    import matplotlib

    before = dict(matplotlib.rcParams)
    loss_curve(run)
    assert dict(matplotlib.rcParams) == before


def test_missing_matplotlib_is_one_line(run, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for draw in (lambda: loss_curve(run), lambda: confusion_matrix(predictions(2))):
        with pytest.raises(UserError, match=r'pip install "jmm_fast\[viz\]"'):
            draw()
