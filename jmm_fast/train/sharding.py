"""Weights, gradients and optimiser state in shards, one a process: FSDP2 (``torch.distributed.fsdp.fully_shard``).

The unit is a block, whose weights come together while it computes and are let go afterwards; what is left of the
network is one more unit. A shard is a ``DTensor``: rows of the whole, by process. Files hold whole tensors.
"""

import copy
import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jmm_fast.models.blocks import Block

# By model in shards: the same network before, without its weights. FSDP's own modules cannot be copied (torch 2.13).
_plain: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()


def shard(objective: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Leave each process its shards of ``model`` alone, in place, and have ``optimizer`` update these.

    Args:
        objective: computes the loss by ``model``, which it holds; all work goes through its forward pass.
        optimizer: of :func:`jmm_fast.train.optim.parameter_groups`, before its first step.
    """
    # Imported here: it takes a second, and few runs need it.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    _plain[model] = copy.deepcopy(model, memo)
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for module in list(model.modules()):
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    parameters = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [parameters[name] for name in group["names"]]


def whole(value: Tensor) -> Tensor:
    """The whole tensor of which ``value`` is a shard, else ``value``. All processes must ask for the same."""
    value = value.detach()
    return value.full_tensor() if _is_shard(value) else value


def whole_model(model: nn.Module) -> nn.Module:
    """``model``; where its weights are in shards, a copy with all of them. All processes must ask for it."""
    if model not in _plain:
        return model
    made = copy.deepcopy(_plain[model])
    # With assign a buffer would be the trained model's own.
    made.load_state_dict({name: whole(value).clone() for name, value in model.state_dict().items()}, assign=True)
    return made.train(model.training)


def local(value: Tensor) -> Tensor:
    """This process's shard as a plain tensor that shares its memory, or ``value``."""
    return value.detach().to_local() if _is_shard(value) else value


def like(own: Tensor, value: Tensor) -> Tensor:
    """Of the whole tensor ``value`` the shard that ``own`` is of its whole; ``value`` where ``own`` is no shard."""
    if not _is_shard(own):
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every process has the whole: nothing is sent. A copy, or the shard would keep the whole in memory.
    made = distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
    return made.clone()


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Norm of all gradients together, of their wholes where they are shards: a plain scalar, on the device."""
    norm = nn.utils.get_total_norm([local(gradient) for gradient in gradients])
    if not gradients or not _is_shard(gradients[0]):
        return norm
    # In double precision the square of no finite norm is infinite.
    square = norm.double().square()
    dist.all_reduce(square)
    return square.sqrt().float()


def _is_shard(value: Tensor) -> bool:
    return hasattr(value, "to_local")
