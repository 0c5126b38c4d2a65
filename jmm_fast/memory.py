"""How much memory a process has taken."""

import re
import resource
import sys
from pathlib import Path


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
