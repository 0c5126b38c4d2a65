import time

import numpy as np
import pytest

from jmm_fast import skeleton
from jmm_fast.data import ClipStore, figure, prepare
from jmm_fast.data.actions import ACTIONS
from jmm_fast.data.readers import READERS
from jmm_fast.data.readers.synthetic import SyntheticOptions, read
from jmm_fast.errors import UserError

QUIET = {"noise": 0.0, "stuck": 0.0, "center": False}
CLASSES = len(ACTIONS)


@pytest.fixture(scope="module")
def contents():
    return read(clips=24 * CLASSES)


@pytest.fixture(scope="module")
def quiet():
    return ClipStore.from_contents(read(clips=4 * CLASSES, **QUIET))


def test_enough_of_everything(contents):
    assert CLASSES >= 16 and sum(bool(action.partner) for action in ACTIONS) >= 2
    assert len({action.name for action in ACTIONS}) == CLASSES
    store = ClipStore.from_contents(contents)
    assert store.skeleton == skeleton.get("ntu25") and store.fps == 30
    assert np.bincount(store.labels).tolist() == [24] * CLASSES
    assert np.bincount(store.columns["subject"]).tolist() == [CLASSES] * 24
    assert np.bincount(store.columns["camera"]).tolist() == [8 * CLASSES] * 3
    for label, action in enumerate(ACTIONS):
        bodies = store.clip_bodies[store.labels == label, 1]
        assert set(bodies.tolist()) == {2 if action.partner else 1}
    lengths = store.lengths.double()
    assert 36 <= lengths.min() < 60 < lengths.median() < 110 < lengths.max() <= 160
    assert store.frames.isfinite().all() and store.frames.abs().max() < 8


def test_splits_follow_subjects_and_cameras(contents):
    store = ClipStore.from_contents(contents)
    for name, column, codes in (("xsub", "subject", range(0, 24, 2)), ("xview", "camera", (1, 2))):
        split = store.split(name)
        assert set(store.columns[column][split.train].tolist()) == set(codes)
        assert not set(store.columns[column][split.test].tolist()) & set(codes)
        assert len(split.train) + len(split.test) == store.num_clips
        assert len(set(store.labels[split.train].tolist())) == len(set(store.labels[split.test].tolist())) == CLASSES
    assert store.split("xview").name == "xview"
    assert store.split("subject in s01").train.tolist() == list(range(CLASSES))


def test_a_clip_depends_on_seed_and_number_alone(contents):
    some = read(clips=101)
    rows = len(some.frames)
    np.testing.assert_array_equal(some.frames, contents.frames[:rows])
    np.testing.assert_array_equal(some.offsets, contents.offsets[:102])
    other = read(clips=101, seed=1)
    assert len(other.frames) != rows or (other.frames != some.frames).any()


def test_the_file_is_reproducible(tmp_path):
    for name in ("a", "b"):
        prepare("synthetic", None, tmp_path / name, SyntheticOptions(clips=30))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_bones_keep_their_length_and_differ_between_subjects(quiet):
    length_of_subject = {}
    for clip in range(quiet.num_clips):
        poses = quiet.clip(clip)
        for body in range(len(poses)):
            lengths = np.stack([(poses[body, :, a] - poses[body, :, b]).norm(dim=-1) for a, b in quiet.skeleton.bones])
            np.testing.assert_allclose(lengths, lengths[:, :1].repeat(lengths.shape[1], 1), rtol=0, atol=2e-5)
            if body == 0:
                subject = int(quiet.columns["subject"][clip])
                length_of_subject.setdefault(subject, []).append(lengths[:, 0])
    means = np.array([np.mean(rows, axis=0) for rows in length_of_subject.values()])
    for rows, mean in zip(length_of_subject.values(), means, strict=True):
        np.testing.assert_allclose(rows, np.tile(mean, (len(rows), 1)), rtol=0, atol=2e-5)
    assert (means.std(axis=0)[means.mean(axis=0) > 0.2] > 0.01).all()


def test_bodies_stand_on_the_ground_and_head_up(quiet):
    names = quiet.skeleton.joint_names
    feet = [names.index(f"{side}_{joint}") for side in ("left", "right") for joint in ("ankle", "foot")]
    for clip in range(quiet.num_clips):
        poses = quiet.clip(clip)
        ground = poses[:, :, feet, 1].amin(-1)
        np.testing.assert_allclose(ground, ground[0, 0], rtol=0, atol=1e-4)
        assert (poses[:, :, names.index("head"), 1] - ground > 0.6).all()
        assert (poses[..., 2] > 0.3).all()  # in front of the camera


def test_two_people_face_each_other(quiet):
    names = quiet.skeleton.joint_names
    left, right, spine = (names.index(name) for name in ("left_hip", "right_hip", "spine_base"))
    pairs = [clip for clip in range(quiet.num_clips) if quiet.clip_bodies[clip, 1] == 2]
    assert pairs
    for clip in pairs:
        first, second = quiet.clip(clip)[:, 0]
        gap = second[spine] - first[spine]
        gap[1] = 0
        assert 0.4 < gap.norm() < 1.3
        # Left cross up is forward.
        for pose, direction in ((first, gap), (second, -gap)):
            across = pose[left] - pose[right]
            forward = np.cross(across, [0, 1, 0])
            assert forward @ direction.numpy() > 0.5 * np.linalg.norm(forward) * direction.norm()


