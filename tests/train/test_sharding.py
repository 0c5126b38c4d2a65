"""Shards: each process holds its part alone, and all that leaves the run is whole."""

import dataclasses
import functools
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from jmm_fast.models import JMMTGT, ModelConfig
from jmm_fast.models.blocks import Block
from jmm_fast.train import checkpoint, distributed, sharding
from jmm_fast.train.config import OptimConfig
from jmm_fast.train.loop import train_step
from jmm_fast.train.optim import adamw, set_learning_rate

sys.path.insert(0, str(Path(__file__).parent))
import ranks

CONFIG = ModelConfig(
    num_frames=8, dim=8, depth=2, heads=2, topology="hops", decoder_dim=8, decoder_depth=1, decoder_heads=2
)

RATE = 0.01


@dataclasses.dataclass
class Part:
    clips: torch.Tensor
    factor: float = 1.0


def network():
    torch.manual_seed(0)
    return JMMTGT(CONFIG)


def loss_of(model, part, _epoch):
    # The square of all numbers that leave a LayerNorm is a constant: of the first three it is not.
    loss = model.encoder(part.clips)[..., :3].square().mean()
    return loss * part.factor + weight_of(model.decoder), len(part.clips)


def weight_of(decoder):
    """Reaches every parameter of the decoder, blocks by their forward pass."""
    x = torch.ones(1, 3, CONFIG.decoder_dim)
    x = decoder.stack(decoder.embed(x), torch.arange(3), None, decoder.head).square().mean()
    return x + sum(value.square().mean() for value in (decoder.mask_token, decoder.joint, decoder.time))


def step(optimizer, backward, clip_grad=0.01):
    return train_step(
        lambda: None,
        optimizer,
        device=torch.device("cpu"),
        rate=RATE,
        seed=0,
        step=0,
        clip_grad=clip_grad,
        gradients=backward,
    )


def trained(model, optimizer, accumulate, shard, parts):
    """The network after a step for each of ``parts``, which are those of this process."""
    loss = functools.partial(loss_of, model)
    shared = distributed.Shared(model, optimizer, loss, accumulate, shard)
    return [step(optimizer, functools.partial(shared.backward, part, 0)) for part in parts]


def bodies(number):
    return torch.randn(6, CONFIG.num_frames, CONFIG.num_joints, 3, generator=torch.Generator().manual_seed(number))


def share(number, factor=1.0):
    """Two thirds for the first process."""
    return Part(bodies(number).split([4, 2])[distributed.rank()], factor)


def check_shards():
    model, plain = network(), network()
    optimizer, plain_optimizer = adamw(model, OptimConfig()), adamw(plain, OptimConfig())
    losses = trained(model, optimizer, 1, "full", [share(0), share(1)])
    # The same alone.
    for number, (loss, norm) in enumerate(losses):
        plain_optimizer.zero_grad()
        true, _ = loss_of(plain, Part(bodies(number)), 0)
        true.backward()
        length = nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
        set_learning_rate(plain_optimizer, RATE)
        plain_optimizer.step()
        torch.testing.assert_close(loss, true.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(norm, length, rtol=1e-5, atol=0)
    # Every process holds its rows of every parameter and of its optimiser state, and nothing else.
    for name, value in model.named_parameters():
        rows = -(-len(value) // 2)
        mine = len(value) - rows if distributed.rank() else rows
        held = [
            sharding.local(value),
            *(sharding.local(optimizer.state[value][key]) for key in ("exp_avg", "exp_avg_sq")),
        ]
        assert all(len(tensor) == mine and tensor.shape[1:] == value.shape[1:] for tensor in held), name
        assert sharding.local(value).untyped_storage().nbytes() <= 4 * rows * value[0].numel(), name
    units = [type(module).__name__ for module in model.modules() if isinstance(module, Block)]
    assert units == ["FSDPBlock"] * 3
    # What is whole is whole, and equal.
    whole = sharding.whole_model(model)
    assert type(whole) is JMMTGT and whole is not model and not whole.encoder.stack.blocks[0].norm1.weight.is_meta
    found = checkpoint.snapshot(model, optimizer)
    true = checkpoint.snapshot(plain, plain_optimizer)
    assert list(found) == list(true)
    # The gradient of the keys' biases is rounding alone, of which AdamW makes steps.
    for name in (name for name in true if "qkv.bias" not in name):
        torch.testing.assert_close(
            found[name], true[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert all(torch.equal(found[f"model/{name}"], value) for name, value in whole.state_dict().items())
    torch.testing.assert_close(whole.encoder(bodies(2)), plain.encoder(bodies(2)), rtol=1e-4, atol=1e-5)
    # Restored: bit for bit, into shards and into a whole network.
    saved = checkpoint.Checkpoint(path=Path("made.safetensors"), tensors=found, record={})
    for shard in ("full", "none"):
        other = JMMTGT(CONFIG)
        again = adamw(other, OptimConfig())
        distributed.Shared(other, again, functools.partial(loss_of, other), 1, shard)
        checkpoint.restore(saved, other, again)
        now = checkpoint.snapshot(other, again)
        assert all(torch.equal(now[name], value) for name, value in found.items())


def check_faults():
    """A loss that is not a number in one process changes nothing in any; parts add up."""
    model = network()
    optimizer = adamw(model, OptimConfig())
    shared = distributed.Shared(model, optimizer, functools.partial(loss_of, model), 1, "full")
    step(optimizer, functools.partial(shared.backward, share(0), 0))
    before = checkpoint.snapshot(model, optimizer)
    bad = share(1, float("nan") if distributed.rank() == 1 else 1.0)
    loss, norm = step(optimizer, functools.partial(shared.backward, bad, 0))
    assert not loss.isfinite() and not norm.isfinite()
    after = checkpoint.snapshot(model, optimizer)
    assert all(torch.equal(before[name], after[name]) for name in before)
    step(optimizer, functools.partial(shared.backward, share(1), 0))
    after = checkpoint.snapshot(model, optimizer)
    assert all(value.isfinite().all() for value in after.values())
    assert not torch.equal(before["model/encoder.joint"], after["model/encoder.joint"])


@pytest.mark.parametrize("work", [check_shards, check_faults])
def test_two_processes(tmp_path, work):
    started = ranks.start(tmp_path, [work] * 2)
    assert started.wait() == [0, 0], started.said(0) + started.said(1)


def test_one_process_holds_all():
    model = network()
    optimizer = adamw(model, OptimConfig())
    trained(model, optimizer, 1, "full", [Part(bodies(0))])
    assert sharding.whole_model(model) is model
    assert all(type(value) is nn.Parameter for value in model.parameters())
