"""A whole transformer block, forward and backward: ours, torch's modules, and these compiled."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from jmm_fast.bench.case import Case, Check, Work, Workload, moved
from jmm_fast.bench.parity import compare_rms, devices
from jmm_fast.models.blocks import Block
from jmm_fast.train.loop import autocast

JOINTS = 25

# The released model's decoder and encoder blocks.
SHAPES = {
    "decoder": {"bodies": 8, "tokens": 750, "width": 256, "heads": 8},
    "encoder": {"bodies": 32, "tokens": 74, "width": 256, "heads": 8},
    "gpu_decoder": {"bodies": 96, "tokens": 750, "width": 256, "heads": 8, "device": "cuda"},
    "gpu_encoder": {"bodies": 1024, "tokens": 74, "width": 256, "heads": 8, "device": "cuda"},
}


def _problem(
    bodies: int, tokens: int, width: int, heads: int, device: str = "cpu", *, backend: str
) -> tuple[Block, list[Tensor], Tensor]:
    """A block, its two differentiable inputs (tokens and table) and the joints; equal for every backend."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = Block(width, heads, 4.0, True, "add", 0.0, backend)
        inputs = [torch.randn(bodies, tokens, width), torch.randn(heads, JOINTS, JOINTS)]
    return block.to(device), [x.to(device) for x in inputs], torch.arange(tokens, device=device) % JOINTS


def prepare(case: Case) -> Callable[[], object]:
    compiled = case.contender == "compiled"
    block, (x, table), joints = _problem(**SHAPES[case.shape], backend="reference" if compiled else case.contender)
    seed = torch.ones_like(x)
    run_block = torch.compile(block, dynamic=False) if compiled else block

    def forward() -> Tensor:
        with autocast(x.device, case.dtype):
            return run_block(x, table, joints)

    if case.direction == "forward":
        return torch.no_grad()(forward)
    x.requires_grad_()
    table.requires_grad_()

    def run() -> Tensor:
        x.grad = table.grad = None
        block.zero_grad(set_to_none=True)
        forward().backward(seed)
        return x.grad

    return run


def checks(dtype: str, contender: str) -> Iterator[Check]:
    """Result and every gradient, those of the weights included; on the CPU, and on a GPU where there is one."""
    sizes = ((2, 1, 32, 2), (3, 63, 64, 4), (2, 127, 256, 8), (1, 750, 256, 8))
    for *size, device in ((*size, device) for device in devices() for size in sizes):

        def results(backend: str, arithmetic: str, size=size, device=device) -> dict[str, Tensor]:
            block, inputs, joints = _problem(*size, device, backend=backend)
            seed = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(device)
            if arithmetic == "float64":
                block, inputs, seed = block.double(), [x.double() for x in inputs], seed.double()
            x, table = (leaf.requires_grad_() for leaf in inputs)
            with autocast(x.device, "float32" if arithmetic == "float64" else arithmetic):
                out = block(x, table, joints)
            out.backward(seed)
            parameters = {f"d {name}": parameter.grad for name, parameter in block.named_parameters()}
            return {"out": out.detach(), "d x": x.grad, "d table": table.grad} | parameters

        ours, plain = results(contender, dtype), results("reference", dtype)
        exact = results("reference", "float64")
        yield from compare_rms(
            list(exact),
            list(ours.values()),
            list(plain.values()),
            list(exact.values()),
            torch.finfo(getattr(torch, dtype)).eps,
            where=f"{device} N={size[1]} d={size[2]} ",
        )


def missing(case: Case) -> str | None:
    if case.contender == "compiled" and "device" not in SHAPES[case.shape]:
        return "torch.compile is measured on a GPU"
    return None


def products(tokens: int, width: int, mlp_ratio: float = 4.0) -> float:
    """Operations of the matrix products of a block's forward pass for a body: queries, keys, values and projection,
    MLP, scores and weighted values."""
    return 2 * tokens * width**2 * (4 + 2 * mlp_ratio) + 4 * tokens**2 * width


def work(case: Case) -> Work:
    """The forward pass's products and twice these backward; the float32 stream and the weights; softmax, and once more
    backward."""
    size = SHAPES[case.shape]
    bodies, tokens, width = size["bodies"], size["tokens"], size["width"]
    back = case.direction != "forward"
    stream, weights = 4 * bodies * tokens * width, 4 * 12 * width**2
    return Work(
        flop=(3 if back else 1) * bodies * products(tokens, width),
        bytes=moved(case.direction, read=stream + weights, written=stream, gradients=stream + weights),
        exps=(2 if back else 1) * bodies * size["heads"] * tokens**2,
    )


WORKLOAD = Workload(
    shapes=SHAPES,
    dtypes=("float32", "bfloat16"),
    directions=("forward", "forward_backward"),
    contenders=("auto", "reference", "compiled"),
    prepare=prepare,
    checks=checks,
    unavailable=missing,
    work=work,
)
