import argparse

import numpy as np
import pytest
import torch

from jmm_fast import ops
from jmm_fast.errors import UserError
from jmm_fast.models import (
    JMMTGT,
    Encoder,
    FinetuneClassifier,
    LinearProbe,
    ModelConfig,
    TopologyTable,
    convert,
    load_encoder,
    parameter_layers,
    pool,
)


def tiny(**changes):
    sizes = {"dim": 16, "depth": 2, "heads": 2, "decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}
    return ModelConfig(**{"num_frames": 16, **sizes, **changes})


def clips_of(config, bodies=3):
    return torch.randn(bodies, config.num_frames, config.num_joints, 3).cumsum(1) * 0.05


def test_released_model_has_the_published_size():
    assert sum(p.numel() for p in JMMTGT().parameters()) == 10_368_524


def test_initialisation():
    model = JMMTGT(ModelConfig())
    block = model.encoder.stack.blocks[0]
    bound = (6 / (256 + 768)) ** 0.5
    assert block.attn.qkv.weight.abs().max() <= bound and block.attn.qkv.weight.std() > 0.55 * bound
    assert not block.mlp.fc1.bias.any() and (block.norm1.weight == 1).all()
    assert model.encoder.patch.weight.abs().max() <= 12**-0.5 and model.encoder.patch.bias.any()
    for name in ("mask_token", "joint", "time"):
        assert abs(getattr(model.decoder, name).std().item() - 0.02) < 0.003


@pytest.mark.parametrize("topology", ["hops", "adjacency", "free"])
def test_topology_tables(topology):
    config = tiny(topology=topology)
    table = TopologyTable(config, 3)()
    layout = config.layout()
    if topology == "hops":
        assert not table.any()
        assert (TopologyTable(tiny(topology="hops", topology_mode="scale"), 3)() == 1).all()
    else:
        expected = torch.from_numpy(layout.adjacency()).float()
        torch.testing.assert_close(table, expected.expand(3, -1, -1))
    model = JMMTGT(config)
    clips = clips_of(config)
    mask = ops.motion_mask(clips)
    ops.motion_loss(model(clips, mask), clips, mask.mask).backward()
    assert model.encoder.stack.topology.weight.grad.abs().sum() > 0
    assert model.decoder.stack.topology.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("mode", ["add", "scale"])
def test_neutral_table_equals_plain_attention(mode):
    plain = Encoder(tiny(topology="none"))
    guided = Encoder(tiny(topology="hops", topology_mode=mode))
    guided.load_state_dict(plain.state_dict(), strict=False)
    clips = clips_of(plain.config)
    torch.testing.assert_close(guided(clips), plain(clips), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        guided.stack.topology.weight.normal_()
    assert (guided(clips) - plain(clips)).abs().max() > 1e-2


@pytest.mark.parametrize("topology", ["none", "hops"])
def test_permuting_visible_tokens_permutes_features(topology):
    encoder = Encoder(tiny(topology=topology)).double()
    if topology == "hops":
        torch.nn.init.normal_(encoder.stack.topology.weight)
    clips = clips_of(encoder.config).double()
    visible = ops.motion_mask(clips, mask_ratio=0.7).visible
    order = torch.stack([torch.randperm(visible.shape[1]) for _ in range(3)])
    features = encoder(clips, visible)
    permuted = encoder(clips, visible.gather(1, order))
    torch.testing.assert_close(permuted, features.gather(1, order[..., None].expand_as(features)))


def test_full_grid_is_all_tokens_visible():
    encoder = Encoder(tiny())
    clips = clips_of(encoder.config)
    everything = torch.arange(encoder.config.num_tokens).expand(3, -1)
    torch.testing.assert_close(encoder(clips), encoder(clips, everything))


def test_masked_tokens_do_not_reach_the_encoder():
    model = JMMTGT(tiny())
    clips = clips_of(model.config, 1)
    mask = ops.motion_mask(clips)
    hidden = mask.mask.view(1, 4, 25).transpose(1, 2)
    changed = clips.clone()
    changed.view(1, 4, 4, 25, 3)[hidden.transpose(1, 2)[:, :, None].expand(1, 4, 4, 25)] += 100
    assert torch.equal(model(changed, mask), model(clips, mask))


def test_pool_averages_tokens_and_bodies():
    tokens = torch.randn(3, 5, 4)
    pooled = pool(tokens, torch.tensor([0, 1, 0]), 2)
    torch.testing.assert_close(pooled[0], (tokens[0].mean(0) + tokens[2].mean(0)) / 2)
    torch.testing.assert_close(pooled[1], tokens[1].mean(0))


def test_pool_of_some_tokens():
    tokens = torch.randn(3, 5, 4)
    owner = torch.tensor([0, 1, 0])
    everything = torch.ones(3, 5, dtype=torch.bool)
    torch.testing.assert_close(pool(tokens, owner, 2, everything), pool(tokens, owner, 2))
    valid = everything.clone()
    valid[0, 1:] = False
    valid[1] = False
    pooled = pool(tokens, owner, 2, valid)
    torch.testing.assert_close(pooled[0], (tokens[0, 0] + tokens[2].mean(0)) / 2)
    torch.testing.assert_close(pooled[1], tokens[1].mean(0))


def test_linear_probe_trains_its_head_alone():
    probe = LinearProbe(Encoder(tiny(), drop_path=0.5), 4).train()
    clips = clips_of(probe.encoder.config)
    owner = torch.arange(3)
    assert torch.equal(probe.features(clips, owner, 3), probe.features(clips, owner, 3))
    probe(clips, owner, 3).sum().backward()
    assert {name for name, p in probe.named_parameters() if p.grad is not None} == {"linear.weight", "linear.bias"}


def test_finetuning_reaches_every_parameter():
    classifier = FinetuneClassifier(Encoder(tiny(topology="hops")), 4, hidden=32)
    clips = clips_of(classifier.encoder.config, 4)
    classifier(clips, torch.tensor([0, 0, 1, 2]), 3).square().sum().backward()
    assert all(p.grad is not None for p in classifier.parameters())


def test_layer_decay_layers_cover_the_model():
    classifier = FinetuneClassifier(Encoder(tiny(topology="hops")), 4, hidden=32)
    layers = parameter_layers(classifier, 2)
    assert layers.keys() == dict(classifier.named_parameters()).keys()
    assert layers["encoder.patch.weight"] == layers["encoder.joint"] == layers["encoder.stack.topology.weight"] == 0
    assert layers["encoder.stack.blocks.1.mlp.fc1.weight"] == 2
    assert layers["encoder.stack.norm.weight"] == layers["fc2.bias"] == 3


def test_other_layouts_and_own_trees():
    for config in (
        tiny(skeleton="coco17", num_joints=17, topology="hops"),
        tiny(skeleton="custom", parents=(-1, 0, 1, 1), num_joints=4, topology="free"),
    ):
        model = JMMTGT(config)
        clips = clips_of(config)
        mask = ops.motion_mask(clips)
        assert model(clips, mask).shape == (3, config.num_tokens, 12)


@pytest.mark.parametrize("topology", ["none", "hops"])
def test_model_compiles_and_exports(topology):
    model = JMMTGT(tiny(topology=topology))
    clips = clips_of(model.config)

    def step(clips):
        mask = ops.motion_mask(clips, seed=3)
        return ops.motion_loss(model(clips, mask), clips, mask.mask)

    torch.testing.assert_close(torch.compile(step, fullgraph=True)(clips), step(clips))
    exported = torch.export.export(model.encoder, (clips,)).module()
    torch.testing.assert_close(exported(clips), model.encoder(clips), rtol=1e-4, atol=1e-5)


def test_save_and_load(tmp_path):
    model = JMMTGT(tiny(topology="hops", parents=(-1, *range(24)), skeleton="chain"))
    model.save_pretrained(tmp_path / "run" / "model")
    for path in (tmp_path / "run", tmp_path / "run" / "model"):
        again = JMMTGT.from_pretrained(path)
        assert again.config == model.config
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value)
    assert torch.equal(load_encoder(tmp_path / "run").joint, model.encoder.joint)


def test_authors_pth_round_trip(tmp_path):
    model = JMMTGT(tiny())
    theirs = convert.to_authors(model.state_dict(), model.config)
    torch.save({"model": theirs, "epoch": 3, "args": argparse.Namespace(lr=1e-3)}, tmp_path / "checkpoint.pth")
    torch.save({f"module.{name}": value for name, value in theirs.items()}, tmp_path / "plain.pth")
    for name in ("checkpoint.pth", "plain.pth"):
        again = JMMTGT.from_pretrained(tmp_path / name, heads=2)
        assert again.config == model.config
        for key, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], value)
    with pytest.raises(UserError, match="topology"):
        convert.to_authors(JMMTGT(tiny(topology="hops")).state_dict(), tiny())


