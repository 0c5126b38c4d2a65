"""``make`` for who has a GPU: what fails is named, the rest goes on, and the exit code tells."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    shutil.which("make") is None or shutil.which("timeout") is None, reason="make and timeout are not installed"
)


def make(target, **variables):
    """With the environment as it is, as if there were a GPU."""
    given = {"GPU": "true", "BIN": str(Path(sys.executable).parent)} | variables
    # A worker of pytest-xdist tells its children so.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    command = ["make", "-o", "install", target, *(f"{name}={value}" for name, value in given.items())]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def script(path, text):
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def test_the_second_checker_runs_where_the_first_finds_something(tmp_path):
    checker = script(tmp_path / "checker", f'echo "$2" >> {tmp_path}/ran; test "$2" != memcheck\n')
    result = make("sanitize-gpu", CHECKER=checker)
    assert (tmp_path / "ran").read_text().split() == ["memcheck", "racecheck"]
    assert result.returncode != 0 and "failed: memcheck\n" in result.stdout
    checker.write_text("#!/bin/sh\n")
    assert make("sanitize-gpu", CHECKER=checker).returncode == 0


def test_tests_leave_a_record_where_one_fails(tmp_path):
    (tmp_path / "test_two.py").write_text("def test_bad():\n    assert False\n\n\ndef test_good():\n    pass\n")
    out = tmp_path / "test_gpu.xml"
    result = make("test-gpu", GPU_TESTS=f"{tmp_path}/test_two.py", GPU_RECORD=out, GPU_WORKERS=2)
    assert result.returncode != 0 and "1 failed, 1 passed" in result.stdout
    text = out.read_text()
    assert 'tests="2"' in text and 'failures="1"' in text and 'name="test_bad"' in text


def test_benchmarks_leave_a_record_where_a_row_fails(tmp_path):
    """The command of the Makefile, a kernel of which breaks off, on the rows of the CPU."""
    script(
        tmp_path / "jmm-fast",
        f'shift; exec {sys.executable} {tmp_path}/broken.py "$@"\n',
    )
    (tmp_path / "broken.py").write_text(
        "import sys\n"
        "from jmm_fast.bench import cases\n"
        "from jmm_fast.cli import main\n"
        "right = cases.prepare\n"
        "def prepare(case):\n"
        "    if case.shape == 'gather':\n"
        "        raise RuntimeError('out of resource')\n"
        "    return right(case)\n"
        "cases.prepare = prepare\n"
        "arguments = ['cpu' if one == 'cuda' else one for one in sys.argv[1:]]\n"
        "sys.exit(main(['bench', 'token_grid', '--quick', *arguments]))\n"
    )
    out = tmp_path / "bench_gpu.json"
    result = make("bench-gpu", BIN=tmp_path, GPU_BENCH=out)
    record = json.loads(out.read_text())
    assert result.returncode != 0 and record["complete"] is True and record["options"]["minutes"] == 7
    gather, scatter = record["rows"]
    assert gather["failed"] and gather["reason"] == "failed: RuntimeError: out of resource"
    assert scatter["ratio"]["median"] > 0
    assert "failed: token_grid/gather" in result.stdout
