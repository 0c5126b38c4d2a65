"""Recipes for sets of a few thousand clips, on a CPU."""

from jmm_fast.models import ModelConfig
from jmm_fast.train.config import DataConfig, FinetuneConfig, MaskConfig, OptimConfig, ProbeConfig, RunConfig


def small() -> RunConfig:
    """A quarter of the width and half of the frames, for real sets of a few thousand clips."""
    return RunConfig(
        recipe="small",
        epochs=40,
        warmup_epochs=4,
        log_every=5,
        checkpoint_every=200,
        model=ModelConfig(
            num_frames=60,
            dim=128,
            depth=4,
            heads=4,
            decoder_dim=128,
            decoder_depth=2,
            decoder_heads=4,
            topology="hops",
        ),
        mask=MaskConfig(variant="paper"),
        data=DataConfig(batch_size=32),
        probe=ProbeConfig(features="cached"),
        finetune=FinetuneConfig(
            epochs=40,
            hidden=512,
            drop_path=0.1,
            optim=OptimConfig(lr=1e-3, min_lr=0.0, betas=(0.9, 0.999), layer_decay=0.8),
        ),
    )


def demo() -> RunConfig:
    """Minutes on two cores: a tiny network on the synthetic set."""
    return RunConfig(
        recipe="demo",
        epochs=56,
        warmup_epochs=5,
        log_every=10,
        checkpoint_every=500,
        model=ModelConfig(
            num_frames=40,
            dim=64,
            depth=2,
            heads=2,
            decoder_dim=64,
            decoder_depth=1,
            decoder_heads=2,
            topology="hops",
        ),
        # The easier task: seeing a tenth of 250 tokens, or much smaller crops and stronger turns, a tiny network spends
        # most of so short a run at predicting the average motion.
        mask=MaskConfig(variant="released", mask_ratio=0.5),
        data=DataConfig(split="xsub", batch_size=32, crop=(0.8, 1.0), rotation=0.1),
        optim=OptimConfig(lr=3e-3, min_lr=1e-4),
        probe=ProbeConfig(features="cached"),
        finetune=FinetuneConfig(epochs=10, warmup_epochs=1, hidden=256, drop_path=0.1),
    )
