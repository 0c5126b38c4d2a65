"""Made-up poses: their values decide no time, but masks and losses want motion."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from jmm_fast.data import ClipStore, StoreContents
from jmm_fast.skeleton import get


def moving_clips(bodies: int, frames: int, joints: int = 25) -> Tensor:
    """Poses that wander, float32 ``[bodies, frames, joints, 3]``; equal for equal arguments."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(bodies, frames, joints, 3, generator=generator).cumsum(1) * 0.02


def clip_lengths(clips: int) -> np.ndarray:
    """Lengths spread as those of NTU RGB+D: half of the clips between 59 and 95 frames, none below 32 or above 300."""
    generator = np.random.default_rng(0)
    return np.clip(75 * np.exp(0.35 * generator.standard_normal(clips)), 32, 300).astype(np.int64)


def made_up_clips(clips: int, bodies: int, joints: int = 25) -> list[np.ndarray]:
    """Clips ``[bodies, frames, joints, 3]`` of lengths as in NTU RGB+D; no pose lies at the origin."""
    return [(moving_clips(bodies, int(length), joints) + 1).numpy() for length in clip_lengths(clips)]


def store_of(clips: Sequence[np.ndarray]) -> ClipStore:
    """A store of one class that holds ``clips`` with the joints of NTU RGB+D."""
    bodies, joints = len(clips[0]), clips[0].shape[2]
    body_offsets = np.concatenate([[0], np.repeat([clip.shape[1] for clip in clips], bodies).cumsum()])
    return ClipStore.from_contents(
        StoreContents(
            frames=np.concatenate([clip.reshape(-1, joints, 3) for clip in clips]),
            offsets=body_offsets[::bodies].copy(),
            body_offsets=body_offsets,
            labels=np.zeros(len(clips), dtype=np.int64),
            class_names=["none"],
            skeleton=get("ntu25"),
        )
    )