def test_the_acting_side_moves_more():
    # Nothing but the action moves, so what is left is what tells the classes apart.
    alone = {**QUIET, "idle": 0.0, "sway": 0.0, "walking": 0.0}
    store = ClipStore.from_contents(read(clips=4 * CLASSES, **alone))
    names = store.skeleton.joint_names

    def travel(clip, joint):
        hand = store.clip(clip)[0, :, names.index(joint)] - store.clip(clip)[0, :, names.index("spine_shoulder")]
        return (hand[1:] - hand[:-1]).norm(dim=-1).mean()

    for name, acting, resting in (
        ("wave right hand", "right_hand", "left_hand"),
        ("wave left hand", "left_hand", "right_hand"),
        ("throw", "right_hand", "left_hand"),
        ("kick left", "left_ankle", "right_ankle"),
        ("kick right", "right_ankle", "left_ankle"),
    ):
        clips = np.flatnonzero(store.labels == store.class_names.index(name)).tolist()
        moved = np.mean([[travel(clip, joint) for joint in (acting, resting)] for clip in clips], axis=0)
        assert moved[0] > 3 * moved[1], name


def test_noise_stuck_joints_and_lost_frames():
    base = {"clips": CLASSES, "stuck": 0.0, "center": False}
    clean, noisy = read(noise=0.0, **base), read(noise=0.02, **base)
    error = noisy.frames - clean.frames
    hand, trunk = figure.JOINT["left_hand"], figure.JOINT["spine_mid"]
    assert 0.01 < error[:, trunk].std() < 0.03
    assert error[:, hand].std() > 1.5 * error[:, trunk].std()
    stuck = read(**{**base, "stuck": 3.0, "noise": 0.0})
    wrong = (stuck.frames != clean.frames).any(axis=2)
    assert 0.005 < wrong.mean() < 0.1 and (wrong.sum(axis=1) < 20).all()
    lossy, whole = read(lost=0.3, **base), read(lost=0.0, **base)
    assert 0.6 < len(lossy.frames) / len(whole.frames) < 0.8


def test_speed():
    read(clips=96)
    started = time.process_time()
    read(clips=480)
    # Processor time, so that a busy machine does not matter.
    assert 480 / (time.process_time() - started) >= 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clips": 0}, "--clips must be at least 1, got 0"),
        ({"min_frames": 1}, "--min-frames and --max-frames must be at least 2 and in order, got 1 and 160"),
        ({"max_frames": 20}, "got 40 and 20"),
        ({"noise": -1.0}, "--noise must not be negative"),
        ({"idle": float("inf")}, "--idle must not be negative, got inf|--idle must be"),
        ({"lost": 1.0}, "--lost must be a share below 1, got 1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        read(**options)


def test_rest_pose_and_rotations():
    angles = np.zeros((1, 25, 3), dtype=np.float32)
    rest = figure.pose(angles, figure.OFFSETS[None], np.zeros(1, dtype=np.float32))[0]
    names = figure.JOINT
    assert 1.5 < rest[names["head"], 1] < 1.8
    assert rest[names["left_hand"], 0] > 0 > rest[names["right_hand"], 0]
    assert rest[names["left_foot"], 2] > 0
    np.testing.assert_allclose(rest[[names["left_foot"], names["right_foot"]], 1], 0, atol=1e-6)
    angles[0, names["left_elbow"], figure.BEND] = np.pi / 2
    angles[0, names["right_elbow"], figure.SPREAD] = np.pi / 2
    raised = figure.pose(angles, figure.OFFSETS[None], np.zeros(1, dtype=np.float32))[0]
    assert raised[names["left_hand"], 2] > 0.5 and raised[names["right_hand"], 0] < -0.6
    lifted = figure.pose(angles, figure.OFFSETS[None], np.full(1, 0.25, dtype=np.float32))[0]
    np.testing.assert_allclose(lifted - raised, np.tile([0, 0.25, 0], (25, 1)), atol=1e-6)

    turns = figure.rotations(np.random.default_rng(0).normal(size=(50, 3)))
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), np.tile(np.eye(3), (50, 1, 1)), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(turns), 1)
    bend, twist, spread = 0.3, -0.5, 1.1
    single = [figure.rotations(np.array(angle)) for angle in ([bend, 0, 0], [0, twist, 0], [0, 0, spread])]
    np.testing.assert_allclose(figure.rotations(np.array([bend, twist, spread])), single[2] @ single[0] @ single[1])


def test_prepare_refuses_unknown_formats_and_missing_input(tmp_path):
    with pytest.raises(UserError, match=r"unknown format 'bvhh': expected one of ragged, npz, .*synthetic"):
        prepare("bvhh", None, tmp_path / "x")
    with pytest.raises(UserError, match="prepare ragged needs an input file"):
        prepare("ragged", None, tmp_path / "x")
    assert all(reader.help and reader.options() is not None for reader in READERS.values())
