"""Where a step's time goes: what ``--profile`` leaves in a run."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from jmm_fast.files import atomic_path, atomic_write_text
from jmm_fast.memory import peak_bytes

# The first steps allocate memory and choose kernels; a few more say as much as many.
UNTIMED, TIMED = 3, 5

Item = TypeVar("Item")


class Named:
    """Items of iterators, waited for under ``name`` in a profile.

    Attributes:
        seconds: the host's, spent waiting for items.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.seconds = 0.0

    def of(self, items: Iterable[Item]) -> Iterator[Item]:
        iterator = iter(items)
        while True:
            began = time.perf_counter()
            with record_function(self.name):
                item = next(iterator, iterator)
            self.seconds += time.perf_counter() - began
            if item is iterator:
                return
            yield item


class Trace:
    """Profiles a few steps of a run and writes ``trace.json`` (for chrome://tracing or Perfetto) and ``table.txt``.

    Used as a context; :meth:`step` is called after each step. The parts of a step are the host's time; on a GPU the
    list of operations is sorted by the device's.

    Args:
        folder: to write to.
        parts: names of :func:`torch.profiler.record_function` that a step consists of.
    """

    def __init__(self, folder: Path, device: torch.device, parts: tuple[str, ...], say: Callable[[str], None]) -> None:
        self.folder, self.device, self.parts, self.say = folder, device, parts, say
        self._written = False
        self._activations = 0
        # torch's profiler tells of its own start and stop on stderr.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=UNTIMED - 1, warmup=1, active=TIMED, repeat=1),
            on_trace_ready=self._write,
        )

    def __enter__(self) -> "Trace":
        self._profile.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._profile.__exit__(*error)
        if not self._written and error[0] is None:
            self.say(f"no profile: the run ended before its step {UNTIMED + TIMED}")

    def step(self, activations: int) -> None:
        """The step in hand ends here; ``activations``: bytes that a step keeps for its backward pass."""
        self._activations = activations
        self._profile.step()

    def _write(self, done: profile) -> None:
        averages = done.key_averages()
        steps = [event for event in averages if event.key.startswith("ProfilerStep")]
        if sum(event.count for event in steps) < TIMED:
            return
        with atomic_path(self.folder / "trace.json") as temporary:
            done.export_chrome_trace(str(temporary))
        atomic_write_text(self.folder / "table.txt", self._table(averages, steps))
        self._written = True
        self.say(f"profile written to {self.folder}")

    def _table(self, averages, steps: list) -> str:
        whole = sum(event.cpu_time_total for event in steps) / TIMED / 1e3
        found = {event.key: event.cpu_time_total / TIMED / 1e3 for event in averages if event.key in self.parts}
        rows = {name: found.get(name, 0.0) for name in self.parts}
        rows["rest"] = whole - sum(rows.values())
        lines = [f"{TIMED} steps on {self.device}, {whole:.2f} ms each", "", f"{'part':<12}{'ms':>10}{'share':>9}"]
        lines += [f"{name:<12}{spent:>10.2f}{spent / whole:>9.1%}" for name, spent in rows.items()]
        lines += ["", self._memory()]
        key = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        return "\n".join([*lines, "", averages.table(sort_by=key, row_limit=30), ""])

    def _memory(self) -> str:
        kept = f"activations kept for the backward pass: {self._activations / 2**20:.1f} MiB"
        if self.device.type != "cuda":
            return f"peak memory of the process: {peak_bytes() / 2**20:.0f} MiB; {kept}"
        held, peak = torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
        within = f"{(peak - held) / 2**20:.0f} of it within a step"
        return f"peak memory of tensors: {peak / 2**20:.0f} MiB, {within}; {kept}"
