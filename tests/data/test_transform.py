"""View, bone lengths and gaps: what a clip is after, and what must not change."""

import itertools

import numpy as np
import pytest

from jmm_fast import skeleton
from jmm_fast.data import ClipStore, prepare
from jmm_fast.data.readers import common
from jmm_fast.data.readers.ragged import RaggedOptions
from jmm_fast.data.readers.synthetic import SyntheticOptions, read
from jmm_fast.data.transform import (
    ClipTransform,
    bone_lengths,
    face_camera,
    fill_gaps,
    missing_joints,
    set_bone_lengths,
)
from jmm_fast.errors import UserError
from jmm_fast.skeleton import Skeleton

NTU = skeleton.get("ntu25")
LEFT, RIGHT = (NTU.joint_names.index(f"{side}_shoulder") for side in ("left", "right"))


@pytest.fixture(scope="module")
def clips():
    """Six clips of the synthetic figure, turned and put anywhere; float32 [M, n, 25, 3]."""
    store = ClipStore.from_contents(read(options=SyntheticOptions(clips=30)))
    rng = np.random.default_rng(0)
    made = []
    two = np.flatnonzero(store.clip_bodies[:, 1] > 1)[:2].tolist()
    for clip in [*two, 0, 1, 2, 3]:
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        turn *= np.linalg.det(turn)
        frames = store.clip(clip).numpy() @ turn.T + rng.normal(size=3)
        frames[~store.clip(clip).numpy().any(axis=(2, 3))] = 0
        made.append(frames.astype(np.float32))
    assert made[0].shape[0] == 2
    return made


def distances(pose):
    return np.linalg.norm(pose[..., :, None, :] - pose[..., None, :, :], axis=-1)


def test_a_turned_clip_faces_the_camera(clips):
    for frames in clips:
        turned = face_camera(frames, NTU)
        assert turned.dtype == np.float32 and turned.shape == frames.shape
        pose = turned[0, int(np.argmax(turned[0].any(axis=(1, 2))))].astype(np.float64)
        up = (pose[LEFT] + pose[RIGHT]) / 2 - pose[NTU.root]
        side = pose[LEFT] - pose[RIGHT]
        np.testing.assert_allclose(up / np.linalg.norm(up), [0, 1, 0], atol=2e-6)
        assert side[0] > 0 and abs(side[2]) < 2e-6


def test_it_is_one_proper_rotation_about_the_root(clips):
    for frames in clips:
        turned = face_camera(frames, NTU)
        live = frames.any(axis=(2, 3))
        first = int(np.argmax(live[0]))
        root = frames[0, first, NTU.root].astype(np.float64)
        np.testing.assert_allclose(turned[0, first, NTU.root], root, atol=1e-6)
        before, after = (array[live].reshape(-1, 3) - root for array in (frames, turned))
        u, _, vh = np.linalg.svd(after.T @ before)
        rotation = u @ vh
        assert np.linalg.det(rotation) == pytest.approx(1), "a mirror image swaps left and right"
        np.testing.assert_allclose(before @ rotation.T, after, atol=5e-6)
        np.testing.assert_allclose(distances(turned[live]), distances(frames[live]), atol=5e-6)


def test_turning_twice_changes_nothing(clips):
    for frames in clips:
        turned = face_camera(frames, NTU)
        np.testing.assert_allclose(face_camera(turned, NTU), turned, atol=5e-6)


def test_absent_bodies_stay_zero_when_turned(clips):
    frames = clips[0].copy()
    frames[0, :3] = 0
    frames[1, 5:9] = 0
    turned = face_camera(frames, NTU)
    np.testing.assert_array_equal(turned.any(axis=(2, 3)), frames.any(axis=(2, 3)))
    # The first frame in which the first body is there decides.
    np.testing.assert_allclose(turned[0, 3:], face_camera(frames[:1, 3:], NTU)[0], atol=1e-6)
    frames[0] = 0
    np.testing.assert_array_equal(face_camera(frames, NTU), frames)


def test_degenerate_poses_are_left_or_turned_by_what_there_is(clips):
    point = np.full((1, 4, 25, 3), 0.3, np.float32)
    np.testing.assert_array_equal(face_camera(point, NTU), point)
    frames = clips[2][:1].copy()
    line = frames.copy()
    line[:, :, LEFT] = line[:, :, RIGHT]
    np.testing.assert_array_equal(face_camera(line, NTU), line)
    # The root between the shoulders: what is furthest is below.
    between = frames.copy()
    between[:, :, NTU.root] = (between[:, :, LEFT] + between[:, :, RIGHT]) / 2
    turned = face_camera(between, NTU)
    pose = turned[0, 0] - turned[0, 0, NTU.root]
    lowest = pose[np.argmax(np.linalg.norm(pose, axis=1))]
    np.testing.assert_allclose(lowest / np.linalg.norm(lowest), [0, -1, 0], atol=1e-5)
    assert np.isfinite(turned).all()


