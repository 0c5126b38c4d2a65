"""What every benchmark record needs to be compared: the machine, versions; nothing that names a host or a person."""

import os

import pytest

# As the command line does, and like it before torch starts: the figures should be those a user sees.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch

from jmm_fast.bench import cases, parity
from jmm_fast.bench.case import BACKENDS


@pytest.fixture(scope="session")
def gate():
    """``gate(case)`` fails the test when a backend of ours has not passed its parity check in this very process."""
    found = {}

    def check(case):
        if case.contender not in BACKENDS:
            return
        key = (case.op, case.dtype, case.contender)
        if key not in found:
            found[key] = parity.verify(cases.WORKLOADS, *key)
        if not found[key].passed:
            pytest.fail(found[key].reason, pytrace=False)

    return check


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["cores"] = len(os.sched_getaffinity(0))
    machine_info["isa"] = parity.isa()
    for private in ("node", "release", "version"):
        machine_info.pop(private, None)


def pytest_benchmark_update_commit_info(config, commit_info):
    # The folder of the checkout.
    commit_info.pop("project", None)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    # Raw rounds make a record hard to read; the median, the quartiles and the extremes stay, and `extra_info.case`.
    for record in output_json["benchmarks"]:
        record["stats"].pop("data", None)
        for settings in ("params", "options"):
            record.pop(settings, None)
