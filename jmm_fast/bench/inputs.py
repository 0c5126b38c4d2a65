"""Made-up poses: their values decide no time, but masks and losses want motion."""

import numpy as np
import torch
from torch import Tensor


def moving_clips(bodies: int, frames: int, joints: int = 25) -> Tensor:
    """Poses that wander, float32 ``[bodies, frames, joints, 3]``; equal for equal arguments."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(bodies, frames, joints, 3, generator=generator).cumsum(1) * 0.02


def clip_lengths(clips: int) -> np.ndarray:
    """Lengths spread as those of NTU RGB+D: half of the clips between 59 and 95 frames, none below 32 or above 300."""
    generator = np.random.default_rng(0)
    return np.clip(75 * np.exp(0.35 * generator.standard_normal(clips)), 32, 300).astype(np.int64)
