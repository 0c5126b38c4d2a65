"""What every benchmark record needs to be compared: the machine, its measured speed, versions."""

import os
import statistics
import time

import pytest

# As the command line does, and like it before torch starts: the figures should be those a user sees.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch


def matrix_product_rate(size: int = 2048, repeats: int = 7) -> float:
    """Median GFLOP/s of a float32 ``size^3`` product: the yardstick beside each time on a shared machine."""
    a = torch.randn(size, size)
    a @ a
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / statistics.median(seconds) / 1e9


@pytest.fixture
def calibrate():
    """The function that measures the machine; call it right before and right after the timed rounds."""
    return matrix_product_rate


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["cores"] = len(os.sched_getaffinity(0))
    for private in ("node", "release", "version"):
        machine_info.pop(private, None)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    # Raw rounds make a record hard to read; the median, the quartiles and the extremes stay.
    for record in output_json["benchmarks"]:
        record["stats"].pop("data", None)
