"""What the host learns from the device in a run: copies that it does not wait for, and nothing else.

The runs are on torch's meta device, whose numbers cannot be read: an operator that needs one raises. Operators that
move numbers between the host and that device are noted.
"""

import dataclasses
import importlib
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from jmm_fast import ops
from jmm_fast.models import JMMTGT, FinetuneClassifier, ModelConfig
from jmm_fast.train import checkpoint, distributed, ledger, loop
from jmm_fast.train.config import OptimConfig
from jmm_fast.train.optim import adamw

META = torch.device("meta")
MODEL = ModelConfig(
    num_frames=8, dim=8, depth=2, heads=2, topology="hops", decoder_dim=8, decoder_depth=1, decoder_heads=2
)
CONFIG = loop.LoopConfig(
    epochs=2,
    warmup_epochs=0,
    optim=OptimConfig(clip_grad=1.0),
    seed=0,
    dtype="bfloat16",
    log_every=2,
    checkpoint_every=99,
    keep=1,
)


def there(module: nn.Module) -> nn.Module:
    """``module`` on the device."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(torch.empty_like(value, device=META))
        for name, value in part._buffers.items():
            part._buffers[name] = torch.empty_like(value, device=META)
    return module


class Batch(SimpleNamespace):
    def split(self, parts):
        return [self] * parts


class Batches:
    """Five batches an epoch."""

    def __len__(self):
        return 5

    def epoch(self, epoch, start=0):
        for _ in range(start, 5):
            clips = torch.empty(6, MODEL.num_frames, MODEL.num_joints, 3, device=META)
            ids, clip_of_body, labels = (torch.empty(n, dtype=torch.int64, device=META) for n in (6, 6, 4))
            yield Batch(clips=clips, clip_ids=ids, clip_of_body=clip_of_body, labels=labels, index=torch.arange(4))


def pretraining(backend):
    model = there(JMMTGT(MODEL, backend=backend))

    def loss_of(batch, epoch):
        mask = ops.motion_mask(batch.clips, epoch=epoch, clip_ids=batch.clip_ids, variant="paper", backend=backend)
        made = model(batch.clips, mask, masked_only=backend != "reference").float()
        return ops.motion_loss(made, batch.clips, mask.mask, backend=backend), mask.mask.sum()

    return model, loss_of


def finetuning(_backend):
    model = there(FinetuneClassifier(JMMTGT(MODEL).encoder, 5, hidden=16, dropout=0.3))

    def loss_of(batch, _epoch):
        logits = model.head(model.features(batch.clips, batch.clip_of_body, 4)).float()
        return functional.cross_entropy(logits, batch.labels), 1

    return model, loss_of


class Moves(TorchDispatchMode):
    """Notes the operators that read numbers from the device or move them to or from it."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_flatten((args, kwargs, out))[0] if isinstance(x, torch.Tensor)}
        name = func.overloadpacket.__name__
        # A number of the host is an argument of a kernel, unless it is copied.
        if len(devices) > 1 and (name in ("_to_copy", "copy_") or all(x.ndim for x in tensors(args, kwargs))):
            self.found.append(name)
        return out


