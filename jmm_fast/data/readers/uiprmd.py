"""Reader of the Kinect part of UI-PRMD as text: ten rehabilitation movements, done well and badly.

RAW is a folder or ``.zip`` with ``mMM_sSS_eEE_...positions.txt``, and ``...angles.txt`` of the same name beside it or
in a folder ``Angles`` next to ``Positions``; a line a frame, 66 numbers between commas. A name that ends in ``_inc``,
or a folder above whose name begins with ``Incorrect``, says that the movement was done badly. Folders called ``Vicon``
are passed over: theirs are other joints.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np

from jmm_fast.data.collect import FileLog, RawClip
from jmm_fast.data.filetree import FileTree, SourceFile
from jmm_fast.data.readers import common
from jmm_fast.data.store import StoreContents
from jmm_fast.data.text_rows import parse_rows
from jmm_fast.errors import UserError
from jmm_fast.skeleton import Skeleton

MOVEMENTS = (
    "deep squat",
    "hurdle step",
    "inline lunge",
    "side lunge",
    "sit to stand",
    "standing active straight leg raise",
    "standing shoulder abduction",
    "standing shoulder extension",
    "standing shoulder internal-external rotation",
    "standing shoulder scaption",
)

_JOINTS = (
    "Waist Spine Chest Neck Head HeadTip LeftCollar LeftUpperArm LeftForearm LeftHand RightCollar RightUpperArm "
    "RightForearm RightHand LeftUpperLeg LeftLowerLeg LeftFoot LeftToes RightUpperLeg RightLowerLeg RightFoot RightToes"
)
SKELETON = Skeleton.from_parents(
    [-1, 0, 1, 2, 3, 4, 2, 6, 7, 8, 2, 10, 11, 12, 0, 14, 15, 16, 0, 18, 19, 20], _JOINTS.split(), "uiprmd22"
)
_NAME = re.compile(r"m(\d+)_s(\d+)_e(\d+)_\w*positions\w*\.txt", re.IGNORECASE)


@dataclass(kw_only=True, slots=True)
class UiprmdOptions(common.CommonOptions):
    """How to read UI-PRMD."""

    center: bool = True
    """Move each clip so that the waist starts at the origin."""


class UiprmdSource:
    """UI-PRMD; a clip is a repetition of a movement, its class the movement.

    Columns: ``movement``, ``subject``, ``episode`` as numbered in the file's name; ``correct`` (1: done well). Split
    ``xsub``: subjects of odd number train. ``--label label,correct`` makes the 20 classes of movement and quality.

    Raises:
        UserError: no positions file.
    """

    class_names: ClassVar = list(MOVEMENTS)
    skeleton = SKELETON
    fps = 30.0

    def __init__(self, path: Path, options: UiprmdOptions) -> None:
        self.where = str(path)
        self._tree = FileTree(path, (".txt",))
        self._by_name = {file.name: file for file in self._tree.files}
        self._center = options.center
        self.files: Sequence[SourceFile] = [
            file
            for file in self._tree.files
            if _NAME.fullmatch(PurePosixPath(file.name).name) and "vicon" not in file.name.lower().split("/")
        ]
        if not self.files:
            raise UserError(f"{path}: no mMM_sSS_eEE_...positions.txt in it")
        angles = [self._angles(file) for file in self.files]
        self.identity: Any = {"center": options.center, "angles": [(a.name, a.size, a.stamp) for a in angles if a]}

    def read(self, file: SourceFile, log: FileLog) -> list[RawClip]:
        angle_file = self._angles(file)
        if angle_file is None:
            raise UserError("there is no file of angles for it")
        offsets = self._rows(file)
        try:
            angles = self._rows(angle_file)
        except UserError as error:
            raise UserError(f"{angle_file.name}: {error}") from None
        if len(angles) != len(offsets):
            raise UserError(f"it has {len(offsets)} frames, its angles in {angle_file.name} have {len(angles)}")
        frames = forward(offsets, angles)[None]
        if self._center:
            common.center_clip(frames, SKELETON)
        movement, subject, episode = map(int, _NAME.fullmatch(PurePosixPath(file.name).name).groups())
        correct = not re.search(r"(^|/)incorrect[^/]*/|_inc\.txt$", file.name, re.IGNORECASE)
        columns = {"movement": movement, "subject": subject, "episode": episode, "correct": int(correct)}
        name = f"m{movement:02d}_s{subject:02d}_e{episode:02d}{'' if correct else '_incorrect'}"
        return [RawClip(name=name, frames=frames, label=movement - 1, columns=columns)]

    def finish(self, contents: StoreContents) -> list[str]:
        odd = contents.columns["subject"] % 2 == 1
        contents.splits["xsub"] = {"train": np.flatnonzero(odd), "test": np.flatnonzero(~odd)}
        return []

    def _angles(self, file: SourceFile) -> SourceFile | None:
        folder, _, name = file.name.rpartition("/")
        name = re.sub("positions", "angles", name, flags=re.IGNORECASE)
        sibling = re.sub(r"positions$", "Angles", folder, flags=re.IGNORECASE)
        paths = (f"{place}/{name}".lstrip("/") for place in (folder, sibling))
        return next((self._by_name[path] for path in paths if path in self._by_name), None)

    def _rows(self, file: SourceFile) -> np.ndarray:
        rows = parse_rows(self._tree.read(file), 66)
        bad = ~np.isfinite(rows).all(axis=1)
        if bad.any():
            raise UserError(f"line {int(np.argmax(bad)) + 1}: expected 66 numbers, got NaN or infinity among them")
        return rows.reshape(-1, 22, 3)


def forward(offsets: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Positions in metres from what the files hold.

    ``R_j = R_parent(j) Rz Rx Ry`` of joint ``j``'s angles and ``X_j = X_parent(j) + R_parent(j) offset_j``; the root's
    offset is its position.

    Args:
        offsets: ``[n, 22, 3]`` cm, each in the frame of the joint's parent.
        angles: ``[n, 22, 3]`` degrees about x, y, z.

    Returns:
        float32 ``[n, 22, 3]``, y up.
    """
    offsets, angles = offsets.astype(np.float64) / 100, np.radians(angles.astype(np.float64))
    x, y, z = np.moveaxis(angles, -1, 0)
    turns = _about(2, z) @ _about(0, x) @ _about(1, y)
    places = offsets.copy()
    for joint, parent in enumerate(SKELETON.parents):
        if parent >= 0:
            places[:, joint] = places[:, parent] + np.einsum("nij,nj->ni", turns[:, parent], offsets[:, joint])
            turns[:, joint] = turns[:, parent] @ turns[:, joint]
    return places.astype(np.float32)


def _about(axis: int, angle: np.ndarray) -> np.ndarray:
    """Rotation matrices ``[..., 3, 3]`` about a coordinate axis."""
    first, second = (axis + 1) % 3, (axis + 2) % 3
    turn = np.zeros((*angle.shape, 3, 3))
    turn[..., axis, axis] = 1
    turn[..., first, first] = turn[..., second, second] = np.cos(angle)
    turn[..., second, first] = np.sin(angle)
    turn[..., first, second] = -np.sin(angle)
    return turn
