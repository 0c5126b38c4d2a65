"""Models on disk: ours as safetensors beside a JSON config, the authors' as .pth or arrays."""

import dataclasses
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from jmm_fast.errors import UserError
from jmm_fast.files import atomic_path, atomic_write_text
from jmm_fast.models import convert
from jmm_fast.models.config import ModelConfig

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_FOREIGN = "it belongs to a network of another shape"

# Junk can break the unpickler in any of its steps.
_BROKEN_PICKLE = (
    pickle.UnpicklingError,
    struct.error,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
)


def write(folder: Path, config: ModelConfig, state: dict[str, Tensor]) -> None:
    """Write weights and config into ``folder``."""
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with atomic_path(folder / WEIGHTS) as path:
        path.write_bytes(safetensors.torch.save(state, metadata={"format": "pt"}))
    atomic_write_text(folder / CONFIG, json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def read(path: str | os.PathLike, heads: int | None = None) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and state (our names) of a run, a ``save_pretrained`` folder, or an authors' or MAMP file.

    Raises:
        UserError: one line naming the file and what is wrong with it.
    """
    path = Path(path)
    if path.is_dir():
        folder = path / "model" if (path / "model" / CONFIG).exists() else path
        if not (folder / CONFIG).exists():
            raise UserError(f"{path} holds no model: expected {CONFIG} and {WEIGHTS} in it or in its folder model/")
        return _read_config(folder / CONFIG), _read_safetensors(folder / WEIGHTS)
    if not path.exists():
        raise UserError(f"{path} does not exist: expected a run, a model folder, or a .pth, .npz or .safetensors file")
    if path.suffix == ".safetensors":
        state = _read_safetensors(path)
        if not convert.is_authors(state):
            return _read_config(path.with_name(CONFIG)), state
    elif path.suffix == ".npz":
        state = _read_npz(path)
    else:
        state = _read_pth(path)
    if not convert.is_authors(state):
        raise UserError(f"{path} is not a JMM-TGT or MAMP checkpoint: it has no parameter joints_embed.proj.weight")
    try:
        config = convert.infer_config(state, heads)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path} is not a whole JMM-TGT or MAMP checkpoint: {error}") from error
    return config, convert.from_authors(state)


def load_into(model: nn.Module, state: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Load ``state`` into ``model``; a missing, unknown or misshapen parameter is a ``UserError`` naming it.

    Args:
        model: takes the values.
        state: parameters under the model's names.
        path: named in errors.
    """
    own = model.state_dict()
    missing = sorted(own.keys() - state.keys())
    if missing:
        raise UserError(f"{path} holds no {missing[0]} (and {len(missing) - 1} more): {_FOREIGN}")
    unknown = sorted(state.keys() - own.keys())
    if unknown:
        raise UserError(f"{path} holds {unknown[0]}, which this network lacks: {_FOREIGN}")
    for name, value in own.items():
        if value.shape != state[name].shape:
            raise UserError(
                f"{path}: parameter {name} is {list(state[name].shape)}, this network needs {list(value.shape)}, "
                f"and both must be equal: {_FOREIGN}"
            )
    model.load_state_dict(state)


def _read_config(path: Path) -> ModelConfig:
    try:
        values = json.loads(path.read_text())
        if values.get("parents") is not None:
            values["parents"] = tuple(values["parents"])
        return ModelConfig(**values)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a model config: {error}") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from error


def _read_npz(path: Path) -> dict[str, Tensor]:
    """Arrays named by parameter, with or without the prefix ``state/``."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = [name for name in arrays.files if name.startswith("state/")] or arrays.files
            return {name.removeprefix("state/"): torch.from_numpy(arrays[name]) for name in names}
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a readable .npz of parameters: {error}") from error


def _read_pth(path: Path) -> dict[str, Tensor]:
    try:
        # argparse.Namespace holds the arguments in MAE-style checkpoints: plain attributes, no code.
        with torch.serialization.safe_globals([_namespace()]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, *_BROKEN_PICKLE) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is not a readable .pth of plain tensors: {reason}") from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} holds no dictionary of tensors (looked at the top level, 'model' and 'state_dict')")
    return {name.removeprefix("module."): value for name, value in content.items()}


def _namespace() -> type:
    import argparse

    return argparse.Namespace
