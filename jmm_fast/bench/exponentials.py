"""How many exponentials a second a GPU computes: a Triton kernel that does little else."""

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS, BLOCK, ROUNDS, WARPS = 4096, 1024, 512, 4
"""Eight numbers a thread, whose chains do not wait for one another, and as many warps as a multiprocessor holds."""


@triton.jit
def _exponentials(out, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = place.to(tl.float32) * 1e-9
    for _ in range(ROUNDS):
        # Each needs the one before, so none can be left out.
        x = tl.exp2(-x)
    tl.store(out + place, x)


def exponentials(out: Tensor, rounds: int = ROUNDS) -> None:
    """``rounds`` times ``x = 2^-x``, begun at ``1e-9 i`` for the ``i``-th of ``BLOCK`` times so many float32."""
    _exponentials[(out.numel() // BLOCK,)](out, BLOCK=BLOCK, ROUNDS=rounds, num_warps=WARPS)


def work() -> tuple[Tensor, int]:
    """Where a call on the GPU writes to, and the exponentials that it computes."""
    out = torch.empty(PROGRAMS * BLOCK, device="cuda")
    return out, out.numel() * ROUNDS
