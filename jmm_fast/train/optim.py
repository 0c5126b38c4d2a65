"""AdamW parameter groups: what decays, and how fast each layer learns."""

import numpy as np
import torch
from torch import nn

from jmm_fast.train.config import OptimConfig


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: to matrices, embeddings and the mask token; not to biases, norms and tables.

    The released code's rule (nothing one-dimensional, nothing called bias), which reaches embeddings too. The topology
    table is added to (or multiplies) attention scores: it is a bias, whatever its shape.
    """
    return parameter.ndim > 1 and not name.endswith(".bias") and "topology." not in name


def parameter_groups(
    module: nn.Module, *, weight_decay: float, layers: dict[str, int] | None = None, layer_decay: float | None = None
) -> list[dict]:
    """Optimiser groups of the parameters that are trained.

    With ``layer_decay = r`` and ``n`` layers, a parameter of layer ``i`` learns at ``r ** (n - i)`` times the rate:
    embeddings are layer 0, block ``b`` is layer ``b + 1``, the rest is layer ``n``, one above the last block.

    Args:
        module: its ``named_parameters`` with ``requires_grad`` are grouped, in order.
        weight_decay: of the parameters that decay.
        layers: layer of each parameter name (``jmm_fast.models.parameter_layers``); needed for ``layer_decay``.
        layer_decay: None leaves every scale at 1.

    Returns:
        Groups with ``params``, ``names``, ``weight_decay`` and ``scale`` (of the learning rate).
    """
    groups: dict[tuple[float, float], dict] = {}
    last = max(layers.values()) if layers else 0
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = 1.0 if layer_decay is None else layer_decay ** (last - layers[name])
        decay = weight_decay if decays(name, parameter) else 0.0
        group = groups.setdefault((scale, decay), {"params": [], "names": [], "weight_decay": decay, "scale": scale})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def adamw(module: nn.Module, config: OptimConfig, *, layers: dict[str, int] | None = None) -> torch.optim.AdamW:
    """AdamW over :func:`parameter_groups`, in one fused kernel per group."""
    groups = parameter_groups(module, weight_decay=config.weight_decay, layers=layers, layer_decay=config.layer_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give each group ``rate`` times its scale, rounded to float32: the same wherever it is kept."""
    for group in optimizer.param_groups:
        value = float(np.float32(rate * group.get("scale", 1.0)))
        if isinstance(group["lr"], torch.Tensor):
            # A kernel's argument: nothing is copied from the host.
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def keep_rates_in_memory(optimizer: torch.optim.Optimizer) -> None:
    """Have the kernel of the update read the learning rates from the device, where a captured step finds new ones."""
    for group in optimizer.param_groups:
        group["lr"] = torch.full((), group["lr"], dtype=torch.float32, device=group["params"][0].device)
