"""The two halves of a transformer block, each as one differentiable function on the CPU and as a chain of few on a GPU.

What stands between the matrix products of a block moves more memory than they do: LayerNorm, bias, GELU, residual, the
layout of queries, keys and values. On the CPU rows go through a whole half in pieces that stay in the caches, and only
what backward cannot do without is kept: LayerNorm's output, the MLP's hidden layer and GELU are made again.

On a GPU a half hands on a :class:`Stream`: its branch is not yet added, so that the sum, its bias and the LayerNorm of
the next half are one pass of one Triton kernel, and their gradients another. Schemas of this path begin with
``block_triton``; products between them are torch's.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from jmm_fast.ops.backend import interpreted, library, on_triton, unavailable
from jmm_fast.ops.topology_attention import attention_backend, split_heads

_MAX_HEAD_DIM = 128
_MAX_JOINTS = 128
_MAX_WIDTH = 4096

library.define(
    "norm_linear_forward(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor? bias, float eps, "
    "bool half) -> Tensor"
)
library.define(
    "norm_linear_backward(Tensor grad, Tensor? grad_k, Tensor? grad_v, Tensor? base, Tensor? base_rows, Tensor x, "
    "Tensor norm_weight, Tensor norm_bias, Tensor weight, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define("linear_add_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? rows) -> Tensor")
library.define("linear_add_backward(Tensor grad, Tensor x, Tensor weight, Tensor? rows) -> (Tensor, Tensor, Tensor)")
library.define(
    "norm_mlp_forward(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight1, Tensor bias1, Tensor weight2, "
    "Tensor bias2, float eps, bool half, bool add) -> Tensor"
)
library.define(
    "norm_mlp_backward(Tensor grad, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight1, Tensor bias1, "
    "Tensor weight2, float eps, bool half, bool add) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_SCHEMAS = {
    "add_norm": "(Tensor x, Tensor? branch, Tensor? bias, Tensor? factor, Tensor? rows, Tensor? weight, Tensor? shift, "
    "float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    "add_norm_backward": "(Tensor? grad, Tensor? stream, Tensor? y, Tensor? statistics, Tensor? factor, Tensor? rows, "
    "Tensor? weight, int tokens, ScalarType? branch_dtype) -> (Tensor, Tensor, Tensor)",
    "mlp": "(Tensor n, Tensor weight1, Tensor bias, Tensor weight2) -> (Tensor, Tensor)",
    "mlp_backward": "(Tensor grad, Tensor n, Tensor weight1, Tensor bias, Tensor weight2, Tensor hidden) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "linear_backward": "(Tensor grad, Tensor x, Tensor weight, bool bias) -> (Tensor, Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    library.define(f"block_triton_{_name}{_schema}")
    library.impl(f"block_triton_{_name}", on_triton("block", _name), "CompositeExplicitAutograd")


class Stream(NamedTuple):
    """The residual stream of the Triton path: ``x + factor (branch + bias)``, of which ``rows`` alone are wanted.

    Attributes:
        x: float32 ``[B,N,d]``.
        branch: ``[B,N,d]`` in the products' dtype; None where nothing is to be added.
        bias: float32 ``[d]``, of the Linear that made the branch.
        factor: float32 ``[B]``, of each body: drop path.
        rows: int64 ``[B*M]``, rows of ``x`` seen as ``[B*N,d]``: as many of each body, in the order of the bodies, none
            twice.
    """

    x: Tensor
    branch: Tensor | None = None
    bias: Tensor | None = None
    factor: Tensor | None = None
    rows: Tensor | None = None

    def settle(self) -> Tensor:
        """The stream as a tensor ``[B,N,d]`` or ``[B,M,d]``."""
        return _add_norm(self, None, torch.float32)[0]


def block_backend(x: Tensor, backend: str, head_dim: int, table: Tensor | None = None) -> str | None:
    """Which of ``"cpu"`` and ``"triton"`` runs the functions of this module on these inputs.

    ``"cpu"`` takes tensors, ``"triton"`` a :class:`Stream`. None where neither can or is wanted (``backend``, as
    in ``jmm_fast.backends()``): the plain composition of torch's modules does it then.
    """
    kind = x.device.type
    wanted = {"cpu": "cpu", "cuda": "triton"}.get(kind) if backend == "auto" else backend
    if wanted not in ("cpu", "triton") or x.dtype != torch.float32 or not x.numel() or head_dim > _MAX_HEAD_DIM:
        return None
    if kind != ("cpu" if wanted == "cpu" or interpreted() else "cuda"):
        return None
    short = (torch.bfloat16,) if wanted == "cpu" else (torch.bfloat16, torch.float16)
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) not in short:
        return None
    if wanted == "triton" and x.shape[-1] > _MAX_WIDTH:
        return None
    if wanted == "triton" and table is not None and (table.dtype != torch.float32 or table.shape[1] > _MAX_JOINTS):
        return None
    available = all(unavailable(op, wanted) is None for op in ("block", "topology_attention"))
    return wanted if available else None


def attention_half(
    x: Tensor | Stream,
    norm: torch.nn.LayerNorm,
    qkv: torch.nn.Linear,
    proj: torch.nn.Linear,
    table: Tensor | None,
    joints: Tensor | None,
    *,
    heads: int,
    multiply: bool,
    keep: Tensor | None = None,
    add: bool = True,
    backend: str = "auto",
) -> Tensor | Stream:
    """``x + proj(topology_attention(qkv(norm(x))))``, or without ``x +``.

    Args:
        x: float32 ``[B,N,d]`` on the CPU, or a :class:`Stream`. Under autocast to bfloat16 (of a stream, to float16
            too) the products and the attention run in it; LayerNorm, the sum with ``x`` and all gradients of
            parameters stay float32.
        norm, qkv, proj: hold the parameters.
        table, joints, multiply: as in ``topology_attention``.
        keep: int64 ``[B,M]``: the tokens of each body whose output is wanted, each at most once; None for all.
        add: whether ``x`` is added; of a stream it is, and ``Stream.factor`` scales what is added.
        backend: of a stream on a GPU, whose attention: ``"auto"`` chooses as ``topology_attention`` does.

    Returns:
        float32 ``[B,N,d]`` or ``[B,M,d]``; a stream of them for a stream.

    Deterministic: repeatable bit for bit, on a GPU as far as torch's products are.
    """
    if isinstance(x, Stream):
        x, n = _add_norm(x, norm, _products_dtype(x.x))
        packed = _Linear.apply(n, qkv.weight, qkv.bias)
        kind = "triton"
        if backend == "auto" and packed.is_cuda:
            kind = attention_backend(split_heads(packed, heads)[0], table, backend)
        joined = _PackedAttention.apply(packed, table, joints, heads, multiply, kind)
        return Stream(x, _Linear.apply(joined, proj.weight, None), proj.bias, rows=_flat(keep, x))
    half = torch.is_autocast_enabled("cpu")
    rows = _flat(keep, x)
    return _AttentionHalf.apply(
        x,
        norm.weight,
        norm.bias,
        qkv.weight,
        qkv.bias,
        proj.weight,
        proj.bias,
        table,
        joints,
        rows,
        heads,
        multiply,
        norm.eps,
        half,
        add,
    )


def mlp_half(
    x: Tensor | Stream, norm: torch.nn.LayerNorm, fc1: torch.nn.Linear, fc2: torch.nn.Linear, *, add: bool = True
) -> Tensor | Stream:
    """``x + fc2(GELU(fc1(norm(x))))``, or without ``x +``; inputs and results as of :func:`attention_half`."""
    if isinstance(x, Stream):
        x, n = _add_norm(x, norm, _products_dtype(x.x))
        return Stream(x, _Mlp.apply(n, fc1.weight, fc1.bias, fc2.weight), fc2.bias)
    half = torch.is_autocast_enabled("cpu")
    return _MlpHalf.apply(x, norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias, norm.eps, half, add)


def norm_linear(x: Tensor | Stream, norm: torch.nn.LayerNorm, linear: torch.nn.Linear | None) -> Tensor:
    """``linear(norm(x))``: float32 ``[..,d]`` to ``[..,out]``, in the products' dtype under autocast. Of a stream,
    ``norm(x)`` in float32 without ``linear``."""
    if isinstance(x, Stream):
        n = _add_norm(x, norm, torch.float32 if linear is None else _products_dtype(x.x))[1]
        return n if linear is None else _Linear.apply(n, linear.weight, linear.bias)
    half = torch.is_autocast_enabled("cpu")
    return _NormLinear.apply(x, norm.weight, norm.bias, linear.weight, linear.bias, norm.eps, half)


def _flat(keep: Tensor | None, x: Tensor) -> Tensor | None:
    """Rows of ``x [B,N,d]``, seen as ``[B*N,d]``, of the tokens ``keep [B,M]``."""
    if keep is None:
        return None
    return (keep + torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]).flatten()


def _products_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32


def _add_norm(stream: Stream, norm: torch.nn.LayerNorm | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The stream with its branch added, and its LayerNorm in ``dtype``."""
    parameters = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    if norm is None and stream.branch is None and stream.rows is None:
        return stream.x, stream.x
    y, n = _AddNorm.apply(*stream, *parameters, dtype)
    return (stream.x if stream.branch is None and stream.rows is None else y), n


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_w, norm_b, weight, bias, eps, half):
        ctx.save_for_backward(x, norm_w, norm_b, weight)
        ctx.eps, ctx.biased = eps, bias is not None
        return torch.ops.jmm_fast.norm_linear_forward(x, norm_w, norm_b, weight, bias, eps, half)

    @staticmethod
    def backward(ctx, grad):
        dx, dnorm_w, dnorm_b, dweight, dbias = torch.ops.jmm_fast.norm_linear_backward(
            grad, None, None, None, None, *ctx.saved_tensors, ctx.eps
        )
        return dx, dnorm_w, dnorm_b, dweight, dbias if ctx.biased else None, None, None


