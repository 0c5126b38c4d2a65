"""Every ``.cu`` compiled for each architecture that we aim at, without a GPU: no spills. The module of them loads."""

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
TOOLS = ("cmake", "ninja", "g++")
SOURCES = sorted((ROOT / "csrc").rglob("*.cu"))

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc not found: nothing compiles CUDA C++ here")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("source", SOURCES, ids=[f"{path.parent.name}/{path.name}" for path in SOURCES])
def test_kernels_compile_without_spills(tmp_path, source, architecture):
    options = ["-cubin", "-std=c++17", f"-arch={architecture}", "-Xptxas", "-v", "-Werror", "all-warnings"]
    command = ["nvcc", *options, "-I", ROOT / "csrc", source, "-o", tmp_path / "kernels.cubin"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert spills and set(spills) == {("0", "0")}, result.stderr


def run(*command, **environment):
    result = subprocess.run(
        [*command], capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_module_registers_its_kernels(tmp_path):
    """The module built against the torch of this machine and a library that stands in for torch's part for GPUs."""
    if torch.version.cuda:
        pytest.skip("torch is built for CUDA: tests/kernels/ tests the module that was built against it")
    tools = {name: shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") for name in TOOLS}
    if missing := [name for name, path in tools.items() if path is None]:
        pytest.skip(f"{' and '.join(missing)} not found")
    libraries = tmp_path / "lib"
    libraries.mkdir()
    (tmp_path / "include").symlink_to(Path(torch.__file__).parent / "include")
    (libraries / "libtorch_cpu.so").symlink_to(Path(torch.__file__).parent / "lib/libtorch_cpu.so")
    (tmp_path / "stand_in.cpp").write_text(
        'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }'
    )
    stand_in = libraries / "libtorch_cuda.so"
    run(tools["g++"], "-shared", "-fPIC", tmp_path / "stand_in.cpp", "-o", stand_in, f"-Wl,-soname,{stand_in.name}")
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": tools["ninja"],
        "PYTHON_INCLUDE_DIR": sysconfig.get_path("include"),
        "JMM_TARGETS": "_cuda",
        "TORCH_DIR": tmp_path,
        "CMAKE_CUDA_COMPILER": shutil.which("nvcc"),
        "CMAKE_CUDA_ARCHITECTURES": "90",
    }
    build = tmp_path / "build"
    run(
        tools["cmake"],
        "-S",
        ROOT,
        "-B",
        build,
        "-G",
        "Ninja",
        *(f"-D{name}={value}" for name, value in options.items()),
    )
    run(tools["cmake"], "--build", build)
    code = """
import torch, jmm_fast.ops, _cuda
attention = [f"topology_attention_cuda_{name}" for name in ("forward", "backward", "backward_into", "packed_backward")]
for name in ("motion_mask_cuda", *attention):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"jmm_fast::{name}", "CUDA"), name
assert _cuda.attention_tokens(227 << 10, 32, 25) == 128 and _cuda.attention_tokens(99 << 10, 32, 25) in range(80, 128)
print(_cuda.load_error())
"""
    said = run(sys.executable, "-c", code, PYTHONPATH=f"{build}:{ROOT}", LD_LIBRARY_PATH=str(libraries))
    assert "CUDA" in said, "without a GPU or a driver the kernel cannot be loaded, and CUDA says so"
