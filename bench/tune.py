"""Choose the block sizes of the Triton kernels on the GPU at hand.

    python bench/tune.py                        # all tables, nine minutes
    python bench/tune.py topology_attention     # those of a kernel, or one, as block.MLP: nine minutes for these alone
    python bench/tune.py few_tokens             # CUDA C++ against Triton, for AUTO_CUDA_TOKENS of topology attention
    python bench/tune.py block --minutes 4

The minutes are shared out evenly: within its share, an entry of a table has its candidates tried, those nearest to the
shipped one first. A candidate is put into the table, launched at the size the entry serves, and timed with CUDA events;
one that does not fit the GPU is passed over. Prints the best of each entry beside the one that is shipped and, after
each entry, writes ``bench/results/tune_ARCHITECTURE.json``, in which entries of earlier runs stay. An entry that breaks
off is named, the others go on, and the exit code is 1. The tables in ``kernels/`` are then changed by hand, after
``make test-gpu``: sizes are never chosen while a program runs.
"""

import argparse
import importlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

BODIES = 256
ROUNDS = 25
FEW_TOKENS = "few_tokens"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An entry of a kernel's table: where it is, what is launched to time it, and what is tried."""

    kernel: str
    table: str
    key: tuple[int, ...]
    launch: Callable[[], Callable[[], object]]
    candidates: Iterable[tuple[int, ...]]


def attention(dtype: torch.dtype, dim: int, length: int, backward: bool) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        from jmm_fast.kernels import topology_attention as kernel

        q, k, v = torch.randn(BODIES, length, 3, 8, dim, device="cuda", dtype=dtype).permute(2, 0, 3, 1, 4)
        table = torch.randn(8, 25, 25, device="cuda")
        joints = torch.arange(length, device="cuda") % 25
        joints = joints if length > 128 else joints.expand(BODIES, -1)
        inputs = (q, k, v, table, joints)
        if not backward:
            return lambda: kernel.forward(*inputs, False, dim**-0.5)
        out, statistics = kernel.forward(*inputs, False, dim**-0.5)
        return lambda: kernel.backward(out, *inputs, out, statistics, False, dim**-0.5)

    return prepare


