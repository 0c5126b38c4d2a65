"""Attention that knows the skeleton: a term for each pair of joints inside the softmax."""

import importlib

import torch
from torch import Tensor

from jmm_fast import reference
from jmm_fast.ops import checks
from jmm_fast.ops.backend import choose, library, on_triton, shared_memory, unavailable

MODES = ("add", "scale")
_MAX_HEAD_DIM = 128
_MAX_JOINTS = 128

CUDA_DTYPES = (torch.bfloat16, torch.float16)
CUDA_WIDTHS = (16, 32, 64)
CUDA_TOKENS = 128
CUDA_JOINTS = 64
"""What the CUDA kernel takes at most; see also :func:`cuda_tokens`."""

AUTO_CUDA_TOKENS = 80
"""Up to how many tokens ``auto`` takes the CUDA kernel and not Triton's. By arithmetic: up to here five tiles of 16 fit
closer than blocks of 64 or 128. Not yet measured on a GPU; ``bench/tune.py`` compares both."""

library.define(
    "topology_attention(Tensor q, Tensor k, Tensor v, Tensor? table, Tensor? joints, bool multiply, float scale) "
    "-> Tensor"
)
# Plain tensor code all the way down: autograd, fake tensors, compile and export look through it.
library.impl("topology_attention", reference.topology_attention, "CompositeImplicitAutograd")

_SCHEMAS = {
    "forward": "(Tensor q, Tensor k, Tensor v, Tensor? table, Tensor? joints, bool multiply, float scale) "
    "-> (Tensor, Tensor)",
    "backward": "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? table, Tensor? joints, Tensor out, "
    "Tensor statistics, bool multiply, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
}
# Of packed queries, keys and values, whose gradient comes packed; for blocks.
for _kind in ("cuda", "triton"):
    library.define(
        f"topology_attention_{_kind}_packed_backward(Tensor grad_out, Tensor packed, Tensor? table, Tensor? joints, "
        "Tensor out, Tensor statistics, bool multiply, float scale) -> (Tensor, Tensor)"
    )
library.define(
    "topology_attention_cuda_backward_into(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? table, "
    "Tensor? joints, Tensor out, Tensor statistics, bool multiply, float scale, "
    "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> Tensor"
)
for _name, _schema in _SCHEMAS.items():
    # In C++ for the CPU; in CUDA C++; as Triton kernels, on CUDA tensors or in Triton's interpreter.
    for _kind in ("", "cuda_", "triton_"):
        library.define(f"topology_attention_{_kind}{_name}{_schema}")


def topology_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None = None,
    joints: Tensor | None = None,
    *,
    mode: str = "add",
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention whose scores carry a term for the joints of query and key.

    ``S_ij = scale * q_i.k_j + table[h, joint(i), joint(j)]`` (``mode="add"``), or
    ``S_ij = scale * q_i.k_j * table[h, joint(i), joint(j)]`` (``mode="scale"``);
    ``out_i = sum_j softmax_j(S_ij) v_j``.

    Args:
        q, k, v: floating ``[B,H,N,D]``, one dtype, any strides (views of a packed qkv cost no copy).
        table: floating ``[H,V,V]``, or None for plain attention.
        joints: int64 or int32 ``[N]`` (one for all bodies) or ``[B,N]``: the joint of each token, in ``[0, V)``;
            needed with a table. Values are checked on CPU tensors and not on a device, where looking would stall.
        mode: ``"add"`` or ``"scale"``.
        scale: None means ``1/sqrt(D)``.
        backend: see ``jmm_fast.backends()``. ``"cpu"`` takes float32 or bfloat16 with ``D <= 128`` and a
            float32 table; ``"triton"`` takes float16 too, and up to 128 joints; ``"cuda"`` bfloat16 and float16 of at
            most 128 tokens with ``D`` 16, 32 or 64 and up to 64 joints. ``"auto"`` on a GPU takes ``"cuda"`` up to 80
            tokens where it is built, else ``"triton"``.

    Returns:
        ``[B,H,N,D]``; differentiable in ``q``, ``k``, ``v`` and ``table``.

    Raises:
        ValueError: wrong shape, dtype, device or value, e.g. "joints must be int [N] or [B,N], got float32 [8, 74]".

    Softmax statistics are float32 in every dtype; on processors that multiply bfloat16 the C++ kernel rounds the
    weights of bfloat16 inputs to bfloat16 before they meet the values, elsewhere it computes in float32.

    Deterministic: repeatable bit for bit, for any number of threads. Source: JMM-TGT (PLOS ONE 2025); the additive
    form with a learned scalar for each hop distance is Graphormer's spatial encoding (Ying et al., NeurIPS 2021).
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.floating(name, tensor, "[B,H,N,D]", 4)
        checks.require(
            tensor.shape == q.shape and tensor.dtype == q.dtype, name, lambda: f"{checks.describe(q)} as q is", tensor
        )
    checks.require(mode in MODES, "mode", '"add" or "scale"', mode)
    bodies, heads, length, dim = q.shape
    if table is not None:
        checks.floating("table", table, "[H,V,V]", 3)
        checks.require(
            table.shape[0] == heads and table.shape[1] == table.shape[2], "table", f"floating [{heads},V,V]", table
        )
        checks.require(joints is not None, "joints", "given with a table", joints)
    if joints is not None:
        fits = (
            isinstance(joints, Tensor)
            and joints.dtype in (torch.int64, torch.int32)
            and joints.shape in ((length,), (bodies, length))
        )
        checks.require(fits, "joints", lambda: f"int [N] or [B,N] with N={length}, B={bodies}", joints)
    checks.same_device(q=q, k=k, v=v, table=table, joints=joints)
    if table is None:
        joints = None
    elif joints.device.type == "cpu" and joints.numel() and not torch.compiler.is_compiling():
        low, high = (int(x) for x in joints.aminmax())
        if low < 0 or high >= table.shape[1]:
            raise ValueError(f"joints must be in [0, {table.shape[1]}), got values from {low} to {high}")
    if joints is not None:
        joints = joints.long()
    scale = dim**-0.5 if scale is None else float(scale)
    backend = attention_backend(q, table, backend)
    if backend in _KERNELS:
        return _NativeAttention.apply(q, k, v, table, joints, mode == "scale", scale, backend)
    return torch.ops.jmm_fast.topology_attention(q, k, v, table, joints, mode == "scale", scale)


