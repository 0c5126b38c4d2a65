"""The kernel that measures a GPU's exponentials: what it computes, and that it does little else."""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: nothing runs or compiles its kernels"
)

RUN = """
import torch
from jmm_fast.bench.exponentials import BLOCK, exponentials

out = torch.full((2 * BLOCK,), float("nan"))
exponentials(out, 3)
x = torch.arange(2 * BLOCK) * 1e-9
for _ in range(3):
    x = 2.0**-x
torch.testing.assert_close(out, x)
"""

COMPILE = """
import re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from jmm_fast.bench.exponentials import BLOCK, ROUNDS, WARPS, _exponentials

source = ASTSource(
    _exponentials,
    {"out": "*fp32", "BLOCK": "constexpr", "ROUNDS": "constexpr"},
    constexprs={(1,): BLOCK, (2,): ROUNDS},
    attrs={(0,): [["tt.divisibility", 16]]},
)
compiled = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": WARPS})
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(compiled.asm["cubin"])
    file.flush()
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
found = re.findall(r"^\\s*/\\*[0-9a-f]+\\*/\\s+(?:@!?U?P\\d+ )?([A-Z0-9.]+)", text, re.M)
print(len(found), sum(name == "MUFU.EX2" for name in found))
"""


def python(code, *arguments, **environment):
    # A process of its own: Triton's interpreter is chosen before a kernel's module is imported.
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=kept | environment
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_it_computes_exponentials():
    python(RUN, TRITON_INTERPRET="1")


@pytest.mark.parametrize("capability", ["80", "90", "100"])
def test_most_of_its_instructions_are_exponentials(capability):
    instructions, exponentials = map(int, python(COMPILE, capability, TRITON_DEFAULT_FP_FUSION="1").split())
    # The loop is unrolled and holds nothing else; the rest stands before and behind it.
    assert exponentials >= 128 and instructions - exponentials < 100
