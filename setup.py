"""Build driver: CMake and Ninja make the extensions ``_C``, ``_host`` and ``_cuda``; the rest is pyproject.toml.

A missing tool never fails the install. What was built, with what, and why the rest was not, is printed and written to
``jmm_fast/_build.json``, which ``jmm-fast doctor`` shows.

Environment variables: ``CXX`` chooses the compiler; ``JMM_FAST_SKIP_NATIVE=1`` installs the Python part alone;
``JMM_FAST_SANITIZE=1`` builds with AddressSanitizer and UndefinedBehaviorSanitizer (``make sanitize``). ``CUDACXX``
chooses nvcc; ``JMM_FAST_CUDA=0`` leaves the CUDA kernels out, ``1`` builds them even where torch is built for CPUs and
they could not be loaded; ``JMM_FAST_CUDA_ARCHS="90"`` or ``"80;90"`` says for which compute capabilities.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
TARGETS = {"_C": "torch operators", "_host": "numpy-facing readers", "_cuda": "CUDA kernels"}
RECORD_NAME = "_build.json"
CUDA_ARCHS = ("80", "90", "100")
SANITIZE = os.environ.get("JMM_FAST_SANITIZE", "0") not in ("", "0")


def find_tool(name: str) -> str | None:
    # pip puts the tools of an isolated environment on PATH; a virtual environment that was not activated has them
    # beside its interpreter only.
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def find_compiler() -> list[str] | None:
    command = shlex.split(os.environ.get("CXX", ""))
    if command:
        return command if shutil.which(command[0]) else None
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return [found] if found else None


def first_line(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return next(iter((result.stdout or result.stderr).splitlines()), "")


def package_folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def torch_reason() -> str:
    """Why ``_C`` cannot be built against the torch of this environment; empty when it can."""
    folder = package_folder("torch")
    if folder is None:
        return "torch is not in the build environment (install torch first, then use pip's --no-build-isolation)"
    version = importlib.metadata.version("torch")
    if tuple(map(int, re.match(r"(\d+)\.(\d+)", version).groups())) < (2, 11):
        return f"torch {version} is too old: the stable interface of 2.11 is needed"
    if not (folder / "include/torch/csrc/stable/library.h").exists():
        return f"torch {version} came without its C++ headers"
    return ""


def find_nvcc() -> str | None:
    return shutil.which(os.environ.get("CUDACXX") or "nvcc")


def cuda_reason() -> str:
    """Why ``_cuda`` is not tried; empty when it is."""
    wish = os.environ.get("JMM_FAST_CUDA", "")
    if wish == "0":
        return "left out because JMM_FAST_CUDA is 0"
    if SANITIZE:
        return "left out because JMM_FAST_SANITIZE is set"
    if reason := torch_reason():
        return reason
    if wish != "1" and not (package_folder("torch") / "lib/libtorch_cuda.so").exists():
        return "torch is built for CPUs: a CUDA kernel could not be loaded"
    return "" if find_nvcc() else f"nvcc not found ({os.environ.get('CUDACXX') or 'on PATH, or named by CUDACXX'})"


def cuda_archs() -> str:
    """Compute capabilities to build for: those asked for, or those we aim at that this nvcc knows."""
    if wish := os.environ.get("JMM_FAST_CUDA_ARCHS"):
        return wish
    listed = subprocess.run([find_nvcc(), "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
    return ";".join(arch for arch in CUDA_ARCHS if f"compute_{arch}" in listed.split()) or CUDA_ARCHS[0]


def plan() -> dict[str, str]:
    """The reason why each target will not be tried; empty for those that will."""
    reason = ""
    if os.environ.get("JMM_FAST_SKIP_NATIVE", "0") not in ("", "0"):
        reason = "left out because JMM_FAST_SKIP_NATIVE is set"
    elif sys.platform == "win32":
        reason = "Windows is not supported"
    elif find_compiler() is None:
        reason = f"no C++ compiler found ({os.environ.get('CXX') or 'c++, g++ or clang++'})"
    elif missing := [tool for tool in ("cmake", "ninja") if find_tool(tool) is None]:
        reason = f"{' and '.join(missing)} not found (pip install {' '.join(missing)})"
    elif not Path(sysconfig.get_path("include"), "Python.h").exists():
        reason = "Python.h not found (install the development files of this Python, e.g. python3-dev)"
    if reason:
        return dict.fromkeys(TARGETS, reason)
    pybind11 = package_folder("pybind11")
    return {
        "_C": torch_reason(),
        "_host": "" if pybind11 else "pybind11 not found (pip install pybind11)",
        "_cuda": cuda_reason(),
    }


def make_record(reasons: dict[str, str], flags: dict[str, str]) -> dict:
    compiler, cmake = find_compiler(), find_tool("cmake")
    return {
        "python": platform.python_version(),
        "platform": sysconfig.get_platform(),
        "torch": importlib.metadata.version("torch") if package_folder("torch") else None,
        "compiler": first_line([*compiler, "--version"]) if compiler else None,
        "cmake": first_line([cmake, "--version"]) if cmake else None,
        "flags": flags,
        "targets": {
            name: {"purpose": purpose, "built": not reasons[name], "reason": reasons[name]}
            for name, purpose in TARGETS.items()
        },
    }


def write_record(folder: Path, record: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{RECORD_NAME}.part"
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / RECORD_NAME)


def announce(reasons: dict[str, str]) -> None:
    for name, reason in reasons.items():
        print(f"jmm-fast: {name} ({TARGETS[name]}): {f'NOT BUILT: {reason}' if reason else 'built'}", file=sys.stderr)


class BuildPython(build_py):
    """Copies the Python part; writes the record that stays when no extension is tried."""

    def run(self):
        if not self.editable_mode:
            # setuptools keeps its build folder and would ship modules deleted since the last build.
            shutil.rmtree(Path(self.build_lib) / "jmm_fast", ignore_errors=True)
        super().run()
        reasons = plan()
        if all(reasons.values()):
            folder = ROOT if self.editable_mode else Path(self.build_lib)
            for name in TARGETS if self.editable_mode else ():
                remove_stale(name)
            write_record(folder / "jmm_fast", make_record(reasons, {}))
            announce(reasons)


def remove_stale(name: str) -> None:
    """An extension of an earlier editable install must not outlive the record that says it was not built."""
    for path in (ROOT / "jmm_fast").glob(f"{name}.*"):
        if path.suffix in (".so", ".pyd"):
            path.unlink()


class BuildNative(build_ext):
    """Configures once, builds every wanted target, then records what came out."""

    def build_extensions(self):
        reasons = plan()
        kind = "-sanitize" if SANITIZE else ""
        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{sysconfig.get_platform()}{kind}"
        flags = {}
        wanted = [name for name, reason in reasons.items() if not reason]
        failure = self.configure(folder, wanted)
        if failure and "_cuda" in wanted:
            # An nvcc that does not get along with the compiler must not cost the rest.
            reasons["_cuda"] = failure
            wanted.remove("_cuda")
            failure = self.configure(folder, wanted)
        if failure:
            reasons.update(dict.fromkeys(wanted, failure))
        else:
            lines = (folder / "flags.txt").read_text(encoding="utf-8").splitlines()
            flags = dict(line.split("=", 1) for line in lines if "=" in line)
            reasons.update(self.compile(folder, wanted))
        in_source = self.editable_mode or self.inplace
        for extension in self.extensions:
            name = extension.name.rpartition(".")[2]
            if reasons[name]:
                if in_source:
                    remove_stale(name)
                continue
            destination = Path(self.get_ext_fullpath(extension.name))
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / f"{name}.so", destination)
        target = ROOT if in_source else Path(self.build_lib)
        write_record(target / "jmm_fast", make_record(reasons, flags))
        announce(reasons)

    def configure(self, folder: Path, wanted: list[str]) -> str:
        """Run CMake; the reason of the failure, or nothing."""
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "CMAKE_CXX_COMPILER": shutil.which(find_compiler()[0]),
            "CMAKE_CXX_FLAGS": shlex.join(find_compiler()[1:]),
            "PYTHON_INCLUDE_DIR": sysconfig.get_path("include"),
            "JMM_TARGETS": ";".join(wanted),
            "JMM_SANITIZE": "ON" if SANITIZE else "OFF",
            "TORCH_DIR": package_folder("torch") or "",
            "PYBIND11_INCLUDE_DIR": (package_folder("pybind11") or Path()) / "include",
        }
        if "_cuda" in wanted:
            options |= {"CMAKE_CUDA_COMPILER": find_nvcc(), "CMAKE_CUDA_ARCHITECTURES": cuda_archs()}
        command = [find_tool("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
        command += [f"-D{key}={value}" for key, value in options.items()]
        # A second build of the same kind is quick; with another tool or torch, CMake's cache would keep the old paths.
        seen = folder / "command.txt"
        if not seen.exists() or seen.read_text(encoding="utf-8") != repr(command):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            seen.write_text(repr(command), encoding="utf-8")
        return self.run_quietly(command)

    def compile(self, folder: Path, wanted: list[str]) -> dict[str, str]:
        build = [find_tool("cmake"), "--build", str(folder)]
        if not self.run_quietly(build):
            return dict.fromkeys(wanted, "")
        # One target may still be whole: ask for each alone.
        return {name: self.run_quietly([*build, "--target", name]) for name in wanted}

    def run_quietly(self, command: list[str]) -> str:
        """Run a build step, passing its output on; the error it reported, or nothing when it succeeded."""
        try:
            result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        except OSError as error:
            return f"{command[0]}: {error.strerror}"
        print(result.stdout, end="", file=sys.stderr)
        if result.returncode == 0:
            return ""
        lines = [line.strip() for line in result.stdout.splitlines() if line.strip()] or ["no output"]
        at = next((i for i, line in enumerate(lines) if "error" in line.lower()), len(lines) - 1)
        if lines[at].startswith("CMake Error"):
            return " ".join(lines[at + 1 : at + 4])  # the first line names a file of CMake's, the next ones the mistake
        return lines[at]


extensions = [
    Extension(f"jmm_fast.{name}", sources=[], optional=True, py_limited_api=name != "_host")
    for name, reason in plan().items()
    if not reason
]

setup(
    packages=[*find_packages(include=["jmm_fast", "jmm_fast.*"]), "jmm_fast.kernels"],
    # The top-level name `kernels` belongs to another package on PyPI.
    package_dir={"jmm_fast.kernels": "kernels"},
    ext_modules=extensions,
    cmdclass={"build_py": BuildPython, "build_ext": BuildNative},
)
