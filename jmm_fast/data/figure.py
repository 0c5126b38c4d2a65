"""An articulated NTU-25 figure: bones, joint angles, forward kinematics. Vectorised over frames.

Body frame: x to the person's left, y up, z forward, metres. Every bone may turn against its parent by
``Rz(spread) Rx(bend) Ry(twist)``; the signs of the table below make a positive ``bend`` the natural one (trunk and head
forward, arm and thigh forward and up, elbow and knee closed) and ``spread`` and ``twist`` outward on both sides.
"""

from dataclasses import dataclass

import numpy as np

from jmm_fast import skeleton

BEND, TWIST, SPREAD = range(3)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bone:
    joint: str
    parent: str
    offset: tuple[float, float, float]
    group: str
    bend: float = 0.0


# Offsets of a person 1.70 m tall, standing with hanging arms. A bone with bend 0 is rigid with its parent's.
_TRUNK = (
    _Bone(joint="spine_mid", parent="spine_base", offset=(0, 0.26, 0), group="trunk", bend=1),
    _Bone(joint="spine_shoulder", parent="spine_mid", offset=(0, 0.24, -0.01), group="trunk", bend=1),
    _Bone(joint="neck", parent="spine_shoulder", offset=(0, 0.07, 0.01), group="trunk", bend=1),
    _Bone(joint="head", parent="neck", offset=(0, 0.14, 0.02), group="trunk", bend=1),
)
_SIDE = (
    _Bone(joint="shoulder", parent="spine_shoulder", offset=(0.17, -0.03, 0), group="shoulders"),
    _Bone(joint="elbow", parent="shoulder", offset=(0, -0.28, 0), group="arms", bend=-1),
    _Bone(joint="wrist", parent="elbow", offset=(0, -0.25, 0), group="arms", bend=-1),
    _Bone(joint="hand", parent="wrist", offset=(0, -0.07, 0), group="arms", bend=-1),
    _Bone(joint="hand_tip", parent="hand", offset=(0, -0.08, 0), group="arms"),
    _Bone(joint="thumb", parent="hand", offset=(-0.02, -0.03, 0.04), group="arms"),
    _Bone(joint="hip", parent="spine_base", offset=(0.085, -0.04, 0), group="hips"),
    _Bone(joint="knee", parent="hip", offset=(0, -0.41, 0), group="legs", bend=-1),
    _Bone(joint="ankle", parent="knee", offset=(0, -0.39, 0), group="legs", bend=1),
    _Bone(joint="foot", parent="ankle", offset=(0, -0.06, 0.13), group="legs", bend=-1),
)
GROUPS = ("trunk", "shoulders", "arms", "hips", "legs")


def _tables():
    layout = skeleton.get("ntu25")
    index = {name: joint for joint, name in enumerate(layout.joint_names)}
    bones = [(bone, bone.joint, bone.parent, 1.0) for bone in _TRUNK]
    for side, mirror in (("left", 1.0), ("right", -1.0)):
        for bone in _SIDE:
            parent = bone.parent if bone.parent in index else f"{side}_{bone.parent}"
            bones.append((bone, f"{side}_{bone.joint}", parent, mirror))
    parents = np.full(layout.num_joints, -1)
    offsets = np.zeros((layout.num_joints, 3), dtype=np.float32)
    signs = np.zeros((layout.num_joints, 3), dtype=np.float32)
    group = np.zeros(layout.num_joints, dtype=np.int64)
    for bone, joint, parent, mirror in bones:
        here = index[joint]
        parents[here] = index[parent]
        offsets[here] = np.array(bone.offset) * (mirror, 1, 1)
        signs[here] = (bone.bend, mirror, mirror) if bone.bend else 0
        group[here] = GROUPS.index(bone.group)
    root = index["spine_base"]
    signs[root] = (1, 1, 1)
    # The same bones as the layout's, hung from the pelvis instead of the shoulders.
    assert {frozenset(bone) for bone in layout.bones} == {
        frozenset((joint, parent)) for joint, parent in enumerate(parents.tolist()) if parent >= 0
    }
    return index, parents, offsets, signs, group, root


JOINT, PARENTS, OFFSETS, SIGNS, GROUP, ROOT = _tables()
_FEET = [JOINT[name] for name in ("left_ankle", "right_ankle", "left_foot", "right_foot")]


def _order() -> list[int]:
    order = [ROOT]
    for joint in order:
        order.extend(np.flatnonzero(joint == PARENTS).tolist())
    return order


_ORDER = _order()


def rotations(angles: np.ndarray) -> np.ndarray:
    """``Rz(spread) Rx(bend) Ry(twist)`` of angles ``[..., 3]`` in that order bend, twist, spread -> ``[..., 3, 3]``."""
    (sa, sb, sc), (ca, cb, cc) = np.moveaxis(np.sin(angles), -1, 0), np.moveaxis(np.cos(angles), -1, 0)
    out = np.empty((*angles.shape[:-1], 3, 3), dtype=angles.dtype)
    out[..., 0, 0] = cc * cb - sc * sa * sb
    out[..., 0, 1] = -sc * ca
    out[..., 0, 2] = cc * sb + sc * sa * cb
    out[..., 1, 0] = sc * cb + cc * sa * sb
    out[..., 1, 1] = cc * ca
    out[..., 1, 2] = sc * sb - cc * sa * cb
    out[..., 2, 0] = -ca * sb
    out[..., 2, 1] = sa
    out[..., 2, 2] = ca * cb
    return out


def pose(angles: np.ndarray, bones: np.ndarray, jump: np.ndarray) -> np.ndarray:
    """Joint positions of a figure that stands on the ground.

    Args:
        angles: float32 ``[F, 25, 3]``, (bend, twist, spread) of the bone that ends in each joint, in radians; the
            root's turn the whole body; those of rigid bones are ignored.
        bones: float32 ``[F, 25, 3]``, each joint's offset from its parent at rest, metres.
        jump: float32 ``[F]``, height of the lowest foot joint above the ground, metres.

    Returns:
        float32 ``[F, 25, 3]``, metres; the root stays above the origin.
    """
    places = np.zeros_like(bones)
    turned: dict[int, np.ndarray] = {}
    for joint in _ORDER:
        parent = PARENTS[joint]
        if SIGNS[joint].any():
            own = rotations(angles[:, joint] * SIGNS[joint])
            turned[joint] = own if joint == ROOT else turned[parent] @ own
        else:
            turned[joint] = turned[parent]
        if joint != ROOT:
            places[:, joint] = places[:, parent] + (turned[joint] @ bones[:, joint, :, None])[..., 0]
    places[..., 1] += (jump - places[:, _FEET, 1].min(axis=1))[:, None]
    return places
