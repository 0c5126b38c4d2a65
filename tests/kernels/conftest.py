"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before a kernel's module is imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _needs_triton():
    pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture(scope="session")
def device():
    """Where Triton kernels run here: the GPU, or the CPU in the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poison():
    """Every tensor that torch leaves uninitialised is full of NaN: an element the kernel forgets is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def _largest(x):
    return x.double().abs().max().item() if x.numel() else 0.0


@pytest.fixture
def parity():
    """``parity(names, ours, same, exact)``: each of ``ours`` has at most twice the error of the plain twin in the same
    dtype plus the rounding of the largest result; gives ``ours`` back."""

    def check(names, ours, same, exact):
        for name, a, b, c in zip(names, ours, same, exact, strict=True):
            assert a.dtype == b.dtype and a.shape == c.shape and a.isfinite().all(), name
            bound = 2 * (_largest(b - c) + torch.finfo(a.dtype).eps * _largest(c))
            assert _largest(a - c) <= bound, f"{name}: error {_largest(a - c):.3g}, bound {bound:.3g}"
        return ours

    return check


@pytest.fixture
def ringed():
    """``ringed(x)``: the values of ``x`` amid NaN, or numbers that would read far outside."""

    def ring(x):
        filler = float("nan") if x.is_floating_point() else True if x.dtype == torch.bool else -(2**40)
        around = torch.full([n + 2 for n in x.shape], filler, dtype=x.dtype, device=x.device)
        return around[tuple(slice(1, -1) for _ in x.shape)].copy_(x)

    return ring
