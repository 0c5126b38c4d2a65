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


@pytest.mark.parametrize("architecture", SHARED_BYTES)
def test_kernels_compile_without_spills(architecture):
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("aot.py"), architecture],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        | {"TRITON_DEFAULT_FP_FUSION": "1"},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    results = json.loads(run.stdout.splitlines()[-1])
    assert len(results) > 20
    for result in results:
        assert result["stack"] == 0, f"spills: {result}"
        assert result["shared"] <= SHARED_BYTES[architecture], result
