"""Between the full grid of tokens and the visible ones, in plain PyTorch."""

import torch
from torch import Tensor

from jmm_fast.reference.motion_mask import patchify


def token_grid_gather(clips: Tensor, visible: Tensor, t_patch: int) -> Tensor:
    """The plain twin of ``jmm_fast.ops.token_grid_gather``."""
    patches = patchify(clips, t_patch).flatten(1, 2)
    return patches.gather(1, visible[..., None].expand(-1, -1, patches.shape[-1]))


def token_grid_scatter(
    tokens: Tensor, restore: Tensor, mask_token: Tensor, joint_embedding: Tensor, time_embedding: Tensor
) -> Tensor:
    """The plain twin of ``jmm_fast.ops.token_grid_scatter``."""
    bodies, kept, dim = tokens.shape
    hidden = mask_token.to(tokens.dtype).expand(bodies, restore.shape[1] - kept, dim)
    grid = torch.cat([tokens, hidden], dim=1).gather(1, restore[..., None].expand(-1, -1, dim))
    return grid + (time_embedding[:, None] + joint_embedding).flatten(0, 1)