def attention_backend(q: Tensor, table: Tensor | None, backend: str) -> str:
    """The backend that runs :func:`topology_attention` on these inputs."""
    return choose(
        "topology_attention",
        backend,
        q,
        unloved=("cuda",) if q.shape[2] > AUTO_CUDA_TOKENS else (),
        cpu=_refusal(q, table),
        triton=_triton_refusal(q, table),
        cuda=_cuda_refusal(q, table),
    )


def _refusal(q: Tensor, table: Tensor | None) -> str | None:
    """Why the C++ kernel cannot take these inputs; None when it can."""
    if q.dtype not in checks.NATIVE_DTYPES:
        return f"it takes {checks.either(checks.NATIVE_DTYPES)}, got {checks.describe(q)}"
    if table is not None and table.dtype != torch.float32:
        return f"it takes a float32 table, got {checks.describe(table)}"
    if q.shape[3] > _MAX_HEAD_DIM:
        return f"it takes a head width up to {_MAX_HEAD_DIM}, got {checks.describe(q)}"
    return None


def _triton_refusal(q: Tensor, table: Tensor | None) -> str | None:
    """Why the Triton kernel cannot take these inputs; None when it can."""
    if q.dtype not in checks.TRITON_DTYPES:
        return f"it takes {checks.either(checks.TRITON_DTYPES)}, got {checks.describe(q)}"
    if table is not None and (table.dtype != torch.float32 or table.shape[1] > _MAX_JOINTS):
        return f"it takes a float32 table of at most {_MAX_JOINTS} joints, got {checks.describe(table)}"
    if q.shape[3] > _MAX_HEAD_DIM:
        return f"it takes a head width up to {_MAX_HEAD_DIM}, got {checks.describe(q)}"
    return None


def cuda_tokens(dim: int, joints: int, device: int) -> int:
    """How many tokens the CUDA kernel takes on a device, whose shared memory bounds them.

    Args:
        dim: head width, one of ``CUDA_WIDTHS``.
        joints: those of the table, at most ``CUDA_JOINTS``; 0 without one.
        device: number of the GPU.
    """
    # Numbers also where a compiler takes sizes as symbols.
    width = next(one for one in CUDA_WIDTHS if one == dim)
    return _room(width, next(one for one in range(CUDA_JOINTS + 1) if one == joints), device)


def _room(dim: int, joints: int, device: int) -> int:
    """What the CUDA extension says. Traced code sees a constant."""
    return importlib.import_module("jmm_fast._cuda").attention_tokens(shared_memory(device), dim, joints)


_room._dynamo_marked_constant = True


