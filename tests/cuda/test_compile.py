"""Every ``.cu`` compiled for each architecture that we aim at, without a GPU: no spills. The module of them links."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("cmake", "ninja", "nm")
SOURCES = sorted((ROOT / "csrc").rglob("*.cu"))

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc not found: nothing compiles CUDA C++ here")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("source", SOURCES, ids=[f"{path.parent.name}/{path.name}" for path in SOURCES])
def test_kernels_compile_without_spills(tmp_path, source, architecture):
    options = ["-cubin", "-std=c++20", f"-arch={architecture}", "-Xptxas", "-v", "-Werror", "all-warnings"]
    command = ["nvcc", *options, "-I", ROOT / "csrc", source, "-o", tmp_path / "kernels.cubin"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert spills and set(spills) == {("0", "0")}, result.stderr


def test_the_module_links(tmp_path):
    """Against whatever torch is here: what only a torch for CUDA has is left open, everything else is found."""
    tools = {name: shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") for name in TOOLS}
    if missing := [name for name, path in tools.items() if path is None]:
        pytest.skip(f"{' and '.join(missing)} not found")
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": tools["ninja"],
        "PYTHON_INCLUDE_DIR": sysconfig.get_path("include"),
        "JMM_TARGETS": "_cuda",
        "TORCH_DIR": Path(torch.__file__).parent,
        "CMAKE_CUDA_COMPILER": shutil.which("nvcc"),
        "CMAKE_CUDA_ARCHITECTURES": "90",
    }
    configure = ["-S", ROOT, "-B", tmp_path, "-G", "Ninja", *(f"-D{name}={value}" for name, value in options.items())]
    for command in (configure, ["--build", tmp_path]):
        result = subprocess.run([tools["cmake"], *command], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    open_symbols = subprocess.run(
        [tools["nm"], "-D", "--undefined-only", tmp_path / "_cuda.so"], capture_output=True, text=True, check=True
    ).stdout
    assert "aoti_torch_get_current_cuda_stream" in open_symbols
    assert not re.search(r"\bU _?_?cuda", open_symbols), "CUDA's runtime is not linked in"