class Evil:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_bad_files_give_one_line(tmp_path, capsys):
    JMMTGT(tiny()).save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    whole = weights.read_bytes()
    config = (tmp_path / "model" / "config.json").read_text()
    cases = []

    def expect(path, *words):
        with pytest.raises(UserError) as caught:
            JMMTGT.from_pretrained(path)
        line = str(caught.value)
        assert "\n" not in line and all(word in line for word in words), line
        cases.append(line)

    expect(tmp_path / "absent", "absent does not exist")
    (tmp_path / "empty").mkdir()
    expect(tmp_path / "empty", "holds no model")
    weights.write_bytes(whole[: len(whole) // 2])
    expect(tmp_path / "model", "model.safetensors")
    weights.write_bytes(whole)
    (tmp_path / "model" / "config.json").write_text(config.replace('"dim": 16', '"dim": 32'))
    expect(tmp_path / "model", "parameter", "must be")
    (tmp_path / "model" / "config.json").write_text(config.replace('"dim": 16', '"width": 32'))
    expect(tmp_path / "model", "config.json is not a model config")
    (tmp_path / "model" / "config.json").write_text("{")
    expect(tmp_path / "model", "config.json is not a model config")
    torch.save({"model": {"x": torch.zeros(2)}}, tmp_path / "other.pth")
    expect(tmp_path / "other.pth", "joints_embed.proj.weight")
    torch.save(Evil(), tmp_path / "evil.pth")
    expect(tmp_path / "evil.pth", "not a readable .pth of plain tensors")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:100])
    expect(tmp_path / "cut.pth", "cut.pth")
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:60])
    expect(tmp_path / "cut.npz", "cut.npz is not a readable .npz")
    assert len(cases) == 10 and "never run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dim": 15}, "model.dim must be a multiple of model.heads=2"),
        ({"num_frames": 18}, "two whole tokens"),
        ({"topology": "star"}, "model.topology must be one of none, hops"),
        ({"topology_mode": "mul"}, "model.topology_mode"),
        ({"num_joints": 17, "topology": "hops"}, "model.num_joints must be 25"),
        ({"depth": -1}, "model.depth"),
        ({"mlp_ratio": 0.0}, "model.mlp_ratio"),
        ({"heads": 0}, "model.heads must be a positive integer"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(UserError, match=message):
        JMMTGT(tiny(**change))


def test_clips_of_another_shape():
    with pytest.raises(ValueError, match=r"clips must be \[B, 16, 25, 3\], got \[2, 20, 25, 3\]"):
        Encoder(tiny())(torch.zeros(2, 20, 25, 3))


@pytest.mark.parametrize("topology", ["none", "hops"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_predicting_masked_tokens_alone_changes_nothing(topology, backend):
    model = JMMTGT(tiny(topology=topology, decoder_depth=2), backend=backend)
    if topology == "hops":
        torch.nn.init.normal_(model.decoder.stack.topology.weight)
    clips = clips_of(model.config)
    mask = ops.motion_mask(clips, mask_ratio=0.7)

    def run(masked_only):
        model.zero_grad()
        prediction = model(clips, mask, masked_only=masked_only)
        ops.motion_loss(prediction, clips, mask.mask).backward()
        return prediction.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    (whole, whole_grads), (masked, masked_grads) = run(False), run(True)
    hidden = mask.mask.sum(1)[0].item()
    assert masked.shape == (3, hidden, 12)
    torch.testing.assert_close(masked, whole[mask.mask].view(3, hidden, 12))
    for name, gradient in whole_grads.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(masked_grads[name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=name)
