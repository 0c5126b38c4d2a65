"""Joint mapping: every layout onto every other, rigs people have, the owners' own indices, overrides, mistakes."""

import numpy as np
import pytest

from jmm_fast import skeleton
from jmm_fast.data import prepare
from jmm_fast.data.mapping import joint_mapping, joint_parts, spine_joints
from jmm_fast.data.readers.ragged import RaggedOptions
from jmm_fast.data.transform import face_camera
from jmm_fast.errors import UserError
from jmm_fast.skeleton import Skeleton

NTU = skeleton.get("ntu25")
LIMBS = [
    f"{side}_{part}"
    for side in ("left", "right")
    for part in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle", "foot")
]
# What each rig calls spine_base, spine_mid, spine_shoulder, neck, head, and the joints of LIMBS on the left.
RIGS = {
    "mixamo": "mixamorig:Hips mixamorig:Spine1 mixamorig:Spine2 mixamorig:Neck mixamorig:Head mixamorig:LeftArm "
    "mixamorig:LeftForeArm mixamorig:LeftHand mixamorig:LeftUpLeg mixamorig:LeftLeg mixamorig:LeftFoot "
    "mixamorig:LeftToeBase + mixamorig:Spine mixamorig:LeftShoulder mixamorig:HeadTop_End mixamorig:LeftToe_End",
    "lafan": "Hips Spine1 Spine2 Neck Head LeftArm LeftForeArm LeftHand LeftUpLeg LeftLeg LeftFoot LeftToe + Spine "
    "LeftShoulder",
    "cmu bvh": "Hips Spine Spine1 Neck Head LeftArm LeftForeArm LeftHand LeftUpLeg LeftLeg LeftFoot LeftToeBase + "
    "LHipJoint RHipJoint LowerBack Neck1 LeftShoulder LeftFingerBase LThumb",
    "cmu asf": "hips upperback thorax lowerneck head lhumerus lradius lwrist lfemur ltibia lfoot ltoes + lowerback "
    "lhipjoint rhipjoint lclavicle upperneck",
    "3ds max": "Bip01_Pelvis Bip01_Spine1 Bip01_Spine2 Bip01_Neck Bip01_Head Bip01_L_UpperArm Bip01_L_Forearm "
    "Bip01_L_Hand Bip01_L_Thigh Bip01_L_Calf Bip01_L_Foot Bip01_L_Toe0 + Bip01_Spine Bip01_L_Clavicle",
    "unreal": "pelvis spine_02 spine_03 neck_01 head upperarm_l lowerarm_l hand_l thigh_l calf_l foot_l ball_l + root "
    "spine_01 clavicle_l",
    "kinect azure": "PELVIS SPINE_NAVEL SPINE_CHEST NECK HEAD SHOULDER_LEFT ELBOW_LEFT WRIST_LEFT HIP_LEFT KNEE_LEFT "
    "ANKLE_LEFT FOOT_LEFT + CLAVICLE_LEFT",
    "blender": "hips spine chest neck head upper_arm.L forearm.L hand.L thigh.L shin.L foot.L toe.L + shoulder.L",
}


def star(names) -> Skeleton:
    """A layout of these names: all joints hang on the first."""
    return Skeleton.from_parents([-1] + [0] * (len(names) - 1), names)


def other_side(name: str) -> str:
    for left, right in (("Left", "Right"), ("LEFT", "RIGHT"), ("_L_", "_R_"), (".L", ".R"), ("_l", "_r"), ("L", "R")):
        if left in name:
            return name.replace(left, right)
    return "r" + name[1:]


@pytest.mark.parametrize("rig", RIGS)
def test_rigs_people_have(rig):
    body, further = (part.split() for part in RIGS[rig].split(" + "))
    expected = dict(zip(["spine_base", "spine_mid", "spine_shoulder", "neck", "head", *LIMBS[:7]], body, strict=True))
    expected |= {name: other_side(expected[name.replace("right", "left")]) for name in LIMBS[7:]}
    layout = star([*expected.values(), *further])
    mapping = joint_mapping(layout, NTU)
    found = {
        name: layout.joint_names[held[0]]
        for name, held, rule in zip(NTU.joint_names, mapping.sources, mapping.rules, strict=True)
        if rule == "same"
    }
    assert {name: found.get(name) for name in expected} == expected


