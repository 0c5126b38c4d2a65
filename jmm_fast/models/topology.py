"""The learned table ``beta [H,V,V]`` that tells attention how joints are connected."""

import torch
from torch import Tensor, nn

from jmm_fast.models.config import ModelConfig


class TopologyTable(nn.Module):
    """A term for each head and pair of joints, made from the skeleton's graph.

    - ``hops``: ``beta[h,i,j] = w[h, hops(i,j)]``; starts at 0 (mode ``add``) or 1 (mode ``scale``), where attention is
      plain attention.
    - ``adjacency``: ``beta[h] = w[h] * D^-1/2 (A + I) D^-1/2``; ``w`` starts at 1.
    - ``free``: ``beta`` itself is learned, started from the normalised adjacency.

    Source: ``hops`` is Graphormer's spatial encoding (Ying et al., NeurIPS 2021); the others follow JMM-TGT.
    """

    def __init__(self, config: ModelConfig, heads: int):
        super().__init__()
        self.kind = config.topology
        layout = config.layout()
        if self.kind == "hops":
            hops = torch.from_numpy(layout.hops())
            start = 1.0 if config.topology_mode == "scale" else 0.0
            self.weight = nn.Parameter(torch.full((heads, int(hops.max()) + 1), start))
            self.register_buffer("graph", hops, persistent=False)
        else:
            adjacency = torch.from_numpy(layout.adjacency()).float()
            if self.kind == "adjacency":
                self.weight = nn.Parameter(torch.ones(heads))
                self.register_buffer("graph", adjacency, persistent=False)
            else:
                self.weight = nn.Parameter(adjacency.repeat(heads, 1, 1))

    def forward(self) -> Tensor:
        """``[H,V,V]``, differentiable in the learned weights."""
        if self.kind == "hops":
            return self.weight[:, self.graph]
        if self.kind == "adjacency":
            return self.weight[:, None, None] * self.graph
        return self.weight


def make_table(config: ModelConfig, heads: int) -> TopologyTable | None:
    """The table of one stack of blocks, shared by its blocks; None for topology ``none``."""
    return None if config.topology == "none" else TopologyTable(config, heads)
