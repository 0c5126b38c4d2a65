"""Configs: YAML there and back, mistakes named, the values of the published protocols."""

import dataclasses

import pytest
import yaml

from jmm_fast import recipes
from jmm_fast.errors import UserError
from jmm_fast.train.config import (
    OptimConfig,
    RunConfig,
    check_config,
    differences,
    from_dict,
    load_config,
    save_config,
    to_dict,
)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipes_are_whole_and_survive_yaml(name, tmp_path):
    config = recipes.get(name)
    assert config.recipe == name
    check_config(config)
    save_config(tmp_path / "config.yaml", config)
    assert load_config(tmp_path / "config.yaml") == config
    assert recipes.get(str(tmp_path / "config.yaml")) == config


def test_released_is_the_published_protocol():
    config = recipes.released()
    assert (config.epochs, config.warmup_epochs, config.data.batch_size) == (400, 20, 48)
    optim = config.optim
    assert (optim.lr, optim.min_lr, optim.betas, optim.weight_decay) == (1e-3, 1e-4, (0.9, 0.95), 0.05)
    assert (config.mask.variant, config.mask.mask_ratio, config.mask.tau) == ("released", 0.9, 0.8)
    assert (config.model.topology, config.data.empty_bodies) == ("none", "keep")
    probe = config.probe
    assert (probe.epochs, probe.batch_size, probe.lr, probe.min_lr, probe.momentum) == (100, 48, 0.1, 0.0, 0.9)
    assert (probe.weight_decay, probe.warmup_epochs, probe.features) == (0.0, 0, "online")
    fine = config.finetune
    assert (fine.epochs, fine.warmup_epochs, fine.batch_size, fine.hidden) == (100, 5, 32, 2048)
    assert (fine.drop_path, fine.dropout, fine.label_smoothing) == (0.3, 0.3, 0.1)
    optim = fine.optim
    assert (optim.lr, optim.min_lr, optim.betas, optim.weight_decay) == (5e-4, 0.0, (0.9, 0.999), 0.05)
    assert optim.layer_decay == 0.8


def test_small_has_the_sizes_asked_for():
    config = recipes.small()
    model = config.model
    assert (model.dim, model.depth, model.decoder_depth, model.heads, model.num_frames) == (128, 4, 2, 4, 60)
    assert (config.epochs, config.data.batch_size) == (40, 32)


@pytest.mark.parametrize(
    ("variant", "score", "topology"),
    [("released", "released", "none"), ("paper", "paper", "hops"), ("mamp", "mamp", "none")],
)
def test_variant_sets_mask_and_topology(variant, score, topology):
    config = recipes.get("small", variant)
    assert (config.mask.variant, config.model.topology) == (score, topology)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"epoch": 3}, "unknown field 'epoch'; did you mean 'epochs'?"),
        ({"model": {"dimm": 3}}, "config.model: unknown field 'dimm'; did you mean 'dim'?"),
        ({"epochs": "many"}, "config.epochs is 'many': expected int"),
        ({"epochs": True}, "config.epochs is True: expected int"),
        ({"dtype": "float16"}, "config.dtype is 'float16': expected one of float32, bfloat16"),
        ({"data": {"crop": [0.5]}}, "config.data.crop is [0.5]: expected a list of 2 values"),
        ({"data": 3}, "config.data: expected a mapping of fields, got 3"),
    ],
)
def test_wrong_fields_are_named(values, complaint):
    with pytest.raises(UserError) as caught:
        from_dict(RunConfig, values)
    assert complaint in str(caught.value)


def test_numbers_as_people_write_them():
    config = from_dict(RunConfig, yaml.safe_load("{optim: {lr: 1e-3, min_lr: 0, clip_grad: null}}"))
    assert config.optim.lr == 1e-3
    assert config.optim.min_lr == 0.0 and isinstance(config.optim.min_lr, float)


def test_broken_files(tmp_path):
    path = tmp_path / "config.yaml"
    with pytest.raises(UserError, match=r"cannot read .*config\.yaml"):
        load_config(path)
    path.write_text("a: [1")
    with pytest.raises(UserError, match="not valid YAML") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("group", "field", "value", "complaint"),
    [
        (None, "epochs", 0, "epochs is 0"),
        (None, "warmup_epochs", 500, "warmup_epochs is 500"),
        (None, "prefetch", -1, "prefetch is -1: expected 0 or more"),
        ("mask", "mask_ratio", 1.0, "mask.mask_ratio is 1.0"),
        ("mask", "mask_ratio", 0.9999, "mask.mask_ratio is 0.9999"),
        ("mask", "tau", 0.0, "mask.tau is 0.0"),
        ("model", "heads", 7, "model.dim must be a multiple of model.heads=7"),
        ("data", "crop", (0.9, 0.5), "data.crop is (0.9, 0.5)"),
        ("data", "batch_size", 0, "data.batch_size is 0"),
        ("optim", "min_lr", 1.0, "optim.min_lr is 1.0"),
        ("optim", "layer_decay", 0.8, "optim.layer_decay is 0.8"),
        ("optim", "accumulate", 0, "optim.accumulate is 0"),
        (None, "probe_every", -1, "probe_every is -1"),
        ("finetune", "optim", OptimConfig(accumulate=2), "finetune.optim.accumulate is 2: expected 1"),
        ("loss", "stride", 120, "loss.stride is 120"),
        ("probe", "batch_size", 1, "probe.batch_size is 1"),
        ("finetune", "labels", 0.0, "finetune.labels is 0.0"),
        ("finetune", "drop_path", 1.0, "finetune.drop_path is 1.0"),
    ],
)
def test_impossible_values_are_refused(group, field, value, complaint):
    config = RunConfig()
    changed = (
        {field: value} if group is None else {group: dataclasses.replace(getattr(config, group), **{field: value})}
    )
    with pytest.raises(UserError) as caught:
        check_config(dataclasses.replace(config, **changed))
    assert complaint in str(caught.value)


def test_differences_name_nested_fields():
    a, b = to_dict(recipes.released()), to_dict(recipes.paper())
    assert {name for name, _, _ in differences(a, b)} == {
        "recipe",
        "model.topology",
        "mask.variant",
        "data.empty_bodies",
    }
