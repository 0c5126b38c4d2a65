"""Gathering visible patches and putting tokens back on the grid: ours and the plain twin."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from jmm_fast import ops
from jmm_fast.bench.case import Case, Check, Work, Workload, moved
from jmm_fast.bench.inputs import moving_clips
from jmm_fast.bench.parity import compare, results
from jmm_fast.ops.backend import unavailable

JOINTS = 25
SHAPES = {
    "gather": {"bodies": 96, "frames": 120, "visible": 74},
    "scatter": {"bodies": 96, "frames": 120, "visible": 74, "width": 256},
    "gpu_scatter": {"bodies": 1024, "frames": 120, "visible": 74, "width": 256, "device": "cuda"},
}


def _order(bodies: int, tokens: int, visible: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Visible tokens, ascending, and where each token sits in [visible, masked]."""
    order = torch.rand(bodies, tokens, generator=generator).argsort(1)
    kept, hidden = order[:, :visible].sort(1).values, order[:, visible:].sort(1).values
    return kept, torch.cat([kept, hidden], 1).argsort(1)


def prepare(case: Case) -> Callable[[], object]:
    size = SHAPES[case.shape]
    generator = torch.Generator().manual_seed(0)
    bodies, steps = size["bodies"], size["frames"] // 4
    visible, restore = _order(bodies, steps * JOINTS, size["visible"], generator)
    if case.shape == "gather":
        clips = moving_clips(bodies, size["frames"]).to(case.torch_dtype)
        return lambda: ops.token_grid_gather(clips, visible, backend=case.contender)
    width, device = size["width"], size.get("device", "cpu")
    restore = restore.to(device)
    leaves = [
        torch.randn(*shape, width, generator=generator).to(device, case.torch_dtype)
        for shape in ((bodies, size["visible"]), (), (JOINTS,), (steps,))
    ]

    def scatter() -> Tensor:
        return ops.token_grid_scatter(leaves[0], restore, *leaves[1:], backend=case.contender)

    if case.direction == "forward":
        return torch.no_grad()(scatter)
    for leaf in leaves:
        leaf.requires_grad_()
    seed = torch.randn(bodies, steps * JOINTS, width, generator=generator).to(device, case.torch_dtype)

    def run() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        scatter().backward(seed)
        return leaves[0].grad

    return run


def checks(dtype: str, contender: str) -> Iterator[Check]:
    kind = getattr(torch, dtype)
    eps = torch.finfo(kind).eps
    device = "cuda" if contender == "triton" else "cpu"
    generator = torch.Generator().manual_seed(0)
    for bodies, steps, visible, width in ((1, 2, 5, 16), (3, 30, 74, 256)):
        kept, restore = (x.to(device) for x in _order(bodies, steps * JOINTS, visible, generator))
        clips = moving_clips(bodies, steps * 4).to(device, kind)
        where = f"B={bodies} steps={steps} "

        def gather(backend, kept=kept):
            return lambda poses: ops.token_grid_gather(poses, kept, backend=backend)

        seed = torch.randn(bodies, visible, 12, generator=generator).to(device, kind)
        yield from compare(
            ("gather", "dclips"),
            results(gather(contender), [clips], seed),
            results(gather("reference"), [clips], seed),
            results(gather("reference"), [clips.double()], seed.double()),
            eps,
            where=where,
        )

        def scatter(backend, restore=restore):
            return lambda tokens, *rest: ops.token_grid_scatter(tokens, restore, *rest, backend=backend)

        leaves = [
            torch.randn(*shape, width, generator=generator).to(device, kind)
            for shape in ((bodies, visible), (), (JOINTS,), (steps,))
        ]
        seed = torch.randn(bodies, steps * JOINTS, width, generator=generator).to(device, kind)
        yield from compare(
            ("scatter", "dtokens", "dmask_token", "djoint", "dtime"),
            results(scatter(contender), leaves, seed),
            results(scatter("reference"), leaves, seed),
            results(scatter("reference"), [x.double() for x in leaves], seed.double()),
            eps,
            where=where,
        )


def missing(case: Case) -> str | None:
    if case.shape == "gather" and case.direction != "forward":
        return "clips are data: nothing asks for the gradient of the gathered patches"
    return unavailable("token_grid", case.contender)


def work(case: Case) -> Work:
    """Gathering: the visible patches and their numbers. Putting back: visible tokens, places and embeddings in, the
    grid out."""
    size = SHAPES[case.shape]
    bodies, steps, visible = size["bodies"], size["frames"] // 4, size["visible"]
    number = case.torch_dtype.itemsize
    if case.shape == "gather":
        patches = bodies * visible * 12 * number
        return Work(bytes=moved(case.direction, read=patches + bodies * visible * 8, written=patches))
    width = size["width"] * number
    grid, leaves = bodies * steps * JOINTS * width, (bodies * visible + 1 + JOINTS + steps) * width
    read = leaves + bodies * steps * JOINTS * 8
    return Work(bytes=moved(case.direction, read=read, written=grid, gradients=leaves))


WORKLOAD = Workload(
    shapes=SHAPES,
    dtypes=("float32", "bfloat16"),
    directions=("forward", "forward_backward"),
    contenders=("cpu", "triton", "reference"),
    prepare=prepare,
    checks=checks,
    unavailable=missing,
    work=work,
)
