"""Heads that evaluate an encoder: linear probe and finetuning."""

import torch
from torch import Tensor, nn

from jmm_fast.models.blocks import init_weights
from jmm_fast.models.encoder import Encoder, mean_over_bodies, pool


class LinearProbe(nn.Module):
    """A frozen encoder and one linear layer: ``Linear(BatchNorm(pool(encoder(clips))))``.

    The mean is over joints, time and bodies; BatchNorm has no affine part and eps 1e-6. Source: MAMP, after MAE.
    """

    def __init__(self, encoder: Encoder, num_classes: int):
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.norm = nn.BatchNorm1d(encoder.config.dim, affine=False, eps=1e-6)
        self.linear = nn.Linear(encoder.config.dim, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def train(self, mode: bool = True) -> "LinearProbe":
        super().train(mode)
        self.encoder.eval()  # frozen: no stochastic depth either
        return self

    def features(self, clips: Tensor, clip_of_body: Tensor, num_clips: int, valid: Tensor | None = None) -> Tensor:
        """Pooled features ``[num_clips,d]`` of the bodies ``[B,T,V,C]``, of ``valid [B,L]`` tokens alone."""
        with torch.no_grad():
            return pool(self.encoder(clips), clip_of_body, num_clips, valid)

    def head(self, features: Tensor) -> Tensor:
        """Logits ``[N,classes]`` from pooled features ``[N,d]``."""
        return self.linear(self.norm(features))

    def forward(self, clips: Tensor, clip_of_body: Tensor, num_clips: int) -> Tensor:
        """Logits ``[num_clips,classes]``."""
        return self.head(self.features(clips, clip_of_body, num_clips))


class FinetuneClassifier(nn.Module):
    """Encoder and MLP head, trained together: mean over time, joints side by side, mean over bodies, then
    ``Linear(ReLU(BatchNorm(Linear(.))))`` with dropout before the first layer.

    Source: the released JMM-TGT and MAMP heads.
    """

    def __init__(self, encoder: Encoder, num_classes: int, hidden: int = 2048, dropout: float = 0.3):
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.fc1 = nn.Linear(encoder.config.num_joints * encoder.config.dim, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.fc2 = nn.Linear(hidden, num_classes)
        self.fc1.apply(init_weights)
        self.fc2.apply(init_weights)

    def features(self, clips: Tensor, clip_of_body: Tensor, num_clips: int) -> Tensor:
        """Features ``[num_clips,V*d]`` of the bodies ``[B,T,V,C]``."""
        config = self.encoder.config
        tokens = self.encoder(clips).unflatten(1, (config.num_steps, config.num_joints))
        return mean_over_bodies(tokens.mean(1).flatten(1), clip_of_body, num_clips)

    def head(self, features: Tensor) -> Tensor:
        """Logits ``[N,classes]`` from features ``[N,V*d]``."""
        return self.fc2(torch.relu(self.norm(self.fc1(self.dropout(features)))))

    def forward(self, clips: Tensor, clip_of_body: Tensor, num_clips: int) -> Tensor:
        """Logits ``[num_clips,classes]`` of the bodies ``[B,T,V,C]``."""
        return self.head(self.features(clips, clip_of_body, num_clips))


def parameter_layers(model: nn.Module, depth: int) -> dict[str, int]:
    """Layer of each parameter for layer-wise learning rate decay.

    0: embeddings and the topology table; ``i + 1``: encoder block ``i``; ``depth + 1``: final norm and head. The
    rate of a parameter is ``decay ** (depth + 1 - layer)`` times the base rate.
    """
    layers = {}
    for name, _ in model.named_parameters():
        inner = name.removeprefix("encoder.")
        if inner.startswith("stack.blocks."):
            layers[name] = int(inner.split(".")[2]) + 1
        elif inner.startswith(("patch.", "stack.topology.")) or inner in ("joint", "time"):
            layers[name] = 0
        else:
            layers[name] = depth + 1
    return layers
