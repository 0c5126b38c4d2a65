import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import jmm_fast
from jmm_fast import ops
from jmm_fast.ops import BACKENDS, OPS
from jmm_fast.ops.backend import choose
from jmm_fast.ops.topology_attention import AUTO_CUDA_TOKENS


def test_table_names_every_op_and_backend_with_a_reason():
    table = jmm_fast.backends()
    assert tuple(table) == OPS
    for row in table.values():
        assert tuple(row) == BACKENDS
        assert row["reference"] == "available"
        assert all(text == "available" or len(text) > 20 for text in row.values())


def test_importing_ops_loads_no_backend():
    code = "import sys, jmm_fast.ops; print([m for m in ('triton', 'jmm_fast._C') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.fixture
def everything(monkeypatch):
    """An installation on which every backend runs every op."""
    found = {(op, backend): None for op in OPS for backend in BACKENDS}
    monkeypatch.setattr("jmm_fast.ops.backend._found", found)
    return found


def test_a_backend_that_refuses_leaves_the_call_to_the_next(everything):
    cpu, gpu = (SimpleNamespace(device=torch.device(kind)) for kind in ("cpu", "cuda"))
    op = "topology_attention"
    assert choose(op, "auto", cpu) == "cpu" and choose(op, "auto", gpu) == "cuda"
    assert choose(op, "auto", cpu, cpu="a dtype") == "reference"
    assert choose(op, "auto", gpu, cuda="too long") == choose(op, "auto", gpu, unloved=("cuda",)) == "triton"
    assert choose(op, "auto", gpu, cuda="too long", triton="a dtype", cpu=None) == "reference"
    assert choose(op, "auto", gpu, cpu="a dtype") == "cuda", "another backend's reason is not its own"
    assert choose(op, "cuda", gpu, unloved=("cuda",), triton="a dtype") == "cuda", "who asks for it gets it"
    with pytest.raises(ValueError, match='topology_attention: backend "cuda" cannot run: too long'):
        choose(op, "cuda", gpu, cuda="too long")
    everything[op, "cuda"] = "no GPU"
    assert choose(op, "auto", gpu) == "triton"


@pytest.mark.parametrize(
    "length, dim, dtype, joints, room, expected",
    [
        (74, 32, torch.bfloat16, 25, 128, "cuda"),
        (AUTO_CUDA_TOKENS, 64, torch.float16, 25, 128, "cuda"),
        (AUTO_CUDA_TOKENS + 1, 32, torch.bfloat16, 25, 128, "triton"),
        (74, 32, torch.bfloat16, 25, 64, "triton"),
        (74, 32, torch.bfloat16, 65, 128, "triton"),
        (74, 24, torch.bfloat16, 25, 128, "triton"),
        (74, 32, torch.float32, 25, 128, "triton"),
    ],
)
def test_which_kernel_few_tokens_take_on_a_gpu(everything, monkeypatch, length, dim, dtype, joints, room, expected):
    monkeypatch.setattr(sys.modules["jmm_fast.ops.topology_attention"], "_room", lambda dim, joints, device: room)
    took = []
    with FakeTensorMode():
        # Without gradients, which a torch for CPUs cannot even plan on a GPU.
        q = torch.empty(4, 8, length, dim, device="cuda", dtype=dtype)
        table = torch.empty(8, joints, joints, device="cuda")
        numbers = torch.empty(4, length, device="cuda", dtype=torch.int64)

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                took.append(str(func))
                return func(*args, **(kwargs or {}))

        with Watch():
            out = ops.topology_attention(q, q, q, table, numbers)
        assert out.shape == q.shape and out.dtype == q.dtype
        kernels = [name for name in took if name.startswith("jmm_fast.")]
        assert kernels == [f"jmm_fast.topology_attention_{expected}_forward.default"]
        backward = getattr(torch.ops.jmm_fast, f"topology_attention_{expected}_backward")
        statistics = torch.empty(2, 4, 8, length, device="cuda")
        gradients = backward(out, q, q, q, table, numbers, out, statistics, False, 1.0)
        assert [x.shape for x in gradients] == [q.shape, q.shape, q.shape, table.shape]


def test_room_on_a_gpu_for_sizes_that_are_symbols(monkeypatch):
    """One graph for all lengths: the question what a device has room for must not stop a compiler."""
    op, asked = sys.modules["jmm_fast.ops.topology_attention"], []
    monkeypatch.setattr(op, "_room", torch._dynamo.assume_constant_result(lambda *sizes: asked.append(sizes) or 100))

    def fits(q, table):
        return q + (q.shape[2] <= op.cuda_tokens(q.shape[3], table.shape[1], 0))

    compiled = torch.compile(fits, fullgraph=True, dynamic=True, backend="eager")
    for length, joints, expected in ((74, 25, 1), (90, 17, 1), (128, 25, 0)):
        assert (compiled(torch.zeros(2, 3, length, 32), torch.zeros(3, joints, joints)) == expected).all()
    assert set(asked) == {(32, 25, 0), (32, 17, 0)}
