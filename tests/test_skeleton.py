import numpy as np
import pytest

from jmm_fast import skeleton
from jmm_fast.errors import UserError
from jmm_fast.skeleton import Skeleton

SIZES = {"ntu25": 25, "kinect20": 20, "coco17": 17, "openpose18": 18, "h36m17": 17, "smpl24": 24, "cmu31": 31}

# 1-based child:parent, as NTU publishes them and as the released feeder subtracts them.
NTU_BONES = (
    "1:2 2:1 3:21 4:3 5:21 6:5 7:6 8:7 9:21 10:9 11:10 12:11 13:1 14:13 15:14 16:15 17:1 18:17 19:18 20:19 "
    "21:2 22:8 23:8 24:12 25:12"
)
FEEDER_BONES = (
    "1:2 2:21 3:21 4:3 5:21 6:5 7:6 8:7 9:21 10:9 11:10 12:11 13:1 14:13 15:14 16:15 17:1 18:17 19:18 20:19 "
    "21:21 22:23 23:8 24:25 25:12"
)


def pairs_of(text):
    return [tuple(int(number) - 1 for number in pair.split(":")) for pair in text.split()]


def test_layouts_have_the_joint_counts_in_their_names():
    assert set(skeleton.names()) == set(SIZES)
    for name, count in SIZES.items():
        layout = skeleton.get(name)
        assert layout.name == name
        assert layout.num_joints == count == len(layout.joint_names)
        assert len(layout.bones) == count - 1


def test_ntu25_follows_the_published_bones():
    layout = skeleton.get("ntu25")
    undirected = {frozenset(bone) for bone in layout.bones}
    assert undirected == {frozenset(pair) for pair in pairs_of(NTU_BONES)}
    assert layout.root == 20
    assert dict(enumerate(layout.bone_parents())) == dict(pairs_of(FEEDER_BONES))


@pytest.mark.parametrize("name", SIZES)
def test_hops_are_shortest_paths(name):
    layout = skeleton.get(name)
    hops = layout.hops()
    assert hops.dtype == np.int64
    reach = np.eye(layout.num_joints, dtype=bool)
    step = layout.adjacency(normalize=False) > 0
    expected = np.where(reach, 0, -1)
    for distance in range(1, layout.num_joints):
        wider = (reach.astype(int) @ step.astype(int)) > 0
        expected[wider & ~reach] = distance
        reach = wider
    np.testing.assert_array_equal(hops, expected)


@pytest.mark.parametrize("name", SIZES)
def test_normalised_adjacency(name):
    layout = skeleton.get(name)
    plain, normal = layout.adjacency(normalize=False), layout.adjacency()
    assert normal.dtype == np.float64
    np.testing.assert_array_equal(plain, plain.T)
    degree = plain.sum(1)
    np.testing.assert_allclose(normal, plain / np.sqrt(np.outer(degree, degree)), rtol=1e-14)
    np.testing.assert_allclose(np.linalg.eigvalsh(normal).max(), 1.0, rtol=1e-12)


@pytest.mark.parametrize("name", SIZES)
def test_mirror_is_an_automorphism_and_its_own_inverse(name):
    layout = skeleton.get(name)
    mirror = layout.mirror()
    np.testing.assert_array_equal(mirror[mirror], np.arange(layout.num_joints))
    np.testing.assert_array_equal(layout.hops()[mirror][:, mirror], layout.hops())
    for left, right in layout.pairs:
        text = layout.joint_names[left]
        assert layout.joint_names[right] == ("r" + text[1:] if name == "cmu31" else text.replace("left", "right"))
    middle = {"root", "lowerback", "upperback", "thorax", "lowerneck", "upperneck", "head"}
    sided = [
        joint
        for joint, text in enumerate(layout.joint_names)
        if (text not in middle if name == "cmu31" else "left" in text or "right" in text)
    ]
    assert sorted(joint for pair in layout.pairs for joint in pair) == sided


def test_order_puts_parents_first():
    layout = Skeleton.from_parents([3, 0, 1, -1, 0])
    order = layout.order()
    assert sorted(order) == list(range(5))
    for joint, parent in layout.bones:
        assert order.index(parent) < order.index(joint)
    np.testing.assert_array_equal(layout.bone_parents(), [3, 0, 1, 3, 0])
    assert layout.hops()[2, 4] == 3


def test_from_parents_finds_pairs_by_name():
    names = ["Hips", "LeftUpLeg", "RightUpLeg", "ArmL", "ArmR", "LHand", "RHand", "Lumbar", "l_toe", "r_toe"]
    assert skeleton.sides_and_stems(["lfemur", "rfemur", "lowerback", "lToe"]) == [
        ("left", "femur"),
        ("right", "femur"),
        (None, "lowerback"),
        (None, "ltoe"),
    ]
    layout = Skeleton.from_parents(np.array([-1, 0, 0, 0, 0, 3, 4, 0, 1, 2]), names)
    assert layout.name == "custom"
    assert layout.pairs == ((1, 2), (3, 4), (5, 6), (8, 9))


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([], "exactly one joint"),
        ([0, 0], "exactly one joint must have parent -1, got 0"),
        ([-1, -1], "got 2 of 2"),
        ([-1, 2, 1], "cycle through joint 1"),
        ([-1, 5], "parent of joint 1 must be -1 or in 0..1, got 5"),
        ([-1, -2], "parent of joint 1"),
        ([-1.0, 0.5], "whole numbers"),
    ],
)
def test_bad_parents(parents, message):
    with pytest.raises(UserError, match=message):
        Skeleton.from_parents(parents)


def test_bad_names_pairs_and_lookup():
    with pytest.raises(UserError, match="2 distinct names"):
        Skeleton.from_parents([-1, 0], ["a", "a"])
    with pytest.raises(UserError, match="pairs must hold"):
        Skeleton(name="x", joint_names=("a", "b"), parents=(-1, 0), pairs=((0, 2),))
    with pytest.raises(UserError, match="unknown skeleton 'ntu26': expected one of ntu25, kinect20"):
        skeleton.get("ntu26")
