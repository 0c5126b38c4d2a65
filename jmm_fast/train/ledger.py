"""The losses of a run: sent to the host a few steps at a time, summed, and stopped at where they are not finite."""

import json
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from jmm_fast.errors import SharedError
from jmm_fast.files import atomic_write_text
from jmm_fast.train import distributed


@dataclass(kw_only=True, slots=True)
class Step:
    """A step that was taken, with its loss and gradient norm where they were computed."""

    step: int
    epoch: int
    rate: float
    index: Tensor
    loss: Tensor
    norm: Tensor


class Arriving:
    """Numbers on their way to host memory: the host does not wait for them until it reads them.

    Args:
        numbers: on any device; may be changed or dropped at once.
    """

    def __init__(self, numbers: Tensor) -> None:
        # A copy from a GPU runs beside the host only into pinned memory.
        self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=numbers.is_cuda)
        self._host.copy_(numbers, non_blocking=True)
        self._done = torch.cuda.current_stream(numbers.device).record_event() if numbers.is_cuda else None

    def arrived(self) -> bool:
        """Whether :meth:`read` would give them at once, in every process: of several with GPUs, nobody can tell."""
        return self._done is None or (distributed.size() == 1 and self._done.query())

    def read(self) -> list:
        """The numbers, as nested lists; waits until they are there."""
        if self._done is not None:
            self._done.synchronize()
        return self._host.tolist()


@dataclass(slots=True)
class _Sent:
    steps: list[Step]
    numbers: Arriving
    then: Callable[[], None] | None


class Ledger:
    """Takes note of steps without waiting for the device, and counts them when their numbers have come from there.

    Steps whose loss or gradient is not finite changed no weight (:func:`jmm_fast.train.loop.train_step` sees to that).
    They are left out of the sums and listed in ``nonfinite.json`` with their clips, newest last.

    Attributes:
        state: sums over the epoch and since the last line of metrics, newest finite loss and gradient norm, and skipped
            steps; goes into checkpoints.

    Args:
        folder: of the run.
        policy: ``stop`` raises at the first such step, ``skip`` at the ``limit``-th in a row.
    """

    def __init__(
        self, folder: Path, policy: Literal["stop", "skip"], limit: int, say: Callable[[str], None] = print
    ) -> None:
        self.path = folder / "nonfinite.json"
        self.limit = limit if policy == "skip" else 1
        self.say = say
        self.state = {"epoch_loss": 0.0, "epoch_steps": 0, "log_loss": 0.0, "log_steps": 0}
        self.state |= {"loss": None, "norm": None, "skipped": 0, "in_row": 0}
        self._unsent: list[Step] = []
        self._sent: deque[_Sent] = deque()
        self._bad: list[dict] = []

    def add(self, step: Step) -> None:
        self._unsent.append(step)

    def send(self, then: Callable[[], None] | None = None) -> None:
        """Send for the numbers of the steps, one at least, that were added since.

        Args:
            then: called when these steps, and none after them, are counted.
        """
        steps, self._unsent = self._unsent, []
        numbers = torch.stack([step.loss.float() for step in steps] + [step.norm.float() for step in steps])
        self._sent.append(_Sent(steps, Arriving(numbers.view(2, -1)), then))

    def read(self, *, wait: bool) -> None:
        """Count what was sent, in order.

        Args:
            wait: for all of it. If not, for all but what was sent last, which is counted if it happens to be there: the
                host is never further ahead of the device. Several processes count together, as they tell each other
                the clips of a step that was not finite.

        Raises:
            UserError: too many steps in a row were not finite; names the file with their clips.
        """
        while self._sent:
            sent = self._sent[0]
            if not wait and len(self._sent) == 1 and not sent.numbers.arrived():
                return
            self._sent.popleft()
            self._count(sent.steps, sent.numbers.read())
            if sent.then is not None:
                sent.then()

    def _count(self, steps: list[Step], numbers: list[list[float]]) -> None:
        state, before = self.state, self.state["skipped"]
        for step, loss, norm in zip(steps, *numbers, strict=True):
            if math.isfinite(loss) and math.isfinite(norm):
                state |= {"loss": loss, "norm": norm, "in_row": 0}
                for name in ("epoch", "log"):
                    state[f"{name}_loss"] += loss
                    state[f"{name}_steps"] += 1
                continue
            state["skipped"] += 1
            state["in_row"] += 1
            self._note(step, loss, norm)
            if state["in_row"] >= self.limit:
                self._stop(step, loss, norm)
        if state["skipped"] > before:
            self._write()
            self.say(
                f"skipped {state['skipped'] - before} of the {len(steps)} steps before step {steps[-1].step + 1}: "
                f"loss or gradient not finite, clips in {self.path} ({state['skipped']} skipped so far)"
            )

    def mean(self, name: Literal["epoch", "log"]) -> float | None:
        """Mean loss of the epoch, or since the last line of metrics, which then starts anew; None without a step."""
        total, steps = self.state[f"{name}_loss"], self.state[f"{name}_steps"]
        self.state[f"{name}_loss"], self.state[f"{name}_steps"] = 0.0, 0
        return total / steps if steps else None

    def _note(self, step: Step, loss: float, norm: float) -> None:
        clips = [clip for part in distributed.gather(step.index.tolist()) for clip in part]
        # Text: JSON has no number for these.
        self._bad.append(
            {"step": step.step, "epoch": step.epoch, "learning_rate": step.rate, "loss": str(loss)}
            | {"gradient_norm": str(norm), "clips": clips}
        )
        del self._bad[: -self.limit]

    def _write(self) -> None:
        if distributed.is_first():
            atomic_write_text(self.path, json.dumps({"batches": self._bad}, indent=2) + "\n")

    def _stop(self, step: Step, loss: float, norm: float) -> None:
        self._write()
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradient is {norm}"
        row = f", as in {self.limit} steps in a row" if self.limit > 1 else ""
        raise SharedError(
            f"{what} at step {step.step}{row} (learning rate {step.rate:.2e}, clips in {self.path}): try a smaller "
            "optim.lr, optim.clip_grad 1.0, dtype float32 or nonfinite skip"
        )
