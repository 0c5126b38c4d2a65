"""Between the full grid of tokens and the visible ones: gather patches, put tokens back."""

import torch
from torch import Tensor

from jmm_fast import reference
from jmm_fast.ops import checks
from jmm_fast.ops.backend import choose, library, on_triton

library.define("token_grid_gather(Tensor clips, Tensor visible, int t_patch) -> Tensor")
library.define(
    "token_grid_scatter(Tensor tokens, Tensor restore, Tensor mask_token, Tensor joint_embedding, "
    "Tensor time_embedding) -> Tensor"
)
# Plain tensor code all the way down: autograd, fake tensors, compile and export look through these two.
library.impl("token_grid_gather", reference.token_grid_gather, "CompositeImplicitAutograd")
library.impl("token_grid_scatter", reference.token_grid_scatter, "CompositeImplicitAutograd")

_SCHEMAS = {
    "gather_forward": "(Tensor clips, Tensor visible, int t_patch) -> Tensor",
    "gather_backward": "(Tensor grad_out, Tensor visible, int t_patch, int frames, int joints, int channels) -> Tensor",
    "scatter_forward": "(Tensor tokens, Tensor restore, Tensor mask_token, Tensor joint_embedding, "
    "Tensor time_embedding) -> Tensor",
    "scatter_backward": "(Tensor grad_out, Tensor restore, int kept, int joints, int steps, ScalarType dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    # In C++ for the CPU; as Triton kernels, on CUDA tensors or in Triton's interpreter.
    library.define(f"token_grid_{_name}{_schema}")
    library.define(f"token_grid_triton_{_name}{_schema}")


def token_grid_gather(clips: Tensor, visible: Tensor, *, t_patch: int = 4, backend: str = "auto") -> Tensor:
    """Patches of the visible tokens only: ``out[b,k] = P[b, visible[b,k]]``.

    ``P`` is ``clips`` cut into tokens ``l = t' * V + v`` of ``u*C`` numbers, inner order (frame in patch, coordinate).

    Args:
        clips: floating ``[B,T,V,C]``, ``T`` a multiple of ``t_patch``.
        visible: int64 ``[B,K]``, token numbers in ``[0, L)`` (``MotionMask.visible``).
        t_patch: frames per token, ``u``.
        backend: see ``jmm_fast.backends()``. ``"cpu"`` takes float32 or bfloat16, ``"triton"`` float16 too.

    Returns:
        ``[B,K,u*C]`` of the dtype of ``clips``; differentiable in ``clips``.

    Raises:
        ValueError: wrong shape, dtype or device.

    Deterministic: repeatable bit for bit, for any number of threads. Source: MAE (He et al., CVPR 2022), MAMP (ICCV
    2023).
    """
    checks.floating("clips", clips, "[B,T,V,C]", 4)
    checks.patches(clips, t_patch)
    checks.require(
        isinstance(visible, Tensor) and visible.dtype == torch.int64 and visible.dim() == 2,
        "visible",
        "int64 [B,K]",
        visible,
    )
    checks.require(visible.shape[0] == clips.shape[0], "visible", lambda: f"int64 [{clips.shape[0]},K]", visible)
    checks.same_device(clips=clips, visible=visible)
    backend = choose("token_grid", backend, clips, **_refusals(clips=clips))
    if backend in ("cpu", "triton"):
        return _NativeGather.apply(clips, visible, t_patch, backend)
    return torch.ops.jmm_fast.token_grid_gather(clips, visible, t_patch)


def token_grid_scatter(
    tokens: Tensor,
    restore: Tensor,
    mask_token: Tensor,
    joint_embedding: Tensor,
    time_embedding: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Put visible tokens back on the grid, fill the rest with the mask token, add the embeddings.

    ``out[b,l] = (tokens[b, restore[b,l]] if restore[b,l] < K else mask_token) + joint[l mod V] + time[l div V]``

    Args:
        tokens: floating ``[B,K,d]``, visible tokens in ascending order.
        restore: int64 ``[B,L]`` (``MotionMask.restore``).
        mask_token: floating ``[d]``.
        joint_embedding: floating ``[V,d]``.
        time_embedding: floating ``[T',d]`` with ``T' * V = L``.
        backend: see ``jmm_fast.backends()``. ``"cpu"`` takes float32 or bfloat16, ``"triton"`` float16 too, both
            computed in float32.

    Returns:
        ``[B,L,d]`` of the dtype that tokens and embeddings promote to; differentiable in all but ``restore``.

    Raises:
        ValueError: wrong shape, dtype or device.

    Deterministic: repeatable bit for bit, for any number of threads; ``"reference"`` on the CPU alone. Source:
    MAE (He et al., CVPR 2022), MAMP (ICCV 2023).
    """
    checks.floating("tokens", tokens, "[B,K,d]", 3)
    dim = tokens.shape[2]
    checks.require(
        isinstance(restore, Tensor)
        and restore.dtype == torch.int64
        and restore.dim() == 2
        and restore.shape[0] == tokens.shape[0]
        and restore.shape[1] >= tokens.shape[1],
        "restore",
        lambda: f"int64 [{tokens.shape[0]},L] with L >= {tokens.shape[1]}",
        restore,
    )
    checks.floating("mask_token", mask_token, f"[{dim}]", 1)
    checks.floating("joint_embedding", joint_embedding, f"[V,{dim}]", 2)
    checks.floating("time_embedding", time_embedding, f"[T',{dim}]", 2)
    for name, tensor in (
        ("mask_token", mask_token),
        ("joint_embedding", joint_embedding),
        ("time_embedding", time_embedding),
    ):
        checks.require(tensor.shape[-1] == dim, name, f"of width {dim} as tokens are", tensor)
    checks.require(
        joint_embedding.shape[0] * time_embedding.shape[0] == restore.shape[1],
        "time_embedding",
        f"[T',{dim}] with T' * {joint_embedding.shape[0]} joints = {restore.shape[1]} tokens",
        time_embedding,
    )
    checks.same_device(
        tokens=tokens,
        restore=restore,
        mask_token=mask_token,
        joint_embedding=joint_embedding,
        time_embedding=time_embedding,
    )
    refusals = _refusals(
        tokens=tokens, mask_token=mask_token, joint_embedding=joint_embedding, time_embedding=time_embedding
    )
    backend = choose("token_grid", backend, tokens, **refusals)
    if backend in ("cpu", "triton"):
        return _NativeScatter.apply(tokens, restore, mask_token, joint_embedding, time_embedding, backend)
    return torch.ops.jmm_fast.token_grid_scatter(tokens, restore, mask_token, joint_embedding, time_embedding)


def _refusals(**tensors: Tensor) -> dict[str, str | None]:
    """Why the C++ and the Triton kernel cannot take these inputs; None where one can."""
    return {
        kind: next(
            (
                f"it takes {checks.either(types)} {name}, got {checks.describe(tensor)}"
                for name, tensor in tensors.items()
                if tensor.dtype not in types
            ),
            None,
        )
        for kind, types in checks.KERNEL_DTYPES.items()
    }


_KERNELS = {
    backend: {name: getattr(torch.ops.jmm_fast, f"token_grid_{prefix}{name}") for name in _SCHEMAS}
    for backend, prefix in (("cpu", ""), ("triton", "triton_"))
}


class _NativeGather(torch.autograd.Function):
    """Forward and backward kernels of a backend as one differentiable function."""

    @staticmethod
    def forward(ctx, clips, visible, t_patch, backend):
        ctx.save_for_backward(visible)
        ctx.t_patch, ctx.sizes, ctx.backend = t_patch, clips.shape[1:], backend
        return _KERNELS[backend]["gather_forward"](clips, visible, t_patch)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        (visible,) = ctx.saved_tensors
        grad = _KERNELS[ctx.backend]["gather_backward"](grad_out, visible, ctx.t_patch, *ctx.sizes)
        return grad, None, None, None


class _NativeScatter(torch.autograd.Function):
    """Forward and backward kernels of a backend as one differentiable function."""

    @staticmethod
    def forward(ctx, tokens, restore, mask_token, joint_embedding, time_embedding, backend):
        ctx.save_for_backward(restore)
        ctx.sizes = tokens.shape[1], joint_embedding.shape[0], time_embedding.shape[0]
        ctx.dtypes = tokens.dtype, mask_token.dtype, joint_embedding.dtype, time_embedding.dtype
        ctx.backend = backend
        return _KERNELS[backend]["scatter_forward"](tokens, restore, mask_token, joint_embedding, time_embedding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        (restore,) = ctx.saved_tensors
        grads = _KERNELS[ctx.backend]["scatter_backward"](grad_out, restore, *ctx.sizes, ctx.dtypes[0])
        tokens, *rest = (grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True))
        return tokens, None, *rest, None


for _name in _SCHEMAS:
    library.impl(f"token_grid_triton_{_name}", on_triton("token_grid", _name), "CompositeExplicitAutograd")


@torch.library.register_fake("jmm_fast::token_grid_triton_gather_forward", lib=library)
@torch.library.register_fake("jmm_fast::token_grid_gather_forward", lib=library)
def _fake_gather_forward(clips, visible, t_patch):
    return clips.new_empty(*visible.shape, t_patch * clips.shape[3])


@torch.library.register_fake("jmm_fast::token_grid_triton_gather_backward", lib=library)
@torch.library.register_fake("jmm_fast::token_grid_gather_backward", lib=library)
def _fake_gather_backward(grad_out, visible, t_patch, frames, joints, channels):
    return grad_out.new_empty(grad_out.shape[0], frames, joints, channels)


@torch.library.register_fake("jmm_fast::token_grid_triton_scatter_forward", lib=library)
@torch.library.register_fake("jmm_fast::token_grid_scatter_forward", lib=library)
def _fake_scatter_forward(tokens, restore, mask_token, joint_embedding, time_embedding):
    dtype = torch.promote_types(tokens.dtype, torch.promote_types(joint_embedding.dtype, time_embedding.dtype))
    return tokens.new_empty(*restore.shape, tokens.shape[2], dtype=dtype)


@torch.library.register_fake("jmm_fast::token_grid_triton_scatter_backward", lib=library)
@torch.library.register_fake("jmm_fast::token_grid_scatter_backward", lib=library)
def _fake_scatter_backward(grad_out, restore, kept, joints, steps, dtype):
    bodies, _, width = grad_out.shape
    sums = ((width,), (joints, width), (steps, width))
    return grad_out.new_empty(bodies, kept, width, dtype=dtype), *(
        grad_out.new_empty(size, dtype=torch.float32) for size in sums
    )
