"""The released model, number for number: forward, gradients, heads, and the way in and out of the authors' names."""

import numpy as np
import pytest
import torch

from jmm_fast import ops
from jmm_fast.models import JMMTGT, Encoder, FinetuneClassifier, LinearProbe, convert, load_encoder, load_into, read
from jmm_fast.ops.backend import OPS, unavailable


@pytest.fixture(params=["reference", "auto", "cpu"])
def backend(request):
    if request.param == "cpu" and any(unavailable(op, "cpu") for op in OPS):
        pytest.skip("the C++ extension is not built")
    return request.param


def close(ours, theirs, tolerance):
    theirs = torch.as_tensor(theirs)
    scale = theirs.abs().max().item()
    assert (ours - theirs).abs().max().item() <= tolerance * scale


@pytest.mark.parametrize("name", ["pretrain_small", "pretrain_small_rawloss"])
def test_pretraining_step(golden, name, backend):
    path = golden(f"{name}.npz")
    arrays = np.load(path, allow_pickle=True)
    model = JMMTGT.from_pretrained(path, heads=int(arrays["cfg_num_heads"]), backend=backend)
    clips = torch.from_numpy(arrays["x"]).permute(0, 4, 2, 3, 1).flatten(0, 1)
    mask = ops.motion_mask(
        clips,
        mask_ratio=float(arrays["mask_ratio"]),
        tau=float(arrays["tau"]),
        uniform=torch.from_numpy(arrays["uniform"]),
        backend=backend,
    )
    latent = model.encoder(clips, mask.visible)
    order = torch.from_numpy(arrays["ids_keep"]).long().argsort(1)[..., None].expand_as(latent)
    close(latent, torch.from_numpy(arrays["latent"]).gather(1, order), 1e-4)
    prediction = model(clips, mask)
    close(prediction, arrays["pred"], 1e-4)
    loss = ops.motion_loss(prediction, clips, mask.mask, normalize=bool(arrays["cfg_norm_skes_loss"]), backend=backend)
    np.testing.assert_allclose(loss.item(), float(arrays["loss"]), rtol=1e-4)
    loss.backward()
    gradients = convert.from_authors(
        {key.removeprefix("grad/"): torch.from_numpy(arrays[key]) for key in arrays.files if key.startswith("grad/")}
    )
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for key, parameter in model.named_parameters():
        close(parameter.grad, gradients[key], 1e-3)


def test_export_gives_the_authors_arrays_back(golden):
    path = golden("pretrain_small.npz")
    arrays = np.load(path, allow_pickle=True)
    model = JMMTGT.from_pretrained(path, heads=4)
    theirs = convert.to_authors(model.state_dict(), model.config)
    expected = {key.removeprefix("state/"): arrays[key] for key in arrays.files if key.startswith("state/")}
    assert theirs.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(theirs[key].numpy(), value)


@pytest.mark.parametrize("name, head", [("linprobe_small", LinearProbe), ("finetune_small", FinetuneClassifier)])
def test_downstream_heads(golden, name, head, backend):
    path = golden(f"{name}.npz")
    arrays = np.load(path)
    config, state = read(path, heads=4)
    classifier = head(Encoder(config, backend=backend), 10)
    load_into(classifier, state, path)
    clips = torch.from_numpy(arrays["x"])
    samples, _, _, _, bodies = clips.shape
    clips = clips.permute(0, 4, 2, 3, 1).flatten(0, 1)
    clip_of_body = torch.arange(samples).repeat_interleave(bodies)
    logits = classifier.eval()(clips, clip_of_body, samples)
    close(logits.detach(), arrays["logits"], 1e-4)
    theirs = convert.to_authors(classifier.state_dict(), config)
    assert theirs.keys() == {key.removeprefix("state/") for key in arrays.files if key.startswith("state/")}
    encoder = load_encoder(path, heads=4)
    assert torch.equal(encoder.patch.weight, classifier.encoder.patch.weight)
