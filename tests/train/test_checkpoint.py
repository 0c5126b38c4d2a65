"""Checkpoints: whole or passed over, exact, and only for the network they belong to."""

import os
import threading

import pytest
import torch
from torch import nn

from jmm_fast.errors import UserError
from jmm_fast.train import checkpoint
from jmm_fast.train.config import OptimConfig
from jmm_fast.train.optim import adamw


def network(width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, 1))


def trained(steps: int, width: int = 3):
    torch.manual_seed(0)
    model = network(width)
    optimizer = adamw(model, OptimConfig())
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 2)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def save(folder, step, model, optimizer, keep=3, **record):
    return checkpoint.write(folder, step, checkpoint.snapshot(model, optimizer), record, keep)


def test_round_trip_is_exact(tmp_path):
    model, optimizer = trained(3)
    save(tmp_path, 3, model, optimizer, note="x")
    other, other_optimizer = trained(0)
    found = checkpoint.latest(tmp_path)
    checkpoint.restore(found, other, other_optimizer)
    assert found.record == {"note": "x", "step": 3}
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    batch = torch.randn(8, 2)
    for net, optim in ((model, optimizer), (other, other_optimizer)):
        optim.zero_grad()
        net(batch).square().mean().backward()
        optim.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_only_the_last_are_kept(tmp_path):
    model, optimizer = trained(1)
    for step in (1, 2, 10, 11):
        save(tmp_path, step, model, optimizer, keep=2)
    assert checkpoint.steps(tmp_path) == [10, 11]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-000000010.safetensors",
        "step-000000011.safetensors",
    ]


@pytest.mark.parametrize("damage", ["truncated", "emptied", "flipped"])
def test_a_damaged_newest_checkpoint_is_passed_over_aloud(tmp_path, damage, said):
    model, optimizer = trained(1)
    save(tmp_path, 1, model, optimizer)
    path = save(tmp_path, 2, model, optimizer)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-3] ^= 1
    path.write_bytes({"truncated": data[:-10], "emptied": b"", "flipped": data}[damage])
    found = checkpoint.latest(tmp_path, said.append)
    assert found.record["step"] == 1
    assert len(said) == 1 and "step-000000002.safetensors" in said[0] and "\n" not in said[0]


def test_all_damaged_is_an_error_none_is_not(tmp_path, said):
    assert checkpoint.latest(tmp_path, said.append) is None
    model, optimizer = trained(1)
    save(tmp_path, 1, model, optimizer).write_bytes(b"junk")
    with pytest.raises(UserError, match="no whole checkpoint"):
        checkpoint.latest(tmp_path, said.append)


def test_another_shape_is_one_line(tmp_path):
    model, optimizer = trained(1)
    found = checkpoint.load(save(tmp_path, 1, model, optimizer))
    with pytest.raises(UserError, match=r"0\.weight is \[3, 2\], this network needs \[4, 2\]"):
        checkpoint.restore(found, *trained(0, width=4))
    with pytest.raises(UserError, match="which this network lacks"):
        checkpoint.restore(found, network()[:2])
    with pytest.raises(UserError, match="holds no"):
        checkpoint.restore(found, nn.Sequential(*network(), nn.Linear(1, 1)))


def test_a_full_disk_leaves_the_old_checkpoint_and_no_scraps(tmp_path, monkeypatch):
    model, optimizer = trained(1)
    save(tmp_path, 1, model, optimizer)

    def full(*_args, **_kwargs):
        raise checkpoint.SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"cannot write .*step-000000002.*No space left"):
        save(tmp_path, 2, model, optimizer)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001.safetensors"]


@pytest.fixture
def slow_disk(monkeypatch):
    """Writes wait until ``go`` is set."""
    go, original = threading.Event(), checkpoint.save_file

    def waits(*args, **kwargs):
        assert go.wait(60)
        original(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", waits)
    yield go
    go.set()


def test_what_is_written_is_the_state_when_it_was_asked_for(tmp_path, slow_disk):
    model, optimizer = trained(3)
    asked = {name: value.clone() for name, value in checkpoint.snapshot(model, optimizer).items()}
    with checkpoint.Writer(tmp_path, 3) as writer:
        writer.save(3, model, optimizer, {"note": "x"})
        # It is not there yet, and training goes on.
        writer.check()
        assert checkpoint.steps(tmp_path) == []
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers(), *(s["exp_avg"] for s in optimizer.state.values())]:
                tensor.zero_()
        slow_disk.set()
    found = checkpoint.latest(tmp_path)
    assert found.record == {"note": "x", "step": 3}
    assert found.tensors.keys() == asked.keys()
    assert all(torch.equal(found.tensors[name], value) for name, value in asked.items())


def test_one_checkpoint_at_a_time(tmp_path, slow_disk):
    model, optimizer = trained(1)
    with checkpoint.Writer(tmp_path, 2) as writer:
        writer.save(1, model, optimizer, {})
        second = threading.Thread(target=writer.save, args=(2, model, optimizer, {}))
        second.start()
        second.join(0.1)
        assert second.is_alive()
        slow_disk.set()
        second.join(60)
        assert checkpoint.steps(tmp_path)[0] == 1
        writer.save(3, model, optimizer, {})
        writer.wait()
        assert checkpoint.steps(tmp_path) == [2, 3]


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        path = save(tmp_path, 1, *trained(1))
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_failed_write_is_told_once_by_whatever_comes_next(tmp_path, monkeypatch):
    model, optimizer = trained(1)

    def full(*_args, **_kwargs):
        raise checkpoint.SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)

    def failed():
        writer.save(1, model, optimizer, {})
        writer._thread.submit(int).result()

    with checkpoint.Writer(tmp_path, 2) as writer:
        for tells in (writer.check, writer.wait, lambda: writer.save(2, model, optimizer, {})):
            failed()
            with pytest.raises(UserError, match=r"cannot write .*step-000000001.*No space left"):
                tells()
            writer.check()
    with pytest.raises(UserError, match="No space left"), checkpoint.Writer(tmp_path, 2) as writer:
        failed()
    with pytest.raises(KeyError), checkpoint.Writer(tmp_path, 2) as writer:
        failed()
        raise KeyError
    assert list(tmp_path.iterdir()) == []