@pytest.mark.parametrize("source", skeleton.names())
@pytest.mark.parametrize("target", skeleton.names())
def test_every_layout_onto_every_other(source, target):
    source, target = skeleton.get(source), skeleton.get(target)
    mapping = joint_mapping(source, target)
    if source == target:
        assert mapping.sources == tuple((joint,) for joint in range(target.num_joints))
    assert "missing" not in mapping.rules
    assert all(rule != "same" or len(held) == 1 for rule, held in zip(mapping.rules, mapping.sources, strict=True))
    # What is left of the source is left of the target.
    mirror, swap = source.mirror(), target.mirror()
    for joint, held in enumerate(mapping.sources):
        assert sorted(mirror[list(held)]) == sorted(mapping.sources[swap[joint]])


@pytest.mark.parametrize("name", skeleton.names())
def test_every_joint_of_a_known_layout_is_a_part(name):
    layout = skeleton.get(name)
    assert sorted(joint_parts(layout).values()) == list(range(layout.num_joints))


def test_middles_and_nearest():
    coco = skeleton.get("coco17")
    mapping = joint_mapping(coco, NTU)
    table = dict(zip(NTU.joint_names, zip(mapping.rules, mapping.sources, strict=True), strict=True))
    names = coco.joint_names.index
    hips, shoulders = (names("left_hip"), names("right_hip")), (names("left_shoulder"), names("right_shoulder"))
    assert table["spine_base"] == ("middle", hips)
    assert table["spine_shoulder"] == ("middle", shoulders)
    assert table["spine_mid"] == ("middle", hips + shoulders)
    assert table["head"] == ("middle", (names("left_ear"), names("right_ear")))
    assert table["left_hand_tip"] == table["left_thumb"] == table["left_hand"] == ("nearest", (names("left_wrist"),))
    assert table["right_foot"] == ("nearest", (names("right_ankle"),))
    assert mapping.table().splitlines()[0] == "spine_base      middle   left_hip, right_hip"
    # One pelvis weighs as much as two shoulders.
    torso = star(["pelvis", *(name for name in LIMBS if "foot" not in name), "head"])
    at = NTU.joint_names.index("spine_mid")
    assert joint_mapping(torso, NTU).sources[at] == (0, 0, *(1 + LIMBS.index("left_shoulder"), 7))