class Made(TorchFunctionMode):
    """Notes tensors that are made on the device of numbers of the host, which no operator tells."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor) and out.device == META:
            self.found.append(func.__name__)
        return out


def tensors(*values):
    return [x for x in tree_flatten(values)[0] if isinstance(x, torch.Tensor)]


@pytest.fixture
def device(monkeypatch):
    """``device.asked``: for which numbers a copy was asked, and which of them were read, in order."""
    asked = []

    class Arriving:
        def __init__(self, numbers):
            assert numbers.device == META
            self.number, self.shape = sum(what == "sent" for what, _ in asked), numbers.shape
            asked.append(("sent", self.number))

        def arrived(self):
            return False

        def read(self):
            asked.append(("read", self.number))
            return torch.ones(self.shape).tolist()

    monkeypatch.setattr(ledger, "Arriving", Arriving)
    monkeypatch.setattr(
        importlib.import_module("torch.optim.adam"), "_device_dtype_check_for_fused", lambda *_args, **_more: None
    )
    monkeypatch.setattr(checkpoint.Writer, "save", lambda self, step, *_: asked.append(("saved", step)))
    monkeypatch.setattr(loop, "autocast", lambda device, dtype: torch.autocast("cpu", dtype=getattr(torch, dtype)))
    return SimpleNamespace(asked=asked)


def fit(tmp_path, made, config=CONFIG):
    model, loss_of = made
    optimizer = adamw(model, config.optim)
    with Moves() as moves, Made(moves.found):
        loop.fit(
            model,
            optimizer,
            Batches(),
            loss_of,
            config=config,
            folder=tmp_path,
            device=META,
            title="test",
            fingerprint="data",
            say=lambda _: None,
        )
    return moves.found


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("stage", "backend"), [(pretraining, "reference"), (pretraining, "auto"), (finetuning, "auto")]
)
def test_nothing_is_read_or_moved_but_the_losses(tmp_path, device, stage, backend, accumulate):
    config = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, accumulate=accumulate))
    assert fit(tmp_path, stage(backend), config) == []
    # Steps 2, 4, 5 (a checkpoint), 6, 8, 10: a line waits for the line before it, a checkpoint for all.
    assert device.asked == [
        ("sent", 0), ("sent", 1), ("read", 0), ("sent", 2), ("read", 1), ("read", 2), ("saved", 5),
        ("sent", 3), ("sent", 4), ("read", 3), ("sent", 5), ("read", 4), ("read", 5), ("saved", 10),
    ]  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("train", 2), ("train", 4), ("epoch", 5), ("train", 6), ("train", 8), ("train", 10), ("epoch", 10),
    ]  # fmt: skip


def read_loss(model, loss_of):
    return model, lambda batch, epoch: (lambda loss, weight: (loss, weight + loss.item()))(*loss_of(batch, epoch))


def send_number(model, loss_of, copy=False):
    def number():
        return torch.tensor(1.0).to(META) if copy else torch.as_tensor(1.0, device=META)

    return model, lambda batch, epoch: (loss_of(batch, epoch)[0], number())


def test_a_step_that_reads_or_sends_a_number_is_noticed(tmp_path, device):
    with pytest.raises(RuntimeError, match="meta"):
        fit(tmp_path / "read", read_loss(*pretraining("auto")))
    assert set(fit(tmp_path / "sent", send_number(*pretraining("auto")))) == {"as_tensor"}
    assert set(fit(tmp_path / "copied", send_number(*pretraining("auto"), copy=True))) == {"_to_copy"}


def test_a_copy_to_the_host_is_one_that_nobody_waits_for():
    """On a GPU into pinned memory; here the same copy of numbers that change afterwards."""

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            assert name in ("empty", "copy_", "detach"), name
            assert name != "copy_" or args[2] or (kwargs or {}).get("non_blocking")
            return func(*args, **(kwargs or {}))

    numbers = torch.tensor([[1.0, 2.0], [3.0, float("inf")]])
    with Copies():
        arriving = ledger.Arriving(numbers)
    numbers.zero_()
    assert arriving.arrived() and arriving.read() == [[1.0, 2.0], [3.0, float("inf")]]


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@gpu
def test_gpu_numbers_arrive_while_the_host_goes_on(monkeypatch):
    numbers = torch.full((2, 3), 4.0, device="cuda")
    ledger.Arriving(numbers).read()
    torch.cuda._sleep(10**9)
    torch.cuda.set_sync_debug_mode("error")
    try:
        arriving = ledger.Arriving(numbers)
        numbers.zero_()
        assert not arriving.arrived()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert arriving.read() == [[4.0] * 3] * 2 and arriving.arrived()
    monkeypatch.setattr(distributed, "size", lambda: 2)
    assert not arriving.arrived(), "another process might think otherwise"
