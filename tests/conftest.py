"""Shared fixtures: where golden arrays and real data lie, if they lie anywhere."""

import hashlib
import os
import tempfile
from pathlib import Path

import pytest
import torch

# torch's cache of compiled graphs does not know when the outputs of our operators change: a graph made before such a
# change would come back and fail. So the cache of the tests has the name of the code they test.
_code = hashlib.sha256()
for _path in sorted(Path(__file__).parents[1].glob("jmm_fast/ops/*.py")):
    _code.update(_path.read_bytes())
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(tempfile.gettempdir(), f"jmm-fast-tests-{_code.hexdigest()[:12]}"))

SHARED = Path(os.environ.get("JMM_FAST_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def _shared_file(folder: str, name: str) -> Path:
    path = SHARED / folder / name
    if not path.exists():
        pytest.skip(f"{path} is absent: golden arrays and real data are not part of the project (set JMM_FAST_SHARED)")
    return path


@pytest.fixture(scope="session")
def golden():
    """``golden("pretrain_small.npz")``: path of an array file made by the authors' code; skips where absent."""
    return lambda name: _shared_file("golden", name)


@pytest.fixture(scope="session")
def real_data():
    """``real_data("ui-prmd/ui-prmd-kinect.npz")``: path of a real data set; skips where absent."""
    return lambda name: _shared_file("data", name)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
