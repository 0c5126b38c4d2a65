"""Device code compiled for the CPU, whose blocks run thread by thread (host.h): how it is checked without a GPU."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    "-std=c++20",
    "-O2",
    "-Wall",
    "-Wextra",
    "-Wno-unused-function",
    "-Wno-unknown-pragmas",
    "-shared",
    "-fPIC",
    "-fno-strict-aliasing",
)
UNDEFINED = ("-fsanitize=undefined", "-fno-sanitize-recover=all")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """``compiled("motion_mask")``: path of ``tests/cuda/motion_mask.cpp`` as a shared library."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler found (g++ or c++)")

    def build(name):
        library = tmp_path_factory.mktemp("cuda") / f"{name}.so"
        source = Path(__file__).with_name(f"{name}.cpp")
        command = [compiler, *FLAGS, *UNDEFINED, "-I", ROOT / "csrc", "-I", source.parent, source, "-o", library]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return library

    return build
