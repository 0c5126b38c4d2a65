"""What this machine can do at best, measured beside the cases: products, exponentials, bytes."""

import statistics
import time
from collections.abc import Callable

import torch

UNITS = {
    "gemm_float32": "GFLOP/s",
    "gemm_bfloat16": "GFLOP/s",
    "exp_float32": "Gexp/s",
    "copy": "GB/s",
}


def limits(*, size: int = 1024, repeats: int = 9) -> dict[str, float]:
    """Rates with torch's present number of threads, medians, in the units of ``UNITS``.

    - ``gemm_float32``, ``gemm_bfloat16``: a product of two ``size x size`` matrices as torch does it.
    - ``exp_float32``: exponentials over an array that stays in the caches.
    - ``copy``: bytes read and written by a copy between arrays far larger than the caches.
    """
    single = torch.randn(size, size)
    half = single.bfloat16()
    cached = torch.rand(1 << 17)
    cached_out = torch.empty_like(cached)
    source = torch.zeros(size * size * 64)
    target = torch.zeros_like(source)
    flop = 2 * size**3
    return {
        "gemm_float32": _rate(lambda: single @ single, flop, repeats),
        "gemm_bfloat16": _rate(lambda: half @ half, flop, repeats),
        "exp_float32": _rate(lambda: [torch.exp(cached, out=cached_out) for _ in range(64)], 64 * len(cached), repeats),
        "copy": _rate(lambda: target.copy_(source), 2 * source.numel() * source.element_size(), repeats),
    }


def _rate(function: Callable[[], object], work: float, repeats: int) -> float:
    function()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return float(f"{work / statistics.median(seconds) / 1e9:.4g}")
