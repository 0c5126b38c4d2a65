"""Crop, resample and rotate clips that lie packed one after another."""

import torch
from torch import Tensor

from jmm_fast import reference
from jmm_fast.ops import checks
from jmm_fast.ops.backend import choose, library, on_triton

library.define(
    "clip_window(Tensor frames, Tensor start, Tensor length, Tensor? angles, int window, str backend) -> Tensor"
)
# What the C++ extension serves, called inside the op above: compilers see that one alone.
library.define("clip_window_cpu(Tensor frames, Tensor start, Tensor length, Tensor? angles, int window) -> Tensor")


def clip_window(
    frames: Tensor,
    start: Tensor,
    length: Tensor,
    angles: Tensor | None = None,
    *,
    window: int = 120,
    backend: str = "auto",
) -> Tensor:
    """Cut a window out of each packed clip, resample it to ``window`` frames and rotate it.

    Output frame ``i`` of clip ``b`` reads at ``s = max((i + 0.5) * length[b] / window - 0.5, 0)`` of the window's own
    frames: ``R_b ((1 - w) x[floor s] + w x[floor s + 1])``, ``w = s - floor s``, the upper frame clamped to the last
    one (linear interpolation with half-pixel centres along time). ``R_b = Rz(c) Ry(b) Rx(a)`` with
    ``angles[b] = (a, b, c)``.

    Args:
        frames: floating ``[F,V,3]``, metres: the frames of all clips, one clip after another.
        start: int ``[B]``: first row of each window.
        length: int ``[B]``: rows in each window; 0 gives an all-zero clip. ``start + length <= F`` is the caller's
            duty: it is checked on CPU tensors and not on a device, where looking would stall.
        angles: floating ``[B,3]`` in radians, or None for no rotation.
        window: frames of the result.
        backend: see ``jmm_fast.backends()``. ``"cpu"`` takes float32 frames, ``"triton"`` bfloat16 and float16 too.

    Returns:
        ``[B,window,V,3]`` of the dtype of ``frames``. Not differentiable: clips are data.

    Raises:
        ValueError: wrong shape, dtype, device or rows outside ``frames``.

    Deterministic; ``"cpu"`` and ``"triton"`` equal the reference on the same device bit for bit. Source: the clip
    preparation of MAMP (Mao et al., ICCV 2023) and JMM-TGT (PLOS ONE 2025).
    """
    checks.floating("frames", frames, "[F,V,3]", 3)
    checks.require(frames.shape[2] == 3, "frames", "floating [F,V,3]", frames)
    checks.integer("start", start, "[B]", 1)
    checks.integer("length", length, "[B]", 1)
    checks.require(start.shape == length.shape, "length", lambda: f"int [{start.shape[0]}] as start is", length)
    if angles is not None:
        checks.floating("angles", angles, "[B,3]", 2)
        checks.require(angles.shape == (start.shape[0], 3), "angles", lambda: f"floating [{start.shape[0]}, 3]", angles)
    checks.require(isinstance(window, int) and window >= 1, "window", "a positive integer", window)
    checks.same_device(frames=frames, start=start, length=length, angles=angles)
    refusals = {}
    if frames.dtype != torch.float32:
        refusals["cpu"] = f"frames must be float32, got {checks.describe(frames)}"
    if frames.dtype not in checks.TRITON_DTYPES:
        refusals["triton"] = f"frames must be {checks.either(checks.TRITON_DTYPES)}, got {checks.describe(frames)}"
    backend = choose("clip_window", backend, frames, **refusals)
    return torch.ops.jmm_fast.clip_window(frames, start, length, angles, window, backend)


@torch.library.impl(library, "clip_window", "CompositeExplicitAutograd")
def _run(frames: Tensor, start: Tensor, length: Tensor, angles: Tensor | None, window: int, backend: str) -> Tensor:
    start, length = start.long(), length.long()
    if backend == "cpu":
        try:
            return torch.ops.jmm_fast.clip_window_cpu(
                frames, start, length, None if angles is None else angles.float(), window
            )
        except RuntimeError:
            # The kernel looks at every window anyway; only the kind of the exception is missing.
            _check_inside(frames, start, length)
            raise
    if frames.device.type == "cpu":
        _check_inside(frames, start, length)
    if backend == "triton":
        return on_triton("clip_window", "forward")(frames, start, length, angles, window)
    return reference.clip_window(frames, start, length, angles, window=window)


def _check_inside(frames: Tensor, start: Tensor, length: Tensor) -> None:
    rows = frames.shape[0]
    # Not start + length, which could wrap.
    inside = (length == 0) | ((length > 0) & (start >= 0) & (start <= rows) & (length <= rows - start.clamp(0, rows)))
    if not bool(inside.all()):
        worst = int(torch.nonzero(~inside)[0])
        raise ValueError(
            f"start and length must stay inside the {rows} frames, "
            f"got start {int(start[worst])} and length {int(length[worst])} for clip {worst}"
        )


@torch.library.register_fake("jmm_fast::clip_window", lib=library)
def _fake(frames: Tensor, start: Tensor, length: Tensor, angles: Tensor | None, window: int, backend: str) -> Tensor:
    return frames.new_empty(start.shape[0], window, frames.shape[1], 3)
