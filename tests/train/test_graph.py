"""Captured steps. Without a GPU a recorder stands for CUDA graphs; steps of several processes: test_distributed.py."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from jmm_fast import ops
from jmm_fast.data import BodyBatches, Draft
from jmm_fast.errors import UserError
from jmm_fast.models import load_encoder
from jmm_fast.train import distributed, graph, loop
from jmm_fast.train.graph import StepGraphs
from jmm_fast.train.metrics import MEASURED, read_lines
from jmm_fast.train.pretrain import pretrain

sys.path.insert(0, str(Path(__file__).parent))
import recorder
from recorder import Recorder


@pytest.fixture
def recorded(monkeypatch):
    """Pretraining with captured steps, here."""
    Recorder.made = []
    monkeypatch.setattr(graph, "wanted", lambda *_: True)
    monkeypatch.setattr(graph, "CudaGraphs", Recorder)
    return Recorder.made


@pytest.fixture
def long(config):
    """24 steps, each written."""
    return dataclasses.replace(config, epochs=8, log_every=1, checkpoint_every=100)


def run(clips, config, out):
    """Weights and metrics of a run."""
    pretrain(config, data=clips, out=out, say=lambda _: None)
    lines = [{k: v for k, v in line.items() if k not in MEASURED} for line in read_lines(out / "metrics.jsonl")]
    return list(load_encoder(out).parameters()), lines


def same(ours, other):
    return ours[1] == other[1] and all(torch.equal(a, b) for a, b in zip(ours[0], other[0], strict=True))


@pytest.fixture
def gathered(monkeypatch):
    monkeypatch.setattr(BodyBatches, "_held_frames", lambda self: None)


CASES = {
    "plain": {},
    "reference": {"backend": "reference"},
    "bfloat16": {"dtype": "bfloat16"},
    "clipped": {"optim": {"clip_grad": 0.5}},
    "bones": {"data": {"modality": "bone_motion", "rotation": 0.0}},
    "kept": {"data": {"empty_bodies": "keep"}},
}


def changed(config, values):
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
            for name, value in values.items()
        },
    )


@pytest.mark.parametrize("case", CASES)
def test_captured_steps_give_the_same_weights(clips, long, tmp_path, recorded, case, monkeypatch):
    config = changed(long, CASES[case])
    ours = run(clips, config, tmp_path / "captured")
    (made,) = recorded
    assert made.warm_ups + made.replays == 24 and made.replays >= 12
    assert made.captures == 1 if case == "kept" else made.captures > 2
    monkeypatch.setattr(graph, "wanted", lambda *_: False)
    assert same(ours, run(clips, config, tmp_path / "plain"))
    assert len({line["loss"] for line in ours[1]}) > 20, "no two steps are alike"


def test_captured_steps_where_joints_are_missing_and_frames_are_sent(
    gappy_clips, long, tmp_path, recorded, gathered, monkeypatch
):
    ours = run(gappy_clips, long, tmp_path / "captured")
    assert recorded[0].replays >= 12
    monkeypatch.setattr(graph, "wanted", lambda *_: False)
    assert same(ours, run(gappy_clips, long, tmp_path / "plain"))


def test_few_graphs_are_kept_and_nothing_depends_on_it(clips, long, tmp_path, recorded, monkeypatch):
    ours = run(clips, long, tmp_path / "many")
    monkeypatch.setattr(StepGraphs.__init__, "__kwdefaults__", StepGraphs.__init__.__kwdefaults__ | {"limit": 2})
    assert same(ours, run(clips, long, tmp_path / "two"))
    many, two = recorded
    assert two.warm_ups > many.warm_ups


def test_a_run_goes_on_with_and_without_graphs(clips, long, tmp_path, recorded, monkeypatch):
    whole = run(clips, long, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stopping(epochs):
        def after(self, epoch, start=0):
            if epoch == epochs:
                raise Stop
            return drafts(self, epoch, start)

        return after

    drafts = BodyBatches.drafts
    monkeypatch.setattr(BodyBatches, "drafts", stopping(4))
    with pytest.raises(Stop):
        run(clips, long, tmp_path / "resumed")
    monkeypatch.undo()
    plain = dataclasses.replace(long, graph="off", prefetch=0)
    pretrain(plain, data=clips, out=tmp_path / "resumed", resume=True, say=lambda _: None)
    assert all(
        torch.equal(a, b) for a, b in zip(whole[0], load_encoder(tmp_path / "resumed").parameters(), strict=True)
    )


def stale_draft(monkeypatch):
    calls = []

    def once(self, other):
        if id(other) not in calls:
            calls.append(id(other))
            fill(self, other)

    fill = Draft.copy_into
    monkeypatch.setattr(Draft, "copy_into", once)


def stale_epoch(monkeypatch):
    draw = ops.motion_mask
    monkeypatch.setattr(ops, "motion_mask", lambda *args, epoch, **more: draw(*args, epoch=int(epoch), **more))
    monkeypatch.setattr(recorder, "CHECKS_ON_CPU", (*recorder.CHECKS_ON_CPU, Path(__file__).name))


def stale_rate(monkeypatch):
    monkeypatch.setattr(loop, "keep_rates_in_memory", lambda optimizer: None)


@pytest.mark.parametrize("mistake", [stale_draft, stale_epoch, stale_rate])
def test_what_is_stale_is_noticed(clips, long, tmp_path, recorded, monkeypatch, mistake):
    """Each of the three ways in which the world reaches a captured step is needed."""
    whole = run(clips, long, tmp_path / "right")
    mistake(monkeypatch)
    assert not same(whole, run(clips, long, tmp_path / "wrong"))


def test_a_step_that_looks_at_a_number_is_noticed(clips, long, tmp_path, recorded, monkeypatch):
    draw = ops.motion_mask
    monkeypatch.setattr(ops, "motion_mask", lambda *args, epoch, **more: draw(*args, epoch=int(epoch), **more))
    with pytest.raises(AssertionError, match=r"_local_scalar_dense.* waits for the device"):
        run(clips, long, tmp_path / "run")


class Counter:
    """A capture that notes what is asked of it."""

    def __init__(self, strict=True, fails=False):
        self.strict, self.fails, self.asked = strict, fails, []

    def warm_up(self, work):
        self.asked.append("warm up")
        return work()

    def capture(self, work):
        self.asked.append("capture")
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")
        return lambda: (self.asked.append("replay"), work())[1]


def draft(bodies, clips, value=0, frames=None):
    return Draft(
        numbers=torch.full((5,), value), shape=(bodies, clips), index=torch.arange(clips), bodies=None, turned=False,
        frames=frames,
    )  # fmt: skip


def step(given):
    return (given.numbers.sum(), given.numbers[0] + 0)


def test_shapes_are_captured_when_met_again_and_the_least_used_is_dropped():
    counter = Counter()
    graphs = StepGraphs(step, counter, rows=1, limit=2)

    def take(*shape):
        counter.asked.clear()
        assert graphs(draft(*shape, value=shape[0]))[1].item() == shape[0]
        return counter.asked

    assert take(3, 2) == ["warm up"]
    assert take(3, 2) == ["capture", "replay"]
    assert take(3, 2) == ["replay"]
    assert take(3, 3) == ["warm up"], "as many bodies in another number of clips"
    assert take(3, 2) == ["replay"]
    assert take(4, 2) == ["warm up"]
    assert take(3, 2) == ["replay"], "what was used last is kept"
    assert take(3, 3) == ["warm up"], "and the other was dropped"


def test_inputs_lie_in_one_place_per_shape_and_frames_in_one_for_all():
    seen = []
    graphs = StepGraphs(
        lambda given: (seen.append(given), given.numbers.sum(), given.numbers.sum())[1:], Counter(), rows=9
    )
    for bodies, count in ((1, 4), (2, 7), (1, 9)):
        graphs(draft(bodies, 1, value=bodies, frames=torch.full((count, 2, 3), float(count))))
    first, second, again = seen[0], seen[1], seen[-1]
    assert again.numbers.data_ptr() == first.numbers.data_ptr() != second.numbers.data_ptr()
    assert first.frames is second.frames and first.frames.shape == (9, 2, 3) and (first.frames == 9).all()
    assert first.index is None and first.bodies is None, "these are the host's, and would be those of the first draft"


def test_a_capture_that_fails():
    message = r"the step cannot be captured as a CUDA graph \(operation not permitted .* capturing\): set graph off"
    graphs = StepGraphs(step, Counter(fails=True), rows=1)
    graphs(draft(1, 1))
    with pytest.raises(UserError, match=message):
        graphs(draft(1, 1))
    said, counter = [], Counter(strict=False, fails=True)
    graphs = StepGraphs(step, counter, rows=1, say=said.append)
    assert [graphs(draft(1, 1, value=value))[1].item() for value in range(4)] == [0, 1, 2, 3]
    assert said == ["steps run without CUDA graphs: operation not permitted when stream is capturing"]
    assert counter.asked == ["warm up", "capture"]


def test_where_graphs_are_wanted(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert (
        graph.wanted("auto", gpu, 1, "none")
        and graph.wanted("on", gpu, 1, "none")
        and not graph.wanted("off", gpu, 1, "none")
    )
    assert not graph.wanted("auto", cpu, 1, "none") and not graph.wanted("auto", gpu, 2, "none")
    with pytest.raises(UserError, match="graph is on, but CUDA graphs need a GPU, the device is cpu: expected auto or"):
        graph.wanted("on", cpu, 1, "none")
    with pytest.raises(UserError, match=r"graph is on, but optim.accumulate is 2"):
        graph.wanted("on", gpu, 2, "none")
    monkeypatch.setattr(distributed, "size", lambda: 2)
    assert graph.wanted("auto", gpu, 1, "none") and not graph.wanted("auto", gpu, 1, "full")
    with pytest.raises(UserError, match="graph is on, but shard is full, and shards come together in the middle of a"):
        graph.wanted("on", gpu, 1, "full")


def test_a_run_that_cannot_have_graphs_is_refused_before_it_starts(clips, config, tmp_path):
    with pytest.raises(UserError, match="graph is on, but CUDA graphs need a GPU"):
        pretrain(dataclasses.replace(config, graph="on"), data=clips, out=tmp_path / "run", say=lambda _: None)
    assert not (tmp_path / "run").exists()


def test_what_draws_at_random_is_known():
    from jmm_fast.models.blocks import DropPath

    for module, expected in ((nn.Dropout(0.1), True), (nn.Dropout(0.0), False), (DropPath(0.2), True)):
        assert graph.draws(nn.Sequential(nn.Linear(2, 2), module)) == expected
    assert not graph.draws(nn.Sequential(DropPath(0.0)))


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@gpu
@pytest.mark.parametrize("case", ["plain", "bfloat16", "clipped", "bones"])
def test_gpu_graphs_train_as_plain_steps_do(clips, long, tmp_path, case):
    config = dataclasses.replace(changed(long, CASES[case]), device="cuda")
    ours, plain = (
        run(clips, dataclasses.replace(config, graph=setting), tmp_path / setting) for setting in ("on", "off")
    )
    for line, other in zip(ours[1], plain[1], strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4 if case != "bfloat16" else 1e-2)


@gpu
@pytest.mark.parametrize("capture", [True, False])
def test_no_gpu_step_waits_for_the_gpu(clips, config, tmp_path, monkeypatch, capture):
    """Nor for a line of metrics."""
    config = changed(config, {"device": "cuda", "graph": "on" if capture else "off", "epochs": 6, "log_every": 2})
    config = changed(config, {"checkpoint_every": 1000, "data": {"empty_bodies": "keep"}})
    steps, taken = loop.steps, []

    def guarded(work):
        def guard(*given, **more):
            # The first steps load kernels and are captured.
            torch.cuda.set_sync_debug_mode("error" if len(taken) >= 6 else "default")
            try:
                return work(*given, **more)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return guard

    def counted(*args):
        take, items = steps(*args)
        return guarded(lambda *given: (taken.append(given), take(*given))[1]), items

    monkeypatch.setattr(loop, "steps", counted)
    for name in ("send", "read"):
        monkeypatch.setattr(loop.Ledger, name, guarded(getattr(loop.Ledger, name)))
    pretrain(config, data=clips, out=tmp_path / "run", say=lambda _: None)
    assert len(taken) == 18
