"""How a process takes memory, and how much it has taken."""

import ctypes
import os
import re
import resource
import sys
from pathlib import Path

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""Variable that torch's CPU allocator reads when it starts: 1 puts large tensors into huge pages."""


def settle() -> None:
    """Make large tensors cheap to take again, step after step: huge pages, and freed memory that stays here.

    To be called before torch is loaded. ``THP_MEM_ALLOC_ENABLE=0`` leaves both as they come. glibc returns each freed
    block of more than 32 MB to the system at once, which clears its pages before the next step has them back: with huge
    pages 4 to 8 % of the processor time of a step at the released size (Zen 4). Blocks of more than 256 MB still go
    back; kept, they would leave holes. Other C libraries are left alone.
    """
    if os.environ.setdefault(HUGE_PAGES, "1") != "1":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of glibc's malloc.h
        libc.mallopt(mmap_threshold, 1 << 28)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    try:
        # VmHWM begins anew with the program; ru_maxrss is inherited from a larger parent.
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
        if found:
            return int(found[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
