"""Shared fixtures: where golden arrays and real data lie, if they lie anywhere."""

import hashlib
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

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


def _attention(q, k, v, table, joints, mode="add", scale=None):
    """The formula of topology attention, written without a look at the package."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    scores = scale * torch.einsum("bhid,bhjd->bhij", q, k)
    if table is not None:
        term = torch.stack([table[:, joint][:, :, joint] for joint in joints.expand(q.shape[0], -1)])
        scores = scores * term if mode == "scale" else scores + term
    return torch.softmax(scores, -1) @ v


def _pair_gradients(q, k, v, grad, scale):
    """Size of the gradient of each score, without a table."""
    weights = torch.softmax(scale * q @ k.transpose(2, 3), 3)
    change = grad @ v.transpose(2, 3)
    return (weights * (change - (weights * change).sum(3, keepdim=True))).abs()


@pytest.fixture
def attention_formula():
    return _attention


@pytest.fixture
def attention_parity():
    """``attention_parity(ours, q, k, v, table, joints, mode, scale, grad)``: ``ours(q, k, v, table)`` and the gradient
    of every input that is there, which it gives back, have at most twice the error of the plain twin in the same dtype
    plus the rounding of the largest result; gradients, whose chain is longer, three times. Exact is the formula in
    float64.

    ``largest_score``, where sums come out otherwise in the last bits in each kernel: gradients may be off by the
    rounding of such a score.
    """
    from jmm_fast import ops
    from jmm_fast.bench.parity import compare, results

    def check(ours, q, k, v, table, joints, mode="add", scale=None, grad=None, *, largest_score=0.0):
        scale = q.shape[3] ** -0.5 if scale is None else scale
        grad = torch.randn_like(q) if grad is None else grad
        inputs, single = (q, k, v, table), torch.finfo(torch.float32).eps

        def plain(*x):
            return ops.topology_attention(*x, joints, mode=mode or "add", scale=scale, backend="reference")

        found, same = results(ours, inputs, grad), results(plain, inputs, grad)
        doubles = [None if x is None else x.double() for x in inputs]
        exact = results(lambda *x: _attention(*x, joints, mode, scale), doubles, grad.double())
        names = ("out", "dq", "dk", "dv", "dtable")[: len(found)]
        for one, result, truth in zip(
            compare(names, found, same, exact, torch.finfo(q.dtype).eps), found, exact, strict=True
        ):
            bound = one.bound + (one.name != "out") * single * largest_score * truth.abs().max().item()
            if q.shape[2] == 1 and one.name in ("dq", "dk", "dtable"):
                # The only weight is 1 and its gradient, exactly 0, the difference of two sums of D products.
                sums = q.shape[3] * (grad.abs().max() * v.abs().max() * max(1, q.abs().max(), k.abs().max())).item()
                bound = 4 * single * sums * q.shape[0]
            elif one.name == "dtable" and mode == "add" and (joints == joints.flatten()[0]).all():
                # All terms are one number, which softmax does not see: what is left is the rounding of each gradient.
                rounded = _pair_gradients(*doubles[:3], grad.double(), scale).sum().item()
                bound = torch.finfo(q.dtype).eps * rounded
            assert result.isfinite().all(), one.name
            assert one.error <= bound, f"{one.name}: error {one.error:.3g}, bound {bound:.3g}"
        return found

    return check


@pytest.fixture
def gelu():
    """Layers that pass numbers through: ``norm``, ``fc1`` and ``fc2`` make GELU of ``values`` of whatever comes in, and
    the gradient of ``fc1.bias`` is the slope there. ``result`` and ``slope`` are what is right, in float64."""
    values = torch.cat([torch.linspace(-9, 9, 181), torch.tensor([-1e4, -40.0, 40.0, 1e4, 0.0, -0.0])])
    count = len(values)
    layers = nn.LayerNorm(count), nn.Linear(count, count), nn.Linear(count, count)
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter.zero_()
        layers[1].bias.copy_(values)
        layers[2].weight.copy_(torch.eye(count))
    exact = values.double().requires_grad_()
    result = functional.gelu(exact)
    (slope,) = torch.autograd.grad(result.sum(), exact)
    norm, fc1, fc2 = layers
    return SimpleNamespace(values=values, norm=norm, fc1=fc1, fc2=fc2, result=result.detach(), slope=slope)