def test_a_layout_without_shoulders_has_no_front():
    chain = Skeleton.from_parents([-1, 0, 1], ["a", "b", "c"], name="chain")
    with pytest.raises(UserError, match="--view needs joints named left_shoulder and right_shoulder, which chain has"):
        face_camera(np.ones((1, 2, 3, 3), np.float32), chain)


def test_missing_joints_do_not_turn_the_clip(clips):
    frames = clips[0].copy()
    missing = np.zeros(frames.shape[:3], bool)
    missing[0, :2, LEFT] = True  # the first two frames cannot tell
    missing[0, 5, 10] = missing[1, :, 3] = True
    frames[missing] = 0
    turned = face_camera(frames, NTU, missing)
    assert not turned[missing].any()
    np.testing.assert_allclose(
        turned[0, 2:][~missing[0, 2:]], face_camera(clips[0][:, 2:], NTU)[0][~missing[0, 2:]], atol=5e-6
    )
    missing[0, :, RIGHT] = True
    np.testing.assert_array_equal(face_camera(frames, NTU, missing), frames)


def test_bone_lengths_are_medians_of_the_first_body(clips):
    frames = clips[0].copy()
    frames[0, :4] = 0
    lengths = bone_lengths(frames, NTU)
    for joint, parent in enumerate(NTU.parents):
        if parent < 0:
            assert lengths[joint] == 0
            continue
        bone = frames[0, 4:, joint].astype(np.float64) - frames[0, 4:, parent]
        assert lengths[joint] == pytest.approx(np.median(np.linalg.norm(bone, axis=1)), abs=1e-12)


def test_bone_lengths_read_no_missing_joint(clips):
    frames = clips[2].copy()
    missing = np.zeros(frames.shape[:3], bool)
    missing[:, ::3, 5] = True
    missing[:, :, 21] = True
    frames[missing] = 0
    lengths = bone_lengths(frames, NTU, missing)
    unknown = [21, *[joint for joint, parent in enumerate(NTU.parents) if parent == 21]]
    assert not lengths[unknown].any()
    shown = np.arange(frames.shape[1]) % 3 != 0
    for joint, parent in enumerate(NTU.parents):
        if joint in unknown or parent < 0:
            continue
        both = clips[2][:, shown] if 5 in (joint, parent) else clips[2]
        assert lengths[joint] == pytest.approx(bone_lengths(both, NTU)[joint], abs=1e-12)


def test_set_lengths_are_those_asked_for_and_directions_stay(clips):
    lengths = bone_lengths(clips[3], NTU) * np.linspace(0.7, 1.4, 25)
    for frames in clips:
        result = set_bone_lengths(frames, NTU, lengths)
        assert result.dtype == np.float32
        live = frames.any(axis=(2, 3))
        np.testing.assert_array_equal(result.any(axis=(2, 3)), live)
        np.testing.assert_array_equal(result[:, :, NTU.root], frames[:, :, NTU.root])
        for joint, parent in enumerate(NTU.parents):
            if parent < 0:
                continue
            before, after = (
                (array[live][:, joint] - array[live][:, parent]).astype(float) for array in (frames, result)
            )
            np.testing.assert_allclose(np.linalg.norm(after, axis=1), lengths[joint], atol=2e-6)
            cosine = (before * after).sum(1) / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1)
            assert cosine.min() > 1 - 1e-6
        np.testing.assert_allclose(set_bone_lengths(result, NTU, lengths), result, atol=2e-6)
        own = set_bone_lengths(frames[:1, :1], NTU, bone_lengths(frames[:, :1], NTU))
        np.testing.assert_allclose(own, frames[:1, :1], atol=1e-6, err_msg="its own lengths change a pose")


def test_bones_without_length():
    chain = Skeleton.from_parents([-1, 0, 1, 2])
    frames = np.zeros((1, 1, 4, 3), np.float32)
    frames[0, 0, :, 0] = [1, 2, 2, 4]  # joint 2 lies on joint 1
    result = set_bone_lengths(frames, chain, np.array([0, 0.5, 0.5, 0.5]))
    np.testing.assert_allclose(result[0, 0, :, 0], [1, 1.5, 1.5, 2])
    # A length that nobody knows leaves the bone as it is.
    result = set_bone_lengths(frames, chain, np.array([0, 0.5, 0.5, 0]))
    np.testing.assert_allclose(result[0, 0, :, 0], [1, 1.5, 1.5, 3.5])


def test_what_hangs_from_a_missing_joint_keeps_its_place():
    chain = Skeleton.from_parents([-1, 0, 1, 2])
    frames = np.zeros((1, 3, 4, 3), np.float32)
    frames[0, :, :, 0] = [1, 2, 3, 4]
    missing = np.zeros((1, 3, 4), bool)
    missing[0, 1, 1] = missing[0, 2, :2] = True
    frames[missing] = 0
    result = set_bone_lengths(frames, chain, np.array([0, 0.5, 0.5, 0.5]), missing)
    np.testing.assert_allclose(result[0, :, :, 0], [[1, 1.5, 2, 2.5], [1, 0, 3, 3.5], [0, 0, 3, 3.5]])


