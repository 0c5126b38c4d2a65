"""The two named forms of the method at full size."""

from jmm_fast.models import ModelConfig
from jmm_fast.train.config import DataConfig, MaskConfig, RunConfig


def released() -> RunConfig:
    """What the authors' published code computes: its mask score, no topology, two bodies always (absent ones zero)."""
    return RunConfig(
        recipe="released",
        model=ModelConfig(topology="none"),
        mask=MaskConfig(variant="released"),
        data=DataConfig(empty_bodies="keep"),
    )


def paper() -> RunConfig:
    """What the abstract describes: gated mask score with correlation, topology bias by hop distance."""
    return RunConfig(recipe="paper", model=ModelConfig(topology="hops"), mask=MaskConfig(variant="paper"))
