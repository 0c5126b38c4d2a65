"""The two halves of a transformer block on the CPU, each as one differentiable function.

What stands between the matrix products of a block moves more memory than they do: LayerNorm, bias, GELU, residual, the
layout of queries, keys and values. Here rows go through a whole half in pieces that stay in the caches, and only what
backward cannot do without is kept: LayerNorm's output, the MLP's hidden layer and GELU are made again.
"""

import torch
from torch import Tensor

from jmm_fast.ops.backend import library, unavailable

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


def native_block(x: Tensor, backend: str, head_dim: int) -> bool:
    """Whether the functions of this module take these inputs and are wanted."""
    if backend not in ("auto", "cpu") or x.device.type != "cpu" or x.dtype != torch.float32 or not x.numel():
        return False
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return False
    return head_dim <= 128 and unavailable("block", "cpu") is None and unavailable("topology_attention", "cpu") is None


def attention_half(
    x: Tensor,
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
) -> Tensor:
    """``x + proj(topology_attention(qkv(norm(x))))``, or without ``x +``.

    Args:
        x: float32 ``[B,N,d]``. Under autocast to bfloat16 the products and the attention run in bfloat16; LayerNorm,
            the sum with ``x`` and all gradients of parameters stay float32.
        norm, qkv, proj: hold the parameters.
        table, joints, multiply: as in ``topology_attention``.
        keep: int64 ``[B,M]``: the tokens of each body whose output is wanted, each at most once; None for all.
        add: whether ``x`` is added.

    Returns:
        float32 ``[B,N,d]`` or ``[B,M,d]``.
    """
    half = torch.is_autocast_enabled("cpu")
    rows = None
    if keep is not None:
        rows = (keep + torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]).flatten()
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
    x: Tensor, norm: torch.nn.LayerNorm, fc1: torch.nn.Linear, fc2: torch.nn.Linear, *, add: bool = True
) -> Tensor:
    """``x + fc2(GELU(fc1(norm(x))))``, or without ``x +``; dtypes as in :func:`attention_half`."""
    half = torch.is_autocast_enabled("cpu")
    return _MlpHalf.apply(x, norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias, norm.eps, half, add)


def norm_linear(x: Tensor, norm: torch.nn.LayerNorm, linear: torch.nn.Linear) -> Tensor:
    """``linear(norm(x))``: float32 ``[..,d]`` to ``[..,out]``, bfloat16 under autocast to it."""
    half = torch.is_autocast_enabled("cpu")
    return _NormLinear.apply(x, norm.weight, norm.bias, linear.weight, linear.bias, norm.eps, half)


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
        q, k, v = _split(packed, heads)
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
        q, k, v = _split(packed, ctx.heads)
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


def _split(packed: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views ``[B,H,N,D]`` of packed ``[B,N,3*H*D]``."""
    bodies, tokens, width = packed.shape
    return packed.view(bodies, tokens, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind()


class _MlpHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_w, norm_b, w1, b1, w2, b2, eps, half, add):
        ctx.save_for_backward(x, norm_w, norm_b, w1, b1, w2)
        ctx.options = (eps, half, add)
        return torch.ops.jmm_fast.norm_mlp_forward(x, norm_w, norm_b, w1, b1, w2, b2, eps, half, add)

    @staticmethod
    def backward(ctx, grad):
        return *torch.ops.jmm_fast.norm_mlp_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None


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
