"""Crop, resample and rotate ragged clips in plain PyTorch."""

import torch
from torch import Tensor


def rotation_matrix(angles: Tensor) -> Tensor:
    """``Rz(c) Ry(b) Rx(a)`` for angles ``[..., 3]`` = (a, b, c) in radians -> ``[..., 3, 3]``.

    Each factor turns coordinates by the negative angle (the sine stands above the diagonal in Rx and Rz), which is the
    convention of the released feeder; a pose is a column vector, ``R @ x``. Computed in float64 and rounded once to the
    dtype of ``angles``.
    """
    sine, cosine = angles.double().sin(), angles.double().cos()
    (sa, sb, sc), (ca, cb, cc) = sine.unbind(-1), cosine.unbind(-1)
    zero, one = torch.zeros_like(sa), torch.ones_like(sa)

    def matrix(*rows: tuple[Tensor, ...]) -> Tensor:
        return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)

    rx = matrix((one, zero, zero), (zero, ca, sa), (zero, -sa, ca))
    ry = matrix((cb, zero, -sb), (zero, one, zero), (sb, zero, cb))
    rz = matrix((cc, sc, zero), (-sc, cc, zero), (zero, zero, one))
    return (rz @ ry @ rx).to(angles.dtype)


def clip_window(frames: Tensor, start: Tensor, length: Tensor, angles: Tensor | None, *, window: int) -> Tensor:
    """The plain twin of ``jmm_fast.ops.clip_window``: ``[F,V,3]`` -> ``[B,window,V,3]``."""
    dtype = torch.promote_types(frames.dtype, torch.float32)
    if not frames.shape[0]:
        return frames.new_zeros(len(start), window, *frames.shape[1:])
    # Half-pixel centres: frame i reads at ((2 i + 1) length - window) / (2 window). Integers keep that exact, so every
    # backend reads the same two rows with the same weight, however long the clip.
    step = torch.arange(window, device=frames.device)
    source = ((2 * step + 1) * length[:, None] - window).clamp(min=0)
    last = (length[:, None] - 1).clamp(min=0)
    low = torch.minimum(source // (2 * window), last)
    high = torch.minimum(low + 1, last)
    weight = ((source - low * (2 * window)).to(dtype) / (2 * window)).clamp(max=1)[..., None, None]
    # An empty body (length 0) may point past the last row; it reads row 0 and is zeroed below.
    full = (length > 0)[:, None]
    base = start[:, None]
    zero = torch.zeros((), dtype=torch.int64, device=frames.device)
    first = frames[torch.where(full, base + low, zero)].to(dtype)
    second = frames[torch.where(full, base + high, zero)].to(dtype)
    clips = (1 - weight) * first + weight * second
    clips = torch.where(full[..., None, None], clips, torch.zeros((), dtype=dtype, device=frames.device))
    if angles is not None:
        # Written out, so that every backend can round where this does: equal clips draw equal masks.
        columns = rotation_matrix(angles.to(dtype))[:, None, None].unbind(-1)
        x, y, z = (clips[..., axis, None] * column for axis, column in enumerate(columns))
        clips = x + y + z
    return clips.to(frames.dtype)
