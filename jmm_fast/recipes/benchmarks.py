"""One recipe per published protocol: ``paper`` with the split and the settings that differ between data sets."""

import dataclasses

from jmm_fast.recipes.method import paper
from jmm_fast.train.config import RunConfig


def ntu60_xsub() -> RunConfig:
    """NTU RGB+D 60, cross-subject."""
    return _benchmark("ntu60_xsub", split="xsub")


def ntu60_xview() -> RunConfig:
    """NTU RGB+D 60, cross-view."""
    return _benchmark("ntu60_xview", split="xview")


def ntu120_xsub() -> RunConfig:
    """NTU RGB+D 120, cross-subject."""
    return _benchmark("ntu120_xsub", split="xsub", tau=0.75)


def ntu120_xset() -> RunConfig:
    """NTU RGB+D 120, cross-setup."""
    return _benchmark("ntu120_xset", split="xset", tau=0.75)


def pku1_xsub() -> RunConfig:
    """PKU-MMD phase 1, cross-subject."""
    return _benchmark("pku1_xsub", split="xsub")


def pku2_xsub() -> RunConfig:
    """PKU-MMD phase 2, cross-subject."""
    return _benchmark("pku2_xsub", split="xsub")


def _benchmark(recipe: str, *, split: str, tau: float = 0.8) -> RunConfig:
    config = paper()
    # MAMP sharpened the mask probabilities on NTU-120.
    return dataclasses.replace(
        config,
        recipe=recipe,
        data=dataclasses.replace(config.data, split=split),
        mask=dataclasses.replace(config.mask, tau=tau),
    )
