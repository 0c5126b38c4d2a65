"""Accuracy of the recipe ``small`` on two public sets: each variant of the method over seeds, baselines, finetuning.

UI-PRMD (Kinect part, public domain) and the Bandai-Namco Research Motiondataset (CC BY-NC 4.0) as ragged .npz files:

    jmm-fast prepare ragged ui-prmd.npz --out ui-prmd.safetensors --label labels,correct \\
        --split "odd=subject in 0,2,4,6,8"
    jmm-fast prepare ragged bandai-namco.npz --out bandai-namco.safetensors --where "dataset_id in 2" \\
        --split "group=capture_group in 0,1"
    python bench/accuracy.py --data UI_PRMD=ui-prmd.safetensors --data BANDAI_NAMCO=bandai-namco.safetensors --work runs
    python bench/accuracy.py --work runs --table bench/results/accuracy_small

The third runs what is not yet done, one ``jmm-fast`` command after another, and can be stopped and repeated; several
may run side by side with different ``--only``. The last writes the table from the runs' own records.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import yaml

PROTOCOLS = {
    "linear": "probe RUN --data DATA",
    "knn": "knn RUN --data DATA",
    "linear, 1 view": "probe RUN --data DATA --augment-views 1",
    "knn, 1 view": "knn RUN --data DATA --augment-views 1",
    "finetune": "finetune RUN --data DATA --overwrite",
    "linear untrained": "probe RUN --data DATA --encoder untrained",
    "linear, 1 view untrained": "probe RUN --data DATA --augment-views 1 --encoder untrained",
    "knn, 1 view untrained": "knn RUN --data DATA --augment-views 1 --encoder untrained",
    "knn untrained": "knn RUN --data DATA --encoder untrained",
    "knn raw": "knn RUN --data DATA --raw",
    "finetune scratch": "finetune RUN --data DATA --encoder scratch --overwrite",
}
VARIANTS = {
    "mamp": "--variant mamp",
    "released": "--variant released",
    "paper-none": "--variant paper --model.topology none",
    "paper-hops": "--variant paper",
    "paper-adjacency": "--variant paper --model.topology adjacency",
    "paper-free": "--variant paper --model.topology free",
}
SEEDS = {"UI_PRMD": (0, 1, 2), "BANDAI_NAMCO": (0,)}
PRETRAIN = "pretrain small OPTIONS --data DATA --out RUN --dtype DTYPE --seed SEED"
EPOCHS = {"UI_PRMD": " --epochs 40", "BANDAI_NAMCO": " --epochs 10 --warmup-epochs 1"}
FINETUNE = {"UI_PRMD": " --epochs 20 --warmup-epochs 2", "BANDAI_NAMCO": " --epochs 6 --warmup-epochs 1"}
BASELINES = {"untrained": "untrained", "raw": "raw poses", "scratch": "from scratch"}


def runs(name: str) -> list[tuple[str, int]]:
    """Variant and seed of each run on a set, the first seed of all variants first."""
    return [(variant, seed) for seed in SEEDS[name] for variant in VARIANTS]


def steps(name: str, variant: str, seed: int) -> tuple[str, ...]:
    """Protocols of a run. What needs no pretraining is kept with `released`, whose network has no topology."""
    first = seed == SEEDS[name][0]
    if variant == "released":
        return tuple(PROTOCOLS) if first else ("linear", "knn", "linear untrained", "knn untrained")
    if variant == "paper-hops" and name == "UI_PRMD" and first:
        return ("linear", "knn", "linear, 1 view", "knn, 1 view", "finetune")
    return ("linear", "knn")


def commands(name: str, variant: str, seed: int, dtype: str = "bfloat16") -> dict[str, str]:
    """Step -> command line, with DATA and RUN left to fill in."""
    line = PRETRAIN.replace("OPTIONS", VARIANTS[variant]).replace("DTYPE", dtype).replace("SEED", str(seed))
    lines = {"pretrain": line + EPOCHS[name]}
    for step in steps(name, variant, seed):
        lines[step] = PROTOCOLS[step] + (FINETUNE[name] if step.startswith("finetune") else "")
        if seed and step != "knn raw":
            lines[step] += f" --seed {seed}"
    return lines


def step_of(record: dict) -> str:
    """The step of ``PROTOCOLS`` that a line of ``evaluations.jsonl`` is the result of."""
    views = record.get("augment_views") or 0
    return (
        record["protocol"]
        + (f", {views} view" + "s" * (views > 1) if views else "")
        + (f" {record['encoder']}" if record["encoder"] in BASELINES else "")
    )


def done(run: Path) -> set[str]:
    """Steps whose result is in the run's records."""
    found = {"pretrain"} if (run / "model" / "config.json").exists() else set()
    records = run / "evaluations.jsonl"
    return (
        found | {step_of(json.loads(line)) for line in records.read_text().splitlines()} if records.exists() else found
    )


