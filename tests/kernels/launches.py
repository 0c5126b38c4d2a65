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
