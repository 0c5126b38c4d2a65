"""What a model is made of: one flat record, saved beside its weights."""

import dataclasses

import numpy as np

from jmm_fast import skeleton as layouts
from jmm_fast.errors import UserError
from jmm_fast.skeleton import Skeleton

TOPOLOGIES = ("none", "hops", "adjacency", "free")
TOPOLOGY_MODES = ("add", "scale")


@dataclasses.dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Sizes and options of encoder and decoder. Defaults: the released model (10,368,524 parameters).

    Attributes:
        skeleton: name of the joint layout (``jmm_fast.skeleton.names()``), or "custom" with ``parents``.
        parents: parent of each joint, -1 for the root; overrides ``skeleton``.
        num_joints: joints ``V``; must be the layout's.
        num_frames: frames of a clip, ``T``; a multiple of ``t_patch``.
        t_patch: frames per token, ``u``.
        channels: coordinates ``C``.
        dim, depth, heads: width, blocks and heads of the encoder.
        mlp_ratio: hidden width of a block's MLP over its width.
        qkv_bias: whether the query, key and value projections have a bias.
        topology: "none", "hops" (a learned scalar per head and hop distance), "adjacency" (a learned scale per head
            times the normalised adjacency) or "free" (a learned table).
        topology_mode: "add" adds the table to the scores, "scale" multiplies them by it.
        decoder_dim, decoder_depth, decoder_heads: the same for the decoder.
    """

    skeleton: str = "ntu25"
    parents: tuple[int, ...] | None = None
    num_joints: int = 25
    num_frames: int = 120
    t_patch: int = 4
    channels: int = 3
    dim: int = 256
    depth: int = 8
    heads: int = 8
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    topology: str = "none"
    topology_mode: str = "add"
    decoder_dim: int = 256
    decoder_depth: int = 5
    decoder_heads: int = 8

    @property
    def num_steps(self) -> int:
        """Time steps of the token grid, ``T' = T / u``."""
        return self.num_frames // self.t_patch

    @property
    def num_tokens(self) -> int:
        """Tokens of the grid, ``L = T' * V``."""
        return self.num_steps * self.num_joints

    @property
    def patch_size(self) -> int:
        """Numbers per token, ``P = u * C``."""
        return self.t_patch * self.channels

    def layout(self) -> Skeleton:
        """The joint layout: ``parents`` if given, else the one named ``skeleton``."""
        if self.parents is not None:
            return Skeleton.from_parents(self.parents, name=self.skeleton)
        return layouts.get(self.skeleton)

    def check(self) -> None:
        """Raise ``UserError`` naming the first field that cannot be."""
        whole = ("num_joints", "num_frames", "t_patch", "channels", "dim", "heads", "decoder_dim", "decoder_heads")
        for name in whole:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"model.{name} must be a positive integer, got {value!r}")
        for name in ("depth", "decoder_depth"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise UserError(f"model.{name} must be an integer of at least 0, got {getattr(self, name)!r}")
        for width, heads in (("dim", "heads"), ("decoder_dim", "decoder_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise UserError(
                    f"model.{width} must be a multiple of model.{heads}={getattr(self, heads)}, "
                    f"got {getattr(self, width)}"
                )
        if self.num_frames % self.t_patch or self.num_frames < 2 * self.t_patch:
            raise UserError(
                f"model.num_frames must be at least two whole tokens of model.t_patch={self.t_patch} frames, "
                f"got {self.num_frames}"
            )
        if self.topology not in TOPOLOGIES:
            raise UserError(f"model.topology must be one of {', '.join(TOPOLOGIES)}, got {self.topology!r}")
        if self.topology_mode not in TOPOLOGY_MODES:
            raise UserError(f"model.topology_mode must be add or scale, got {self.topology_mode!r}")
        if not np.isfinite(self.mlp_ratio) or self.mlp_ratio <= 0:
            raise UserError(f"model.mlp_ratio must be positive, got {self.mlp_ratio!r}")
        if self.topology != "none" or self.parents is not None:
            joints = self.layout().num_joints
            if joints != self.num_joints:
                raise UserError(
                    f"model.num_joints must be {joints} as layout {self.skeleton} has, got {self.num_joints}"
                )
