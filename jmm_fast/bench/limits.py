"""What this machine can do at best, measured beside the cases: products, exponentials, bytes."""

import statistics
import time
from collections.abc import Callable

import torch

from jmm_fast.bench import timing

UNITS = {
    "gemm_float32": "GFLOP/s",
    "onednn_gemm_float32": "GFLOP/s",
    "gemm_bfloat16": "GFLOP/s",
    "exp_float32": "Gexp/s",
    "copy": "GB/s",
    "gpu_gemm_bfloat16": "GFLOP/s",
    "gpu_copy": "GB/s",
}


def limits(*, size: int = 1024, repeats: int = 9) -> dict[str, float]:
    """Rates with torch's present number of threads, medians, in the units of ``UNITS``.

    - ``gemm_float32``, ``gemm_bfloat16``: a product of two ``size x size`` matrices as torch does it.
    - ``onednn_gemm_float32``: the same by oneDNN, where torch has it. Torch takes MKL for float32, which leaves AVX-512
      unused on some processors: what these can do is this number.
    - ``exp_float32``: exponentials over an array that stays in the caches.
    - ``copy``: bytes read and written by a copy between arrays far larger than the caches.
    - ``gpu_gemm_bfloat16``, ``gpu_copy``: the same two on the GPU, with matrices 8 times as wide, where there is one.
    """
    single = torch.randn(size, size)
    half = single.bfloat16()
    cached = torch.rand(1 << 17)
    cached_out = torch.empty_like(cached)
    source = torch.zeros(size * size * 64)
    target = torch.zeros_like(source)
    flop = 2 * size**3
    found = {
        "gemm_float32": _rate(lambda: single @ single, flop, repeats),
        "gemm_bfloat16": _rate(lambda: half @ half, flop, repeats),
        "exp_float32": _rate(lambda: [torch.exp(cached, out=cached_out) for _ in range(64)], 64 * len(cached), repeats),
        "copy": _rate(lambda: target.copy_(source), 2 * source.numel() * source.element_size(), repeats),
    }
    if torch.backends.mkldnn.is_available():
        # No public function of torch multiplies by oneDNN alone.
        product = torch.ops.mkldnn._linear_pointwise
        found["onednn_gemm_float32"] = _rate(lambda: product(single, single, None, "none", [], ""), flop, repeats)
    if torch.cuda.is_available():
        wide, large = half.cuda().repeat(8, 8), torch.zeros(size * size * 256, device="cuda")
        other, products, bytes_moved = torch.empty_like(large), 8**3 * flop, 2 * large.nbytes
        found["gpu_gemm_bfloat16"] = _rate(lambda: wide @ wide, products, repeats, timing.on_gpu)
        found["gpu_copy"] = _rate(lambda: other.copy_(large), bytes_moved, repeats, timing.on_gpu)
    return found


def _by_clock(function: Callable[[], object], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls


def _rate(function: Callable[[], object], work: float, repeats: int, timed=_by_clock) -> float:
    function()
    return float(f"{work / statistics.median(timed(function, 1) for _ in range(repeats)) / 1e9:.4g}")
