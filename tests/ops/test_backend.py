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


class Watch(TorchDispatchMode):
    """Which operators were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def took(self, start):
        return [name for name in self.names if name.startswith(start)]


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
    with FakeTensorMode():
        # Without gradients, which a torch for CPUs cannot even plan on a GPU.
        q = torch.empty(4, 8, length, dim, device="cuda", dtype=dtype)
        table = torch.empty(8, joints, joints, device="cuda")
        numbers = torch.empty(4, length, device="cuda", dtype=torch.int64)
        with Watch() as watch:
            out = ops.topology_attention(q, q, q, table, numbers)
        assert out.shape == q.shape and out.dtype == q.dtype
        assert watch.took("jmm_fast.") == [f"jmm_fast.topology_attention_{expected}_forward.default"]
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


@pytest.mark.parametrize(
    "length, wanted, expected", [(74, "auto", "cuda"), (74, "triton", "triton"), (750, "auto", "triton")]
)
def test_which_kernel_the_attention_of_a_block_takes_on_a_gpu(everything, monkeypatch, length, wanted, expected):
    monkeypatch.setattr(sys.modules["jmm_fast.ops.topology_attention"], "_room", lambda dim, joints, device: 128)
    block = sys.modules["jmm_fast.ops.block"]
    with FakeTensorMode():
        modules = [
            SimpleNamespace(
                weight=torch.empty(shape, device="cuda"), bias=torch.empty(shape[:1], device="cuda"), eps=1e-5
            )
            for shape in ((64,), (192, 64), (64, 64))
        ]
        x, table = torch.empty(4, length, 64, device="cuda"), torch.empty(2, 25, 25, device="cuda")
        joints = torch.empty(4, length, device="cuda", dtype=torch.int64)
        monkeypatch.setattr(block, "_products_dtype", lambda x: torch.bfloat16)
        with Watch() as watch:
            ops.attention_half(ops.Stream(x), *modules, table, joints, heads=2, multiply=False, backend=wanted)
        packed, out = (torch.empty(4, length, width, device="cuda", dtype=torch.bfloat16) for width in (192, 64))
        out = out.unflatten(2, (2, 32)).transpose(1, 2)
        statistics = torch.empty(2, 4, 2, length, device="cuda")
        gradients = block._PACKED[expected][1](out, packed, table, joints, out, statistics, False, 1.0)
        assert [x.shape for x in gradients] == [packed.shape, table.shape]
    assert watch.took("jmm_fast.topology") == [f"jmm_fast.topology_attention_{expected}_forward.default"]
