"""The package builds and installs whatever tools are there, and says what it had to leave out."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FILES = ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE")
FOLDERS = ("jmm_fast", "kernels", "csrc")


@pytest.fixture
def source(tmp_path):
    """A copy of what goes into a build, without anything built here."""
    source = tmp_path / "source"
    source.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "_build.json"))
    return source


def run(*command, cwd, **environment):
    result = subprocess.run(
        [sys.executable, *command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_wheel_without_native_code(source, tmp_path):
    # A module that was deleted since the last build must not come back from the build folder.
    stale = source / "build" / "lib" / "jmm_fast" / "deleted.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    command = ("-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(tmp_path))
    run(*command, cwd=source, JMM_FAST_SKIP_NATIVE="1")
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")

    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        record = json.loads(archive.read("jmm_fast/_build.json"))
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
        (scripts,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/entry_points.txt"))
        archive.extractall(tmp_path / "installed")

    modules = set()
    for prefix, folder in (("jmm_fast", ROOT / "jmm_fast"), ("jmm_fast/kernels", ROOT / "kernels")):
        modules |= {f"{prefix}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    others = {name for name in names - modules if ".dist-info/" not in name}
    assert others == {"jmm_fast/_build.json"}
    assert any(name.endswith("licenses/LICENSE") for name in names)

    for name in ("_C", "_host", "_cuda"):
        assert record["targets"][name]["built"] is False
        assert record["targets"][name]["reason"] == "left out because JMM_FAST_SKIP_NATIVE is set"
    assert "jmm-fast = jmm_fast.cli:main" in scripts
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    core = {"torch", "numpy", "safetensors", "tyro", "PyYAML", "rich"}
    assert {line.removeprefix("Requires-Dist: ").partition(">")[0] for line in required} == core

    code = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import jmm_fast, jmm_fast.kernels, torch
assert "installed" in jmm_fast.__file__ and "installed" in jmm_fast.kernels.__file__
print(jmm_fast.backends()["topology_attention"]["cpu"])
jmm_fast.ops.topology_attention(*torch.randn(3, 1, 2, 5, 4))
"""
    said = run("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed"))
    assert "left out because JMM_FAST_SKIP_NATIVE is set" in said


@pytest.mark.parametrize(
    "compiler, reason",
    [
        ("no-such-compiler", "no C++ compiler found (no-such-compiler)"),
        ("false", "is not able to compile a simple test program"),
    ],
    ids=["missing", "broken"],
)
def test_a_compiler_that_is_missing_or_broken_is_no_failure(source, compiler, reason):
    said = run("setup.py", "-q", "build", "--build-lib", "out", cwd=source, CXX=compiler, JMM_FAST_SKIP_NATIVE="")
    built = source / "out" / "jmm_fast"
    assert not list(built.glob("*.so")) and (built / "kernels" / "__init__.py").exists()
    targets = json.loads((built / "_build.json").read_text())["targets"]
    for name in ("_C", "_host"):
        assert targets[name]["built"] is False and reason in targets[name]["reason"]
        assert f"NOT BUILT: {targets[name]['reason']}" in said


@pytest.mark.parametrize(
    "environment, reason",
    [
        ({"JMM_FAST_CUDA": "0"}, "left out because JMM_FAST_CUDA is 0"),
        ({"JMM_FAST_CUDA": "1", "CUDACXX": "no-such-nvcc"}, "nvcc not found (no-such-nvcc)"),
        ({"JMM_FAST_CUDA": "", "CUDACXX": "true"}, "torch is built for CPUs: a CUDA kernel could not be loaded"),
        ({"JMM_FAST_CUDA": "1", "CUDACXX": "true"}, ""),
    ],
)
def test_why_cuda_kernels_are_not_built(monkeypatch, environment, reason):
    if torch.version.cuda and environment["JMM_FAST_CUDA"] == "":
        pytest.skip("torch is built for CUDA")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **arguments: None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    driver = runpy.run_path("setup.py")
    assert driver["cuda_reason"]() == reason
    if environment.get("CUDACXX") == "true":
        assert driver["cuda_archs"]() == "80", "an nvcc that does not say what it knows"
    monkeypatch.setenv("JMM_FAST_CUDA_ARCHS", "90;120")
    assert driver["cuda_archs"]() == "90;120"
