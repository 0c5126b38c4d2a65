"""Attention with a term for each pair of joints, in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F


def pair_term(table: Tensor, joints: Tensor) -> Tensor:
    """``table[h, joint(i), joint(j)]``: table ``[H,V,V]``, joints ``[N]`` or ``[B,N]`` -> ``[1 or B,H,N,N]``.

    Selection is a product with one-hot rows: exact, and its gradient is a matrix product too, which sums in a fixed
    order, where the gradient of an indexed read would be a slow scatter.
    """
    rows = F.one_hot(joints, table.shape[-1]).to(table.dtype)
    if rows.dim() == 2:
        rows = rows[None]
    rows = rows[:, None]
    return rows @ (table @ rows.transpose(-1, -2))


def topology_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, joints: Tensor | None, multiply: bool, scale: float
) -> Tensor:
    """The plain twin of ``jmm_fast.ops.topology_attention``: builds the whole score matrix ``[B,H,N,N]``."""
    scores = (q * scale) @ k.transpose(-1, -2)
    if table is not None:
        term = pair_term(table, joints)
        scores = scores.to(torch.promote_types(scores.dtype, table.dtype))
        scores = scores * term if multiply else scores + term
    # Softmax statistics in float32 at least: half precision loses the tail of 750 terms.
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return torch.softmax(scores, dim=-1).to(v.dtype) @ v
