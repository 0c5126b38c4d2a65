"""Joint motion mask in plain PyTorch: which tokens of a clip are hidden, by how much and how alike joints move."""

import torch
from torch import Tensor

from jmm_fast.reference.philox import MASK, uniform


def patchify(clips: Tensor, t_patch: int) -> Tensor:
    """``[B,T,V,C] -> [B,T',V,u*C]`` with inner order (frame in patch, coordinate)."""
    b, t, v, c = clips.shape
    return clips.reshape(b, t // t_patch, t_patch, v, c).transpose(2, 3).reshape(b, t // t_patch, v, t_patch * c)


def num_visible(tokens: int, mask_ratio: float) -> int:
    """``int(L * (1 - ratio))`` in Python floats, rounding as the released code does: 74 of 750 at 0.9."""
    return int(tokens * (1 - mask_ratio))


def motion_scores(clips: Tensor, *, t_patch: int, variant: str, gate: float | None = None) -> Tensor:
    """Score of each token, ``[B,T',V]``: larger is more likely to be masked. Formulas: ``jmm_fast.ops.motion_mask``."""
    patches = patchify(clips, t_patch)
    a, b = patches[:, 1:], patches[:, :-1]
    score = (a - b).abs().mean(-1)
    if variant != "mamp":
        a = a - a.mean(-1, keepdim=True)
        b = b - b.mean(-1, keepdim=True)
        norm = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1) + 1e-10
        if variant == "released":
            score = score + ((a * b).abs() / norm[..., None]).mean(-1)
        else:
            gate = 0.5 if gate is None else gate
            score = gate * score + (1 - gate) * (a * b).sum(-1).abs() / norm
    return torch.cat([score[:, :1], score], dim=1)


def known_scores(valid: Tensor, joints: int) -> Tensor:
    """Tokens whose score compares two tokens that were seen, bool ``[B,L]``, from ``valid`` bool ``[B,L]``."""
    grid = valid.unflatten(1, (-1, joints))
    known = grid[:, 1:] & grid[:, :-1]
    return torch.cat([known[:, :1], known], dim=1).flatten(1)


def motion_mask(
    clips: Tensor,
    *,
    mask_ratio: float,
    tau: float,
    t_patch: int,
    variant: str,
    gate: float | None = None,
    uniform_draws: Tensor | None = None,
    seed: int = 0,
    epoch: int | Tensor = 0,
    clip_ids: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The plain twin of ``jmm_fast.ops.motion_mask``: ``(visible, mask, restore, probability)``."""
    # In float32 the order of a sum decides about one body in ten thousand, whose two keys at the threshold are nearly
    # equal. Double precision makes the mask a fact that every backend, device and memory layout can reproduce.
    dtype = torch.promote_types(clips.dtype, torch.float32)
    scores = motion_scores(clips.double(), t_patch=t_patch, variant=variant, gate=gate).flatten(1)
    bodies, tokens = scores.shape
    if valid is not None:
        scores = torch.where(known_scores(valid, clips.shape[2]), scores, 0.0)
    logits = scores / (scores.amax(dim=1, keepdim=True) * tau + 1e-10)
    if uniform_draws is None:
        if clip_ids is None:
            clip_ids = torch.arange(bodies, dtype=torch.int64, device=clips.device)
        uniform_draws = uniform(seed, MASK, clip_ids, epoch, tokens)
    uniform_draws = uniform_draws.double()
    # log p differs from the logits by a constant of the body, which changes no order; adding it would only round.
    keys = logits - torch.log(-torch.log(uniform_draws + 1e-10) + 1e-10)
    kept = num_visible(tokens, mask_ratio)
    order = torch.argsort(keys, dim=1, stable=True)
    if valid is not None:
        # Keys say nothing about tokens that were not seen: these follow, in the order of the grid.
        seen_first = torch.argsort(torch.where(valid.gather(1, order), 0, order + 1), dim=1, stable=True)
        order = order.gather(1, seen_first)
    visible = order[:, :kept].sort(dim=1).values
    mask = torch.ones(bodies, tokens, dtype=torch.bool, device=clips.device).scatter(1, visible, False)
    hidden_before = mask.cumsum(1) - mask.to(torch.int64)
    visible_before = torch.arange(tokens, device=clips.device) - hidden_before
    restore = torch.where(mask, kept + hidden_before, visible_before)
    return visible, mask, restore, torch.softmax(logits, dim=1).to(dtype)
