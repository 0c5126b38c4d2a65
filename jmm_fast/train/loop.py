"""The training loop that pretraining and finetuning share: one step function, checkpoints, resumption.

Nothing here draws from a generator that outlives a step: torch's generators are seeded anew from (seed, step), and
crops and masks come from counters. So the state of a run is its step, its weights and its optimiser, and a run that
continues from any checkpoint takes the same steps, bit for bit, on the same CPU with the same number of threads.
"""

import contextlib
import functools
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from jmm_fast.errors import SharedError
from jmm_fast.progress import Progress
from jmm_fast.train import checkpoint, distributed
from jmm_fast.train.config import OptimConfig
from jmm_fast.train.metrics import Metrics
from jmm_fast.train.optim import set_learning_rate
from jmm_fast.train.schedule import learning_rate


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop; its checkpoint is saved. ``signum`` says which signal."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


@dataclass(kw_only=True, slots=True)
class LoopConfig:
    """What :func:`fit` needs to know of a run."""

    epochs: int
    warmup_epochs: int
    optim: OptimConfig
    seed: int
    dtype: str
    log_every: int
    checkpoint_every: int
    keep: int


def step_seed(seed: int, step: int) -> int:
    """Seed of torch's generators during ``step``: different for neighbouring seeds and steps."""
    # splitmix64's finaliser over both numbers; seeds such as 0 and 1 must not give related streams.
    value = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) & (2**64 - 1)
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (value ^ (value >> 31)) >> 1


