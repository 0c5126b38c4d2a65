"""The two halves of a transformer block on the CPU, each as one differentiable function.

What stands between the matrix products of a block moves more memory than they do: LayerNorm, bias, GELU, residual, the
layout of queries, keys and values. Here rows go through a whole half in pieces that stay in the caches, and only what
backward cannot do without is kept: LayerNorm's output, the MLP's hidden layer and GELU are made again.
"""

import torch
from torch import Tensor

from jmm_fast.ops.backend import choose, library

_ROWS = 1024
"""Rows of a piece: four hidden layers of the released size (4 MB each) fit the third cache."""

library.define(
    "norm_linear_forward(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor? bias, float eps, "
    "bool half) -> (Tensor, Tensor, Tensor)"
)
library.define(
    "norm_linear_backward(Tensor[] grads, Tensor? base, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor mean, "
    "Tensor rstd, Tensor weight, bool has_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define("linear_add_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual) -> Tensor")
library.define("linear_add_backward(Tensor grad, Tensor x, Tensor weight) -> (Tensor, Tensor, Tensor)")
library.define(
    "norm_mlp_forward(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight1, Tensor bias1, Tensor weight2, "
    "Tensor bias2, float eps, bool half, bool add) -> (Tensor, Tensor, Tensor)"
)
library.define(
    "norm_mlp_backward(Tensor grad, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor mean, Tensor rstd, "
    "Tensor weight1, Tensor bias1, Tensor weight2, bool half, bool add) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def native_block(x: Tensor, backend: str, head_dim: int) -> bool:
    """Whether :func:`attention_half` and :func:`mlp_half` take these inputs and are wanted."""
    if backend not in ("auto", "cpu") or x.device.type != "cpu" or x.dtype != torch.float32 or not x.numel():
        return False
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return False
    return head_dim <= 128 and _has_products() and choose("topology_attention", "auto", x) == "cpu"


def _has_products() -> bool:
    """Whether torch has oneDNN's product, which is twice as fast as MKL's on AMD and float32 all through."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


_has_products._dynamo_marked_constant = True


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


class _AttentionHalf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, norm_w, norm_b, qkv_w, qkv_b, proj_w, proj_b, table, joints, rows, heads, multiply, eps, half, add
    ):
        ops = torch.ops.jmm_fast
        bodies, tokens, dim = x.shape
        packed, mean, rstd = ops.norm_linear_forward(x, norm_w, norm_b, qkv_w, qkv_b, eps, half)
        q, k, v = packed.view(bodies, tokens, 3, heads, dim // heads).permute(2, 0, 3, 1, 4).unbind()
        scale = (dim // heads) ** -0.5
        out, lse = ops.topology_attention_forward(q, k, v, table, joints, multiply, scale)
        joined = out.transpose(1, 2).reshape(bodies, tokens, dim)
        residual = x if add else None
        if rows is not None:
            joined = joined.flatten(0, 1).index_select(0, rows).view(bodies, -1, dim)
            residual = x.flatten(0, 1).index_select(0, rows).view(bodies, -1, dim) if add else None
        y = ops.linear_add_forward(joined, proj_w, proj_b, residual)
        ctx.save_for_backward(x, norm_w, norm_b, qkv_w, proj_w, table, joints, rows, packed, mean, rstd, out, lse)
        ctx.heads, ctx.multiply, ctx.scale, ctx.add = heads, multiply, scale, add
        ctx.biased = (qkv_b is not None, proj_b is not None)
        return y

    @staticmethod
    def backward(ctx, grad):
        ops = torch.ops.jmm_fast
        x, norm_w, norm_b, qkv_w, proj_w, table, joints, rows, packed, mean, rstd, out, lse = ctx.saved_tensors
        bodies, tokens, dim = x.shape
        q, k, v = packed.view(bodies, tokens, 3, ctx.heads, dim // ctx.heads).permute(2, 0, 3, 1, 4).unbind()
        joined = out.transpose(1, 2).reshape(bodies * tokens, dim)
        if rows is not None:
            joined = joined.index_select(0, rows)
        da, dproj_w, dproj_b = ops.linear_add_backward(grad.contiguous(), joined.view(*grad.shape[:2], dim), proj_w)
        base = grad if ctx.add else None
        if rows is not None:
            da = da.new_zeros(bodies * tokens, dim).index_copy(0, rows, da.flatten(0, 1))
            if base is not None:
                base = grad.new_zeros(bodies * tokens, dim).index_copy(0, rows, grad.flatten(0, 1)).view(x.shape)
        dout = da.view(bodies, tokens, ctx.heads, -1).transpose(1, 2)
        dq, dk, dv, dtable = ops.topology_attention_backward(
            dout, q, k, v, table, joints, out, lse, ctx.multiply, ctx.scale
        )
        grads = [d.transpose(1, 2).reshape(bodies, tokens, dim) for d in (dq, dk, dv)]
        dx, dnorm_w, dnorm_b, dqkv_w, dqkv_b = ops.norm_linear_backward(
            grads, base, x, norm_w, norm_b, mean, rstd, qkv_w, ctx.biased[0]
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
        y, mean, rstd = torch.ops.jmm_fast.norm_mlp_forward(x, norm_w, norm_b, w1, b1, w2, b2, eps, half, add)
        ctx.save_for_backward(x, norm_w, norm_b, mean, rstd, w1, b1, w2)
        ctx.half, ctx.add = half, add
        return y

    @staticmethod
    def backward(ctx, grad):
        return *torch.ops.jmm_fast.norm_mlp_backward(grad, *ctx.saved_tensors, ctx.half, ctx.add), None, None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _product_add(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
    """``x @ weight.T + bias + other``; the sum is float32."""
    if x.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, "add")
    return other + _product(x, weight, bias)


def _outer(grad: Tensor, x: Tensor) -> Tensor:
    """``grad.T @ x`` of rows, ``[out,in]``."""
    if x.dtype != torch.float32:
        return grad.t() @ x
    # oneDNN runs this twice as fast with the shorter side in front.
    if grad.shape[1] > x.shape[1]:
        return _product(x.t(), grad.t()).t()
    return _product(grad.t(), x.t())


def _normed(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return torch.addcmul(bias, (x - mean[:, None]) * rstd[:, None], weight)


def _pieces(*tensors: Tensor | None):
    """The rows of all tensors, ``[.., n]``, in pieces of ``_ROWS``."""
    flat = [None if tensor is None else tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    for begin in range(0, flat[0].shape[0], _ROWS):
        yield [None if tensor is None else tensor[begin : begin + _ROWS] for tensor in flat]


def _type(half: bool) -> torch.dtype:
    return torch.bfloat16 if half else torch.float32


@torch.library.impl(library, "norm_linear_forward", "CPU")
def _norm_linear_forward(x, norm_weight, norm_bias, weight, bias, eps, half):
    dtype = _type(half)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    y = x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)
    mean, rstd = x.new_empty(x.shape[:-1].numel(), 1), x.new_empty(x.shape[:-1].numel(), 1)
    for piece, to, mean_of, rstd_of in _pieces(x, y, mean, rstd):
        normed, m, r = torch.native_layer_norm(piece, piece.shape[-1:], norm_weight, norm_bias, eps)
        mean_of.copy_(m)
        rstd_of.copy_(r)
        to.copy_(_product(normed.to(dtype), weight, bias))
    return y, mean, rstd


@torch.library.impl(library, "norm_linear_backward", "CPU")
def _norm_linear_backward(grads, base, x, norm_weight, norm_bias, mean, rstd, weight, has_bias):
    dtype = grads[0].dtype
    weight_t = weight.to(dtype).t()
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight, dbias = torch.zeros_like(weight), weight.new_zeros(weight.shape[0])
    dnorm_w, dnorm_b = torch.zeros_like(norm_weight), torch.zeros_like(norm_bias)
    for *parts, base_of, rows, m, r, to in _pieces(*grads, base, x, mean, rstd, dx):
        grad = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        normed, _, _ = torch.native_layer_norm(rows, rows.shape[-1:], norm_weight, norm_bias, 1e-5)
        dweight += _outer(grad, normed.to(dtype))
        if has_bias:
            dbias += grad.sum(0, dtype=torch.float32)
        dnormed = _product(grad, weight_t).float()
        d, dw, db = torch.ops.aten.native_layer_norm_backward(
            dnormed, rows, rows.shape[-1:], m, r, norm_weight, norm_bias, [True] * 3
        )
        to.copy_(d if base_of is None else d + base_of)
        dnorm_w += dw
        dnorm_b += db
    return dx, dnorm_w, dnorm_b, dweight, dbias


@torch.library.impl(library, "linear_add_forward", "CPU")
def _linear_add_forward(x, weight, bias, residual):
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    y = x.new_empty(*x.shape[:-1], weight.shape[0], dtype=torch.float32)
    for piece, to, other in _pieces(x, y, residual):
        to.copy_(_product(piece, weight, bias) if other is None else _product_add(piece, weight, bias, other))
    return y


@torch.library.impl(library, "linear_add_backward", "CPU")
def _linear_add_backward(grad, x, weight):
    weight_t = weight.to(x.dtype).t()
    dx = x.new_empty(x.shape)
    dweight, dbias = torch.zeros_like(weight), weight.new_zeros(weight.shape[0])
    for g, piece, to in _pieces(grad, x, dx):
        dbias += g.sum(0)
        g = g.to(x.dtype)
        to.copy_(_product(g, weight_t))
        dweight += _outer(g, piece)
    return dx, dweight, dbias


@torch.library.impl(library, "norm_mlp_forward", "CPU")
def _norm_mlp_forward(x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, eps, half, add):
    dtype = _type(half)
    weight1, bias1, weight2, bias2 = (p.to(dtype) for p in (weight1, bias1, weight2, bias2))
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean, rstd = x.new_empty(x.shape[:-1].numel(), 1), x.new_empty(x.shape[:-1].numel(), 1)
    for piece, to, mean_of, rstd_of in _pieces(x, y, mean, rstd):
        normed, m, r = torch.native_layer_norm(piece, piece.shape[-1:], norm_weight, norm_bias, eps)
        mean_of.copy_(m)
        rstd_of.copy_(r)
        hidden = torch.ops.mkldnn._linear_pointwise(normed.to(dtype), weight1, bias1, "gelu", [], "none")
        to.copy_(_product_add(hidden, weight2, bias2, piece) if add else _product(hidden, weight2, bias2))
    return y, mean, rstd


@torch.library.impl(library, "norm_mlp_backward", "CPU")
def _norm_mlp_backward(grad, x, norm_weight, norm_bias, mean, rstd, weight1, bias1, weight2, half, add):
    dtype = _type(half)
    w1, b1, w2 = (p.to(dtype) for p in (weight1, bias1, weight2))
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dw1, db1, dw2 = (torch.zeros_like(p) for p in (weight1, bias1, weight2))
    db2, dnorm_w, dnorm_b = (
        weight2.new_zeros(weight2.shape[0]),
        torch.zeros_like(norm_weight),
        torch.zeros_like(norm_bias),
    )
    for g, rows, m, r, to in _pieces(grad, x, mean, rstd, dx):
        normed, _, _ = torch.native_layer_norm(rows, rows.shape[-1:], norm_weight, norm_bias, 1e-5)
        normed = normed.to(dtype)
        before = _product(normed, w1, b1)
        db2 += g.sum(0)
        lower = g.to(dtype)
        dw2 += _outer(lower, torch.nn.functional.gelu(before))
        dbefore = torch.ops.aten.gelu_backward(_product(lower, w2.t()), before)
        db1 += dbefore.sum(0, dtype=torch.float32)
        dw1 += _outer(dbefore, normed)
        d, dw, db = torch.ops.aten.native_layer_norm_backward(
            _product(dbefore, w1.t()).float(), rows, rows.shape[-1:], m, r, norm_weight, norm_bias, [True] * 3
        )
        to.copy_(d + g if add else d)
        dnorm_w += dw
        dnorm_b += db
    return dx, dnorm_w, dnorm_b, dw1, db1, dw2, db2


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.shape[:-1].numel()
    return x.new_empty(rows, 1), x.new_empty(rows, 1)


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)


@torch.library.register_fake("jmm_fast::norm_linear_forward", lib=library)
def _fake_norm_linear_forward(x, norm_weight, norm_bias, weight, bias, eps, half):
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=_type(half)), *_statistics(x)


@torch.library.register_fake("jmm_fast::norm_linear_backward", lib=library)
def _fake_norm_linear_backward(grads, base, x, norm_weight, norm_bias, mean, rstd, weight, has_bias):
    return *_like(x, norm_weight, norm_bias, weight), weight.new_empty(weight.shape[0])


@torch.library.register_fake("jmm_fast::linear_add_forward", lib=library)
def _fake_linear_add_forward(x, weight, bias, residual):
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=torch.float32)


@torch.library.register_fake("jmm_fast::linear_add_backward", lib=library)
def _fake_linear_add_backward(grad, x, weight):
    return *_like(x, weight), weight.new_empty(weight.shape[0])


@torch.library.register_fake("jmm_fast::norm_mlp_forward", lib=library)
def _fake_norm_mlp_forward(x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, eps, half, add):
    return *_like(x), *_statistics(x)


@torch.library.register_fake("jmm_fast::norm_mlp_backward", lib=library)
def _fake_norm_mlp_backward(grad, x, norm_weight, norm_bias, mean, rstd, weight1, bias1, weight2, half, add):
    return *_like(x, norm_weight, norm_bias, weight1, bias1, weight2), weight2.new_empty(weight2.shape[0])
