"""Counter-based uniform numbers on the CPU in C++: the same as the plain twin, ``jmm_fast.reference.uniform``."""

import torch
from torch import Tensor

from jmm_fast import reference
from jmm_fast.ops.backend import library, unavailable

library.define("philox_uniform_cpu(int seed, int purpose, Tensor clip_ids, int epoch, int count) -> Tensor")


def uniform(seed: int, purpose: int, clip_ids: Tensor, epoch: int, count: int) -> Tensor:
    """``count`` numbers in [0, 1) for each clip: ``jmm_fast.reference.uniform``, formula and arguments, bit for bit.

    In C++ where the extension is there and ``clip_ids`` is an int64 CPU tensor: a batch needs a few hundred numbers,
    for which the plain twin starts two hundred small tensor operations.
    """
    if clip_ids.device.type == "cpu" and unavailable("motion_mask", "cpu") is None:
        # The key is 64 bits of any sign; the operator's argument is signed.
        signed = (seed + 2**63) % 2**64 - 2**63
        return torch.ops.jmm_fast.philox_uniform_cpu(signed, purpose, clip_ids.long(), epoch, count)
    return reference.uniform(seed, purpose, clip_ids, epoch, count)
