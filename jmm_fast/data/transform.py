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
    """Steps in this order: filling gaps, joint mapping, view, bone lengths.

    Joints of confidence 0 that no step gave a place stay at zero, and no other joint is moved by where they would be.

    Attributes:
        source: layout of the clips that come in.
        gaps: longest run of missing frames of a joint that is filled, see :func:`fill_gaps`.
        mapping: onto another layout; None keeps the joints.
        view: turn each clip about its first body, see :func:`face_camera`.
        bones: length of the bone that ends in each joint, float ``[V]`` of the resulting layout; None keeps lengths.
    """

    source: Skeleton
    gaps: int = 0
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
        return {"gaps": self.gaps, "mapping": mapping, "view": self.view, "bones": self.bones}

    def __call__(
        self, frames: np.ndarray, confidence: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """``frames`` float32 ``[M, n, V, 3]`` and ``confidence`` float32 ``[M, n, V]`` or None, transformed."""
        if self.gaps and confidence is not None:
            frames = fill_gaps(frames, confidence, self.gaps)
        if self.mapping is not None:
            frames, confidence = self.mapping(frames, confidence)
        missing = None if confidence is None else missing_joints(frames, confidence)
        if self.view:
            frames = face_camera(frames, self.skeleton, missing)
        if self.bones is not None:
            frames = set_bone_lengths(frames, self.skeleton, np.asarray(self.bones), missing)
        return frames, confidence


def missing_joints(frames: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """Joints without a place, bool ``[M, n, V]``: confidence 0 and at zero (a filled gap has confidence 0 alone)."""
    return (confidence == 0) & ~frames.any(axis=-1)


def fill_gaps(frames: np.ndarray, confidence: np.ndarray, longest: int) -> np.ndarray:
    """Put missing joints on a straight line in time between where they were seen before and after.

    Args:
        frames: float32 ``[M, n, V, 3]``.
        confidence: float32 ``[M, n, V]``; 0 is missing. A filled joint keeps that: its place is a guess.
        longest: frames of a gap that is filled; longer ones, and those at either end of the clip, stay.
    """
    time, count = np.arange(frames.shape[1])[:, None], frames.shape[1]
    seen = confidence > 0
    before = np.maximum.accumulate(np.where(seen, time, -1), axis=1)
    after = np.minimum.accumulate(np.where(seen, time, count)[:, ::-1], axis=1)[:, ::-1]
    body, now, joint = np.nonzero(~seen & (before >= 0) & (after < count) & (after - before - 1 <= longest))
    before, after = before[body, now, joint], after[body, now, joint]
    share = ((now - before) / (after - before))[:, None]
    filled = frames.copy()
    filled[body, now, joint] = (1 - share) * frames[body, before, joint] + share * frames[body, after, joint]
    return filled


def face_camera(frames: np.ndarray, layout: Skeleton, missing: np.ndarray | None = None) -> np.ndarray:
    """Turn a clip so that its first body stands upright and faces the camera when it first appears.

    With ``r`` the root, ``up`` from the root to the middle of the shoulders and ``side`` from the right to the left
    shoulder, both of the first body in its first non-zero frame: one rotation makes ``up`` the y axis and brings
    ``side`` into the x-y plane pointing to +x (the person's left); all bodies turn about ``r``. Bodies that are absent
    (zero) stay so, as do ``missing`` joints (bool ``[M, n, V]``); frames without shoulders or root are passed over. A
    clip whose shoulders coincide with its root is returned as it is.

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
    usable = live[0]
    if missing is not None:
        needed = [names["left_shoulder"], names["right_shoulder"], layout.root]
        usable = usable & ~missing[0][:, needed].any(axis=1)
    if not usable.any():
        return frames
    first = int(np.argmax(usable))
    pose = frames[0, first].astype(np.float64)
    left, right, root = pose[names["left_shoulder"]], pose[names["right_shoulder"]], pose[layout.root]
    up = (left + right) / 2 - root
    height = np.linalg.norm(up)
    if height < 1e-6:
        # The root lies between the shoulders: any joint below tells as well where up is.
        distance = np.linalg.norm(pose - root, axis=1)
        lowest = pose[np.argmax(distance if missing is None else np.where(missing[0, first], 0, distance))]
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
    if missing is not None:
        turned[missing] = 0
    return turned


def bone_lengths(frames: np.ndarray, layout: Skeleton, missing: np.ndarray | None = None) -> np.ndarray:
    """Median length of the bone that ends in each joint, over the frames of the first body that show both of its ends.

    Args:
        frames: float32 ``[M, n, V, 3]``.
        missing: bool ``[M, n, V]``; None: no joint is.

    Returns:
        float64 ``[V]``; 0 for the root and for a bone that no frame shows.
    """
    live = frames[0].any(axis=(1, 2))
    body = frames[0][live].astype(np.float64)
    parents = np.array(layout.parents)
    parents[layout.root] = layout.root
    lengths = np.linalg.norm(body - body[:, parents], axis=-1)
    if missing is not None:
        lengths[missing[0][live] | missing[0][live][:, parents]] = np.nan
    shown = np.isfinite(lengths).any(axis=0)
    return np.array([np.nanmedian(lengths[:, joint]) if shown[joint] else 0.0 for joint in range(len(parents))])


def set_bone_lengths(
    frames: np.ndarray, layout: Skeleton, lengths: np.ndarray, missing: np.ndarray | None = None
) -> np.ndarray:
    """Rebuild each pose from its root outwards with bones of ``lengths``, directions as they are.

    Args:
        frames: float32 ``[M, n, V, 3]``; poses that are absent (zero) stay so, and a bone of no length keeps none.
        layout: the tree of bones.
        lengths: float ``[V]``, metres, of the bone that ends in each joint; 0 leaves the bone as long as it is.
        missing: bool ``[M, n, V]``; None: no joint is. A joint whose parent is missing keeps its place relative to the
            nearest joint on the way to the root that is not.
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
        if lengths[joint] > 0:
            factor = np.where(norm > 1e-9, lengths[joint] / np.maximum(norm, 1e-9), 0)
            bone *= factor if missing is None else np.where(missing[..., parent, None], 1, factor)
        result[..., joint, :] = result[..., parent, :] + bone
        if missing is not None:
            # What hangs from a missing joint is measured from where that one's parent is.
            for array in (source, result):
                array[..., joint, :] = np.where(missing[..., joint, None], array[..., parent, :], array[..., joint, :])
    if missing is not None:
        result[missing] = 0
    return np.where(live, result, 0).astype(np.float32)
