"""jmm_fast: masked motion pretraining on 3D skeletons, fast and checked against a plain implementation."""

import importlib

__version__ = "0.1.0"

_LAZY = {
    "backends": "jmm_fast.ops",
    "ops": "jmm_fast.ops",
    "JMMTGT": "jmm_fast.models",
    "ModelConfig": "jmm_fast.models",
    "ClipStore": "jmm_fast.data",
    "Skeleton": "jmm_fast.skeleton",
    "UserError": "jmm_fast.errors",
}

__all__ = ["__version__", *_LAZY]  # noqa: PLE0604 (names resolved below)


def __getattr__(name: str):
    # Looked up on first use: `jmm-fast --help` should not wait for torch.
    if name not in _LAZY:
        raise AttributeError(f"module 'jmm_fast' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    return module if name == "ops" else getattr(module, name)
