"""Attention with a joint-pair table: ours, the plain twin, PyTorch's fused attention and FlexAttention."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from jmm_fast import ops, reference
from jmm_fast.bench.case import BACKENDS, Case, Check, Work, Workload, moved, no_compiler
from jmm_fast.bench.parity import compare, results
from jmm_fast.ops.backend import unavailable
from jmm_fast.ops.topology_attention import AUTO_CUDA_TOKENS, CUDA_DTYPES, CUDA_TOKENS
from jmm_fast.reference.topology_attention import pair_term

JOINTS = 25

# `decoder`: the full grid of the released model, one joint order for all bodies. `encoder`: its visible tokens, whose
# joints differ from body to body.
SHAPES = {
    "decoder": {"bodies": 8, "heads": 8, "tokens": 750, "width": 32, "joints": "grid"},
    "encoder": {"bodies": 32, "heads": 8, "tokens": 74, "width": 32, "joints": "body"},
    "decoder_d16": {"bodies": 8, "heads": 8, "tokens": 750, "width": 16, "joints": "grid"},
    "decoder_d64": {"bodies": 8, "heads": 8, "tokens": 750, "width": 64, "joints": "grid"},
    "gpu_decoder": {"bodies": 96, "heads": 8, "tokens": 750, "width": 32, "joints": "grid", "device": "cuda"},
    "gpu_encoder": {"bodies": 1024, "heads": 8, "tokens": 74, "width": 32, "joints": "body", "device": "cuda"},
}
CHECKED = (
    (1, 32),
    (63, 32),
    (74, 32),
    (75, 32),
    (127, 32),
    (250, 32),
    (750, 32),
    (75, 16),
    (750, 16),
    (75, 64),
    (750, 64),
)
"""Tokens and width of the problems that the parity check solves."""


def sdpa(q: Tensor, k: Tensor, v: Tensor, table: Tensor, joints: Tensor) -> Tensor:
    """PyTorch's fused attention without any bias: what a free bias would cost."""
    return scaled_dot_product_attention(q, k, v)


def sdpa_mask(q: Tensor, k: Tensor, v: Tensor, table: Tensor, joints: Tensor) -> Tensor:
    """PyTorch's fused attention with the table expanded to a learned mask, by the product that the plain twin uses:
    its gradient is faster than that of an indexed read."""
    return scaled_dot_product_attention(q, k, v, attn_mask=pair_term(table, joints).to(q.dtype))


@functools.cache
def _compiled() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(q: Tensor, k: Tensor, v: Tensor, table: Tensor, joints: Tensor) -> Tensor:
    """FlexAttention, compiled, whose ``score_mod`` reads the same table."""
    if joints.dim() == 1:

        def bias(score, b, h, i, j):
            return score + table[h, joints[i], joints[j]]
    else:

        def bias(score, b, h, i, j):
            return score + table[h, joints[b, i], joints[b, j]]

    return _compiled()(q, k, v, score_mod=bias)


PEERS = {"sdpa": sdpa, "sdpa_mask": sdpa_mask, "flex": flex}


def _attend(contender: str) -> Callable[..., Tensor]:
    if contender in PEERS:
        return PEERS[contender]
    return lambda q, k, v, table, joints: ops.topology_attention(q, k, v, table, joints, backend=contender)


def prepare(case: Case) -> Callable[[], object]:
    size = SHAPES[case.shape]
    bodies, heads, tokens, width = size["bodies"], size["heads"], size["tokens"], size["width"]
    generator = torch.Generator().manual_seed(0)
    # One packed projection, as the model makes it: every contender gets the same strided views.
    packed = torch.randn(bodies, tokens, 3, heads, width, generator=generator).to(case.torch_dtype)
    table = torch.randn(heads, JOINTS, JOINTS, generator=generator)
    if size["joints"] == "grid":
        joints = torch.arange(tokens) % JOINTS
    else:
        joints = torch.randint(0, JOINTS, (bodies, tokens), generator=generator)
    attend = _attend(case.contender)
    device = size.get("device", "cpu")
    packed, table, joints = packed.to(device), table.to(device), joints.to(device)
    if case.direction == "forward":

        @torch.no_grad()
        def run() -> Tensor:
            return attend(*packed.permute(2, 0, 3, 1, 4), table, joints)

        return run
    packed.requires_grad_()
    table.requires_grad_()
    seed = torch.randn(bodies, heads, tokens, width, generator=generator).to(device, case.torch_dtype)

    def run_backward() -> Tensor:
        packed.grad = table.grad = None
        attend(*packed.permute(2, 0, 3, 1, 4), table, joints).backward(seed)
        return packed.grad

    return run_backward