def short(length: int, bodies: int, device: str, backend: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward and backward pass over few tokens, joints of its own for each body."""
    from jmm_fast.ops import topology_attention

    packed = torch.randn(bodies, length, 3, 8, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
    table = torch.randn(8, 25, 25, device=device, requires_grad=True)
    joints = torch.randint(0, 25, (bodies, length), device=device)

    def forward() -> torch.Tensor:
        return topology_attention(*packed.permute(2, 0, 3, 1, 4), table, joints, backend=backend)

    out = forward()
    gradient = torch.randn_like(out)
    return (
        torch.no_grad()(forward),
        lambda: torch.autograd.grad(out, (packed, table), gradient, retain_graph=True),
    )


def few_tokens(
    measure: Callable[[Callable[[], object]], float],
    *,
    lengths: Iterable[int] = (16, 32, 48, 64, 74, 80, 96, 112, 128),
    backends: tuple[str, ...] = ("cuda", "triton"),
    bodies: int = 4 * BODIES,
    device: str = "cuda",
) -> list[dict]:
    """Milliseconds of each backend's passes, one row a number of tokens."""
    found = []
    for length in lengths:
        row: dict = {"tokens": length}
        for backend in backends:
            for name, run in zip(("forward", "backward"), short(length, bodies, device, backend), strict=True):
                row[f"{backend} {name}"] = measure(run)
        found.append(row)
    return found


def loss(dtype: torch.dtype) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        from jmm_fast.kernels import motion_loss as kernel

        prediction = torch.randn(BODIES, 676, 12, device="cuda", dtype=dtype)
        clips = torch.randn(BODIES, 120, 25, 3, device="cuda")
        mask = (torch.arange(750, device="cuda") < 676).expand(BODIES, -1)
        return lambda: kernel.forward(prediction, clips, mask, 4, 1, True, True, None)

    return prepare


def patches() -> Callable[[], object]:
    from jmm_fast.kernels import token_grid as kernel

    clips = torch.randn(BODIES, 120, 25, 3, device="cuda")
    visible = torch.rand(BODIES, 750, device="cuda").argsort(1)[:, :74].sort(1).values
    return lambda: kernel.gather_forward(clips, visible, 4)


def stream(backward: bool) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        from jmm_fast.kernels import block as kernel

        x = torch.randn(BODIES, 750, 256, device="cuda")
        branch, parameter = x.bfloat16(), torch.randn(256, device="cuda")
        inputs = (x, branch, parameter, None, None, parameter, parameter, 1e-5, branch.dtype)
        if not backward:
            return lambda: kernel.add_norm(*inputs)
        y, n, held = kernel.add_norm(*inputs)
        return lambda: kernel.add_norm_backward(n, x, y, held, None, None, parameter, 750, branch.dtype)

    return prepare


def mlp(part: str) -> Callable[[], Callable[[], object]]:
    """A part of the released model's MLP; ``either`` is the whole, in the form that ``FUSED`` names."""

    def prepare() -> Callable[[], object]:
        from jmm_fast.kernels import block as kernel

        n = torch.randn(BODIES * 750, 256, device="cuda", dtype=torch.bfloat16)
        first, second = (torch.randn(1024, 256, device="cuda", dtype=n.dtype) / 16 for _ in range(2))
        second, bias = second.t().contiguous(), torch.randn(1024, device="cuda")

        def either() -> object:
            out, hidden = kernel.mlp(n, first, bias, second)
            return kernel.mlp_backward(out, n, first, bias, second, hidden)

        hidden = n @ first.t()
        return {
            "either": either,
            "gelu": lambda: kernel.bias_gelu(hidden, bias),
            "gelu_backward": lambda: kernel.bias_gelu_backward(hidden, hidden, bias),
            "sums": lambda: kernel.column_sums(hidden),
            "fused": lambda: kernel.mlp_fused(n, first, bias, second),
            "fused_backward": lambda: kernel.mlp_fused_backward(n, n, first, bias, second),
        }[part]

    return prepare


def grid(backward: bool) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        from jmm_fast.kernels import token_grid as kernel

        tokens = torch.randn(BODIES, 74, 256, device="cuda", dtype=torch.bfloat16)
        restore = torch.rand(BODIES, 750, device="cuda").argsort(1)
        embeddings = [torch.randn(*shape, 256, device="cuda") for shape in ((), (25,), (30,))]
        out = kernel.scatter_forward(tokens, restore, *embeddings)
        if backward:
            return lambda: kernel.scatter_backward(out, restore, 74, 25, 30, tokens.dtype)
        return lambda: kernel.scatter_forward(tokens, restore, *embeddings)

    return prepare


def window() -> Callable[[], object]:
    from jmm_fast.kernels import clip_window as kernel

    frames = torch.randn(100 * BODIES, 25, 3, device="cuda")
    start = torch.arange(BODIES, device="cuda") * 100
    length = torch.full_like(start, 90)
    angles = torch.rand(BODIES, 3, device="cuda")
    return lambda: kernel.forward(frames, start, length, angles, 120)


def entries() -> list[Entry]:
    """What is tuned: the entries that training, finetuning and evaluation in bfloat16 use."""
    from jmm_fast.kernels.config import ANY

    half = torch.bfloat16
    blocks = list(itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (2, 4, 8), (1, 2, 3, 4)))
    found = []
    for table, backward in (("FORWARD", False), ("QUERIES", True), ("KEYS", True)):
        for key, dim, length in (
            ((2, 64, 128), 32, 74),
            ((2, 64, ANY), 32, 750),
            ((2, 128, ANY), 128, 750),
        ):
            found.append(
                Entry(
                    kernel="topology_attention",
                    table=table,
                    key=key,
                    launch=attention(half, dim, length, backward),
                    candidates=blocks,
                )
            )
    sizes, warps = (256, 512, 1024, 2048, 4096), (1, 2, 4, 8)
    tiles = list(itertools.product((8, 16, 32, 64), (64, 128, 256), (4, 8, 16, 32), warps))
    found += [
        Entry(
            kernel="motion_loss",
            table="ERRORS",
            key=(4, ANY),
            launch=loss(half),
            candidates=itertools.product(sizes, warps),
        ),
        Entry(
            kernel="token_grid",
            table="SCATTER",
            key=(4, ANY),
            launch=grid(backward=False),
            candidates=tiles,
        ),
        Entry(kernel="token_grid", table="SUM", key=(4, ANY), launch=grid(backward=True), candidates=tiles),
        Entry(
            kernel="token_grid",
            table="ROWS",
            key=(4, ANY),
            launch=grid(backward=True),
            candidates=itertools.product((8, 16, 32), (64, 128, 256), (32, 64, 128), warps),
        ),
        Entry(
            kernel="token_grid",
            table="PATCHES",
            key=(4, ANY),
            launch=patches,
            candidates=itertools.product(sizes, warps),
        ),
        Entry(
            kernel="block",
            table="NORM",
            key=(4, ANY),
            launch=stream(backward=False),
            candidates=itertools.product(sizes, warps),
        ),
        Entry(
            kernel="block",
            table="NORM_BACKWARD",
            key=(4, ANY),
            launch=stream(backward=True),
            candidates=itertools.product(sizes, (2, 4, 8, 16, 32), warps),
        ),
        Entry(
            kernel="block",
            table="GELU",
            key=(4, ANY),
            launch=mlp("gelu"),
            candidates=itertools.product((8, 16, 32, 64), (64, 128, 256), warps),
        ),
    ]
    found += [
        Entry(kernel="block", table=table, key=(4, ANY), launch=mlp(part), candidates=tiles)
        for table, part in (("GELU_BACKWARD", "gelu_backward"), ("COLUMNS", "sums"))
    ]
    products = list(itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3)))
    spans = [(rows, units, count, *rest) for rows, units, *rest in products for count in (8, 16, 32)]
    found += [
        Entry(kernel="block", table="MLP", key=(2, 256), launch=mlp("fused"), candidates=products),
        Entry(kernel="block", table="MLP_INPUT", key=(2, 256), launch=mlp("fused_backward"), candidates=products),
        Entry(kernel="block", table="MLP_WEIGHTS", key=(2, 256), launch=mlp("fused_backward"), candidates=spans),
        Entry(
            kernel="block",
            table="FUSED",
            key=(2, 256, 1024),
            launch=mlp("either"),
            candidates=[(False,), (True,)],
        ),
        Entry(
            kernel="clip_window",
            table="CUT",
            key=(4, 3),
            launch=window,
            candidates=itertools.product((8, 16, 32, 64), (16, 32, 64), warps),
        ),
    ]
    return found


