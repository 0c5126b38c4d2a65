"""What the commands ask of the C library: memory that is freed and taken again costs no page faults."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
from jmm_fast import memory
memory.settle()
import torch

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

torch.ones(25_000_000)  # 100 MB, freed at once
before = faults()
for _ in range(4):
    torch.ones(25_000_000)
print(faults() - before)
"""


def _faults(huge: str) -> int:
    env = {**os.environ, "THP_MEM_ALLOC_ENABLE": huge}
    found = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True)
    return int(found.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked to keep freed memory")
def test_freed_memory_is_taken_again_without_page_faults():
    assert _faults("1") < 50


def test_the_variable_of_torch_turns_it_off():
    # Four times 100 MB, a fault for 2 MB at most even where the system gives huge pages to all.
    assert _faults("0") > 4 * 40
