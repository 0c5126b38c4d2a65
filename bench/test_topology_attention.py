"""Attention with a learned joint-pair table against its plain twin and PyTorch's fused attention.

Peers: ``reference`` (the plain twin), ``sdpa`` (``scaled_dot_product_attention`` without any bias: what a free bias
would cost) and ``sdpa_mask`` (the same with the table expanded to a learned ``attn_mask``). Shapes: ``decoder`` is the
full grid of the released model, one joint order for all bodies; ``encoder`` its visible tokens, joints differ per body.
``relative_to_sdpa`` in the record is the median ratio to ``sdpa`` without bias, timed in turn with each case.
"""

import statistics
import time

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from jmm_fast import ops
from jmm_fast.ops.backend import unavailable

SHAPES = {"decoder": (8, 8, 750, 32), "encoder": (32, 8, 74, 32)}
ROUNDS = 9


def sdpa(q, k, v, table, joints):
    return scaled_dot_product_attention(q, k, v)


def sdpa_mask(q, k, v, table, joints):
    if joints.dim() == 1:
        mask = table[:, joints][:, :, joints][None]
    else:
        mask = table[:, joints[:, :, None], joints[:, None, :]].transpose(0, 1)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))


def ours(backend):
    return lambda q, k, v, table, joints: ops.topology_attention(q, k, v, table, joints, backend=backend)


PEERS = {"cpu": ours("cpu"), "sdpa_mask": sdpa_mask, "reference": ours("reference")}


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("peer", PEERS)
def test_topology_attention(benchmark, peer, shape, dtype, direction):
    reason = unavailable("topology_attention", "cpu")
    if peer == "cpu" and reason is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    bodies, heads, length, dim = SHAPES[shape]
    packed = torch.randn(bodies, length, 3, heads, dim, dtype=dtype, requires_grad=True)
    table = torch.randn(heads, 25, 25, requires_grad=True)
    joints = torch.arange(length) % 25 if shape == "decoder" else torch.randint(0, 25, (bodies, length))
    seed = torch.randn(bodies, heads, length, dim, dtype=dtype)

    def run(attend):
        if direction == "forward":
            with torch.no_grad():
                attend(*packed.permute(2, 0, 3, 1, 4), table, joints)
        else:
            packed.grad = table.grad = None
            attend(*packed.permute(2, 0, 3, 1, 4), table, joints).backward(seed)

    # Paired: the machine drifts, the ratio of neighbours does not.
    ratios = []

    def pair():
        begin = time.perf_counter()
        run(sdpa)
        middle = time.perf_counter()
        run(PEERS[peer])
        ratios.append((time.perf_counter() - middle) / (middle - begin))

    for _ in range(ROUNDS + 1):
        pair()
    benchmark.extra_info["relative_to_sdpa"] = round(statistics.median(ratios[1:]), 3)
    benchmark.pedantic(run, args=(PEERS[peer],), rounds=ROUNDS)
