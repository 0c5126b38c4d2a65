"""Encoder and decoder that learn by predicting the motion of masked tokens."""

import os
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from jmm_fast import ops
from jmm_fast.models import files
from jmm_fast.models.blocks import Stack, embedding, init_weights
from jmm_fast.models.config import ModelConfig
from jmm_fast.models.encoder import Encoder
from jmm_fast.ops import MotionMask


class Decoder(nn.Module):
    """Features of the visible tokens -> predicted motion of every token."""

    def __init__(self, config: ModelConfig, backend: str = "auto"):
        super().__init__()
        self.config, self.backend = config, backend
        dim = config.decoder_dim
        self.embed = nn.Linear(config.dim, dim)
        self.stack = Stack(config, dim, config.decoder_depth, config.decoder_heads, 0.0, backend)
        self.head = nn.Linear(dim, config.patch_size)
        self.apply(init_weights)
        # [1, d] and not [d]: the released code's mask token is no vector to its optimiser either, so it decays.
        self.mask_token = embedding(1, dim)
        self.joint = embedding(config.num_joints, dim)
        self.time = embedding(config.num_steps, dim)

    def forward(self, latent: Tensor, restore: Tensor, masked_only: bool = False) -> Tensor:
        """``[B,K,d]`` and ``MotionMask.restore [B,L]`` -> prediction ``[B,L,u*C]``, or ``[B,L-K,u*C]``: the masked
        tokens alone, ascending."""
        x = ops.token_grid_scatter(
            self.embed(latent), restore, self.mask_token[0], self.joint, self.time, backend=self.backend
        )
        joints = torch.arange(self.config.num_tokens, device=x.device) % self.config.num_joints
        # restore is where each token sits in [visible, masked]; its inverse lists the tokens in that order.
        masked = restore.argsort(1)[:, latent.shape[1] :] if masked_only else None
        return self.stack(x, joints, masked, self.head)


class JMMTGT(nn.Module):
    """JMM-TGT: masked motion prediction with a topology-guided transformer.

    ``prediction = decoder(encoder(clips, visible), restore)``; train it with ``jmm_fast.ops.motion_loss``.

    Args:
        config: sizes and topology; defaults are the released model.
        backend: passed to every op (``jmm_fast.backends()``).

    Source: PLOS ONE 20(12): e0338008 (2025); MAMP, arXiv 2308.07092; MAE, arXiv 2111.06377.
    """

    def __init__(self, config: ModelConfig | None = None, backend: str = "auto"):
        super().__init__()
        self.config = config or ModelConfig()
        self.encoder = Encoder(self.config, backend=backend)
        self.decoder = Decoder(self.config, backend=backend)

    def forward(self, clips: Tensor, mask: MotionMask, masked_only: bool = False) -> Tensor:
        """Predicted motion of every token from clips ``[B,T,V,C]`` and their mask.

        Args:
            clips: floating ``[B,T,V,C]``, metres.
            mask: from ``jmm_fast.ops.motion_mask``.
            masked_only: predict the masked tokens alone, which is all that the loss reads.

        Returns:
            ``[B,L,u*C]``, or with ``masked_only`` ``[B,M,u*C]``: the masked tokens of each body in ascending order.
        """
        return self.decoder(self.encoder(clips, mask.visible), mask.restore, masked_only)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, *, heads: int | None = None, backend: str = "auto") -> Self:
        """Load a model: a run, a folder of ``save_pretrained``, or an authors' or MAMP checkpoint (.pth, .npz).

        Args:
            path: what to load.
            heads: attention heads of an authors' checkpoint, which does not tell (None: 8, the released default).
            backend: passed to every op.

        Raises:
            UserError: the file is missing, damaged, or of another shape; the line names file and parameter.
        """
        config, state = files.read(path, heads=heads)
        model = cls(config, backend=backend)
        files.load_into(model, state, path)
        return model

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write ``model.safetensors`` and ``config.json`` into ``folder``, each whole or not at all."""
        files.write(Path(folder), self.config, self.state_dict())
