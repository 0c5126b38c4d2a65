"""The encoder: one for pretraining, probing and finetuning."""

import torch
from torch import Tensor, nn

from jmm_fast import ops
from jmm_fast.models.blocks import Stack, embedding, init_weights
from jmm_fast.models.config import ModelConfig


class Encoder(nn.Module):
    """Visible tokens of a body clip -> features, ``h = blocks(Linear(patch) + joint + time)``.

    Args:
        config: sizes and topology.
        drop_path: stochastic depth rate of the last block.
        backend: passed to every op (``jmm_fast.backends()``).

    Source: MAMP (ICCV 2023) with the topology table of JMM-TGT (PLOS ONE 2025). Only visible tokens are embedded.
    """

    def __init__(self, config: ModelConfig, drop_path: float = 0.0, backend: str = "auto"):
        super().__init__()
        config.check()
        self.config, self.backend = config, backend
        self.stack = Stack(config, config.dim, config.depth, config.heads, drop_path, backend)
        self.stack.apply(init_weights)
        # nn.Linear's own initialisation with 12 inputs is the one Conv2d of kernel (4, 1) has: Kaiming-uniform.
        self.patch = nn.Linear(config.patch_size, config.dim)
        self.joint = embedding(config.num_joints, config.dim)
        self.time = embedding(config.num_steps, config.dim)

    def forward(self, clips: Tensor, visible: Tensor | None = None) -> Tensor:
        """Features of the visible tokens, or of all.

        Args:
            clips: floating ``[B,T,V,C]``, metres.
            visible: int64 ``[B,K]`` ascending token numbers, or None for the full grid.

        Returns:
            ``[B,K,d]`` or ``[B,L,d]``.

        Raises:
            ValueError: clips of another shape than the model's.
        """
        config = self.config
        expected = (config.num_frames, config.num_joints, config.channels)
        if clips.dim() != 4 or tuple(clips.shape[1:]) != expected:
            raise ValueError(f"clips must be [B, {', '.join(map(str, expected))}], got {list(clips.shape)}")
        if visible is None:
            token = torch.arange(config.num_tokens, device=clips.device)
            patches = ops.token_grid_gather(
                clips, token.expand(clips.shape[0], -1), t_patch=config.t_patch, backend=self.backend
            )
        else:
            token = visible
            patches = ops.token_grid_gather(clips, visible, t_patch=config.t_patch, backend=self.backend)
        joint = token % config.num_joints
        step = token // config.num_joints
        x = self.patch(patches) + (self.joint[joint] + self.time[step])
        return self.stack(x, joint)


def pool(tokens: Tensor, clip_of_body: Tensor, num_clips: int, valid: Tensor | None = None) -> Tensor:
    """One feature vector per clip: the mean over tokens and over the clip's bodies.

    Args:
        tokens: ``[B,L,d]``, the features of each body.
        clip_of_body: int64 ``[B]``, the clip each body belongs to, in ``[0, num_clips)``.
        num_clips: clips in the batch, each with a body at least.
        valid: bool ``[B,L]``, the tokens whose mean is taken (of a body without any: all); None: all.

    Returns:
        ``[num_clips,d]``.
    """
    if valid is None:
        return mean_over_bodies(tokens.mean(1), clip_of_body, num_clips)
    weight = (valid | ~valid.any(1, keepdim=True)).to(tokens.dtype)[..., None]
    return mean_over_bodies((tokens * weight).sum(1) / weight.sum(1), clip_of_body, num_clips)


def mean_over_bodies(features: Tensor, clip_of_body: Tensor, num_clips: int) -> Tensor:
    """Mean of the rows ``[B,d]`` that belong to one clip -> ``[num_clips,d]``."""
    total = features.new_zeros(num_clips, features.shape[1]).index_add(0, clip_of_body, features)
    count = torch.zeros(num_clips, dtype=features.dtype, device=features.device)
    count = count.index_add(0, clip_of_body, torch.ones_like(clip_of_body, dtype=features.dtype))
    return total / count.clamp(min=1)[:, None]
