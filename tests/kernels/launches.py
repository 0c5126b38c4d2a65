"""What is launched with which sizes in training, finetuning and evaluation: the launches that must compile well.

Each is called with tensors that have no memory; :mod:`aot` records what would run on a GPU.
"""

import torch


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def topology_attention(dtype, dim, length, joints, multiply, shared):
    from jmm_fast.kernels import topology_attention as kernel

    def launch():
        # As a block makes them: views of packed queries, keys and values.
        q, k, v = empty(4, length, 3, 8, dim, dtype=dtype).permute(2, 0, 3, 1, 4)
        table = empty(8, joints, joints, dtype=torch.float32) if joints else None
        numbers = empty(*(() if shared else (4,)), length, dtype=torch.int64) if joints else None
        out, statistics = kernel.forward(q, k, v, table, numbers, multiply, dim**-0.5)
        kernel.backward(out, q, k, v, table, numbers, out, statistics, multiply, dim**-0.5)

    return launch


def packed(dtype, length):
    from jmm_fast.kernels import topology_attention as kernel

    def launch():
        given = empty(4, length, 768, dtype=dtype)
        q, k, v = given.unflatten(2, (3, 8, 32)).permute(2, 0, 3, 1, 4)
        table, numbers = empty(8, 25, 25, dtype=torch.float32), empty(length, dtype=torch.int64)
        out, statistics = kernel.forward(q, k, v, table, numbers, False, 32**-0.5)
        kernel.packed_backward(out, given, table, numbers, out, statistics, False, 32**-0.5)

    return launch


def block(dtype, width, kept, dropped):
    """A half with what may be missing, of the stream and around the MLP's products; and both forms of the MLP."""
    from jmm_fast.kernels import block as kernel

    def launch():
        single = {"dtype": torch.float32}
        x, branch = empty(4, 750, width, **single), empty(4, 750, width, dtype=dtype)
        weight, shift = empty(width, **single), empty(width, **single)
        rows = empty(4 * 676, dtype=torch.int64) if kept else None
        factor = empty(4, **single) if dropped else None
        for added in (branch, None):
            y, n, statistics = kernel.add_norm(x, added, shift, factor, rows, weight, shift, 1e-5, dtype)
            y = x if added is None and not kept else y
            after = (n, y if added is not None else None, y, statistics, factor, rows, weight)
            kernel.add_norm_backward(*after, 750, None if added is None else dtype)
        # The end of a stack: LayerNorm in float32 whose stream nobody reads; and a stream that is only added up.
        y, n, statistics = kernel.add_norm(x, branch, shift, factor, rows, weight, shift, 1e-5, torch.float32)
        kernel.add_norm_backward(n, None, y, statistics, factor, rows, weight, 750, dtype)
        kernel.add_norm(x, branch, shift, factor, rows, None, None, 0.0, torch.float32)
        kernel.add_norm_backward(None, y, None, None, factor, rows, None, 750, dtype)
        n = empty(3000, width, dtype=dtype)
        weights = empty(4 * width, width, dtype=dtype), empty(4 * width, **single), empty(width, 4 * width, dtype=dtype)
        out, hidden = kernel.mlp(n, *weights)
        kernel.mlp_backward(out, n, *weights, hidden)
        kernel.linear_backward(empty(3000, 3 * width, dtype=dtype), n, empty(3 * width, width, dtype=dtype), True)
        if width <= kernel.MOST_FUSED:
            kernel.mlp_fused(n, *weights)
            kernel.mlp_fused_backward(out, n, *weights)

    return launch


def token_grid(dtype, embedding, kept, width):
    from jmm_fast.kernels import token_grid as kernel

    def launch():
        clips, visible = empty(4, 120, 25, 3, dtype=embedding), empty(4, kept, dtype=torch.int64)
        kernel.gather_backward(kernel.gather_forward(clips, visible, 4), visible, 4, 120, 25, 3)
        tokens, restore = empty(4, kept, width, dtype=dtype), empty(4, 750, dtype=torch.int64)
        grid = kernel.scatter_forward(tokens, restore, *(empty(*n, width, dtype=embedding) for n in ((), (25,), (30,))))
        kernel.scatter_backward(grid, restore, kept, 25, 30, dtype)

    return launch


def motion_loss(dtype, rows, normalize, known):
    from jmm_fast.kernels import motion_loss as kernel

    def launch():
        prediction, clips = empty(4, rows, 12, dtype=dtype), empty(4, 120, 25, 3, dtype=torch.float32)
        mask = empty(4, 750, dtype=torch.bool)
        for differentiate in (False, True):
            loss, errors, factor = kernel.forward(
                prediction, clips, mask, 4, 1, normalize, differentiate, mask if known else None
            )
        kernel.backward(loss, errors, factor)

    return launch


def clip_window(dtype, joints, turn):
    from jmm_fast.kernels import clip_window as kernel

    def launch():
        rows = empty(4, dtype=torch.int64)
        angles = empty(4, 3, dtype=torch.float32) if turn else None
        kernel.forward(empty(9000, joints, 3, dtype=dtype), rows, rows, angles, 120)

    return launch


