"""Metrics as JSON lines and TensorBoard events."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from jmm_fast.errors import UserError
from jmm_fast.files import atomic_write_text

MEASURED = ("time", "samples_per_s", "data_wait", "peak_memory", "activation_memory")
"""Values of a line that another launch of the same run measures anew; all others it computes again."""


def cut_after(path: Path, step: int) -> None:
    """Drop the lines of ``path`` that belong to steps after ``step``, and a last line that was cut short.

    A run that continues from the checkpoint of ``step`` writes those steps again.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and record.get("step", 0) <= step:
            kept.append(line + "\n")
    atomic_write_text(path, "".join(kept))


def read_lines(path: Path) -> list[dict]:
    """Objects of a JSON-lines file; a last line cut short by a crash is left out. Empty when the file is absent."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


class Metrics:
    """Append-only writer of ``metrics.jsonl`` and, where TensorBoard is installed, of its events.

    Each line goes to the system at once, so ``kill -9`` loses at most the line being written.

    Args:
        folder: the run; lines go to ``metrics.jsonl``, events to ``tensorboard/``.
        step: step that the run continues from: later lines are cut, later events are marked as superseded.
        written: False writes nothing (a process that is not the first of several).

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, folder: Path, step: int = 0, *, written: bool = True) -> None:
        self.path = folder / "metrics.jsonl"
        self._file = self._events = None
        if not written:
            return
        cut_after(self.path, step)
        with _writing(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a", encoding="utf-8")
        with _writing(folder / "tensorboard"):
            self._events = _event_writer(folder / "tensorboard", step)

    def write(self, kind: str, step: int, **values) -> None:
        """Append one line and one event per number."""
        if self._file is None:
            return
        with _writing(self.path):
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()
        if self._events is not None:
            with _writing(self.path.parent / "tensorboard"):
                for name, value in values.items():
                    if isinstance(value, int | float) and name != "time":
                        self._events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        if self._file is None:
            return
        with _writing(self.path):
            self._file.close()
        if self._events is not None:
            with _writing(self.path.parent / "tensorboard"):
                self._events.close()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn a full disk into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _event_writer(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
