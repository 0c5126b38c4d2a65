"""What decays, how fast each layer learns, against the authors' groups."""

import numpy as np
import pytest
import torch

from jmm_fast.models import JMMTGT, Encoder, FinetuneClassifier, ModelConfig, convert, parameter_layers
from jmm_fast.recipes import released
from jmm_fast.train.config import OptimConfig
from jmm_fast.train.optim import adamw, parameter_groups, set_learning_rate

SMALL = ModelConfig(num_frames=8, dim=8, depth=8, heads=2, decoder_dim=8, decoder_depth=1, decoder_heads=2)


def test_finetuning_groups_are_the_authors(golden):
    arrays = np.load(golden("schedule.npz"))
    model = FinetuneClassifier(Encoder(SMALL), 3, hidden=8)
    settings = released().finetune.optim
    groups = parameter_groups(
        model,
        weight_decay=settings.weight_decay,
        layers=parameter_layers(model, SMALL.depth),
        layer_decay=settings.layer_decay,
    )
    ours = {name: (group["scale"], group["weight_decay"]) for group in groups for name in group["names"]}
    # Number the parameters, rename them through the converter, and read the numbers back.
    names = list(ours)
    marked = {name: torch.full_like(value, float(names.index(name))) for name, value in model.named_parameters()}
    theirs = {name: names[int(value.flatten()[0])] for name, value in convert.to_authors(marked, SMALL).items()}
    assert sorted(theirs) == sorted(arrays["lrd_names"].tolist())
    for name, scale, decay in zip(
        arrays["lrd_names"].tolist(), arrays["lrd_scale"], arrays["lrd_weight_decay"], strict=True
    ):
        assert ours[theirs[name]] == (pytest.approx(scale, rel=1e-12), decay), name


def test_pretraining_decay():
    model = JMMTGT(
        ModelConfig(
            num_frames=8, dim=8, depth=1, heads=2, topology="free", decoder_dim=8, decoder_depth=1, decoder_heads=2
        )
    )
    groups = parameter_groups(model, weight_decay=0.05)
    decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
    free = {name for group in groups if not group["weight_decay"] for name in group["names"]}
    assert {
        "encoder.joint",
        "encoder.time",
        "decoder.mask_token",
        "encoder.patch.weight",
        "decoder.head.weight",
    } <= decayed
    assert {"encoder.patch.bias", "encoder.stack.norm.weight", "encoder.stack.topology.weight"} <= free
    assert decayed | free == {name for name, _ in model.named_parameters()}


def test_rate_reaches_each_group_scaled():
    model = FinetuneClassifier(Encoder(SMALL), 3, hidden=8)
    optimizer = adamw(model, OptimConfig(layer_decay=0.5), layers=parameter_layers(model, SMALL.depth))
    set_learning_rate(optimizer, 1.0)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert rates["fc2.weight"] == 1.0
    assert rates["encoder.stack.blocks.7.mlp.fc1.weight"] == 0.5
    assert rates["encoder.joint"] == 0.5**9


def test_frozen_parameters_are_left_out():
    model = FinetuneClassifier(Encoder(SMALL).requires_grad_(False), 3, hidden=8)
    names = [name for group in parameter_groups(model, weight_decay=0.1) for name in group["names"]]
    assert names and not any(name.startswith("encoder.") for name in names)