def test_numbers_and_confidence():
    source = star(["pelvis", *(name for name in LIMBS if "elbow" not in name)])
    mapping = joint_mapping(source, NTU)
    rng = np.random.default_rng(0)
    frames = rng.normal(size=(2, 7, source.num_joints, 3)).astype(np.float32)
    frames[1, 2] = 0
    mapped, confidence = mapping(frames, None)
    assert mapped.dtype == confidence.dtype == np.float32 and mapped.shape == (2, 7, 25, 3)
    names, at = NTU.joint_names.index, source.joint_names.index
    for joint, held in enumerate(mapping.sources):
        if held:
            mean = sum(frames[:, :, one].astype(np.float64) for one in held) / len(held)
            np.testing.assert_allclose(mapped[:, :, joint], mean, rtol=0, atol=1e-6)
            assert (confidence[:, :, joint] == 1).all()
    for lost in ("left_elbow", "right_elbow"):
        assert not mapped[:, :, names(lost)].any() and not confidence[:, :, names(lost)].any()
    given = rng.uniform(0.1, 1, frames.shape[:3]).astype(np.float32)
    given[0, 3:5, at("left_shoulder")] = 0
    frames[0, 3, at("left_shoulder")] = 0
    mapped, confidence = mapping(frames, given)
    pair = given[:, :, [at("left_shoulder"), at("right_shoulder")]].min(axis=2)
    np.testing.assert_array_equal(confidence[:, :, names("spine_shoulder")], pair)
    assert not mapped[0, 3, names("spine_shoulder")].any()
    filled = frames[0, 4, [at("left_shoulder"), at("right_shoulder")]].mean(axis=0)
    np.testing.assert_allclose(mapped[0, 4, names("spine_shoulder")], filled, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(confidence[:, :, names("left_hip")], given[:, :, at("left_hip")])
    same, none = joint_mapping(NTU, NTU)(np.ones((1, 2, 25, 3), np.float32), None)
    assert none is None and same.all()


@pytest.mark.parametrize("name", ["ui-prmd/ui-prmd-kinect.npz", "bandai-namco/bandai-namco.npz"])
def test_agrees_with_the_indices_of_the_real_sets(real_data, name):
    with np.load(real_data(name)) as file:
        layout = Skeleton.from_parents(file["parents"].tolist(), file["joint_names"].tolist())
        index = file["ntu25_index"].tolist()
    assert joint_mapping(layout, NTU).sources == tuple((joint,) for joint in index)


def test_where_the_spine_is():
    assert [skeleton.get("ntu25").joint_names[joint] for joint in spine_joints(NTU)] == ["spine_mid"]
    coco = skeleton.get("coco17")
    assert {coco.joint_names[joint] for joint in spine_joints(coco)} == {*LIMBS[::7], "left_hip", "right_hip"}
    assert spine_joints(Skeleton.from_parents([1, -1])) == [1]


def test_override(tmp_path):
    path = tmp_path / "map.yaml"
    path.write_text("head: nose\nneck: [nose, left_ear]\nleft_foot: null\n")
    coco = skeleton.get("coco17")
    mapping = joint_mapping(coco, NTU, path)
    table = dict(zip(NTU.joint_names, zip(mapping.rules, mapping.sources, strict=True), strict=True))
    assert (table["head"], table["neck"], table["left_foot"]) == (("given", (0,)), ("given", (0, 3)), ("given", ()))
    assert table["left_knee"] == ("same", (13,))


BAD_OVERRIDES = {
    "- head": "expected lines TARGET: SOURCE",
    "head: [": "map.yaml: not YAML:",
    "tail: nose": "ntu25 has no joint 'tail': it has spine_base",
    "head: snout": "head: the data has no joint 'snout': it has nose",
    "head: 3": "head: the data has no joint 3",
    "head: []": "the data has no joint []",
    "head: [nose, [nose]]": "the data has no joint ['nose']",
}


@pytest.mark.parametrize("text", BAD_OVERRIDES)
def test_bad_overrides(text, tmp_path):
    path = tmp_path / "map.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        joint_mapping(skeleton.get("coco17"), NTU, path)
    assert BAD_OVERRIDES[text] in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot read"):
        joint_mapping(skeleton.get("coco17"), NTU, tmp_path / "absent")


def test_nothing_in_common_and_ambiguity(tmp_path):
    with pytest.raises(UserError, match=r"joint_0, .* \(9 in all\) cannot be mapped onto ntu25: 25 of its 25 joints"):
        joint_mapping(Skeleton.from_parents([-1] + [0] * 8), NTU)
    names = ["Hips", *LIMBS, "Left-Knee"]
    with pytest.raises(UserError, match="left_knee may be left_knee or Left-Knee: say which with --joint-map"):
        joint_mapping(star(names), NTU)
    with pytest.raises(UserError, match="left_knee may be"):
        joint_parts(star(names))
    path = tmp_path / "map.yaml"
    path.write_text("left_knee: Left-Knee")
    mapping = joint_mapping(star(names), NTU, path)
    assert mapping.sources[NTU.joint_names.index("left_knee")] == (len(names) - 1,)


def test_view_finds_the_shoulders_by_their_names():
    layout = star(["Hips", "UpperArm_L", "UpperArm_R", "Head"])
    pose = np.array([[0, 0, 0], [1, 2, 0], [-1, 2, 0], [0, 3, 0]], np.float32)
    turn, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))
    turn *= np.sign(np.linalg.det(turn))
    turned = face_camera((pose @ turn.T).astype(np.float32)[None, None].repeat(2, axis=1), layout)
    np.testing.assert_allclose(turned[0, 1], pose, rtol=0, atol=1e-5)


def test_prepare_maps_a_ragged_file(ragged_file, tmp_path):
    names = [*skeleton.get("coco17").joint_names]
    frames = np.random.default_rng(0).normal(size=(20, 17, 3)).astype(np.float32)
    parents = np.array(skeleton.get("coco17").parents)
    raw = ragged_file(frames=frames, joint_names=np.array(names), parents=parents)
    store = prepare("ragged", raw, tmp_path / "out", RaggedOptions(layout="ntu25", center=False))
    assert store.skeleton == NTU and store.confidence is None
    base = store.frames.numpy()[:, NTU.joint_names.index("spine_base")]
    np.testing.assert_allclose(base, frames[:, [11, 12]].mean(axis=1), rtol=0, atol=1e-6)
