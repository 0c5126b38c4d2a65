"""What the user sees while something takes long: a bar on a terminal, plain lines elsewhere."""

import sys
import threading
import time


class Progress:
    """A progress bar with throughput and time left on a terminal, plain lines elsewhere.

    Args:
        title: what is being done.
        total: steps altogether.
        done: steps that were done before (a resumed run).
        every: seconds between plain lines.
        unit: what the throughput counts.
        shown: False says nothing at all.

    Several threads may advance it.
    """

    def __init__(
        self,
        title: str,
        total: int,
        done: int = 0,
        every: float = 15.0,
        *,
        step: str = "step",
        unit: str = "samples",
        shown: bool = True,
    ) -> None:
        self.title, self.total, self.done = title, total, done
        self._step, self._unit = step, unit
        self._lock = threading.Lock()
        self._every = every
        self._shown = shown
        self._began = self._said = time.monotonic()
        self._fresh = 0
        self._samples = 0
        self._bar = None
        if shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[speed]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(title, total=total, completed=done, speed="", left="", note="")

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, samples: int, note: str = "") -> None:
        """One step with ``samples`` clips is done; ``note`` is a few words such as the loss."""
        if not self._shown:
            return
        with self._lock:
            self._advance(samples, note)

    def _advance(self, samples: int, note: str) -> None:
        self.done += 1
        self._fresh += 1
        self._samples += samples
        now = time.monotonic()
        last = self.done >= self.total
        if self._bar is None and now - self._said < self._every and not (last and now - self._began >= 1.0):
            return
        seconds = max(now - self._began, 1e-9)
        speed = f"{self._samples / seconds:.1f} {self._unit}/s"
        left = f"{_clock((self.total - self.done) * seconds / self._fresh)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, speed=speed, left=left, note=note)
        else:
            self._said = now
            place = f"{self.title}: {self._step} {self.done}/{self.total}"
            print(f"{place}  {note}  {speed}  {left}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
