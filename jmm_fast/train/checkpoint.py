"""Checkpoints: one safetensors file per kept step, checksummed, whole or absent.

A file holds ``model/NAME`` and ``optimizer/NAME/KEY`` tensors; its header holds a JSON record (step, accumulators, data
fingerprint) and the SHA-256 of everything, so that a file cut short or damaged on disk is recognised and passed over.
"""

import hashlib
import json
import re
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from jmm_fast.errors import UserError
from jmm_fast.files import atomic_path
from jmm_fast.models import load_into
from jmm_fast.train import sharding

_NAME = re.compile(r"step-(\d{9})\.safetensors")


@dataclass(kw_only=True, slots=True)
class Checkpoint:
    """What :func:`load` read: the tensors by name, and the record that was saved with them."""

    path: Path
    tensors: dict[str, Tensor]
    record: dict


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies, in host memory, of all that a checkpoint of ``model`` and ``optimizer`` holds.

    Of shards the other processes have to :func:`contribute`.
    """
    tensors, copies = _state(model, optimizer), {}
    for name, value in tensors.items():
        # From a GPU all copies are under way together, and the host waits once.
        copies[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        copies[name].copy_(sharding.whole(value), non_blocking=True)
    for device in {value.device for value in tensors.values() if value.is_cuda}:
        torch.cuda.synchronize(device)
    return copies


def contribute(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give this process's shards to the :func:`snapshot` of the first one; does nothing without shards."""
    for value in _state(model, optimizer).values():
        sharding.whole(value)


def write(folder: Path, step: int, tensors: dict[str, Tensor], record: dict, keep: int) -> Path:
    """Write the checkpoint of ``step`` into ``folder`` and remove all but the newest ``keep``.

    Args:
        tensors: from :func:`snapshot`.

    Raises:
        UserError: the folder cannot be written or the disk is full; the checkpoints before are as they were.
    """
    text = json.dumps(record | {"step": step})
    path = folder / f"step-{step:09d}.safetensors"
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"record": text, "sha256": _digest(tensors, text)})
        except SafetensorError as error:
            # safetensors hides the system's error inside its own.
            raise OSError(str(error)) from error
    for old in steps(folder)[:-keep]:
        (folder / f"step-{old:09d}.safetensors").unlink(missing_ok=True)
    return path


class Writer:
    """Writes checkpoints in a thread, one at a time, while training goes on.

    Used as a context: at its end the checkpoint under way is finished. Every method raises the :class:`UserError` of
    a checkpoint that could not be written; the end of a context that another exception leaves does not.

    Args:
        folder: of the checkpoints.
        keep: newest checkpoints that stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future | None = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, *_) -> None:
        self._thread.shutdown()
        if kind is None:
            self.wait()

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, record: dict) -> None:
        """Copy the state of ``step`` and have it written; waits for the checkpoint before it, not for this one."""
        self.wait()
        tensors = snapshot(model, optimizer)
        self._writing = self._thread.submit(write, self.folder, step, tensors, record, self.keep)

    def check(self) -> None:
        """Do nothing, unless a checkpoint could not be written."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Return when no checkpoint is under way."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def steps(folder: Path) -> list[int]:
    """Steps whose checkpoints lie in ``folder``, ascending."""
    found = (_NAME.fullmatch(path.name) for path in folder.glob("step-*.safetensors"))
    return sorted(int(match[1]) for match in found if match)


def load(path: Path) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        UserError: missing, truncated or damaged; names the file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies: a view into the mapped file would change under us and need not be aligned.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        record = json.loads(metadata["record"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} is not a whole checkpoint: {' '.join(str(error).split())}") from error
    if metadata.get("sha256") != _digest(tensors, metadata["record"]):
        raise UserError(f"{path} is damaged: its checksum does not match")
    return Checkpoint(path=path, tensors=tensors, record=record)


def latest(folder: Path, say=print) -> Checkpoint | None:
    """The newest checkpoint of ``folder`` that is whole; None when there is none at all.

    Each one that is passed over is named through ``say``.

    Raises:
        UserError: there are checkpoints but all of them are damaged.
    """
    found = steps(folder)
    for step in reversed(found):
        try:
            return load(folder / f"step-{step:09d}.safetensors")
        except UserError as error:
            say(f"{error}; trying the checkpoint before it")
    if found:
        raise UserError(f"{folder} holds no whole checkpoint ({len(found)} are damaged): start again with --overwrite")
    return None


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Put the weights, and the optimiser's state, of ``checkpoint`` into ``model`` and ``optimizer``.

    Raises:
        UserError: the checkpoint belongs to a network of another shape; names the first tensor that differs.
    """
    weights = {k.removeprefix("model/"): v for k, v in checkpoint.tensors.items() if k.startswith("model/")}
    own = model.state_dict()
    # Another shape stays as it is, for load_into to refuse.
    fits = {name for name, value in weights.items() if name in own and own[name].shape == value.shape}
    weights |= {name: sharding.like(own[name], weights[name]) for name in fits}
    load_into(model, weights, checkpoint.path)
    if optimizer is None:
        return
    state: dict[int, dict[str, Tensor]] = {}
    index = 0
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            prefix = f"optimizer/{name}/"
            entries = {k.removeprefix(prefix): v for k, v in checkpoint.tensors.items() if k.startswith(prefix)}
            for key, value in entries.items():
                if value.ndim and value.shape != parameter.shape:
                    raise UserError(
                        f"{checkpoint.path}: {prefix}{key} is {list(value.shape)}, "
                        f"this network needs {list(parameter.shape)}"
                    )
            if entries:
                state[index] = {k: sharding.like(parameter, v) if v.ndim else v for k, v in entries.items()}
            index += 1
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that a checkpoint holds, by name, in the same order in every process."""
    found = {f"model/{name}": value for name, value in model.state_dict().items()}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found[f"optimizer/{name}/{key}"] = value
    return found


def _digest(tensors: dict[str, Tensor], record: str) -> str:
    digest = hashlib.sha256(record.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
