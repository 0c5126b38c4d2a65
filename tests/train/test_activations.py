"""Memory that is kept for the backward pass: what is counted is what lives on after the forward pass."""

import gc

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jmm_fast import ops
from jmm_fast.models import JMMTGT, ModelConfig
from jmm_fast.train.activations import kept_bytes

CONFIG = ModelConfig(
    num_frames=16, dim=16, depth=2, heads=2, topology="hops", decoder_dim=16, decoder_depth=1, decoder_heads=2
)


class Alive(TorchDispatchMode):
    """Remembers the memory of every result, without keeping it."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def bytes(self, apart):
        apart = {value.untyped_storage()._cdata for value in apart}
        gc.collect()
        return sum(size for at, (found, size) in self.made.items() if at not in apart and not found.expired())


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_that_a_step_keeps_is_counted(backend, dtype):
    """Functions of this project included."""
    model = JMMTGT(CONFIG, backend=backend)
    clips, ids = torch.randn(4, 16, 25, 3, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    apart = [clips, ids, *model.parameters(), *model.buffers()]

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            mask = ops.motion_mask(clips, variant="paper", clip_ids=ids, backend=backend)
            prediction = model(clips, mask, masked_only=backend != "reference").float()
            return ops.motion_loss(prediction, clips, mask.mask, backend=backend)

    # What is kept from call to call is made now.
    step()
    with Alive() as alive:
        loss = step()
    living = alive.bytes(apart) - loss.nbytes
    # Numbers of the host that operators have saved live below what the mode sees: 8 bytes each.
    assert living <= kept_bytes(loss, apart) <= living + 64
    assert living > 50_000
    loss.backward()
    assert all(value.grad is not None for value in model.parameters())


class Keeps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.also = {"list": [torch.ones(100), x[1:]]}
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_each_piece_once_and_attributes_of_a_context():
    x = torch.randn(10, 10, requires_grad=True)
    weight = nn.Parameter(torch.randn(10))
    kept = x.exp()
    # exp saves its result, the product both, the function the same once more, and 100 numbers.
    loss = Keeps.apply(kept * weight)
    assert kept_bytes(loss.sum(), [x, weight]) == 4 * (100 + 100 + 100)
    assert kept_bytes(loss.sum(), [x]) == 4 * (300 + 10)
    assert kept_bytes(x.sum(), []) == 0
