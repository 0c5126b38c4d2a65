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