def test_gaps_are_filled_on_a_line():
    frames = np.arange(1, 11, dtype=np.float32)[None, :, None, None] ** 2 * np.ones((1, 1, 3, 3), np.float32)
    confidence = np.ones((1, 10, 3), np.float32)
    confidence[0, [0, 3, 4, 9], 0] = 0  # the start, two frames, the end
    confidence[0, 2:5, 1] = 0  # three frames
    confidence[0, 6, 1] = 0
    frames[confidence == 0] = 0
    before = frames.copy()
    filled = fill_gaps(frames, confidence, 2)
    np.testing.assert_array_equal(frames, before)
    np.testing.assert_allclose(filled[0, :, 0, 0], [0, 4, 9, 9 + 9, 9 + 18, 36, 49, 64, 81, 0])
    np.testing.assert_allclose(filled[0, :, 1, 0], [1, 4, 0, 0, 0, 36, 50, 64, 81, 100])
    np.testing.assert_array_equal(filled[0, :, 2], frames[0, :, 2])
    np.testing.assert_allclose(fill_gaps(frames, confidence, 3)[0, 2:5, 1, 0], [12, 20, 28])
    assert filled.dtype == np.float32
    assert not fill_gaps(np.zeros_like(frames), np.zeros_like(confidence), 9).any()


def test_all_steps_leave_missing_joints_at_zero_and_seen_ones_alike(clips):
    """Steps with and without some joints agree on the others; a filled gap is moved with the rest."""
    chain = ClipTransform(source=NTU, gaps=3, view=True, bones=tuple(bone_lengths(clips[3], NTU).tolist()))
    frames = clips[2].copy()
    plain, none = chain(frames)
    assert none is None
    confidence = np.ones(frames.shape[:3], np.float32)
    confidence[:, 10:, 23] = 0  # a finger, to the end
    confidence[:, 5:8, 24] = 0  # another one, for three frames
    frames[confidence == 0] = 0
    given, kept = chain(frames, confidence)
    assert kept is confidence
    assert not given[:, 10:, 23].any() and given[:, 5:8, 24].any(axis=-1).all()
    expected = np.zeros_like(confidence, dtype=bool)
    expected[:, 10:, 23] = True
    np.testing.assert_array_equal(missing_joints(given, kept), expected)
    np.testing.assert_allclose(given[confidence > 0], plain[confidence > 0], atol=5e-6)


def test_identity_follows_every_step():
    steps = {"gaps": 2, "view": True, "bones": (1.0,)}
    identities = [ClipTransform(source=NTU).identity]
    identities += [ClipTransform(source=NTU, **{name: value}).identity for name, value in steps.items()]
    assert all(a != b for a, b in itertools.combinations(identities, 2))


def test_contents_in_memory_are_transformed_clip_by_clip(make_contents):
    contents = make_contents(sizes=[6, 4], bodies=[2, 1])
    contents.confidence = np.ones((16, 25), np.float16)
    contents.confidence[2, 8] = 0
    contents.frames[2, 8] = 0
    frames, confidence = contents.frames.copy(), contents.confidence.astype(np.float32)
    options = common.CommonOptions(fill_gaps=1, view=True, bones=True)
    common.transform_contents(contents, options)
    first = (frames[:12].reshape(2, 6, 25, 3), confidence[:12].reshape(2, 6, 25))
    turned, _ = ClipTransform(source=NTU, gaps=1, view=True)(*first)
    chain = ClipTransform(source=NTU, gaps=1, view=True, bones=tuple(bone_lengths(turned, NTU).tolist()))
    expected = [chain(*first)[0].reshape(12, 25, 3), chain(frames[12:][None], confidence[12:][None])[0][0]]
    np.testing.assert_array_equal(np.concatenate(contents.frames), np.concatenate(expected))
    assert np.concatenate(contents.confidence)[2, 8] == 0 and contents.frames[0][2, 8].any()


def test_options_of_prepare(ragged_file, tmp_path):
    with pytest.raises(UserError, match="--fill-gaps must be 0 or more frames, got -1"):
        prepare("ragged", ragged_file(), tmp_path / "a", RaggedOptions(fill_gaps=-1))
    store = prepare("ragged", ragged_file(), tmp_path / "b", RaggedOptions(bones=True, fill_gaps=4, center=False))
    lengths = bone_lengths(store.clip(0).numpy(), store.skeleton)
    for clip in range(4):
        for joint, parent in enumerate(store.skeleton.parents):
            bone = store.clip(clip)[..., joint, :] - store.clip(clip)[..., max(parent, 0), :]
            np.testing.assert_allclose(bone.norm(dim=-1), lengths[joint], atol=2e-6)