def _cuda_refusal(q: Tensor, table: Tensor | None) -> str | None:
    """Why the CUDA kernel cannot take these inputs; None when it can."""
    *_, length, dim = q.shape
    if q.dtype not in CUDA_DTYPES:
        return f"it takes {checks.either(CUDA_DTYPES)}, got {checks.describe(q)}"
    if dim not in CUDA_WIDTHS:
        return f"it takes a head width of 16, 32 or 64, got {checks.describe(q)}"
    if length > CUDA_TOKENS:
        return f"it takes at most {CUDA_TOKENS} tokens, got {checks.describe(q)}"
    if table is not None and (table.dtype != torch.float32 or table.shape[1] > CUDA_JOINTS):
        return f"it takes a float32 table of at most {CUDA_JOINTS} joints, got {checks.describe(table)}"
    if q.is_cuda and unavailable("topology_attention", "cuda") is None:
        most = cuda_tokens(dim, 0 if table is None else table.shape[1], q.get_device())
        if length > most:
            return f"a block has shared memory for {most} tokens on this GPU, got {checks.describe(q)}"
    return None


_KERNELS = {
    "cpu": (torch.ops.jmm_fast.topology_attention_forward, torch.ops.jmm_fast.topology_attention_backward),
    "triton": (
        torch.ops.jmm_fast.topology_attention_triton_forward,
        torch.ops.jmm_fast.topology_attention_triton_backward,
    ),
    "cuda": (
        torch.ops.jmm_fast.topology_attention_cuda_forward,
        torch.ops.jmm_fast.topology_attention_cuda_backward,
    ),
}


class _NativeAttention(torch.autograd.Function):
    """Forward and backward kernels of a backend as one differentiable function."""

    @staticmethod
    def forward(ctx, q, k, v, table, joints, multiply, scale, backend):
        out, statistics = _KERNELS[backend][0](q, k, v, table, joints, multiply, scale)
        ctx.save_for_backward(q, k, v, table, joints, out, statistics)
        ctx.multiply, ctx.scale, ctx.backend = multiply, scale, backend
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, table, joints, out, statistics = ctx.saved_tensors
        dq, dk, dv, dtable = _KERNELS[ctx.backend][1](
            grad_out, q, k, v, table, joints, out, statistics, ctx.multiply, ctx.scale
        )
        return dq, dk, dv, dtable if table is not None else None, None, None, None, None


for _name in (*_SCHEMAS, "packed_backward"):
    _launch = on_triton("topology_attention", _name)
    library.impl(f"topology_attention_triton_{_name}", _launch, "CompositeExplicitAutograd")


def _token_major(x: Tensor) -> Tensor:
    """Empty ``[B,H,N,D]`` laid out as ``[B,N,H,D]``, so that joining the heads again costs no copy."""
    bodies, heads, length, dim = x.shape
    return x.new_empty(bodies, length, heads, dim).transpose(1, 2)


@torch.library.register_fake("jmm_fast::topology_attention_triton_forward", lib=library)
@torch.library.register_fake("jmm_fast::topology_attention_cuda_forward", lib=library)
@torch.library.register_fake("jmm_fast::topology_attention_forward", lib=library)
def _fake_forward(q, k, v, table, joints, multiply, scale):
    return _token_major(q), q.new_empty((2, *q.shape[:3]), dtype=torch.float32)


@torch.library.register_fake("jmm_fast::topology_attention_triton_backward", lib=library)
@torch.library.register_fake("jmm_fast::topology_attention_cuda_backward", lib=library)
@torch.library.register_fake("jmm_fast::topology_attention_backward", lib=library)
def _fake_backward(grad_out, q, k, v, table, joints, out, statistics, multiply, scale):
    dtable = q.new_empty((0,) if table is None else table.shape, dtype=torch.float32)
    return _token_major(q), _token_major(q), _token_major(q), dtable


def split_heads(packed: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values ``[B,H,N,D]``, views of ``[B,N,3*H*D]``."""
    return packed.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _cuda_packed_backward(grad_out, packed, table, joints, out, statistics, multiply, scale):
    dpacked = torch.empty_like(packed, memory_format=torch.contiguous_format)
    parts, into = (split_heads(x, out.shape[1]) for x in (packed, dpacked))
    dtable = torch.ops.jmm_fast.topology_attention_cuda_backward_into(
        grad_out, *parts, table, joints, out, statistics, multiply, scale, *into
    )
    return dpacked, dtable


library.impl("topology_attention_cuda_packed_backward", _cuda_packed_backward, "CUDA")


@torch.library.register_fake("jmm_fast::topology_attention_cuda_packed_backward", lib=library)
@torch.library.register_fake("jmm_fast::topology_attention_triton_packed_backward", lib=library)
def _fake_packed_backward(grad_out, packed, table, joints, out, statistics, multiply, scale):
    dtable = packed.new_empty((0,) if table is None else table.shape, dtype=torch.float32)
    return packed.new_empty(packed.shape), dtable
