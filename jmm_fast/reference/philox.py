"""Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011), the same on every device and backend.

A draw is a function of (seed, purpose, clip, epoch, position) alone, so the crop, the rotation and the mask of a clip
do not depend on batch size, order, number of workers or on whether the run was interrupted.
"""

import torch
from torch import Tensor

MASK, CROP, ROTATION, ORDER, DROP = range(5)
"""Purposes: the second word of the counter, one for each kind of draw, so that no two kinds share numbers."""

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_ROUNDS = 10


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Ten rounds of Philox4x32.

    Args:
        counter: int64 ``[..., 4]``, each a 32-bit word.
        key: int64 ``[..., 2]``, each a 32-bit word; broadcasts against ``counter``.

    Returns:
        int64 ``[..., 4]``: four random 32-bit words for each counter.
    """
    x0, x1, x2, x3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(_ROUNDS):
        # The product wraps in int64, but both of its 32-bit halves stay right: masking undoes the sign extension.
        p0 = x0 * _MULTIPLIERS[0]
        p1 = x2 * _MULTIPLIERS[1]
        x0, x1, x2, x3 = (
            ((p1 >> 32) & _WORD) ^ x1 ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ x3 ^ k1,
            p0 & _WORD,
        )
        k0 = (k0 + _WEYL[0]) & _WORD
        k1 = (k1 + _WEYL[1]) & _WORD
    return torch.stack(torch.broadcast_tensors(x0, x1, x2, x3), dim=-1)


def uniform(seed: int, purpose: int, clip_ids: Tensor, epoch: int | Tensor, count: int) -> Tensor:
    """``count`` numbers in [0, 1) for each clip: the 24 high bits of each Philox word over 2^24.

    Key = the 64-bit seed. Counter = (block of four numbers, purpose, clip index, epoch).

    Args:
        seed: 64-bit integer.
        purpose: one of ``MASK, CROP, ROTATION, ORDER, DROP``.
        clip_ids: int64 ``[B]``; the low 32 bits are the clip's index in its dataset, the high bits the body's number,
            which joins the purpose word. Bodies of a clip thus draw different masks, and share what is drawn for the
            plain clip index.
        epoch: 32-bit integer, or an int64 tensor ``[]`` that holds it.
        count: how many numbers for each clip.

    Returns:
        float32 ``[B, count]`` on the device of ``clip_ids``; exact, so equal on every device.
    """
    blocks = (count + 3) // 4
    block = torch.arange(blocks, dtype=torch.int64, device=clip_ids.device)
    clip_ids = clip_ids.to(torch.int64)[:, None]
    clip = clip_ids & _WORD
    word = (purpose + (((clip_ids >> 32) & 0xFFFFFF) << 8)) & _WORD
    epoch = torch.zeros_like(clip) + (epoch & _WORD)
    counter = torch.stack(torch.broadcast_tensors(block, word, clip, epoch), dim=-1)
    # Filled on the device: numbers copied from the host would make it wait, and cannot be part of a CUDA graph.
    key = torch.stack(
        [torch.full((), half & _WORD, dtype=torch.int64, device=clip_ids.device) for half in (seed, seed >> 32)]
    )
    words = philox4x32(counter, key).flatten(1)[:, :count]
    return (words >> 8).to(torch.float32) * 2.0**-24
