"""``python -m jmm_fast``: the same as ``jmm-fast``."""

import sys

from jmm_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
