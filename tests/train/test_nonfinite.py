"""A loss or gradient that is not finite: noticed without waiting at each step, and no weight of the run touched."""

import dataclasses
import itertools
import json
import math
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from jmm_fast.errors import UserError
from jmm_fast.train import checkpoint, ledger
from jmm_fast.train.config import OptimConfig
from jmm_fast.train.loop import LoopConfig, fit, train_step
from jmm_fast.train.metrics import MEASURED, read_lines
from jmm_fast.train.optim import adamw

CPU = torch.device("cpu")
CONFIG = LoopConfig(
    epochs=3,
    warmup_epochs=1,
    optim=OptimConfig(lr=0.05, min_lr=0.0),
    seed=7,
    dtype="float32",
    log_every=3,
    checkpoint_every=99,
    keep=99,
)


class Huge(torch.autograd.Function):
    """The loss unchanged, its gradient infinite."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


class Batch(SimpleNamespace):
    def split(self, parts):
        rows = zip(self.x.tensor_split(parts), self.index.tensor_split(parts), strict=True)
        return [Batch(x=x, clips=x, index=index, fault=self.fault) for x, index in rows]


class Batches:
    """Six batches an epoch; those whose step is in ``bad`` ruin loss or gradient."""

    def __init__(self, bad):
        self.bad = bad

    def __len__(self):
        return 6

    def epoch(self, epoch, start=0):
        for number in range(start, 6):
            step = 6 * epoch + number
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(8, 5, generator=generator)
            yield Batch(x=x, clips=x, index=torch.arange(8) + 10 * step, fault=self.bad.get(step))


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 5))


def loss_of(model, batch):
    # As in real life the fault is in the numbers: running statistics see it too.
    loss = (model(batch.x * (math.nan if batch.fault == "loss" else 1)) - batch.x).square().mean()
    return Huge.apply(loss) if batch.fault == "gradient" else loss


def run(folder, bad, resume=False, say=lambda _: None, **changes):
    model = network()
    config = dataclasses.replace(CONFIG, **changes)
    fit(
        model,
        adamw(model, config.optim),
        Batches(bad),
        lambda batch, epoch: (loss_of(model, batch), 1),
        config=config,
        folder=folder,
        device=CPU,
        title="test",
        fingerprint="data",
        resume=resume,
        say=say,
    )
    return {name: value.clone() for name, value in model.state_dict().items()}


class Late(ledger.Arriving):
    """Numbers that come after some more steps, as from a GPU, or when they are waited for."""

    def __init__(self, numbers):
        super().__init__(numbers)
        self.steps = 2

    def arrived(self):
        self.steps -= 1
        return self.steps < 0


class Waiting(ledger.Arriving):
    def arrived(self):
        return False


@pytest.fixture(params=[ledger.Arriving, Late, Waiting], ids=["at-once", "late", "waited-for"])
def arrival(request, monkeypatch):
    """When the losses come from the device."""
    monkeypatch.setattr(ledger, "Arriving", request.param)
    return request.param


@pytest.mark.parametrize("log_every", [2, 3, 4, 99])
@pytest.mark.parametrize("checkpoint_every", [4, 99])
def test_when_losses_arrive_changes_nothing(tmp_path, monkeypatch, log_every, checkpoint_every):
    changes = {"nonfinite": "skip", "nonfinite_limit": 3, "log_every": log_every, "checkpoint_every": checkpoint_every}
    made = []
    for kind in (ledger.Arriving, Late, Waiting):
        monkeypatch.setattr(ledger, "Arriving", kind)
        folder, said = tmp_path / kind.__name__, []
        state = run(folder, {3: "loss", 7: "gradient", 8: "loss"}, say=said.append, **changes)
        lines = [{k: v for k, v in line.items() if k not in MEASURED} for line in read_lines(folder / "metrics.jsonl")]
        saved = checkpoint.latest(folder / "checkpoints").record
        saved.pop("seconds")
        said = [line.replace(str(folder), "") for line in said]
        made.append((state, lines, saved, (folder / "nonfinite.json").read_text(), said))
    assert [line["step"] for line in made[0][1] if line["kind"] == "train"] == [*range(log_every, 18, log_every), 18]
    assert len(made[0][-1]) >= 1
    for state, *rest in made[1:]:
        assert rest == list(made[0][1:])
        assert_same(state, made[0][0])


@pytest.mark.parametrize("clip_grad", [None, 0.01])
@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_such_a_step_changes_nothing(fault, clip_grad):
    model = network()
    optimizer = adamw(model, OptimConfig(weight_decay=0.5))

    def step(number, fault):
        (batch,) = Batches({number: fault}).epoch(0, start=5)
        return train_step(
            lambda: loss_of(model, batch),
            optimizer,
            device=CPU,
            rate=0.1,
            seed=0,
            step=number,
            clip_grad=clip_grad,
            buffers=list(model.buffers()),
        )

    for number in (4, 5):
        step(number, None)
    before = checkpoint.snapshot(model, optimizer)
    loss, norm = step(5, fault)
    assert loss.isfinite() == (fault == "gradient") and not norm.isfinite()
    after = checkpoint.snapshot(model, optimizer)
    assert all(torch.equal(before[name], after[name]) for name in before)
    step(5, None)
    after = checkpoint.snapshot(model, optimizer)
    assert all(value.isfinite().all() for value in after.values())
    assert not torch.equal(before["model/0.weight"], after["model/0.weight"])


@pytest.mark.parametrize(
    ("fault", "what"), [("loss", "the loss is nan"), ("gradient", "the norm of the gradient is (inf|nan)")]
)
@pytest.mark.parametrize("log_every", [1, 3, 100])
def test_stop_names_the_batch_and_keeps_no_later_checkpoint(tmp_path, fault, what, log_every, arrival):
    with pytest.raises(UserError, match=rf"{what} at step 7 .*clips in .*nonfinite\.json\)") as caught:
        run(tmp_path, {7: fault}, log_every=log_every, checkpoint_every=4)
    assert "\n" not in str(caught.value)
    (batch,) = json.loads((tmp_path / "nonfinite.json").read_text())["batches"]
    assert (batch["step"], batch["epoch"]) == (7, 1)
    assert batch["clips"] == list(range(70, 78))
    assert math.isfinite(float(batch["loss"])) == (fault == "gradient") and batch["learning_rate"] > 0
    assert checkpoint.steps(tmp_path / "checkpoints") == [4, 6]
    found = checkpoint.latest(tmp_path / "checkpoints")
    assert all(value.isfinite().all() for value in found.tensors.values())


def test_skip_goes_on_counts_and_says(tmp_path, said):
    bad = {3: "loss", 7: "gradient", 8: "loss"}
    whole = run(tmp_path / "whole", bad, say=said.append, nonfinite="skip", nonfinite_limit=3)
    assert all(value.isfinite().all() for value in whole.values())
    lines = read_lines(tmp_path / "whole" / "metrics.jsonl")
    assert [line.get("skipped") for line in lines if line["kind"] == "train"] == [None, 1, 3, 3, 3, 3]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert len(said) == 2
    assert said[0].startswith("skipped 1 of the 3 steps before step 6: ") and said[1].endswith("(3 skipped so far)")
    batches = json.loads((tmp_path / "whole" / "nonfinite.json").read_text())["batches"]
    assert [batch["step"] for batch in batches] == [3, 7, 8]
    # The same weights whenever losses are read, and after a resumption.
    assert_same(whole, run(tmp_path / "often", bad, nonfinite="skip", nonfinite_limit=3, log_every=1))
    with pytest.raises(UserError, match="at step 8, as in 2 steps in a row"):
        run(tmp_path / "run", bad, nonfinite="skip", nonfinite_limit=2)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [6]
    with pytest.raises(UserError, match=r"is (nan|inf) at step 7"):
        run(tmp_path / "run", bad, resume=True)
    assert_same(whole, run(tmp_path / "run", bad, resume=True, nonfinite="skip", nonfinite_limit=3))
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["loss"] == lines[-1]["loss"]


def test_steps_in_a_row_are_counted_across_a_resumption(tmp_path):
    bad = {5: "loss", 6: "loss", 7: "loss"}
    run(tmp_path, bad, epochs=1, nonfinite="skip", nonfinite_limit=3)
    with pytest.raises(UserError, match="at step 7, as in 3 steps in a row"):
        run(tmp_path, bad, resume=True, nonfinite="skip", nonfinite_limit=3)


def test_lines_of_metrics_are_the_same_after_a_resumption(tmp_path):
    """Whose steps since the checkpoint were all skipped, too."""
    bad = {4: "loss", 5: "gradient", 9: "loss"}
    changes = {"nonfinite": "skip", "checkpoint_every": 4}
    run(tmp_path / "whole", bad, **changes)
    with pytest.raises(UserError, match="at step 4"):
        run(tmp_path / "run", bad, checkpoint_every=4)
    run(tmp_path / "run", bad, resume=True, **changes)
    whole, resumed = (
        [
            {name: value for name, value in line.items() if name not in MEASURED}
            for line in read_lines(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("whole", "run")
    )
    assert whole == resumed


def test_an_epoch_of_nothing_else(tmp_path):
    run(tmp_path, dict.fromkeys(range(6), "loss"), nonfinite="skip", nonfinite_limit=7)
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == [9, 12, 15, 18]
    assert ["loss" in line for line in lines if line["kind"] == "epoch"] == [False, True, True]


def assert_same(a, b):
    assert all(torch.equal(a[name], b[name]) for name in a)


class Reads(TorchDispatchMode):
    """Counts the numbers and truth values that are read from tensors: on a GPU the host waits for each."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func).startswith(("aten._local_scalar_dense", "aten.equal", "aten.nonzero"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("clip_grad", "accumulate"), [(None, 1), (0.01, 1), (0.01, 2)])