class _AttentionHalf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, norm_w, norm_b, qkv_w, qkv_b, proj_w, proj_b, table, joints, rows, heads, multiply, eps, half, add
    ):
        ops = torch.ops.jmm_fast
        bodies, tokens, dim = x.shape
        packed = ops.norm_linear_forward(x, norm_w, norm_b, qkv_w, qkv_b, eps, half)
        q, k, v = split_heads(packed, heads)
        scale = (dim // heads) ** -0.5
        out, statistics = ops.topology_attention_forward(q, k, v, table, joints, multiply, scale)
        joined = out.transpose(1, 2).reshape(bodies, tokens, dim)
        y = ops.linear_add_forward(joined, proj_w, proj_b, x if add else None, rows)
        ctx.save_for_backward(x, norm_w, norm_b, qkv_w, proj_w, table, joints, rows, packed, out, statistics)
        ctx.heads, ctx.multiply, ctx.scale, ctx.eps, ctx.add = heads, multiply, scale, eps, add
        ctx.biased = (qkv_b is not None, proj_b is not None)
        return y if rows is None else y.view(bodies, -1, dim)

    @staticmethod
    def backward(ctx, grad):
        ops = torch.ops.jmm_fast
        x, norm_w, norm_b, qkv_w, proj_w, table, joints, rows, packed, out, statistics = ctx.saved_tensors
        bodies, tokens, dim = x.shape
        q, k, v = split_heads(packed, ctx.heads)
        joined = out.transpose(1, 2).reshape(bodies, tokens, dim)
        da, dproj_w, dproj_b = ops.linear_add_backward(grad, joined, proj_w, rows)
        dout = da.view(bodies, tokens, ctx.heads, -1).transpose(1, 2)
        dq, dk, dv, dtable = ops.topology_attention_backward(
            dout, q, k, v, table, joints, out, statistics, ctx.multiply, ctx.scale
        )
        dq, dk, dv = (d.transpose(1, 2).reshape(bodies, tokens, dim) for d in (dq, dk, dv))
        dx, dnorm_w, dnorm_b, dqkv_w, dqkv_b = ops.norm_linear_backward(
            dq, dk, dv, grad if ctx.add else None, rows, x, norm_w, norm_b, qkv_w, ctx.eps
        )
        return (
            dx,
            dnorm_w,
            dnorm_b,
            dqkv_w,
            dqkv_b if ctx.biased[0] else None,
            dproj_w,
            dproj_b if ctx.biased[1] else None,
            dtable if table is not None else None,
            *[None] * 7,
        )


class _MlpHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_w, norm_b, w1, b1, w2, b2, eps, half, add):
        ctx.save_for_backward(x, norm_w, norm_b, w1, b1, w2)
        ctx.options = (eps, half, add)
        return torch.ops.jmm_fast.norm_mlp_forward(x, norm_w, norm_b, w1, b1, w2, b2, eps, half, add)

    @staticmethod
    def backward(ctx, grad):
        return *torch.ops.jmm_fast.norm_mlp_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None


