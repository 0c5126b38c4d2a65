"""Several processes as torchrun would start them, forked from a server that has imported everything once."""

import contextlib
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from jmm_fast.cli import main
from jmm_fast.train.distributed import session

LIMIT = 120
"""Seconds after which a test gives up."""


@dataclass
class Ranks:
    """The processes of one launch; ``said(rank)`` is what one wrote, both streams together."""

    processes: list
    folder: Path

    def wait(self) -> list[int]:
        """Exit codes; none may still run after the limit."""
        limit = time.monotonic() + LIMIT
        for process in self.processes:
            process.join(max(0.0, limit - time.monotonic()))
        hanging = [process for process in self.processes if process.is_alive()]
        for process in hanging:
            process.kill()
        assert not hanging, [self.said(rank) for rank in range(len(self.processes))]
        return [process.exitcode for process in self.processes]

    def said(self, rank: int) -> str:
        path = self.folder / str(rank)
        return path.read_text() if path.exists() else ""


def free_port() -> int:
    """Of this machine."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(folder: Path, commands: list) -> Ranks:
    """One process per command line of ``jmm-fast``, joined as ranks 0, 1, ...; what they write goes into ``folder``.

    In place of a command line a function of a module, called in the session of the processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    # DistributedDataParallel imports the last one, which takes seconds.
    context.set_forkserver_preload(
        ["jmm_fast.train.pretrain", "jmm_fast.recipes", "torch.utils.tensorboard", "torch._dynamo"]
    )
    processes, port = [], free_port()
    for rank, command in enumerate(commands):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(commands), "MASTER_ADDR": "127.0.0.1"}
        place |= {"MASTER_PORT": port, "JMM_FAST_TIMEOUT": LIMIT / 2}
        command = command if callable(command) else [str(word) for word in command]
        process = context.Process(target=_run, args=(folder / str(rank), place, command))
        process.start()
        processes.append(process)
    return Ranks(processes, folder)


def _run(path: Path, place: dict, command: list[str] | Callable[[], None]) -> None:
    os.environ.update({name: str(value) for name, value in place.items()})
    output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    code = _call(command) if callable(command) else main(command)
    sys.stdout.flush()
    sys.stderr.flush()
    # As a program ends: without the clean-up of multiprocessing, which has nothing to clean up here.
    os._exit(code)


def _call(work: Callable[[], None]) -> int:
    try:
        with session():
            work()
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
