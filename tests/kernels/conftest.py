"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before a kernel's module is imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

collect_ignore_glob = []


@pytest.fixture(autouse=True)
def _needs_triton():
    pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture(scope="session")
def device():
    """Where Triton kernels run here: the GPU, or the CPU in the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"