class _AddNorm(torch.autograd.Function):
    """Stream and LayerNorm; a result that is not asked for is empty. Nobody reads the last stream: then it has no
    gradient, and no zeros in place of one."""

    @staticmethod
    def forward(ctx, x, branch, bias, factor, rows, weight, shift, eps, dtype):
        y, n, statistics = torch.ops.jmm_fast.block_triton_add_norm(
            x, branch, bias, factor, rows, weight, shift, eps, dtype
        )
        moved, norm = branch is not None or rows is not None, weight is not None
        ctx.save_for_backward((y if moved else x) if norm else None, statistics if norm else None, factor, rows, weight)
        ctx.set_materialize_grads(False)
        ctx.tokens, ctx.moved, ctx.norm = x.shape[1], moved, norm
        ctx.branch_dtype, ctx.biased = None if branch is None else branch.dtype, bias is not None
        return y, n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dn):
        dx, dbranch, sums = torch.ops.jmm_fast.block_triton_add_norm_backward(
            dn, dy if ctx.moved else None, *ctx.saved_tensors, ctx.tokens, ctx.branch_dtype
        )
        dweight, dshift, dbias = sums
        branch = ctx.branch_dtype is not None
        return (
            dx,
            dbranch if branch else None,
            dbias if branch and ctx.biased else None,
            None,
            None,
            dweight if ctx.norm else None,
            dshift if ctx.norm else None,
            None,
            None,
        )