def run_all(data: dict[str, str], work: Path, only: str) -> None:
    for name, path in data.items():
        for variant, seed in runs(name):
            if only not in f"{name}/{variant}/seed{seed}":
                continue
            run = work / name / variant / f"seed{seed}"
            for step, line in commands(name, variant, seed).items():
                if step in done(run):
                    continue
                words = [path if word == "DATA" else str(run) if word == "RUN" else word for word in line.split()]
                if step == "pretrain" and (run / "config.yaml").exists():
                    words.append("--resume")
                print("jmm-fast", shlex.join(words), flush=True)
                subprocess.run([sys.executable, "-m", "jmm_fast", *words], check=True)


def table(work: Path, out: Path) -> None:
    """Write ``out.json`` from the records of the runs under ``work`` and print the table: mean and deviation."""
    rows = []
    results: dict[tuple[str, str, str], list[float]] = {}
    for name in SEEDS:
        for variant, seed in runs(name):
            run = work / name / variant / f"seed{seed}"
            if not (run / "evaluations.jsonl").exists():
                continue
            config = yaml.safe_load((run / "config.yaml").read_text())
            environment = json.loads((run / "environment.json").read_text())
            metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            records = map(json.loads, (run / "evaluations.jsonl").read_text().splitlines())
            latest = {step_of(record): record for record in records}
            rows.append(
                {
                    "set": name,
                    "variant": variant,
                    "seed": seed,
                    "pretraining": {
                        "epochs": config["epochs"],
                        "dtype": config["dtype"],
                        "seconds": round(metrics[-1]["time"], 1),
                        "last_loss": [m["loss"] for m in metrics if m["kind"] == "epoch"][-1],
                    },
                    "commands": commands(name, variant, seed, config["dtype"]),
                    # Paths and host details stay with the run.
                    "environment": {key: environment[key] for key in ("commit", "versions", "cpu", "cores", "threads")}
                    | {"data": environment["data"]["fingerprint"]},
                    "evaluations": [
                        {key: record[key] for key in record if key not in ("predictions", "data")}
                        for record in latest.values()
                    ],
                }
            )
            for step, record in latest.items():
                encoder = record["encoder"]
                what = f"pretrained, `{variant}`" if encoder == "pretrained" else BASELINES[encoder]
                results.setdefault((name, step.removesuffix(" " + encoder), what), []).append(record["top1"])
    out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    print("| set | protocol | encoder | top-1 | seeds |\n|---|---|---|---|---|")
    for (name, protocol, what), top1 in sorted(results.items()):
        deviation = f" ± {statistics.stdev(top1):.1f}" if len(top1) > 1 else ""
        print(f"| {name} | {protocol} | {what} | {statistics.mean(top1):.1f}{deviation} | {len(top1)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", default=[], metavar="SET=FILE", help=f"sets: {', '.join(SEEDS)}")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", default="", help="part of SET/VARIANT/seedN")
    parser.add_argument("--table", type=Path, help="write TABLE.json from the runs and print the table")
    arguments = parser.parse_args()
    data = dict(item.split("=", 1) for item in arguments.data)
    unknown = data.keys() - SEEDS.keys()
    if unknown:
        parser.error(f"unknown set {sorted(unknown)[0]}: expected {', '.join(SEEDS)}")
    run_all(data, arguments.work, arguments.only)
    if arguments.table:
        table(arguments.work, arguments.table)


if __name__ == "__main__":
    main()
