"""What this machine can do at best, measured beside the cases: products, exponentials, bytes."""

import statistics
import time
from collections.abc import Callable, Collection

import torch

from jmm_fast.bench import timing

UNITS = {
    "gemm_float32": "GFLOP/s",
    "onednn_gemm_float32": "GFLOP/s",
    "gemm_bfloat16": "GFLOP/s",
    "exp_float32": "Gexp/s",
    "copy": "GB/s",
    "copy_cached": "GB/s",
    "gpu_gemm_float32": "GFLOP/s",
    "gpu_gemm_bfloat16": "GFLOP/s",
    "gpu_exp_float32": "Gexp/s",
    "gpu_copy": "GB/s",
}


def limits(
    *, size: int = 1024, repeats: int = 9, only: Collection[str] = UNITS, problems: dict[str, str] | None = None
) -> dict[str, float]:
    """Rates with torch's present number of threads, medians, in the units of ``UNITS``.

    - ``gemm_float32``, ``gemm_bfloat16``: a product of two ``size x size`` matrices as torch does it.
    - ``onednn_gemm_float32``: the same by oneDNN, where torch has it. Torch takes MKL for float32, which leaves AVX-512
      unused on some processors: what these can do is this number.
    - ``exp_float32``: exponentials over an array that stays in the caches.
    - ``copy``, ``copy_cached``: bytes read and written by a copy between arrays far larger than the caches, and between
      two that stay in them.
    - ``gpu_gemm_float32``, ``gpu_gemm_bfloat16``, ``gpu_copy``: the same on the GPU, with matrices 8 times as wide;
      float32 products as torch is set to compute them.
    - ``gpu_exp_float32``: exponentials in registers, by a Triton kernel.

    Args:
        size: of the matrices.
        repeats: how often each is timed.
        only: names of those to measure.
        problems: takes why a rate is missing that could not be measured; None raises.
    """
    found = {}
    for name, (prepare, timed) in _sources(size).items():
        if name not in only:
            continue
        try:
            function, work = prepare()
            found[name] = _rate(function, work, repeats, timed)
        except Exception as error:
            if problems is None:
                raise
            problems[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found


Prepare = Callable[[], tuple[Callable[[], object], float]]
Timed = Callable[[Callable[[], object], int], float]


def _sources(size: int) -> dict[str, tuple[Prepare, Timed]]:
    """Of each rate, what gives the function to time and its work, and the clock."""
    # No public function of torch multiplies by oneDNN alone.
    onednn = {"onednn_gemm_float32": lambda: _product(size, torch.float32, by=torch.ops.mkldnn._linear_pointwise)}
    host = {
        "gemm_float32": lambda: _product(size, torch.float32),
        "gemm_bfloat16": lambda: _product(size, torch.bfloat16),
        "exp_float32": _exponentials,
        "copy": lambda: _copy(size * size * 64),
        "copy_cached": lambda: _copy(1 << 20, 16),
        **(onednn if torch.backends.mkldnn.is_available() else {}),
    }
    device = {
        "gpu_gemm_float32": lambda: _product(8 * size, torch.float32, "cuda"),
        "gpu_gemm_bfloat16": lambda: _product(8 * size, torch.bfloat16, "cuda"),
        "gpu_copy": lambda: _copy(size * size * 256, device="cuda"),
        "gpu_exp_float32": _exponentials_on_gpu,
    }
    found = {name: (prepare, _by_clock) for name, prepare in host.items()}
    if torch.cuda.is_available():
        found |= {name: (prepare, timing.on_gpu) for name, prepare in device.items()}
    return found


def _product(size: int, dtype: torch.dtype, device: str = "cpu", by: Callable | None = None):
    matrix = torch.randn(size, size, device=device).to(dtype)
    run = (lambda: matrix @ matrix) if by is None else (lambda: by(matrix, matrix, None, "none", [], ""))
    return run, 2 * size**3


def _copy(numbers: int, times: int = 1, device: str = "cpu"):
    source = torch.zeros(numbers, device=device)
    target = torch.zeros_like(source)
    return lambda: [target.copy_(source) for _ in range(times)], 2 * source.nbytes * times


def _exponentials():
    cached = torch.rand(1 << 17)
    out = torch.empty_like(cached)
    return lambda: [torch.exp(cached, out=out) for _ in range(64)], 64 * len(cached)


def _exponentials_on_gpu():
    from jmm_fast.bench import exponentials

    out, work = exponentials.work()
    return lambda: exponentials.exponentials(out), work


def _by_clock(function: Callable[[], object], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls


def _rate(function: Callable[[], object], work: float, repeats: int, timed: Timed) -> float:
    function()
    return float(f"{work / statistics.median(timed(function, 1) for _ in range(repeats)) / 1e9:.4g}")