class _Linear(torch.autograd.Function):
    """``x weight^T + bias`` in the dtype of ``x``; gradients of parameters are float32."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        flat, short = x.reshape(-1, x.shape[-1]), weight.to(x.dtype)
        ctx.save_for_backward(flat, short)
        ctx.shape, ctx.biased = x.shape, bias is not None
        out = flat @ short.t() if bias is None else torch.addmm(bias.to(x.dtype), flat, short.t())
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        flat, short = ctx.saved_tensors
        dx, dweight, dbias = torch.ops.jmm_fast.block_triton_linear_backward(
            grad.reshape(-1, grad.shape[-1]), flat, short, ctx.biased
        )
        return dx.view(ctx.shape), dweight, dbias if ctx.biased else None


_PACKED = {
    "cuda": (
        torch.ops.jmm_fast.topology_attention_cuda_forward,
        torch.ops.jmm_fast.topology_attention_cuda_packed_backward,
    ),
    "triton": (
        torch.ops.jmm_fast.topology_attention_triton_forward,
        torch.ops.jmm_fast.topology_attention_triton_packed_backward,
    ),
}


class _PackedAttention(torch.autograd.Function):
    """``topology_attention`` of packed queries, keys and values ``[B,N,3*H*D]``: ``[B,N,H*D]``, no copies."""

    @staticmethod
    def forward(ctx, packed, table, joints, heads, multiply, kind):
        joints = None if table is None else joints.long()
        scale = (packed.shape[2] // (3 * heads)) ** -0.5
        out, statistics = _PACKED[kind][0](*split_heads(packed, heads), table, joints, multiply, scale)
        ctx.save_for_backward(packed, table, joints, out, statistics)
        ctx.multiply, ctx.scale, ctx.kind = multiply, scale, kind
        return out.transpose(1, 2).flatten(2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        packed, table, joints, out, statistics = ctx.saved_tensors
        dpacked, dtable = _PACKED[ctx.kind][1](
            grad.unflatten(2, (out.shape[1], -1)).transpose(1, 2),
            packed, table, joints, out, statistics, ctx.multiply, ctx.scale,
        )  # fmt: skip
        return dpacked, dtable if table is not None else None, None, None, None, None


class _Mlp(torch.autograd.Function):
    """``weight2 GELU(weight1 n + bias)`` in the dtype of ``n``; gradients of parameters are float32."""

    @staticmethod
    def forward(ctx, n, weight1, bias, weight2):
        flat, short1, short2 = n.reshape(-1, n.shape[-1]), weight1.to(n.dtype), weight2.to(n.dtype)
        out, hidden = torch.ops.jmm_fast.block_triton_mlp(flat, short1, bias, short2)
        ctx.save_for_backward(flat, short1, bias, short2, hidden)
        return out.view(*n.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dn, *parameters = torch.ops.jmm_fast.block_triton_mlp_backward(
            grad.reshape(-1, grad.shape[-1]), *ctx.saved_tensors
        )
        return dn.view(*grad.shape[:-1], -1), *parameters


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)


def _rows(x: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty(*x.shape[:-1], columns, dtype=dtype)


@torch.library.register_fake("jmm_fast::norm_linear_forward", lib=library)
def _fake_norm_linear_forward(x, norm_weight, norm_bias, weight, bias, eps, half):
    return _rows(x, weight.shape[0], torch.bfloat16 if half else torch.float32)


@torch.library.register_fake("jmm_fast::norm_linear_backward", lib=library)
def _fake_norm_linear_backward(grad, grad_k, grad_v, base, base_rows, x, norm_weight, norm_bias, weight, eps):
    return *_like(x, norm_weight, norm_bias, weight), weight.new_empty(weight.shape[0])


@torch.library.register_fake("jmm_fast::linear_add_forward", lib=library)
def _fake_linear_add_forward(x, weight, bias, residual, rows):
    if rows is not None:
        return x.new_empty(rows.shape[0], weight.shape[0], dtype=torch.float32)
    return _rows(x, weight.shape[0], torch.float32)


@torch.library.register_fake("jmm_fast::linear_add_backward", lib=library)
def _fake_linear_add_backward(grad, x, weight, rows):
    return *_like(x, weight), weight.new_empty(weight.shape[0])


@torch.library.register_fake("jmm_fast::norm_mlp_forward", lib=library)
def _fake_norm_mlp_forward(x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, eps, half, add):
    return _rows(x, weight2.shape[0], torch.float32)


@torch.library.register_fake("jmm_fast::norm_mlp_backward", lib=library)
def _fake_norm_mlp_backward(grad, x, norm_weight, norm_bias, weight1, bias1, weight2, eps, half, add):
    return *_like(x, norm_weight, norm_bias, weight1, bias1, weight2), weight2.new_empty(weight2.shape[0])


@torch.library.register_fake("jmm_fast::block_triton_add_norm", lib=library)
def _fake_add_norm(x, branch, bias, factor, rows, weight, shift, eps, dtype):
    bodies, tokens, width = x.shape
    kept = tokens if rows is None else rows.shape[0] // bodies
    moved, norm = branch is not None or rows is not None, weight is not None
    return (
        x.new_empty((bodies, kept, width) if moved else (0,)),
        x.new_empty((bodies, kept, width) if norm else (0,), dtype=dtype),
        x.new_empty((2, bodies * kept) if norm else (0,)),
    )


@torch.library.register_fake("jmm_fast::block_triton_add_norm_backward", lib=library)
def _fake_add_norm_backward(grad, stream, y, statistics, factor, rows, weight, tokens, branch_dtype):
    like = stream if grad is None else grad
    bodies, _, width = like.shape
    return (
        like.new_empty(bodies, tokens, width, dtype=torch.float32),
        like.new_empty((0,) if branch_dtype is None else (bodies, tokens, width), dtype=branch_dtype),
        like.new_empty(3, width, dtype=torch.float32),
    )


@torch.library.register_fake("jmm_fast::block_triton_mlp", lib=library)
def _fake_mlp(n, weight1, bias, weight2):
    fused = on_triton("block", "fused")(n, weight1.shape[0])
    return torch.empty_like(n), n.new_empty((0,) if fused else (n.shape[0], weight1.shape[0]))


@torch.library.register_fake("jmm_fast::block_triton_mlp_backward", lib=library)
def _fake_mlp_backward(grad, n, weight1, bias, weight2, hidden):
    return torch.empty_like(n), *(torch.empty_like(x, dtype=torch.float32) for x in (weight1, bias, weight2))


@torch.library.register_fake("jmm_fast::block_triton_linear_backward", lib=library)
def _fake_linear_backward(grad, x, weight, bias):
    sums = grad.new_empty(weight.shape[0] if bias else 0, dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(weight, dtype=torch.float32), sums
