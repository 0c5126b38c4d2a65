"""Masked motion prediction loss in plain PyTorch."""

import torch
from torch import Tensor

from jmm_fast.reference.motion_mask import patchify


def motion_target(clips: Tensor, *, t_patch: int, stride: int = 1, normalize: bool = True) -> Tensor:
    """What the decoder predicts: ``[B,T,V,C] -> [B,L,u*C]``. Formula: ``jmm_fast.ops.motion_loss``."""
    motion = torch.zeros_like(clips)
    motion[:, : clips.shape[1] - stride] = clips[:, stride:] - clips[:, : clips.shape[1] - stride]
    target = patchify(motion, t_patch).flatten(1, 2)
    if normalize:
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True, correction=1)
        target = (target - mean) / (variance + 1e-6).sqrt()
    return target


def masked_tokens(mask: Tensor, count: int) -> Tensor:
    """Token numbers of the first ``count`` masked tokens of each body, ascending: ``[B,L] -> [B,count]``."""
    bodies, tokens = mask.shape
    # A column more than there are tokens takes the numbers of those that are not masked.
    place = torch.where(mask, mask.cumsum(1) - 1, tokens)
    token = torch.arange(tokens, device=mask.device).expand(bodies, -1)
    return place.new_zeros(bodies, tokens + 1).scatter(1, place, token)[:, :count]


def motion_loss(
    prediction: Tensor,
    clips: Tensor,
    mask: Tensor,
    *,
    t_patch: int,
    stride: int,
    normalize: bool,
    valid: Tensor | None = None,
) -> Tensor:
    """The plain twin of ``jmm_fast.ops.motion_loss``."""
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    target = motion_target(
        clips.to(torch.promote_types(clips.dtype, torch.float32)), t_patch=t_patch, stride=stride, normalize=normalize
    )
    counted = mask if valid is None else mask & valid
    if prediction.shape[1] != mask.shape[1]:
        token = masked_tokens(mask, prediction.shape[1])
        target = target.gather(1, token[..., None].expand(-1, -1, target.shape[-1]))
        counted = counted.gather(1, token)
    error = (prediction.to(dtype) - target).square().mean(-1)
    return (error * counted).sum() / counted.sum().clamp(min=1)
