"""The training loop that pretraining and finetuning share: one step function, checkpoints, resumption.

Nothing here draws from a generator that outlives a step: torch's generators are seeded anew from (seed, step), and
crops and masks come from counters. So the state of a run is its step, its weights and its optimiser, and a run that
continues from any checkpoint takes the same steps, bit for bit, on the same CPU with the same number of threads.
"""

import contextlib
import functools
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from jmm_fast.data import Draft
from jmm_fast.errors import SharedError
from jmm_fast.memory import peak_bytes
from jmm_fast.progress import Progress
from jmm_fast.train import checkpoint, distributed, sharding
from jmm_fast.train.activations import kept_bytes, tensors_of
from jmm_fast.train.config import FinetuneConfig, OptimConfig, RunConfig
from jmm_fast.train.graph import Capture, StepGraphs, draws
from jmm_fast.train.ledger import Ledger, Step
from jmm_fast.train.metrics import Metrics
from jmm_fast.train.optim import keep_rates_in_memory, set_learning_rate
from jmm_fast.train.schedule import learning_rate
from jmm_fast.train.trace import Named, Trace

PARTS = ("data wait", "forward", "backward", "update", "graph", "save and log")


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
    nonfinite: Literal["stop", "skip"] = "stop"
    nonfinite_limit: int = 10
    shard: Literal["none", "full"] = "none"

    @classmethod
    def of(cls, run: RunConfig, stage: RunConfig | FinetuneConfig, optim: OptimConfig) -> "LoopConfig":
        """Length and seed of a ``stage`` of ``run``, which is pretraining or finetuning; the rest is the run's."""
        return cls(
            epochs=stage.epochs,
            warmup_epochs=stage.warmup_epochs,
            optim=optim,
            seed=stage.seed,
            dtype=run.dtype,
            log_every=run.log_every,
            checkpoint_every=run.checkpoint_every,
            keep=run.keep,
            nonfinite=run.nonfinite,
            nonfinite_limit=run.nonfinite_limit,
            shard=run.shard,
        )


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
    gradients: Callable[[Callable], Tensor] | None = None,
    buffers: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Forward, loss, backward, clip, update; the host waits for none of it.

    Args:
        loss_of: computes the scalar loss of the step's batch.
        optimizer: a fused one; the others do not look at ``found_inf``.
        rate: learning rate before each group's scale.
        seed, step: dropout and drop path draw from generators seeded with both.
        clip_grad: the gradient is scaled down to this norm where it is longer.
        gradients: in place of ``loss_of``: leaves the gradients in the parameters and returns the loss; computes the
            forward pass in the context that its argument makes.
        buffers: what the forward pass changes besides: running statistics.

    Returns:
        The loss and the norm of the gradient before it was clipped, scalars on the device. Where either is not finite,
        weights, buffers and optimiser are as before the step.
    """
    torch.manual_seed(step_seed(seed, step))
    set_learning_rate(optimizer, rate)
    return _compute(
        loss_of, optimizer, device=device, dtype=dtype, clip_grad=clip_grad, gradients=gradients, buffers=buffers
    )


def _compute(
    loss_of: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    device: torch.device,
    dtype: str,
    clip_grad: float | None,
    gradients: Callable[[Callable], Tensor] | None = None,
    buffers: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """What :func:`train_step` does on the device: a CUDA graph can hold it."""
    before = [buffer.clone() for buffer in buffers]
    optimizer.zero_grad(set_to_none=True)
    if gradients is not None:
        loss = gradients(lambda: autocast(device, dtype))
    else:
        with record_function("forward"), autocast(device, dtype):
            loss = loss_of()
        with record_function("backward"):
            loss.backward()
        loss = loss.detach()
    return _update(loss, optimizer, clip_grad=clip_grad, buffers=buffers, before=before)


def _update(
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    *,
    clip_grad: float | None,
    buffers: Sequence[Tensor],
    before: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """The end of a step: its gradients are there, ``before`` is what ``buffers`` held when it began."""
    with record_function("update"):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = sharding.total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        bad = ~(loss.isfinite() & norm.isfinite())
        # Both are read by the kernel of the update: a branch here would wait for the device.
        optimizer.found_inf = bad.float()
        optimizer.grad_scale = None if clip_grad is None else (norm / clip_grad).clamp(min=1)
        optimizer.step()
        for buffer, old in zip(buffers, before, strict=True):
            buffer.copy_(torch.where(bad, old, buffer))
    return loss, norm


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
    profile: bool = False,
    after_epoch: Callable[[int], dict] | None = None,
    capture: Capture | None = None,
    say: Callable[[str], None] = print,
) -> float:
    """Train ``model`` for ``config.epochs``, leaving ``metrics.jsonl`` and ``checkpoints/`` in ``folder``.

    The host waits for the device before a checkpoint and after an epoch. A line of metrics is written when its numbers
    have come from the device, while later steps run; only the next line waits for them. SIGUSR1 asks for a checkpoint
    after the step in hand. Of several processes (:mod:`jmm_fast.train.distributed`) the first reads and writes the
    files.

    Args:
        batches: ``len(batches)`` steps an epoch; ``batches.epoch(e, start)`` iterates over the batches of epoch ``e``
            from number ``start`` on; of several processes, over this one's part of each.
        loss_of: ``(batch, epoch) -> (loss, weight)``, the mean over ``weight`` terms; called in training mode. In a
            captured step ``epoch`` is a tensor.
        fingerprint: of the data; a run is not continued on other data.
        resume: continue from the newest whole checkpoint of ``folder``, if there is one.
        profile: write where the time of a few steps goes to ``profile/``.
        after_epoch: called with the number of finished epochs; the numbers that it returns go to the metrics.
        capture: captures steps (:class:`jmm_fast.train.graph.StepGraphs`) of a model that draws nothing at random, for
            which ``batches`` has drafts; None: steps are not captured.

    Returns:
        Seconds of training, over all launches.

    Raises:
        UserError: no batch, checkpoint of another network or other data, nothing can be written; loss or gradient not
            finite (the batch is in ``nonfinite.json``), by the policy of ``config``.
        Stopped: on SIGINT or SIGTERM, after the checkpoint is saved.
    """
    per_epoch = len(batches)
    if per_epoch == 0:
        raise SharedError("the training split gives no batch: it holds no clip, or fewer than one batch of them")
    total = per_epoch * config.epochs
    folder_of_checkpoints = folder / "checkpoints"
    ledger = Ledger(folder, config.nonfinite, config.nonfinite_limit, say)
    step, seconds = 0, 0.0

    def open_checkpoints() -> checkpoint.Checkpoint | None:
        for leftover in folder.rglob(".*.part"):
            # A writer that was killed cannot remove its temporary file.
            leftover.unlink(missing_ok=True)
        if not resume and folder_of_checkpoints.exists():
            shutil.rmtree(folder_of_checkpoints)
        return checkpoint.latest(folder_of_checkpoints, say) if resume else None

    found = distributed.from_first(open_checkpoints)
    activations = None

    def objective(batch, epoch: int | Tensor) -> tuple[Tensor, Tensor | int]:
        nonlocal activations
        loss, weight = loss_of(batch, epoch)
        if activations is None:
            activations = kept_bytes(loss, [*model.parameters(), *model.buffers(), *tensors_of(batch)])
        return loss, weight

    shared = None
    if distributed.size() * config.optim.accumulate > 1:
        shared = distributed.Shared(
            model, optimizer, objective, config.optim.accumulate, config.shard, captured=capture is not None
        )
    if found is not None:
        if found.record["fingerprint"] != fingerprint:
            raise SharedError(f"{folder} was trained on other data than the file given: a resumed run keeps its data")
        if found.record["per_epoch"] != per_epoch:
            raise SharedError(
                f"{found.path}: an epoch had {found.record['per_epoch']} steps, now it would have {per_epoch}: "
                "a resumed run keeps its split and batch size"
            )
        distributed.together(lambda: checkpoint.restore(found, model, optimizer))
        step, seconds = found.record["step"], found.record["seconds"]
        ledger.state = {name: found.record.get(name, value) for name, value in ledger.state.items()}
        say(f"continuing after step {step} of {total}")
    elif resume:
        say("no checkpoint yet: starting from the beginning")

    first = distributed.is_first()
    take, items = steps(model, optimizer, batches, objective, config, device, shared, capture, say)
    waited = Named("data wait")
    began = time.monotonic() - seconds
    logged, logged_wait, logged_samples, memory, peak = time.monotonic(), 0.0, 0, 0, ""
    exchange = distributed.Exchange()
    metrics = Metrics(folder, step, written=first)

    def write_line(step: int, rate: float, samples: int, wait: float, memory: int) -> None:
        """Of the steps since the line before, which are counted now: the clock shows when the device was done."""
        nonlocal logged
        now = time.monotonic()
        mean, state = ledger.mean("log"), ledger.state
        if mean is not None:
            metrics.write(
                "train",
                step,
                epoch=step / per_epoch,
                loss=mean,
                lr=rate,
                samples_per_s=samples / max(now - logged, 1e-9),
                grad_norm=state["norm"],
                data_wait=wait / max(now - logged, 1e-9),
                peak_memory=memory,
                activation_memory=activations,
                **({"skipped": state["skipped"]} if state["skipped"] else {}),
                time=now - began,
            )
        logged = now

    try:
        with (
            _Signals() as signals,
            checkpoint.Writer(folder_of_checkpoints, config.keep) as writer,
            Progress(title, total, step, shown=first) as progress,
            Trace(folder / "profile", device, PARTS, say) if profile and first else contextlib.nullcontext() as trace,
        ):
            for epoch in range(step // per_epoch, config.epochs):
                model.train()
                for batch in waited.of(items(epoch, start=step % per_epoch)):
                    rate = learning_rate(
                        step / per_epoch,
                        lr=config.optim.lr,
                        min_lr=config.optim.min_lr,
                        warmup_epochs=config.warmup_epochs,
                        epochs=config.epochs,
                    )
                    loss, norm = take(batch, epoch, rate, step)
                    ledger.add(Step(step=step, epoch=epoch, rate=rate, index=batch.index, loss=loss, norm=norm))
                    step += 1
                    logs = step % config.log_every == 0 or step == total
                    # Several processes stop together, after the step in which all learned of the signal.
                    samples, stop, wanted = exchange(len(batch.index), *signals.take(), now=logs)
                    logged_samples += samples
                    saves = step % per_epoch == 0 or step % config.checkpoint_every == 0 or stop or wanted
                    with record_function("save and log"):
                        line = None
                        if logs:
                            memory = peak_memory(device)
                            peak = f"  peak {memory / 2**30:.2f} GiB, activations {activations / 2**30:.2f}"
                            wait = waited.seconds - logged_wait
                            line = functools.partial(write_line, step, rate, logged_samples, wait, memory)
                            logged_samples, logged_wait = 0, waited.seconds
                        if logs or saves:
                            ledger.send(line)
                        ledger.read(wait=saves)
                        last = "" if ledger.state["loss"] is None else f"  loss {ledger.state['loss']:.4f}"
                        progress.advance(samples, f"epoch {epoch + 1}/{config.epochs}{last}{peak}")
                        if step % per_epoch == 0:
                            mean = ledger.mean("epoch")
                            values = {} if mean is None else {"loss": mean}
                            if after_epoch is not None:
                                values |= after_epoch(epoch + 1)
                            metrics.write("epoch", step, epoch=epoch + 1, **values, time=time.monotonic() - began)
                        writer.check()
                        if saves:
                            seconds = time.monotonic() - began
                            state = {"fingerprint": fingerprint, "per_epoch": per_epoch, "seconds": seconds}
                            if first:
                                writer.save(step, model, optimizer, ledger.state | state)
                            else:
                                checkpoint.contribute(model, optimizer)
                    if wanted:
                        say(f"checkpoint of step {step} of {total} asked for by a signal")
                    if stop and step < total:
                        writer.wait()
                        raise Stopped(
                            f"stopped after step {step} of {total}, checkpoint saved: --resume continues", stop
                        )
                    if trace is not None:
                        trace.step(activations)
    finally:
        metrics.close()
    return seconds


def steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches,
    loss_of: Callable[[object, int | Tensor], tuple[Tensor, Tensor | int]],
    config: LoopConfig,
    device: torch.device,
    shared: distributed.Shared | None,
    capture: Capture | None,
    say: Callable[[str], None],
) -> tuple[Callable[[object, int, float, int], tuple[Tensor, Tensor]], Callable]:
    """How a step is taken, ``(batch, epoch, rate, step) -> (loss, norm)``, and where its batches come from."""
    buffers = [value for value in model.state_dict(keep_vars=True).values() if not isinstance(value, nn.Parameter)]
    how = {"device": device, "dtype": config.dtype, "clip_grad": config.optim.clip_grad, "buffers": buffers}

    def take(batch, epoch: int, rate: float, step: int) -> tuple[Tensor, Tensor]:
        return train_step(
            lambda: loss_of(batch, epoch)[0],
            optimizer,
            rate=rate,
            seed=config.seed,
            step=step,
            gradients=None if shared is None else functools.partial(shared.backward, batch, epoch),
            **how,
        )

    if capture is None:
        return take, batches.epoch
    assert not draws(model), "such steps cannot be captured"

    def compute(draft: Draft) -> tuple[Tensor, ...]:
        batch, epoch = batches.make(draft), draft.parts()["epoch"]
        if shared is None:
            return _compute(lambda: loss_of(batch, epoch)[0], optimizer, **how)
        return (shared.own(batch, epoch, lambda: autocast(device, config.dtype)),)

    graphs = StepGraphs(compute, capture, rows=batches.most_rows(), say=say)
    if shared is None:
        keep_rates_in_memory(optimizer)

    # Nothing in it draws from torch's generators, so there is nothing to seed.
    def take_captured(draft: Draft, _epoch: int, rate: float, _step: int) -> tuple[Tensor, Tensor]:
        set_learning_rate(optimizer, rate)
        before = [] if shared is None else [buffer.clone() for buffer in buffers]
        with record_function("graph"):
            results = graphs(draft)
        if shared is None:
            return results
        loss = shared.combine(*results)
        return _update(loss, optimizer, clip_grad=config.optim.clip_grad, buffers=buffers, before=before)

    return take_captured, batches.drafts


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on the GPU, or that the process took, so far."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes()


class _Signals:
    """Remembers signals so that the step in hand can end; a second SIGINT or SIGTERM acts at once."""

    def __init__(self) -> None:
        self._stop = 0
        self._wanted = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def take(self) -> tuple[int, bool]:
        """Which of SIGINT and SIGTERM came, or 0, and whether SIGUSR1 asked for a checkpoint since the last call."""
        wanted, self._wanted = self._wanted, False
        return self._stop, wanted

    def _catch(self, number: int, _frame) -> None:
        if number == signal.SIGUSR1:
            self._wanted = True
        elif self._stop:
            raise KeyboardInterrupt
        else:
            self._stop = number
