"""Argument checks shared by the ops: one form for every complaint, "NAME must be WHAT, got THIS"."""

from collections.abc import Callable

import torch
from torch import Tensor

NATIVE_DTYPES = (torch.float32, torch.bfloat16)
TRITON_DTYPES = (*NATIVE_DTYPES, torch.float16)
KERNEL_DTYPES = {"cpu": NATIVE_DTYPES, "triton": TRITON_DTYPES}


def either(dtypes: tuple[torch.dtype, ...]) -> str:
    """``float32, bfloat16 or float16``."""
    *names, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(names)} or {last}"


def describe(value: object) -> str:
    """A tensor as ``float32 [8, 74]``, anything else by its value."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return repr(value)


def require(condition: bool, name: str, expected: str | Callable[[], str], got: object) -> None:
    """Raise ``ValueError("name must be expected, got ...")`` unless ``condition``.

    Words that tell a size are given as a function: a compiler takes a size that has become text for a constant.
    """
    if not condition:
        raise ValueError(f"{name} must be {expected if isinstance(expected, str) else expected()}, got {describe(got)}")


def floating(name: str, tensor: object, shape: str, dims: int) -> None:
    """A floating tensor of ``dims`` dimensions."""
    ok = isinstance(tensor, Tensor) and tensor.dim() == dims and tensor.is_floating_point()
    require(ok, name, f"floating {shape}", tensor)


def integer(name: str, tensor: object, shape: str, dims: int) -> None:
    """An int64 or int32 tensor of ``dims`` dimensions."""
    ok = isinstance(tensor, Tensor) and tensor.dim() == dims and tensor.dtype in (torch.int64, torch.int32)
    require(ok, name, f"int {shape}", tensor)


def boolean(name: str, tensor: object, shape: tuple[int, ...]) -> None:
    """A bool tensor of exactly ``shape``."""
    ok = isinstance(tensor, Tensor) and tensor.dtype == torch.bool and tensor.shape == shape
    require(ok, name, lambda: f"bool {list(shape)}", tensor)


def same_device(**tensors: Tensor | None) -> None:
    """All given tensors lie on the device of the first."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{name} must be on the device of {first_name}, {first.device}, got {tensor.device}")


def patches(clips: Tensor, t_patch: int) -> None:
    """The clip's frames divide into whole patches, at least two of them."""
    require(isinstance(t_patch, int) and t_patch >= 1, "t_patch", "a positive integer", t_patch)
    frames = clips.shape[1]
    if frames % t_patch:
        raise ValueError(f"clips must have a multiple of t_patch={t_patch} frames, got {describe(clips)}")
