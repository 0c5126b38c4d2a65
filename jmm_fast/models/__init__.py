"""Models: topology table, blocks, encoder, pretrainer, classifiers, and their files."""

import os

from jmm_fast.models import convert
from jmm_fast.models.classifier import FinetuneClassifier, LinearProbe, parameter_layers
from jmm_fast.models.config import ModelConfig
from jmm_fast.models.encoder import Encoder, mean_over_bodies, pool
from jmm_fast.models.files import load_into, read
from jmm_fast.models.pretrainer import JMMTGT, Decoder
from jmm_fast.models.topology import TopologyTable

__all__ = [
    "JMMTGT",
    "Decoder",
    "Encoder",
    "FinetuneClassifier",
    "LinearProbe",
    "ModelConfig",
    "TopologyTable",
    "convert",
    "load_encoder",
    "load_into",
    "mean_over_bodies",
    "parameter_layers",
    "pool",
    "read",
]


def load_encoder(
    path: str | os.PathLike, *, heads: int | None = None, drop_path: float = 0.0, backend: str = "auto"
) -> Encoder:
    """The encoder of a run, a model folder, or an authors' or MAMP checkpoint (also a downstream one).

    Raises:
        UserError: as ``JMMTGT.from_pretrained``.
    """
    config, state = read(path, heads=heads)
    encoder = Encoder(config, drop_path=drop_path, backend=backend)
    prefix = "encoder."
    inner = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    load_into(encoder, inner, path)
    return encoder
