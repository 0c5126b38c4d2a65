"""Every op in plain PyTorch: any device, any dtype, autograd does the backward. The oracle of the other backends."""

from jmm_fast.reference.clip_window import clip_window, rotation_matrix
from jmm_fast.reference.motion_loss import motion_loss, motion_target
from jmm_fast.reference.motion_mask import known_scores, motion_mask, motion_scores, num_visible, patchify
from jmm_fast.reference.philox import CROP, DROP, MASK, ORDER, ROTATION, philox4x32, uniform
from jmm_fast.reference.token_grid import token_grid_gather, token_grid_scatter
from jmm_fast.reference.topology_attention import topology_attention

__all__ = [
    "CROP",
    "DROP",
    "MASK",
    "ORDER",
    "ROTATION",
    "clip_window",
    "known_scores",
    "motion_loss",
    "motion_mask",
    "motion_scores",
    "motion_target",
    "num_visible",
    "patchify",
    "philox4x32",
    "rotation_matrix",
    "token_grid_gather",
    "token_grid_scatter",
    "topology_attention",
    "uniform",
]
