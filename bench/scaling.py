"""How a run scales over processes: measured here with gloo, modelled for GPUs; docs/scaling.md explains both.

    jmm-fast prepare synthetic --out synthetic.safetensors --clips 480
    python bench/scaling.py measure --data synthetic.safetensors --json bench/results/scaling.json -- --split xsub
    python bench/scaling.py model --parameters 10368716

``measure`` pretrains the same recipe with the same batch on 1, 2 and 4 processes of ``--threads`` threads each. The
figure of a size is the median over its logged steps without the first; the losses are compared as well.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jmm_fast.train.environment import commit, cpu_name, versions
from jmm_fast.train.metrics import read_lines

WARMUP = 2
"""Logged steps that are left out: first touches of memory, first exchanges."""


def measure(args: argparse.Namespace) -> dict:
    """Samples per second and losses of each size."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in args.ranks:
            out = Path(folder, str(size))
            line = [sys.executable, "-m"]
            if size > 1:
                line += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(size), "-m"]
            line += ["jmm_fast", "pretrain", args.recipe, "--data", str(args.data), "--out", str(out)]
            line += ["--device", "cpu", "--log-every", "1", "--epochs", str(args.epochs), "--warmup-epochs", "1"]
            line += ["--data.batch-size", str(args.batch), "--dtype", args.dtype, *args.options]
            began = time.monotonic()
            environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
            done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{' '.join(line)} failed:\n{done.stderr[-3000:]}")
            steps = [record for record in read_lines(out / "metrics.jsonl") if record["kind"] == "train"]
            speeds = [record["samples_per_s"] for record in steps[WARMUP:]]
            quarter = statistics.quantiles(speeds, n=4)
            rows.append(
                {
                    "ranks": size,
                    "samples_per_s": statistics.median(speeds),
                    "iqr": quarter[2] - quarter[0],
                    "steps": len(speeds),
                    "losses": [record["loss"] for record in steps],
                    "seconds": time.monotonic() - began,
                }
            )
    first = rows[0]
    for row in rows:
        row["speedup"] = row["samples_per_s"] / first["samples_per_s"]
        pairs = zip(row["losses"], first["losses"], strict=True)
        row["largest_loss_difference"] = max(abs(ours - theirs) / theirs for ours, theirs in pairs)
    for row in rows:
        row["losses"] = [row["losses"][0], row["losses"][-1]]
    return {
        "schema": 1,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "versions": versions(),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count()},
        "options": {name: value for name, value in vars(args).items() if name not in ("do", "data", "json")},
        "rows": rows,
    }


