"""Every kernel, at the sizes of training, compiled ahead of time for each architecture: no spills, shared memory."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
"""Shared memory that a block may have (CUDA C++ programming guide, table of compute capabilities)."""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: nothing compiles its kernels"
)


def compiled(*arguments):
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("aot.py"), *arguments],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        | {"TRITON_DEFAULT_FP_FUSION": "1"},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("architecture", SHARED_BYTES)
def test_kernels_compile_without_spills(architecture):
    results = compiled(architecture)
    assert len(results) > 20
    for result in results:
        assert result["stack"] == 0 or result["launch"] == "sizes of one", f"spills: {result}"
        assert result["shared"] <= SHARED_BYTES[architecture], result


@pytest.mark.parametrize("length", [74, 750])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_no_two_warps_compute_the_same_scores(architecture, length):
    """A score takes one exponential, a row of a block one more, made by the four lanes that share it. Sizes that give a
    warp less than its instructions of the matrix units hold let several warps do the same."""
    results = compiled(architecture, f"topology_attention bfloat16 D=32 N={length} V=25")
    assert [result["kernel"] for result in results] == ["_forward", "_backward_queries", "_backward_keys"]
    for result in results:
        scores = result["BM"] * result["BN"]
        expected = scores + (4 * result["BM"] if result["kernel"] == "_forward" else 0)
        assert result["loop"]["MUFU.EX2"] * 32 * result["num_warps"] == expected, result
