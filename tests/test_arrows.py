"""Imports inside the package go down only, and importing the package loads no backend."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jmm_fast"

LEAVES = {"errors", "files", "memory", "progress", "skeleton"}
BELOW_MODELS = {"ops", "reference", *LEAVES}
ALLOWED = {
    "errors": set(),
    "files": {"errors"},
    "memory": set(),
    "progress": set(),
    "skeleton": {"errors"},
    "reference": set(),
    "kernels": set(),
    "ops": {"reference", "kernels", "_C", "_cuda", *LEAVES},
    "models": BELOW_MODELS,
    "data": {"_host", *BELOW_MODELS},
    "train": {"models", "data", *BELOW_MODELS},
    "recipes": {"train", "models", "data", *BELOW_MODELS},
    "viz": {"models", "data", *BELOW_MODELS},
    "doctor": {"train", "models", "data", *BELOW_MODELS},
    "bench": {"recipes", "train", "models", "data", "_C", *BELOW_MODELS},
    "cli": {"bench", "doctor", "recipes", "train", "viz", "models", "data", *BELOW_MODELS},
    "__main__": {"cli"},
    "__init__": set(),
}
"""For each room of the package, the rooms it may import. A new room needs a line here."""


def modules() -> list[tuple[str, Path]]:
    """Dotted name below ``jmm_fast`` and file of every module."""
    found = [(".".join(path.relative_to(PACKAGE).with_suffix("").parts), path) for path in PACKAGE.rglob("*.py")]
    kernels = ROOT / "kernels"
    found += [
        ("kernels." + ".".join(path.relative_to(kernels).with_suffix("").parts), path) for path in kernels.rglob("*.py")
    ]
    return sorted(found)


def imports(name: str, source: str) -> set[str]:
    """Every absolute name a module imports, anywhere in it; ``from jmm_fast import ops`` counts as ``jmm_fast.ops``."""
    package = ["jmm_fast", *name.split(".")[:-1]]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            found |= {f"jmm_fast.{alias.name}" for alias in node.names} if module == "jmm_fast" else {module}
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute | ast.Name)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.add(node.args[0].value)
    return found


def rooms_of(names: set[str]) -> set[str]:
    rooms = {name.split(".")[1] for name in names if name.startswith("jmm_fast.")}
    return {room for room in rooms if not (room.startswith("__") and room.endswith("__"))}


@pytest.mark.parametrize("name, path", modules(), ids=[name for name, _ in modules()])
def test_imports_go_down(name, path):
    room = name.split(".")[0]
    assert room in ALLOWED, f"tests/test_arrows.py does not say what {room} may import"
    upward = rooms_of(imports(name, path.read_text(encoding="utf-8"))) - ALLOWED[room] - {room}
    assert not upward, f"{path} imports {sorted(upward)}, which are not below {room}"


@pytest.mark.parametrize("name, path", [(n, p) for n, p in modules() if n.startswith("reference.")])
def test_reference_imports_torch_alone(name, path):
    outside = {module.split(".")[0] for module in imports(name, path.read_text(encoding="utf-8"))}
    assert outside - set(sys.stdlib_module_names) <= {"torch", "jmm_fast"}


def test_the_reader_of_imports_sees_every_form():
    source = """
import jmm_fast.viz.report as a
from jmm_fast import cli, ops
from jmm_fast.train.config import X
def late():
    from ..data import store
    from . import blocks
    import importlib
    importlib.import_module("jmm_fast._C")
"""
    assert rooms_of(imports("models.encoder", source)) == {"viz", "cli", "ops", "train", "data", "models", "_C"}


def test_importing_the_package_loads_no_backend():
    code = """
import sys
import jmm_fast, jmm_fast.cli
import jmm_fast.ops, jmm_fast.models, jmm_fast.data
print(sorted({"triton", "jmm_fast._C", "jmm_fast._cuda", "jmm_fast.kernels", "matplotlib"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