def autocast(device: torch.device, dtype: str):
    """Context in which the forward pass computes in ``dtype``; weights stay float32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))


def train_step(
    loss_of: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    device: torch.device,
    rate: float,
    seed: int,
    step: int,
    dtype: str = "float32",
    clip_grad: float | None = None,
    gradients: Callable[[Callable], float] | None = None,
) -> tuple[float, float | None]:
    """Forward, loss, backward, clip, update.

    Args:
        loss_of: computes the scalar loss of the step's batch.
        rate: learning rate before each group's scale.
        seed, step: dropout and drop path draw from generators seeded with both.
        gradients: in place of ``loss_of``: leaves the gradients in the parameters and returns the loss; computes the
            forward pass in the context that its argument makes.

    Returns:
        The loss and, when gradients are clipped, their norm before that.

    Raises:
        UserError: the loss is not finite; the weights are as before the step.
    """
    torch.manual_seed(step_seed(seed, step))
    set_learning_rate(optimizer, rate)
    optimizer.zero_grad(set_to_none=True)
    if gradients is not None:
        value = gradients(lambda: autocast(device, dtype))
    else:
        with autocast(device, dtype):
            loss = loss_of()
        value = loss.item()
        if math.isfinite(value):
            loss.backward()
    if not math.isfinite(value):
        raise SharedError(
            f"the loss is {value} at step {step} (learning rate {rate:.2e}): try a smaller optim.lr, "
            "optim.clip_grad 1.0 or dtype float32"
        )
    norm = None
    if clip_grad is not None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients).item()
        if not norm <= clip_grad:
            # Most steps are within the bound, and then the gradients need not be written again.
            nn.utils.clip_grads_with_norm_(parameters, clip_grad, torch.tensor(norm))
    optimizer.step()
    return value, norm


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches,
    loss_of: Callable[[object, int], tuple[Tensor, Tensor | int]],
    *,
    config: LoopConfig,
    folder: Path,
    device: torch.device,
    title: str,
    fingerprint: str,
    resume: bool = False,
    after_epoch: Callable[[int], dict] | None = None,
    say: Callable[[str], None] = print,
) -> float:
    """Train ``model`` for ``config.epochs``, leaving ``metrics.jsonl`` and ``checkpoints/`` in ``folder``.

    Of several processes (:mod:`jmm_fast.train.distributed`) the first reads and writes the files.

    Args:
        batches: ``len(batches)`` steps an epoch; ``batches.epoch(e, start)`` iterates over the batches of epoch ``e``
            from number ``start`` on; of several processes, over this one's part of each.
        loss_of: ``(batch, epoch) -> (loss, weight)``, the mean over ``weight`` terms; called in training mode.
        fingerprint: of the data; a run is not continued on other data.
        resume: continue from the newest whole checkpoint of ``folder``, if there is one.
        after_epoch: called with the number of finished epochs; the numbers that it returns go to the metrics.

    Returns:
        Seconds of training, over all launches.

    Raises:
        UserError: no batch, loss not finite, checkpoint of another network or other data, nothing can be written.
        Stopped: on SIGINT or SIGTERM, after the checkpoint is saved.
    """
    per_epoch = len(batches)
    if per_epoch == 0:
        raise SharedError("the training split gives no batch: it holds no clip, or fewer than one batch of them")
    total = per_epoch * config.epochs
    folder_of_checkpoints = folder / "checkpoints"
    state = {"epoch_loss": 0.0, "epoch_steps": 0, "log_loss": 0.0, "log_steps": 0, "seconds": 0.0}
    step = 0

    def open_checkpoints() -> checkpoint.Checkpoint | None:
        for leftover in folder.rglob(".*.part"):
            # A writer that was killed cannot remove its temporary file.
            leftover.unlink(missing_ok=True)
        if not resume and folder_of_checkpoints.exists():
            shutil.rmtree(folder_of_checkpoints)
        return checkpoint.latest(folder_of_checkpoints, say) if resume else None

    found = distributed.from_first(open_checkpoints)
    if found is not None:
        if found.record["fingerprint"] != fingerprint:
            raise SharedError(f"{folder} was trained on other data than the file given: a resumed run keeps its data")
        if found.record["per_epoch"] != per_epoch:
            raise SharedError(
                f"{found.path}: an epoch had {found.record['per_epoch']} steps, now it would have {per_epoch}: "
                "a resumed run keeps its split and batch size"
            )
        distributed.together(lambda: checkpoint.restore(found, model, optimizer))
        step = found.record["step"]
        state = {name: found.record[name] for name in state}
        say(f"continuing after step {step} of {total}")
    elif resume:
        say("no checkpoint yet: starting from the beginning")

    accumulate = config.optim.accumulate
    shared = distributed.Shared(model, loss_of, accumulate) if distributed.size() * accumulate > 1 else None
    began = time.monotonic() - state["seconds"]
    logged = time.monotonic()
    logged_samples = 0

    def save() -> None:
        state["seconds"] = time.monotonic() - began
        if not distributed.is_first():
            return
        record = state | {"fingerprint": fingerprint, "per_epoch": per_epoch}
        checkpoint.save(folder_of_checkpoints, step, model, optimizer, record, config.keep)

    metrics = Metrics(folder, step, written=distributed.is_first())
    try:
        with _Signals() as signals, Progress(title, total, step, shown=distributed.is_first()) as progress:
            for epoch in range(step // per_epoch, config.epochs):
                model.train()
                for batch in batches.epoch(epoch, start=step % per_epoch):
                    rate = learning_rate(
                        step / per_epoch,
                        lr=config.optim.lr,
                        min_lr=config.optim.min_lr,
                        warmup_epochs=config.warmup_epochs,
                        epochs=config.epochs,
                    )
                    if shared is not None:
                        shared.signal = signals.caught
                    loss, norm = train_step(
                        lambda batch=batch, epoch=epoch: loss_of(batch, epoch)[0],
                        optimizer,
                        device=device,
                        rate=rate,
                        seed=config.seed,
                        step=step,
                        dtype=config.dtype,
                        clip_grad=config.optim.clip_grad,
                        gradients=None if shared is None else functools.partial(shared.backward, batch, epoch),
                    )
                    step += 1
                    samples = len(batch.index) if shared is None else shared.samples
                    # Several processes stop together, after the step in which all learned of the signal.
                    caught = signals.caught if shared is None else shared.signal
                    logged_samples += samples
                    for name in ("epoch", "log"):
                        state[f"{name}_loss"] += loss
                        state[f"{name}_steps"] += 1
                    progress.advance(samples, f"epoch {epoch + 1}/{config.epochs}  loss {loss:.4f}")
                    if step % config.log_every == 0 or step == total:
                        now = time.monotonic()
                        metrics.write(
                            "train",
                            step,
                            epoch=step / per_epoch,
                            loss=state["log_loss"] / state["log_steps"],
                            lr=rate,
                            samples_per_s=logged_samples / max(now - logged, 1e-9),
                            **({} if norm is None else {"grad_norm": norm}),
                            time=now - began,
                        )
                        logged, logged_samples = now, 0
                        state["log_loss"], state["log_steps"] = 0.0, 0
                    if step % per_epoch == 0:
                        values = {"loss": state["epoch_loss"] / state["epoch_steps"]}
                        state["epoch_loss"], state["epoch_steps"] = 0.0, 0
                        if after_epoch is not None:
                            values |= after_epoch(epoch + 1)
                        metrics.write("epoch", step, epoch=epoch + 1, **values, time=time.monotonic() - began)
                    if step % per_epoch == 0 or step % config.checkpoint_every == 0 or caught:
                        save()
                    if caught and step < total:
                        raise Stopped(
                            f"stopped after step {step} of {total}, checkpoint saved: --resume continues",
                            caught,
                        )
    finally:
        metrics.close()
    return state["seconds"]


class _Signals:
    """Remembers SIGINT and SIGTERM so that the step in hand can end; a second one acts at once."""

    def __init__(self) -> None:
        self.caught = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, _frame) -> None:
        if self.caught:
            raise KeyboardInterrupt
        self.caught = number
