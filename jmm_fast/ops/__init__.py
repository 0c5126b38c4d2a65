"""The public ops: formula, checks, choice of backend. One module per op, the same noun in every folder."""

from jmm_fast.ops.backend import BACKENDS, OPS, backends
from jmm_fast.ops.block import Stream, attention_half, block_backend, mlp_half, norm_linear
from jmm_fast.ops.clip_window import clip_window
from jmm_fast.ops.motion_loss import motion_loss
from jmm_fast.ops.motion_mask import MotionMask, motion_mask
from jmm_fast.ops.token_grid import token_grid_gather, token_grid_scatter
from jmm_fast.ops.topology_attention import topology_attention

__all__ = [
    "BACKENDS",
    "OPS",
    "MotionMask",
    "Stream",
    "attention_half",
    "backends",
    "block_backend",
    "clip_window",
    "mlp_half",
    "motion_loss",
    "motion_mask",
    "norm_linear",
    "token_grid_gather",
    "token_grid_scatter",
    "topology_attention",
]
