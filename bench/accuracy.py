"""Accuracy of the recipe ``small`` on two public sets: pretraining, linear, kNN and finetuned evaluation, baselines.

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
PRETRAINED = ("linear", "knn", "linear, 1 view", "knn, 1 view", "finetune")
# Baselines need no pretraining; they are kept with the first run of a set, whose split and sizes they share.
STEPS = {
    "UI_PRMD": {"released": tuple(PROTOCOLS), "paper": PRETRAINED},
    "BANDAI_NAMCO": {"released": tuple(PROTOCOLS)},
}
PRETRAIN = {
    "UI_PRMD": "pretrain small --variant VARIANT --data DATA --out RUN --epochs 40 --seed 0",
    "BANDAI_NAMCO": "pretrain small --variant VARIANT --data DATA --out RUN --epochs 10 --warmup-epochs 1 --seed 0",
}
FINETUNE = {"UI_PRMD": " --epochs 20 --warmup-epochs 2", "BANDAI_NAMCO": " --epochs 6 --warmup-epochs 1"}
BASELINES = {"untrained": "untrained", "raw": "raw poses", "scratch": "from scratch"}


def commands(name: str, variant: str) -> dict[str, str]:
    """Step -> command line, with DATA and RUN left to fill in."""
    lines = {"pretrain": PRETRAIN[name].replace("VARIANT", variant)}
    for step in STEPS[name][variant]:
        lines[step] = PROTOCOLS[step] + (FINETUNE[name] if step.startswith("finetune") else "")
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
        for variant in STEPS[name]:
            if only not in f"{name}/{variant}":
                continue
            run = work / name / variant
            for step, line in commands(name, variant).items():
                if step in done(run):
                    continue
                words = [path if word == "DATA" else str(run) if word == "RUN" else word for word in line.split()]
                if step == "pretrain" and (run / "config.yaml").exists():
                    words.append("--resume")
                print("jmm-fast", shlex.join(words), flush=True)
                subprocess.run([sys.executable, "-m", "jmm_fast", *words], check=True)


def table(work: Path, out: Path) -> None:
    """Write ``out.json`` and ``out.md`` from the records of the runs under ``work``."""
    rows, lines = [], []
    for name, variants in STEPS.items():
        for variant in variants:
            run = work / name / variant
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
                    "pretraining": {
                        "epochs": config["epochs"],
                        "seed": config["seed"],
                        "seconds": round(metrics[-1]["time"], 1),
                        "last_loss": [m["loss"] for m in metrics if m["kind"] == "epoch"][-1],
                    },
                    "commands": commands(name, variant),
                    # Paths and host details stay with the run.
                    "environment": {
                        name: environment[name] for name in ("commit", "versions", "cpu", "cores", "threads")
                    }
                    | {"data": environment["data"]["fingerprint"]},
                    "evaluations": list(latest.values()),
                }
            )
            for step, record in latest.items():
                encoder = record["encoder"]
                what = f"pretrained, `{variant}`" if encoder == "pretrained" else BASELINES[encoder]
                figures = f"{record['top1']:.1f} | {record['top5']:.1f} | {record['seconds']:.0f}"
                lines.append(f"| {name} | {step.removesuffix(' ' + encoder)} | {what} | {figures} |")
    out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    head = "| set | protocol | encoder | top-1 | top-5 | seconds |\n|---|---|---|---|---|---|\n"
    print(head + "\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", default=[], metavar="SET=FILE", help=f"sets: {', '.join(STEPS)}")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", default="", help="part of SET/VARIANT")
    parser.add_argument("--table", type=Path, help="write TABLE.json from the runs and print the table")
    arguments = parser.parse_args()
    data = dict(item.split("=", 1) for item in arguments.data)
    unknown = data.keys() - STEPS.keys()
    if unknown:
        parser.error(f"unknown set {sorted(unknown)[0]}: expected {', '.join(STEPS)}")
    run_all(data, arguments.work, arguments.only)
    if arguments.table:
        table(arguments.work, arguments.table)


if __name__ == "__main__":
    main()
