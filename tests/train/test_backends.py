"""The same run with every backend and dtype: the same draws, nearly the same losses, and what a step may keep."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from jmm_fast import ops, recipes
from jmm_fast.data import ClipStore
from jmm_fast.models import JMMTGT
from jmm_fast.ops.backend import OPS, unavailable
from jmm_fast.train.evaluate import batches
from jmm_fast.train.metrics import read_lines
from jmm_fast.train.pretrain import pretrain

native = pytest.mark.skipif(
    any(unavailable(op, "cpu") is not None for op in OPS), reason="the C++ extension is not built"
)


def losses(clips, config, out):
    pretrain(config, data=clips, out=out, say=lambda _: None)
    return torch.tensor([line["loss"] for line in read_lines(out / "metrics.jsonl") if line["kind"] == "train"])


@pytest.fixture
def fifty(config):
    """51 steps, each written."""
    return dataclasses.replace(config, epochs=17, log_every=1, checkpoint_every=100)


@native
@pytest.mark.parametrize("variant, topology", [("released", "none"), ("paper", "hops")])
def test_cpu_and_reference_train_alike(clips, fifty, tmp_path, variant, topology):
    config = dataclasses.replace(
        fifty,
        mask=dataclasses.replace(fifty.mask, variant=variant),
        model=dataclasses.replace(fifty.model, topology=topology),
    )
    curves = {
        backend: losses(clips, dataclasses.replace(config, backend=backend), tmp_path / backend)
        for backend in ("cpu", "reference")
    }
    assert len(curves["cpu"]) == 51
    # Rounding differs from the first step on, and each step builds on the one before.
    assert (curves["cpu"][0] - curves["reference"][0]).abs() <= 2e-6 * curves["reference"][0]
    torch.testing.assert_close(curves["cpu"], curves["reference"], rtol=2e-4, atol=0)
    assert curves["cpu"][-3:].mean() < 0.97 * curves["cpu"][:3].mean()


@native
def test_cpu_and_reference_train_alike_where_joints_are_missing(gappy_clips, fifty, tmp_path):
    """And with a stride, so that a token's motion needs frames of the next one."""
    config = dataclasses.replace(fifty, loss=dataclasses.replace(fifty.loss, stride=2))
    curves = {
        backend: losses(gappy_clips, dataclasses.replace(config, backend=backend), tmp_path / backend)
        for backend in ("cpu", "reference")
    }
    assert (curves["cpu"][0] - curves["reference"][0]).abs() <= 2e-6 * curves["reference"][0]
    torch.testing.assert_close(curves["cpu"], curves["reference"], rtol=2e-4, atol=0)
    assert curves["cpu"][-3:].mean() < 0.97 * curves["cpu"][:3].mean()


@native
def test_cpu_and_reference_draw_the_same(clips, config):
    store = ClipStore.open(clips)
    ids = store.split("xsub").train
    for epoch in range(3):
        drawn = {}
        for backend in ("cpu", "reference"):
            settings = dataclasses.replace(config, backend=backend)
            feeder = batches(
                store, ids, settings, train=True, batch_size=8, seed=5, device=torch.device("cpu"), drop_last=True
            )
            drawn[backend] = [
                (batch, ops.motion_mask(batch.clips, seed=5, epoch=epoch, clip_ids=batch.clip_ids, backend=backend))
                for batch in feeder.epoch(epoch)
            ]
        for (a, mask_a), (b, mask_b) in zip(drawn["cpu"], drawn["reference"], strict=True):
            assert torch.equal(a.index, b.index) and torch.equal(a.clips, b.clips)
            assert torch.equal(mask_a.visible, mask_b.visible) and torch.equal(mask_a.mask, mask_b.mask)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bfloat16_trains_like_float32(clips, fifty, tmp_path, backend):
    whole, half = (
        losses(clips, dataclasses.replace(fifty, backend=backend, dtype=dtype), tmp_path / dtype)
        for dtype in ("float32", "bfloat16")
    )
    torch.testing.assert_close(half, whole, rtol=0.02, atol=0)
    # bfloat16 has 8 bits: the curves must not be the same either, or nothing ran in it.
    assert not torch.equal(half, whole)


@native
def test_what_stays_float32_under_autocast(config):
    """Residual stream, LayerNorm, gradients of parameters, and the loss."""
    torch.manual_seed(0)
    model = JMMTGT(config.model)
    clips = torch.randn(2, 16, 25, 3).cumsum(1) * 0.05
    mask = ops.motion_mask(clips)
    seen = {}
    block = model.encoder.stack.blocks[0]
    block.register_forward_hook(lambda _, inputs, out: seen.update(x=inputs[0].dtype, out=out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = model(clips, mask, masked_only=True)
        loss = ops.motion_loss(prediction.float(), clips, mask.mask)
    loss.backward()
    assert loss.dtype == seen["out"] == torch.float32
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


MEMORY = """
import os, resource, sys
os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
import torch
from jmm_fast import ops
from jmm_fast.models import JMMTGT, ModelConfig
torch.set_num_threads(1)
sizes = dict(num_frames=120, dim=64, depth=1, heads=4, decoder_dim=64, decoder_depth=2, decoder_heads=4)
backend = sys.argv[1]
model = JMMTGT(ModelConfig(**sizes), backend=backend)
clips = torch.randn(6, 120, 25, 3).cumsum(1) * 0.02
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
for _ in range(3):
    mask = ops.motion_mask(clips, backend=backend)
    prediction = model(clips, mask, masked_only=backend != "reference")
    ops.motion_loss(prediction, clips, mask.mask, backend=backend).backward()
    model.zero_grad()
print(peak() - before)
"""


@native
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_a_step_takes_a_third_of_the_references_memory():
    taken = {
        backend: float(
            subprocess.run(
                [sys.executable, "-c", MEMORY, backend], capture_output=True, text=True, check=True, timeout=120
            ).stdout
        )
        for backend in ("cpu", "reference")
    }
    assert taken["cpu"] <= taken["reference"] / 3, taken


def test_recipes_run_with_a_backend_by_name(clips, config, tmp_path):
    """``--backend cpu`` is for whole runs: every op has a C++ kernel, or the run is refused before it starts."""
    config = dataclasses.replace(config, backend="cpu", epochs=1, warmup_epochs=0)
    assert recipes.get("released").backend == "auto"
    missing = [op for op in OPS if unavailable(op, "cpu") is not None]
    if missing:
        with pytest.raises(Exception, match="cannot run"):
            pretrain(config, data=clips, out=tmp_path / "run", say=lambda _: None)
    else:
        assert pretrain(config, data=clips, out=tmp_path / "run", say=lambda _: None).exists()