def cuda_milliseconds(run: Callable[[], object]) -> float:
    """Median time of a call on the GPU."""
    for _ in range(3):
        run()
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def nearest_first(shipped: tuple, candidates: Iterable[tuple]) -> list[tuple]:
    """``shipped``, then the others by how many steps of all sizes together they are away from it."""
    every = list(dict.fromkeys([shipped, *candidates]))
    ranks = [{value: rank for rank, value in enumerate(sorted(set(values)))} for values in zip(*every, strict=True)]

    def steps(candidate: tuple) -> int:
        return sum(abs(rank[a] - rank[b]) for rank, a, b in zip(ranks, candidate, shipped, strict=True))

    return sorted(every, key=steps)


def tune(
    entry: Entry,
    architecture: str,
    measure: Callable[[Callable[[], object]], float],
    *,
    seconds: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
) -> list[dict]:
    """The candidates that were tried and run, the fastest first; the shipped one, tried first, is marked. The table is
    left as it was.

    An entry that its table does not have yet is put before those that serve the same sizes now. No candidate is begun
    after ``seconds``, but for the shipped one.
    """
    end = clock() + seconds
    module = importlib.import_module(f"jmm_fast.kernels.{entry.kernel}")
    tables = getattr(module, entry.table)
    before = tables[architecture]
    shipped = next(held for key, held in before.items() if all(a <= b for a, b in zip(entry.key, key, strict=True)))
    others = {key: held for key, held in before.items() if key != entry.key}
    run = entry.launch()
    found = []
    try:
        for candidate in nearest_first(shipped, entry.candidates):
            if candidate != shipped and clock() > end:
                break
            tables[architecture] = {entry.key: candidate} | others
            try:
                found.append({"sizes": list(candidate), "ms": measure(run), "shipped": candidate == shipped})
            except Exception as error:  # too much shared memory, too many registers: Triton has a class for each
                print(f"  {candidate} does not run: {first_line(error)[:80]}", file=sys.stderr)
    finally:
        tables[architecture] = before
    return sorted(found, key=lambda item: item["ms"])


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def chosen(names: list[str], every: list[Entry]) -> list[Entry]:
    """The entries of kernels and tables of these names; all without any.

    Raises:
        ValueError: no such kernel or table.
    """
    known = {entry.kernel for entry in every} | {f"{entry.kernel}.{entry.table}" for entry in every}
    for name in names:
        if name not in known and name != FEW_TOKENS:
            raise ValueError(f"unknown kernel or table {name!r}: expected {', '.join(sorted(known))} or {FEW_TOKENS}")
    return [entry for entry in every if not names or {entry.kernel, f"{entry.kernel}.{entry.table}"} & set(names)]


