"""What can be done to every clip of any format on its way into a store: another joint layout, one view, one body size.

Each clip goes through by itself, so the result does not depend on the others, on their order or on threads.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jmm_fast.data.mapping import JointMapping, joint_parts
from jmm_fast.errors import UserError
from jmm_fast.skeleton import Skeleton


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipTransform:
    """Steps in this order: joint mapping, view, bone lengths.

    Attributes:
        source: layout of the clips that come in.
        mapping: onto another layout; None keeps the joints.
        view: turn each clip about its first body, see :func:`face_camera`.
        bones: length of the bone that ends in each joint, float ``[V]`` of the resulting layout; None keeps lengths.
    """

    source: Skeleton
    mapping: JointMapping | None = None
    view: bool = False
    bones: tuple[float, ...] | None = None

    @property
    def skeleton(self) -> Skeleton:
        """Layout of the clips that come out."""
        return self.source if self.mapping is None else self.mapping.target

    @property
    def identity(self) -> Any:
        """Anything JSON that decides the result."""
        mapping = None if self.mapping is None else [self.mapping.target.name, self.mapping.sources]
        return {"mapping": mapping, "view": self.view, "bones": self.bones}

    def __call__(
        self, frames: np.ndarray, confidence: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """``frames`` float32 ``[M, n, V, 3]`` and ``confidence`` float32 ``[M, n, V]`` or None, transformed."""
        if self.mapping is not None:
            frames, confidence = self.mapping(frames, confidence)
        if self.view:
            frames = face_camera(frames, self.skeleton)
        if self.bones is not None:
            frames = set_bone_lengths(frames, self.skeleton, np.asarray(self.bones))
        return frames, confidence


def face_camera(frames: np.ndarray, layout: Skeleton) -> np.ndarray:
    """Turn a clip so that its first body stands upright and faces the camera when it first appears.

    With ``r`` the root, ``up`` from the root to the middle of the shoulders and ``side`` from the right to the left
    shoulder, both of the first body in its first non-zero frame: one rotation makes ``up`` the y axis and brings
    ``side`` into the x-y plane pointing to +x (the person's left); all bodies turn about ``r``. Bodies that are absent
    (zero) stay so, and a clip whose shoulders coincide with its root is returned as it is.

    Args:
        frames: float32 ``[M, n, V, 3]``.
        layout: must have joints whose names tell that they are the shoulders (:data:`jmm_fast.data.mapping.PARTS`).

    Raises:
        UserError: the layout has no shoulders.
    """
    names = joint_parts(layout)
    if "left_shoulder" not in names or "right_shoulder" not in names:
        raise UserError(f"--view needs joints named left_shoulder and right_shoulder, which {layout.name} has not")
    live = frames.any(axis=(2, 3))
    if not live[0].any():
        return frames
    pose = frames[0, int(np.argmax(live[0]))].astype(np.float64)
    left, right, root = pose[names["left_shoulder"]], pose[names["right_shoulder"]], pose[layout.root]
    up = (left + right) / 2 - root
    height = np.linalg.norm(up)
    if height < 1e-6:
        # The root lies between the shoulders: any joint below tells as well where up is.
        lowest = pose[np.argmax(np.linalg.norm(pose - root, axis=1))]
        up, height = root - lowest, np.linalg.norm(root - lowest)
    side = left - right
    if height < 1e-6:
        return frames
    up /= height
    side -= up * (side @ up)
    if np.linalg.norm(side) < 1e-6:
        return frames
    side /= np.linalg.norm(side)
    rotation = np.stack([side, up, np.cross(side, up)])
    turned = ((frames - root) @ rotation.T + root).astype(np.float32)
    turned[~live] = 0
    return turned


def bone_lengths(frames: np.ndarray, layout: Skeleton) -> np.ndarray:
    """Median length of the bone that ends in each joint, over the frames of the first body; float64 ``[V]``, root 0.

    Args:
        frames: float32 ``[M, n, V, 3]``.
    """
    body = frames[0][frames[0].any(axis=(1, 2))].astype(np.float64)
    parents = np.array(layout.parents)
    parents[layout.root] = layout.root
    return np.median(np.linalg.norm(body - body[:, parents], axis=-1), axis=0)


def set_bone_lengths(frames: np.ndarray, layout: Skeleton, lengths: np.ndarray) -> np.ndarray:
    """Rebuild each pose from its root outwards with bones of ``lengths``, directions as they are.

    Args:
        frames: float32 ``[M, n, V, 3]``; poses that are absent (zero) stay so, and a bone of no length keeps none.
        layout: the tree of bones.
        lengths: float ``[V]``, metres, of the bone that ends in each joint; the root's is not read.
    """
    live = frames.any(axis=(2, 3), keepdims=True)
    source = frames.astype(np.float64)
    result = source.copy()
    for joint in layout.order():
        parent = layout.parents[joint]
        if parent < 0:
            continue
        bone = source[..., joint, :] - source[..., parent, :]
        norm = np.linalg.norm(bone, axis=-1, keepdims=True)
        bone *= np.where(norm > 1e-9, lengths[joint] / np.maximum(norm, 1e-9), 0)
        result[..., joint, :] = result[..., parent, :] + bone
    return np.where(live, result, 0).astype(np.float32)
