"""Joint layouts: names, parents, left and right, graph distance, adjacency.

A layout is a tree over the joints of one body. Models read it for the topology table, readers and batches for the bone
modality, figures for drawing. Leaf module: numpy alone.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from jmm_fast.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """One joint layout.

    Attributes:
        name: identifier, as :func:`get` takes it; ``custom`` for one made from a ``parents`` list.
        joint_names: ``V`` distinct names.
        parents: ``V`` parent indices, -1 for the one root; a connected tree.
        pairs: ``(left, right)`` joints that mirror each other; every other joint is its own mirror image.
        bone_targets: where a joint's bone vector starts when that is not its parent, as ``(joint, start)`` pairs.
            Only the released NTU-25 feeder needs it; see ``ntu25``.

    Raises:
        UserError: not a tree with exactly one root, names missing or repeated, or a pair out of range.
    """

    name: str
    joint_names: tuple[str, ...]
    parents: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...] = ()
    bone_targets: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        _check_tree(self.name, self.parents)
        count = len(self.parents)
        if len(self.joint_names) != count or len(set(self.joint_names)) != count:
            raise UserError(f"skeleton {self.name}: joint_names must be {count} distinct names, got {self.joint_names}")
        flat = [joint for pair in self.pairs for joint in pair]
        if len(set(flat)) != len(flat) or any(not 0 <= joint < count for joint in flat):
            raise UserError(f"skeleton {self.name}: pairs must hold each joint of 0..{count - 1} at most once")
        if any(not 0 <= joint < count for pair in self.bone_targets for joint in pair):
            raise UserError(f"skeleton {self.name}: bone_targets must hold joints of 0..{count - 1}")

    @property
    def num_joints(self) -> int:
        """Number of joints ``V``."""
        return len(self.parents)

    @property
    def root(self) -> int:
        """The joint without a parent."""
        return self.parents.index(-1)

    @property
    def bones(self) -> tuple[tuple[int, int], ...]:
        """The ``V - 1`` edges of the tree as ``(child, parent)``, in joint order."""
        return tuple((joint, parent) for joint, parent in enumerate(self.parents) if parent >= 0)

    def hops(self) -> np.ndarray:
        """Number of bones between every two joints, int64 ``[V, V]``."""
        count = self.num_joints
        distance = np.zeros((count, count), dtype=np.int64)
        placed: list[int] = []
        # A joint's distances follow from its parent's, so parents go first.
        for joint in self.order():
            parent = self.parents[joint]
            if parent >= 0:
                distance[joint, placed] = distance[placed, joint] = distance[parent, placed] + 1
            placed.append(joint)
        return distance

    def order(self) -> tuple[int, ...]:
        """All joints, each after its parent (the order of forward kinematics)."""
        children: dict[int, list[int]] = {}
        for joint, parent in enumerate(self.parents):
            children.setdefault(parent, []).append(joint)
        placed = list(children[-1])
        for joint in placed:
            placed.extend(children.get(joint, ()))
        return tuple(placed)

    def adjacency(self, normalize: bool = True) -> np.ndarray:
        """``A + I`` of the undirected tree, or ``D^-1/2 (A + I) D^-1/2`` with ``D`` its row sums; float64 ``[V,V]``."""
        matrix = np.eye(self.num_joints)
        for child, parent in self.bones:
            matrix[child, parent] = matrix[parent, child] = 1.0
        if not normalize:
            return matrix
        scale = matrix.sum(axis=1) ** -0.5
        return scale[:, None] * matrix * scale[None, :]

    def mirror(self) -> np.ndarray:
        """Permutation that swaps left and right, int64 ``[V]``; its own inverse."""
        swap = np.arange(self.num_joints, dtype=np.int64)
        for left, right in self.pairs:
            swap[left], swap[right] = right, left
        return swap

    def bone_parents(self) -> np.ndarray:
        """Where each bone starts, int64 ``[V]``: ``bone[v] = joint[v] - joint[bone_parents[v]]``, root to itself."""
        start = np.array(self.parents, dtype=np.int64)
        start[self.root] = self.root
        for joint, target in self.bone_targets:
            start[joint] = target
        return start

    @classmethod
    def from_parents(
        cls, parents: Sequence[int], joint_names: Sequence[str] | None = None, name: str = "custom"
    ) -> "Skeleton":
        """A layout from a list of parent indices (-1 = root).

        Left and right come from the names where they tell, see :func:`sides_and_stems`: two joints whose names differ
        only in the side are a pair.

        Raises:
            UserError: a cycle, no root or several, an index out of range, names of another count.
        """
        try:
            parents = tuple(operator.index(parent) for parent in parents)
        except TypeError as error:
            raise UserError(f"skeleton {name}: parents must be a list of whole numbers, got {parents!r}") from error
        if joint_names is None:
            joint_names = [f"joint_{joint}" for joint in range(len(parents))]
        joint_names = tuple(str(joint) for joint in joint_names)
        return cls(name=name, joint_names=joint_names, parents=parents, pairs=_pairs_by_name(joint_names))


def get(name: str) -> Skeleton:
    """The layout called ``name``; :class:`UserError` listing the known ones otherwise."""
    layouts = _layouts()
    if name not in layouts:
        raise UserError(f"unknown skeleton {name!r}: expected one of {', '.join(layouts)}")
    return layouts[name]


def find(parents: Sequence[int], joint_names: Sequence[str] | None = None) -> Skeleton:
    """The known layout of exactly these joints, else :meth:`Skeleton.from_parents`."""
    for layout in _layouts().values():
        if joint_names is not None and (layout.parents, layout.joint_names) == (tuple(parents), tuple(joint_names)):
            return layout
    return Skeleton.from_parents(parents, joint_names)


def names() -> tuple[str, ...]:
    """Names that :func:`get` knows."""
    return tuple(_layouts())


def _check_tree(name: str, parents: Sequence[int]) -> None:
    count = len(parents)
    roots = [joint for joint, parent in enumerate(parents) if parent == -1]
    for joint, parent in enumerate(parents):
        if not -1 <= parent < count:
            raise UserError(f"skeleton {name}: parent of joint {joint} must be -1 or in 0..{count - 1}, got {parent}")
    if len(roots) != 1:
        raise UserError(f"skeleton {name}: exactly one joint must have parent -1, got {len(roots)} of {count}")
    known = {roots[0]}
    for joint in range(count):
        path = []
        while joint not in known:
            if joint in path:
                raise UserError(f"skeleton {name}: parents form a cycle through joint {joint}")
            path.append(joint)
            joint = parents[joint]
        known.update(path)


def _side_and_stem(name: str) -> tuple[str, str] | None:
    text = name.replace("-", "_").replace(" ", "_").replace(".", "_")
    lower = text.lower()
    for side in ("left", "right"):
        if side in lower:
            return side, lower.replace(side, "", 1).strip("_")
    parts = lower.split("_")
    for letter, side in (("l", "left"), ("r", "right")):
        if letter in parts:
            parts.remove(letter)
            return side, "_".join(parts)
        # LHip, not Lumbar: the letter counts only before another capital.
        if len(text) > 1 and text[0] == letter.upper() and text[1].isupper():
            return side, lower[1:]
        if len(text) > 1 and text[-1] == letter.upper() and text[-2].islower():
            return side, lower[:-1]
    return None


def sides_and_stems(joint_names: Sequence[str]) -> list[tuple[str | None, str]]:
    """Of each joint's name its side, ``left``, ``right`` or None, and the lower-case name without it.

    A side is ``left``/``right`` anywhere, a leading, trailing or separate ``L``/``R``, or a leading ``l``/``r`` (as in
    ``lfemur``) where another joint differs in that letter alone.
    """
    lower = {name.lower() for name in joint_names}
    twin = {"l": ("left", "r"), "r": ("right", "l")}
    result: list[tuple[str | None, str]] = []
    for name in joint_names:
        found = _side_and_stem(name)
        if found is None and len(name) > 1 and name[0].lower() in twin:
            side, other = twin[name[0].lower()]
            if other + name[1:].lower() in lower:
                found = side, name[1:].lower()
        result.append(found or (None, name.lower()))
    return result


def _pairs_by_name(joint_names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    sides: dict[str, dict[str, int]] = {}
    for joint, (side, stem) in enumerate(sides_and_stems(joint_names)):
        if side is not None:
            sides.setdefault(stem, {}).setdefault(side, joint)
    return tuple((both["left"], both["right"]) for both in sides.values() if len(both) == 2)


def _parse(name: str, table: str, bone_targets: dict[str, str] | None = None) -> Skeleton:
    rows = [row.split(":") for row in table.split()]
    joint_names = [row[0] for row in rows]
    index = {joint: position for position, joint in enumerate(joint_names)}
    return Skeleton(
        name=name,
        joint_names=tuple(joint_names),
        parents=tuple(index[row[1]] if row[1] else -1 for row in rows),
        pairs=_pairs_by_name(joint_names),
        bone_targets=tuple((index[joint], index[start]) for joint, start in (bone_targets or {}).items()),
    )


@cache
def _layouts() -> dict[str, Skeleton]:
    # NTU's own bone list hangs the hand tips on the hands; that tree gives hops and adjacency. The released feeder's
    # bone modality measures them from the thumbs instead, which bone_targets keeps.
    ntu25 = _parse(
        "ntu25",
        """spine_base:spine_mid spine_mid:spine_shoulder neck:spine_shoulder head:neck
        left_shoulder:spine_shoulder left_elbow:left_shoulder left_wrist:left_elbow left_hand:left_wrist
        right_shoulder:spine_shoulder right_elbow:right_shoulder right_wrist:right_elbow right_hand:right_wrist
        left_hip:spine_base left_knee:left_hip left_ankle:left_knee left_foot:left_ankle
        right_hip:spine_base right_knee:right_hip right_ankle:right_knee right_foot:right_ankle
        spine_shoulder: left_hand_tip:left_hand left_thumb:left_hand right_hand_tip:right_hand right_thumb:right_hand
        """,
        bone_targets={"left_hand_tip": "left_thumb", "right_hand_tip": "right_thumb"},
    )
    kinect20 = _parse(
        "kinect20",
        """hip_center: spine:hip_center shoulder_center:spine head:shoulder_center
        left_shoulder:shoulder_center left_elbow:left_shoulder left_wrist:left_elbow left_hand:left_wrist
        right_shoulder:shoulder_center right_elbow:right_shoulder right_wrist:right_elbow right_hand:right_wrist
        left_hip:hip_center left_knee:left_hip left_ankle:left_knee left_foot:left_ankle
        right_hip:hip_center right_knee:right_hip right_ankle:right_knee right_foot:right_ankle
        """,
    )
    coco17 = _parse(
        "coco17",
        """nose: left_eye:nose right_eye:nose left_ear:left_eye right_ear:right_eye left_shoulder:nose
        right_shoulder:nose left_elbow:left_shoulder right_elbow:right_shoulder left_wrist:left_elbow
        right_wrist:right_elbow left_hip:left_shoulder right_hip:right_shoulder left_knee:left_hip
        right_knee:right_hip left_ankle:left_knee right_ankle:right_knee
        """,
    )
    # The hips hang on the shoulders, as the graph networks of this field draw OpenPose bodies.
    openpose18 = _parse(
        "openpose18",
        """nose:neck neck: right_shoulder:neck right_elbow:right_shoulder right_wrist:right_elbow left_shoulder:neck
        left_elbow:left_shoulder left_wrist:left_elbow right_hip:right_shoulder right_knee:right_hip
        right_ankle:right_knee left_hip:left_shoulder left_knee:left_hip left_ankle:left_knee right_eye:nose
        left_eye:nose right_ear:right_eye left_ear:left_eye
        """,
    )
    h36m17 = _parse(
        "h36m17",
        """pelvis: right_hip:pelvis right_knee:right_hip right_ankle:right_knee left_hip:pelvis left_knee:left_hip
        left_ankle:left_knee spine:pelvis thorax:spine neck:thorax head:neck left_shoulder:thorax
        left_elbow:left_shoulder left_wrist:left_elbow right_shoulder:thorax right_elbow:right_shoulder
        right_wrist:right_elbow
        """,
    )
    smpl24 = _parse(
        "smpl24",
        """pelvis: left_hip:pelvis right_hip:pelvis spine1:pelvis left_knee:left_hip right_knee:right_hip
        spine2:spine1 left_ankle:left_knee right_ankle:right_knee spine3:spine2 left_foot:left_ankle
        right_foot:right_ankle neck:spine3 left_collar:spine3 right_collar:spine3 head:neck
        left_shoulder:left_collar right_shoulder:right_collar left_elbow:left_shoulder right_elbow:right_shoulder
        left_wrist:left_elbow right_wrist:right_elbow left_hand:left_wrist right_hand:right_wrist
        """,
    )
    # The names of the CMU motion capture library; a joint lies where the bone of its name begins.
    cmu31 = _parse(
        "cmu31",
        """root: lhipjoint:root lfemur:lhipjoint ltibia:lfemur lfoot:ltibia ltoes:lfoot
        rhipjoint:root rfemur:rhipjoint rtibia:rfemur rfoot:rtibia rtoes:rfoot
        lowerback:root upperback:lowerback thorax:upperback lowerneck:thorax upperneck:lowerneck head:upperneck
        lclavicle:thorax lhumerus:lclavicle lradius:lhumerus lwrist:lradius lhand:lwrist lfingers:lhand lthumb:lwrist
        rclavicle:thorax rhumerus:rclavicle rradius:rhumerus rwrist:rradius rhand:rwrist rfingers:rhand rthumb:rwrist
        """,
    )
    return {layout.name: layout for layout in (ntu25, kinect20, coco17, openpose18, h36m17, smpl24, cmu31)}