def search(
    wanted: list[Entry],
    record: dict,
    write: Callable[[dict], None],
    *,
    architecture: str,
    minutes: float,
    measure: Callable[[Callable[[], object]], float] = cuda_milliseconds,
    clock: Callable[[], float] = time.monotonic,
) -> list[str]:
    """Tune ``wanted``; what is found goes into ``record["entries"]``, and ``write(record)`` follows each.

    Returns:
        Names of the entries that broke off.
    """
    end, failed = clock() + 60 * minutes, []
    for number, entry in enumerate(wanted):
        name = f"{entry.kernel}.{entry.table} {entry.key}"
        try:
            seconds = (end - clock()) / (len(wanted) - number)
            found = tune(entry, architecture, measure, seconds=seconds, clock=clock)
            if not found:
                raise RuntimeError("no candidate runs")
        except Exception as error:
            print(f"{name}: failed: {first_line(error)}")
            failed.append(name)
            continue
        best, shipped = found[0], [item["ms"] for item in found if item["shipped"]]
        print(
            f"{name}: {tuple(best['sizes'])} {best['ms']:.3f} ms, shipped "
            + (f"{shipped[0]:.3f}" if shipped else "does not run")
            + f", {len(found)} ran"
        )
        record["entries"][name] = {"commit": record["commit"], "ran": len(found), "best": found[:10]}
        write(record)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", help=f"modules of jmm_fast.kernels, their tables, {FEW_TOKENS}; default all"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for all that is named (default 9)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune.py needs a GPU: there is none here")
    from jmm_fast.files import atomic_write_text
    from jmm_fast.kernels import config
    from jmm_fast.ops.backend import unavailable
    from jmm_fast.train.environment import commit, versions

    begin = time.monotonic()
    try:
        wanted = chosen(arguments.names, entries())
    except ValueError as error:
        parser.error(str(error))
    architecture = config.architecture(torch.cuda.current_device())
    path = arguments.results / f"tune_{architecture}.json"
    record = {
        "gpu": torch.cuda.get_device_name(),
        "architecture": architecture,
        "commit": commit(),
        "versions": versions(),
        "entries": {},
    }
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["gpu"] == record["gpu"]:
            record = before | record | {"entries": before["entries"]}

    def write(record: dict) -> None:
        atomic_write_text(path, json.dumps(record, indent=1) + "\n")

    failed = []
    if not arguments.names or FEW_TOKENS in arguments.names:
        if reason := unavailable("topology_attention", "cuda"):
            print(f"{FEW_TOKENS}: {reason}")
        else:
            try:
                record[FEW_TOKENS] = few_tokens(cuda_milliseconds)
                for row in record[FEW_TOKENS]:
                    print(f"{FEW_TOKENS}: " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()))
                write(record)
            except Exception as error:
                print(f"{FEW_TOKENS}: failed: {first_line(error)}")
                failed.append(FEW_TOKENS)
    left = arguments.minutes - (time.monotonic() - begin) / 60
    failed += search(wanted, record, write, architecture=architecture, minutes=left)
    print(f"written to {path}")
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
