"""What the commands ask of the C library: memory that is freed stays with the process."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import os
from jmm_fast import memory
memory.settle()
import torch

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

torch.ones(1000)
before = resident()
torch.ones(25_000_000)  # 100 MB, freed at once
print((resident() - before) / 1e6)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked to keep freed memory")
@pytest.mark.parametrize(("huge", "kept"), [("1", True), ("0", False)])
def test_freed_memory_stays_unless_torch_is_taken_as_it_comes(huge, kept):
    env = {**os.environ, "THP_MEM_ALLOC_ENABLE": huge}
    found = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True)
    megabytes = float(found.stdout)
    assert megabytes > 95 if kept else megabytes < 20
