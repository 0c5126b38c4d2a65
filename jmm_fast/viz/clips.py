"""Clips ready to be drawn or played, alone or with the mask that a run's settings draw for them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from jmm_fast import ops
from jmm_fast.data import BodyBatches, ClipStore
from jmm_fast.errors import UserError
from jmm_fast.skeleton import Skeleton
from jmm_fast.viz.records import read_config, run_folder

_ABSENT = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayedClip:
    """All bodies of one clip.

    Attributes:
        index, name, class_name: which clip of the store, what it is called, what it shows.
        poses: float32 ``[bodies, T, V, 3]``, metres, y up.
        skeleton: joint names and bones.
        seconds: length of the recording, however many frames ``T`` it is shown in.
        seen: bool ``[bodies, T, V]``, False where a joint is missing and not to be drawn; None: all are there.
    """

    index: int
    name: str
    class_name: str
    poses: np.ndarray
    skeleton: Skeleton
    seconds: float
    seen: np.ndarray | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedClip(PlayedClip):
    """A clip and the masks of its bodies.

    Attributes:
        probability: float32 ``[bodies, L]``, each body's adding up to one.
        mask: bool ``[bodies, L]``, True = hidden.
        t_patch: frames per token.
    """

    probability: np.ndarray
    mask: np.ndarray
    t_patch: int


def played_clip(store: ClipStore, clip: int) -> PlayedClip:
    """Clip ``clip`` of ``store`` frame by frame as it is stored."""
    poses = store.clip(clip).numpy()
    seen = None
    if store.confidence is not None:
        rows = store.confidence[store.offsets[clip] : store.offsets[clip + 1]]
        seen = (rows > 0).reshape(poses.shape[:3]).numpy()
    return PlayedClip(
        index=clip,
        name=store.names[clip],
        class_name=store.class_names[int(store.labels[clip])],
        poses=np.nan_to_num(poses),  # a set that is looked at may hold what training refuses
        skeleton=store.skeleton,
        seconds=int(store.lengths[clip]) / store.fps,
        seen=seen,
    )


def masked_clip_of_run(run: str | Path, store: ClipStore, clip: int, *, epoch: int = 0) -> MaskedClip:
    """Clip ``clip`` of ``store`` under the mask settings and the seed of ``RUN/config.yaml``.

    The whole clip is resampled to the model's window, not cropped and not turned; for that input the mask is the one
    :func:`jmm_fast.ops.motion_mask` draws for this clip in epoch ``epoch``. Bodies zero throughout are left out.

    Raises:
        UserError: no or incomplete configuration, no such clip, a store with another number of joints.
    """
    path = run_folder(run) / "config.yaml"
    config = read_config(run)
    joints = _field(config, path, "model.num_joints")
    if store.skeleton.num_joints != joints:
        raise UserError(
            f"{store.path} has {store.skeleton.num_joints} joints, the model of {run_folder(run)} has {joints}"
        )
    window, t_patch = _field(config, path, "model.num_frames"), _field(config, path, "model.t_patch")
    if not 0 <= clip < store.num_clips:
        raise UserError(f"{store.path}: no clip {clip}: there are {store.num_clips}, counted from 0")

    def whole(modality: str):
        batches = BodyBatches(
            store,
            torch.tensor([clip]),
            batch_size=1,
            window=window,
            train=False,
            eval_crop=1.0,
            modality=modality,
            min_confidence=_field(config, path, "data.min_confidence", 0.0),
        )
        return batches.batch(torch.tensor([clip]), epoch)

    joint = whole("joint")
    seen = whole(_field(config, path, "data.modality"))
    present = joint.clips.flatten(1).any(1)
    if not present.any():
        raise UserError(f"{store.path}: clip {clip} holds no body")
    valid = seen.valid(t_patch)
    drawn = ops.motion_mask(
        seen.clips[present],
        mask_ratio=_field(config, path, "mask.mask_ratio"),
        tau=_field(config, path, "mask.tau"),
        t_patch=t_patch,
        variant=_field(config, path, "mask.variant"),
        gate=_field(config, path, "mask.gate", None),
        seed=_field(config, path, "seed"),
        epoch=epoch,
        clip_ids=seen.clip_ids[present],
        valid=None if valid is None else valid[present],
        backend="reference",  # the one backend that always gives the probabilities
    )
    return MaskedClip(
        index=clip,
        name=store.names[clip],
        class_name=store.class_names[int(store.labels[clip])],
        poses=joint.clips[present].numpy(),
        probability=drawn.probability.numpy(),
        mask=drawn.mask.numpy(),
        t_patch=t_patch,
        skeleton=store.skeleton,
        seconds=int(store.lengths[clip]) / store.fps,
        seen=None if joint.seen is None else joint.seen[present].numpy(),
    )


def typical_clips(store: ClipStore, count: int) -> list[int]:
    """``count`` clips that show what a store holds: classes spread over the list, of each the clip of median length.

    Where the store has clips with two bodies, one of them is among those chosen.
    """
    present = torch.unique(store.labels)
    picks = present[torch.linspace(0, len(present) - 1, min(count, len(present))).round().long()].tolist()
    chosen = []
    for label in picks:
        clips = torch.nonzero(store.labels == label)[:, 0]
        chosen.append(int(clips[torch.argsort(store.lengths[clips], stable=True)[len(clips) // 2]]))
    together = torch.nonzero(store.clip_bodies[:, 1] > 1)[:, 0].tolist()
    if together and not any(store.clip_bodies[clip, 1] > 1 for clip in chosen):
        chosen[-1] = next((clip for clip in together if bool(store.clip(clip)[1].any())), chosen[-1])
    return chosen


def _field(config: dict, path: Path, name: str, default=_ABSENT):
    value = config
    for part in name.split("."):
        value = value.get(part, _ABSENT) if isinstance(value, dict) else _ABSENT
    if value is _ABSENT:
        if default is _ABSENT:
            raise UserError(f"{path} has no field {name}")
        return default
    return value