LAUNCHES = {
    f"topology_attention {dtype} D={dim} N={length} V={joints}{' scale' if multiply else ''}": topology_attention(
        getattr(torch, dtype), dim, length, joints, multiply, length > 128
    )
    for dtype, dim, length, joints, multiply in (
        ("bfloat16", 32, 750, 25, False),
        ("bfloat16", 32, 74, 25, False),
        ("bfloat16", 32, 750, 25, True),
        ("bfloat16", 32, 750, 0, False),
        ("bfloat16", 64, 750, 25, False),
        ("bfloat16", 128, 750, 25, False),
        ("float16", 32, 750, 25, False),
        ("float32", 32, 750, 25, False),
        ("float32", 32, 74, 25, False),
        ("float32", 128, 750, 25, False),
    )
}
LAUNCHES |= {
    f"token_grid {dtype}, embeddings {embedding}, K={kept} d={width}": token_grid(
        getattr(torch, dtype), getattr(torch, embedding), kept, width
    )
    for dtype, embedding, kept, width in (
        ("bfloat16", "float32", 74, 256),
        ("bfloat16", "bfloat16", 74, 256),
        ("float16", "float32", 74, 256),
        ("float32", "float32", 74, 256),
        ("float32", "float32", 74, 64),
    )
}
LAUNCHES |= {
    f"motion_loss {dtype} rows={rows}{' as it is' if not normalize else ''}{' valid' if known else ''}": motion_loss(
        getattr(torch, dtype), rows, normalize, known
    )
    for dtype, rows, normalize, known in (
        ("bfloat16", 676, True, False),
        ("bfloat16", 676, True, True),
        ("bfloat16", 750, True, False),
        ("float16", 676, True, False),
        ("float32", 676, True, False),
        ("float32", 750, False, True),
    )
}
LAUNCHES |= {
    f"clip_window {dtype} V={joints}{' turned' if turn else ''}": clip_window(getattr(torch, dtype), joints, turn)
    for dtype, joints, turn in (
        ("float32", 25, True),
        ("float32", 25, False),
        ("float32", 17, True),
        ("bfloat16", 25, True),
    )
}
LAUNCHES |= {f"packed topology_attention N={length}": packed(torch.bfloat16, length) for length in (74, 750)}
LAUNCHES |= {
    f"block {dtype} d={width}{' kept' if kept else ''}{' drop path' if dropped else ''}": block(
        getattr(torch, dtype), width, kept, dropped
    )
    for dtype, width, kept, dropped in (
        ("bfloat16", 256, False, False),
        ("bfloat16", 256, True, False),
        ("bfloat16", 256, False, True),
        ("bfloat16", 64, False, False),
        ("bfloat16", 512, False, False),
        ("float16", 256, False, False),
        ("float32", 256, False, False),
        ("float32", 256, True, True),
        ("float32", 64, False, False),
    )
}


def ones():
    """Every size 1, which Triton takes for a constant and not for an argument: another program."""
    from jmm_fast.kernels import block, clip_window, motion_loss, token_grid
    from jmm_fast.kernels import topology_attention as attention

    single, whole = {"dtype": torch.float32}, {"dtype": torch.int64}
    for dtype in (torch.bfloat16, torch.float32):
        q, table, joints = empty(1, 1, 1, 1, dtype=dtype), empty(1, 1, 1, **single), empty(1, 1, **whole)
        for given in ((None, None, False), (table, joints, False), (table, joints, True)):
            out, statistics = attention.forward(q, q, q, *given, 1.0)
            attention.backward(out, q, q, q, *given[:2], out, statistics, given[2], 1.0)
        x, weight, row = empty(1, 1, 1, **single), empty(1, **single), empty(1, **whole)
        y, n, statistics = block.add_norm(x, x.to(dtype), weight, weight, row, weight, weight, 1e-5, dtype)
        block.add_norm_backward(n, y, y, statistics, weight, row, weight, 1, dtype)
        flat, matrix = empty(1, 1, dtype=dtype), empty(1, 1, dtype=dtype)
        out, hidden = block.mlp(flat, matrix, weight, matrix)
        block.mlp_backward(out, flat, matrix, weight, matrix, hidden)
        block.linear_backward(flat, flat, matrix, True)
        block.mlp_fused(flat, matrix, weight, matrix)
        block.mlp_fused_backward(flat, flat, matrix, weight, matrix)
        token_grid.gather_backward(
            token_grid.gather_forward(empty(1, 1, 1, 1, dtype=dtype), row[None], 1), row[None], 1, 1, 1, 1
        )
        tokens = empty(1, 1, 1, dtype=dtype)
        grid = token_grid.scatter_forward(tokens, row[None], empty(1, dtype=dtype), flat, flat)
        token_grid.scatter_backward(grid, row[None], 1, 1, 1, dtype)
        mask = empty(1, 1, dtype=torch.bool)
        # A token of one number has no variance; two frames, as one has no motion.
        for normalize in (False, True):
            loss, errors, factor = motion_loss.forward(
                empty(1, 1, 2, dtype=dtype), empty(1, 2, 1, 1, **single), mask, 2, 1, normalize, True, mask
            )
        motion_loss.backward(loss, errors, factor)
        clip_window.forward(empty(1, 1, 3, dtype=dtype), row, row, empty(1, 3, **single), 1)


ONCE = {"sizes of one": ones}
"""Compiled for one architecture only: what may go wrong there does so before code is made."""
