"""Recipes: functions without arguments that return a full :class:`~jmm_fast.train.config.RunConfig`.

``released`` computes what the authors published; ``paper`` what they describe, and the data set recipes build on it.
``get(name)`` also sets mask and topology together by ``variant``.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from jmm_fast.errors import UserError
from jmm_fast.recipes.benchmarks import ntu60_xsub, ntu60_xview, ntu120_xset, ntu120_xsub, pku1_xsub, pku2_xsub
from jmm_fast.recipes.method import paper, released
from jmm_fast.recipes.small import demo, small
from jmm_fast.train.config import RunConfig, load_config, suggestion

RECIPES: dict[str, Callable[[], RunConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        released,
        paper,
        ntu60_xsub,
        ntu60_xview,
        ntu120_xsub,
        ntu120_xset,
        pku1_xsub,
        pku2_xsub,
        small,
        demo,
    )
}

# Mask score and topology term of each variant of the method: (mask.variant, model.topology).
VARIANTS = {"released": ("released", "none"), "paper": ("paper", "hops"), "mamp": ("mamp", "none")}


def get(name: str, variant: str | None = None) -> RunConfig:
    """The config of the recipe ``name``, or of a YAML file when ``name`` ends in ``.yaml``.

    Args:
        name: a key of ``RECIPES`` or the path of a config file.
        variant: ``released``, ``paper`` or ``mamp``: overrides the mask score and the topology term together.

    Raises:
        UserError: unknown recipe or variant, unreadable file.
    """
    if name.endswith((".yaml", ".yml")):
        config = load_config(Path(name))
    elif name in RECIPES:
        config = RECIPES[name]()
    else:
        raise UserError(f"unknown recipe {name!r}{suggestion(name, RECIPES)}")
    return config if variant is None else with_variant(config, variant)


def with_variant(config: RunConfig, variant: str) -> RunConfig:
    """``config`` with the mask score and topology term of ``variant``."""
    if variant not in VARIANTS:
        raise UserError(f"unknown variant {variant!r}{suggestion(variant, VARIANTS)}")
    score, topology = VARIANTS[variant]
    return dataclasses.replace(
        config,
        mask=dataclasses.replace(config.mask, variant=score),
        model=dataclasses.replace(config.model, topology=topology),
    )
