import subprocess
import sys

import jmm_fast
from jmm_fast.ops import BACKENDS, OPS


def test_table_names_every_op_and_backend_with_a_reason():
    table = jmm_fast.backends()
    assert tuple(table) == OPS
    for row in table.values():
        assert tuple(row) == BACKENDS
        assert row["reference"] == "available"
        assert all(text == "available" or len(text) > 20 for text in row.values())


def test_importing_ops_loads_no_backend():
    code = "import sys, jmm_fast.ops; print([m for m in ('triton', 'jmm_fast._C') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