def test_the_host_waits_only_where_it_logs(tmp_path, monkeypatch, clip_grad, accumulate, arrival):
    waits = []

    class Counted(Batches):
        def epoch(self, epoch, start=0):
            for batch in super().epoch(epoch, start):
                waits.append(reads.count)
                yield batch

    def counted(original):
        def counts(*args, **kwargs):
            # The writer of checkpoints has host memory only.
            reads.count += threading.current_thread() is threading.main_thread()
            return original(*args, **kwargs)

        return counts

    for name in ("tolist", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
    model = network()
    optim = dataclasses.replace(CONFIG.optim, clip_grad=clip_grad, accumulate=accumulate)
    config = dataclasses.replace(CONFIG, optim=optim)
    with Reads() as reads:
        fit(
            model,
            adamw(model, config.optim),
            Counted({}),
            lambda batch, epoch: (loss_of(model, batch), 1),
            config=config,
            folder=tmp_path,
            device=CPU,
            title="test",
            fingerprint="data",
            say=lambda _: None,
        )
    during = [after - before for before, after in itertools.pairwise(waits)]
    # Every third step is logged; those of an epoch's end are waited for, all else may come later.
    reads_at = {ledger.Arriving: (3, 6, 9, 12, 15), Late: (5, 6, 11, 12, 17), Waiting: (6, 12)}[arrival]
    assert tuple(step for step, count in enumerate(during, 1) if count) == reads_at