def checks(dtype: str, contender: str) -> Iterator[Check]:
    kind = getattr(torch, dtype)
    device = "cpu" if contender == "cpu" else "cuda"
    for tokens, width in CHECKED:
        if contender == "cuda" and tokens > CUDA_TOKENS:
            continue
        heads = 2 if tokens < 750 else 1
        packed = torch.randn(2, tokens, 3, heads, width).to(device, kind)
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        table = torch.randn(heads, JOINTS, JOINTS).to(device)
        seed = torch.randn(2, heads, tokens, width).to(device, kind)
        for kind_of_joints in ("grid", "body"):
            joints = torch.arange(tokens) % JOINTS
            if kind_of_joints == "body":
                joints = torch.randint(0, JOINTS, (2, tokens))
            joints = joints.to(device)

            def ours(*inputs, joints=joints):
                return ops.topology_attention(*inputs, joints, backend=contender)

            def plain(*inputs, joints=joints, width=width):
                return reference.topology_attention(*inputs, joints, False, width**-0.5)

            inputs = (q, k, v, table)
            names = ("out", "dq", "dk", "dv", "dtable")
            found = compare(
                names,
                results(ours, inputs, seed),
                results(plain, inputs, seed),
                results(plain, [x.double() for x in inputs], seed.double()),
                torch.finfo(kind).eps,
                where=f"N={tokens} D={width} joints={kind_of_joints} ",
            )
            for name, check in zip(names, found, strict=True):
                if tokens == 1 and name in ("dq", "dk", "dtable"):
                    # The only weight is 1 and its gradient, exactly 0, the difference of two sums of `width` products.
                    sums = width * (seed.abs().max() * v.abs().max() * max(1, q.abs().max(), k.abs().max())).item()
                    check = replace(check, bound=check.bound + 4 * torch.finfo(torch.float32).eps * sums)
                yield check


def missing(case: Case) -> str | None:
    if case.contender == "auto":
        if "device" not in SHAPES[case.shape]:
            return "on the CPU the default is cpu"
        return unavailable("topology_attention", "triton") if default(case) == "reference" else None
    if case.contender in BACKENDS:
        if case.contender == "cuda" and (case.dtype == "float32" or SHAPES[case.shape]["tokens"] > CUDA_TOKENS):
            return f"the CUDA kernel takes 16-bit floats and at most {CUDA_TOKENS} tokens"
        return unavailable("topology_attention", case.contender)
    if case.contender == "flex" and case.direction != "forward" and "device" not in SHAPES[case.shape]:
        return "FlexAttention has no backward pass on the CPU"
    return no_compiler("FlexAttention") if case.contender == "flex" else None


def default(case: Case) -> str:
    """What ``auto`` takes on this GPU; the rule is that of ``ops.topology_attention``."""
    few = SHAPES[case.shape]["tokens"] <= AUTO_CUDA_TOKENS and case.torch_dtype in CUDA_DTYPES
    for backend in ("cuda", "triton") if few else ("triton",):
        if unavailable("topology_attention", backend) is None:
            return backend
    return "reference"


def work(case: Case) -> Work:
    """The two matrix products of the forward pass, and the five of a backward pass that computes the scores again; the
    plain twin keeps them, but all contenders are counted alike. A weight of the softmax is computed in either pass."""
    size = SHAPES[case.shape]
    bodies, tokens = size["bodies"], size["tokens"]
    scores = float(bodies * size["heads"] * tokens**2)
    back = case.direction != "forward"
    packed = 3 * bodies * size["heads"] * tokens * size["width"] * case.torch_dtype.itemsize
    table, joints = 4 * size["heads"] * JOINTS**2, 8 * tokens * (bodies if size["joints"] == "body" else 1)
    return Work(
        flop=2 * scores * size["width"] * (7 if back else 2),
        bytes=moved(case.direction, read=packed + table + joints, written=packed / 3, gradients=packed + table),
        exps=scores * (2 if back else 1),
    )


WORKLOAD = Workload(
    shapes=SHAPES,
    dtypes=("float32", "bfloat16"),
    directions=("forward", "forward_backward"),
    contenders=("cpu", "auto", "triton", "cuda", "reference", *PEERS),
    prepare=prepare,
    checks=checks,
    unavailable=missing,
    work=work,
    default=default,
)