def step_time(
    gpus: int,
    clips: float,
    *,
    parameters: int,
    bodies_per_s: float,
    bodies_per_clip: float,
    overlap: float,
    node: int,
    node_gb_s: float,
    net_gb_s: float,
    latency_us: float,
) -> dict[str, float]:
    """Seconds of a step on ``gpus`` GPUs with ``clips`` clips each: a model, not a measurement.

    ``compute = clips * bodies_per_clip / bodies_per_s``. Gradients are ``G = 4 * parameters`` bytes. Inside a node of
    ``n`` GPUs a ring moves ``2 G (n-1)/n`` bytes over each link; between ``m`` nodes each GPU exchanges its ``G/n``:
    ``2 G/n (m-1)/m`` bytes over its own network card; each of the ``2 (n-1) + 2 (m-1)`` turns costs ``latency_us``. Up
    to ``overlap`` of the backward pass, which is two thirds of the computation, hides communication: nothing where
    steps are captured. The sum of the losses and weights, ``2 log2 gpus`` turns of a tree, is hidden by nothing:
    ``step = compute + max(0, communication - overlap * 2/3 * compute) + 2 log2(gpus) * latency_us``.
    """
    compute = clips * bodies_per_clip / bodies_per_s
    size = 4.0 * parameters
    n, m = min(gpus, node), max(1, gpus // node)
    inside = 2 * size * (n - 1) / n / (node_gb_s * 1e9)
    between = 2 * size / n * (m - 1) / m / (net_gb_s * 1e9)
    communication = inside + between + (2 * (n - 1) + 2 * (m - 1)) * latency_us * 1e-6
    step = compute + max(0.0, communication - overlap * compute * 2 / 3) + 2 * math.log2(gpus) * latency_us * 1e-6
    return {"compute": compute, "communication": communication, "step": step, "efficiency": compute / step}


def model(args: argparse.Namespace) -> str:
    """Tables: the same batch per GPU, and the same batch altogether."""
    settings = {
        name: getattr(args, name)
        for name in ("parameters", "bodies_per_s", "bodies_per_clip", "node", "node_gb_s", "net_gb_s")
    } | {"latency_us": args.latency_us}
    lines = []
    for title, clips_of in (
        (f"{args.per_gpu} clips per GPU", lambda gpus: args.per_gpu),
        (f"{args.batch} clips altogether", lambda gpus: args.batch / gpus),
    ):
        lines += [
            f"| GPUs, {title} | clips each | compute, ms | communication, ms | step by a graph, ms | efficiency "
            "| plain step, ms | efficiency |",
            "|---" * 8 + "|",
        ]
        for gpus in (1, 8, 16, 32, 64, 128, 256, 512):
            graph, plain = (
                step_time(gpus, clips_of(gpus), overlap=overlap, **settings) for overlap in (0.0, args.overlap)
            )
            times = f"{1e3 * graph['compute']:.3g} | {1e3 * graph['communication']:.3g}"
            steps = " | ".join(f"{1e3 * row['step']:.3g} | {100 * row['efficiency']:.0f} %" for row in (graph, plain))
            lines.append(f"| {gpus} | {clips_of(gpus):g} | {times} | {steps} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="do", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--data", type=Path, required=True)
    measuring.add_argument("--json", type=Path)
    measuring.add_argument("--recipe", default="small")
    measuring.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    measuring.add_argument("--threads", type=int, default=1, help="of each process")
    measuring.add_argument("--batch", type=int, default=32, help="clips of all processes together")
    measuring.add_argument("--epochs", type=int, default=3)
    measuring.add_argument("--dtype", default="float32")
    measuring.add_argument("options", nargs="*", help="further options of pretrain, after --")
    modelling = commands.add_parser("model")
    modelling.add_argument("--parameters", type=int, required=True)
    # The goal of the project, 40,091 clips with 1.18 bodies, 400 epochs in 30 minutes: a goal, not a measurement.
    modelling.add_argument("--bodies-per-s", type=float, default=10_500.0, help="of one GPU")
    modelling.add_argument("--bodies-per-clip", type=float, default=1.18)
    modelling.add_argument(
        "--overlap", type=float, default=0.8, help="part of a plain step's backward pass that can hide"
    )
    modelling.add_argument("--node", type=int, default=8, help="GPUs in a node")
    modelling.add_argument("--node-gb-s", type=float, default=450.0, help="GB/s of a link inside a node, one way")
    modelling.add_argument("--net-gb-s", type=float, default=50.0, help="GB/s of a network card, one per GPU")
    modelling.add_argument("--latency-us", type=float, default=10.0, help="of one turn of a ring")
    modelling.add_argument("--per-gpu", type=int, default=48)
    modelling.add_argument("--batch", type=int, default=1536)
    args = parser.parse_args()
    if args.do == "model":
        print(model(args))
        return
    record = measure(args)
    print(
        "| processes | samples/s | quartile range | speed-up | largest relative difference of a loss |\n"
        + "|---" * 5
        + "|"
    )
    for row in record["rows"]:
        print(
            f"| {row['ranks']} | {row['samples_per_s']:.1f} | {row['iqr']:.1f} | {row['speedup']:.2f} | "
            f"{row['largest_loss_difference']:.1e} |"
        )
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
