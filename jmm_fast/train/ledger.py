"""The losses of a run: read from the device a few steps at a time, summed, and stopped at where they are not finite."""

import json
import math
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


class Ledger:
    """Takes note of steps without waiting for the device; :meth:`read` waits once for all of them.

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
        self._unread: list[Step] = []
        self._bad: list[dict] = []

    def add(self, step: Step) -> None:
        self._unread.append(step)

    def read(self) -> None:
        """Read what was added.

        Raises:
            UserError: too many steps in a row were not finite; names the file with their clips.
        """
        if not self._unread:
            return
        steps, self._unread = self._unread, []
        numbers = torch.stack([torch.stack([step.loss.float(), step.norm.float()]) for step in steps]).tolist()
        state, before = self.state, self.state["skipped"]
        for step, (loss, norm) in zip(steps, numbers, strict=True):
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
