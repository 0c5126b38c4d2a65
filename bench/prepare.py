"""How fast ``jmm-fast prepare ntu60`` reads, and in how much memory.

    python bench/prepare.py                       # 5000 made-up files, 1.1 GB
    python bench/prepare.py --gigabytes 10        # and peak memory on a tree of that size, made of hard links

Writes ``bench/results/prepare.json``: megabytes of text a second of the parser on one core and on all, the ratio to a
straightforward Python reader of the same files, files a second of the whole command with 1 and 2 workers, and its peak
memory; then an epoch of pretraining on the store and a linear probe, all from the command line. The files were just
written, so reading them does not wait for the disk.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jmm_fast.data.ntu_text import parse_ntu, parse_ntu_python
from jmm_fast.data.readers import synthetic
from jmm_fast.data.store import ClipStore
from jmm_fast.train.environment import commit, cpu_name, versions

PARSED, PARSED_IN_PYTHON = 200, 20
"""Files that the parsers are timed on."""
CLIPS = 256
"""Different motions in the tree."""

# Runs a command from a small process of its own: a child's peak begins with the memory of the process it came from.
CHILD = """
import resource, subprocess, sys, time
began = time.monotonic()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(code, time.monotonic() - began, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


def name(number: int) -> str:
    """Name of a file: setups, cameras, performers and actions all take turns."""
    camera, action, performer = number % 3 + 1, number // 3 % 60 + 1, number // 180 % 40 + 1
    setup, replication = number // 7200 % 17 + 1, number // 122400 + 1
    return f"S{setup:03}C{camera:03}P{performer:03}R{replication:03}A{action:03}.skeleton"


class Recorder:
    """Writes made-up clips in the sensor's text, all twelve columns of a joint."""

    def __init__(self) -> None:
        self.clips = ClipStore.from_contents(
            synthetic.read(clips=CLIPS, min_frames=80, max_frames=100, center=False, lost=0)
        )
        # Nobody reads the other nine columns, so a stock of them serves.
        rng = np.random.default_rng(0)
        columns = np.concatenate([rng.uniform(0, 1900, (4096, 4)), rng.uniform(-1, 1, (4096, 4))], axis=1)
        self.others = [" ".join(f"{value:.7g}" for value in row) + " 2" for row in columns.tolist()]

    def text(self, number: int) -> str:
        """The file ``number``; its action says whether there are two people."""
        people = 2 if number // 3 % 60 >= 49 else 1
        bodies = [self.clips.clip((number * 5 + person) % CLIPS).numpy()[0] for person in range(people)]
        length = min(len(body) for body in bodies)
        # A line each, its other columns already in it, and one formatting for all.
        lines = [f"%.7g %.7g %.7g {self.others[(number * 31 + at) % 4096]}\n" for at in range(25 * people * length)]
        parts = [f"{length}\n"]
        for frame in range(length):
            parts.append(f"{people}\n")
            for person in range(people):
                at = 25 * (people * frame + person)
                parts.append(f"{72057594037931101 + person} 0 1 1 1 1 0 0.02764709 -0.1745603 2\n25\n")
                parts += lines[at : at + 25]
        joints = np.stack(
            [body[:length] + np.array([0.8 * person, 0, 0]) for person, body in enumerate(bodies)], axis=1
        )
        return "".join(parts) % tuple(joints.reshape(-1).tolist())


def make_tree(folder: Path, files: int) -> list[Path]:
    folder.mkdir(parents=True)
    recorder = Recorder()
    paths = [folder / name(number) for number in range(files)]
    for number, path in enumerate(paths):
        path.write_text(recorder.text(number))
    return paths


def straightforward(data: bytes, numbers: int = 12) -> list[tuple[int, str, np.ndarray]]:
    """What one would write in an hour: lines, words, float; ``numbers`` of each joint, of which three are kept."""
    lines = data.decode().splitlines()
    rows, at = [], 1
    for frame in range(int(lines[0])):
        bodies = int(lines[at])
        at += 1
        for _ in range(bodies):
            body, count = lines[at].split()[0], int(lines[at + 1])
            at += 2
            joints = [[float(word) for word in line.split()[:numbers]] for line in lines[at : at + count]]
            at += count
            rows.append((frame, body, np.array(joints, dtype=np.float32)[:, :3]))
    return rows


def leanest(data: bytes) -> list[tuple[int, str, np.ndarray]]:
    """The same, knowing that nine of the numbers are not needed."""
    return straightforward(data, 3)


def seconds(parse: Callable, texts: Sequence[bytes], repeats: int) -> float:
    """The shortest of some passes over all ``texts``."""
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        for text in texts:
            parse(text)
        best = min(best, time.perf_counter() - began)
    return best


def measure_parser(paths: Sequence[Path]) -> dict:
    texts = [path.read_bytes() for path in paths[:PARSED]]
    few = texts[:PARSED_IN_PYTHON]
    for text in few:
        ours, rows = parse_ntu(text), straightforward(text)
        np.testing.assert_array_equal(ours.joints, [joints for _, _, joints in rows])
    size, small = (sum(map(len, group)) / 1e6 for group in (texts, few))
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        began = time.perf_counter()
        list(pool.map(lambda _: seconds(parse_ntu, texts, 5), range(cores)))
        together = cores * 5 * size / (time.perf_counter() - began)
    # In turns, so that a change of the machine's speed meets all.
    parsers = (parse_ntu, straightforward, leanest, parse_ntu_python)
    rounds = np.array([[seconds(parse, few, 5 if parse is parse_ntu else 1) for parse in parsers] for _ in range(7)])
    fastest, ratios = rounds.min(axis=0), np.median(rounds / rounds[:, :1], axis=0)
    return {
        "bytes": int(size * 1e6),
        "mb_per_second_one_core": round(size / seconds(parse_ntu, texts, 5), 1),
        "mb_per_second_all_cores": round(together, 1),
        "python": {
            parse.__name__: {"mb_per_second": round(small / took, 1), "times_slower": round(ratio, 1)}
            for parse, took, ratio in zip(parsers[1:], fastest.tolist()[1:], ratios.tolist()[1:], strict=True)
        },
    }


def run(*command: str) -> tuple[float, int]:
    """Seconds and peak bytes of a command."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *command], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()
    if child[0] != "0":
        sys.exit(f"{' '.join(command)} failed")
    return float(child[1]), int(child[2])


def measure_prepare(folder: Path, workers: int, out: Path) -> dict:
    files = [path.stat().st_size for path in folder.iterdir()]
    took, peak = run(
        sys.executable, "-m", "jmm_fast", "prepare", "ntu60", str(folder), "--out", str(out), "--workers", str(workers)
    )
    store = out.stat().st_size
    out.unlink()
    return {
        "files": len(files),
        "bytes": sum(files),
        "store_bytes": store,
        "workers": workers,
        "seconds": round(took, 2),
        "files_per_second": round(len(files) / took, 1),
        "mb_per_second": round(sum(files) / took / 1e6, 1),
        "peak_bytes": peak,
    }


def measure_training(folder: Path, work: Path) -> dict:
    """The way from the files to an evaluation, each command a process of its own."""
    store, training = str(work / "train.safetensors"), str(work / "run")
    program = (sys.executable, "-m", "jmm_fast")
    short = ("--epochs", "1", "--warmup-epochs", "0", "--dtype", "bfloat16", "--split", "xsub")
    commands = {
        "prepare": (*program, "prepare", "ntu60", str(folder), "--out", store),
        "pretrain": (*program, "pretrain", "small", "--data", store, "--out", training, *short),
        "probe": (*program, "probe", training, "--data", store, "--features", "cached"),
    }
    return {
        name: {"seconds": round(took, 1), "peak_bytes": peak}
        for name, (took, peak) in ((name, run(*command)) for name, command in commands.items())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=5000, help="files to make")
    parser.add_argument("--gigabytes", type=float, default=0, help="also measure a tree of this size, of hard links")
    parser.add_argument("--work", type=Path, help="existing folder for the trees; default the system's temporary one")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/prepare.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        began = time.perf_counter()
        tree, out = Path(work, "tree"), Path(work, "out.safetensors")
        paths = make_tree(tree, arguments.files)
        print(f"{len(paths)} files made in {time.perf_counter() - began:.0f} s", flush=True)
        record = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "versions": versions(),
            "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.system()},
            "parser": measure_parser(paths),
            "prepare": [measure_prepare(tree, workers, out) for workers in (1, 2)],
            # What the program takes before it reads anything.
            "imports_peak_bytes": run(sys.executable, "-c", "import jmm_fast.data")[1],
        }
        record["training"] = measure_training(tree, Path(work))
        if arguments.gigabytes:
            size = sum(path.stat().st_size for path in paths)
            large = Path(work, "large")
            large.mkdir()
            for number in range(round(arguments.gigabytes * 1e9 / size * len(paths))):
                os.link(paths[number % len(paths)], large / name(number))
            record["large"] = measure_prepare(large, 2, out)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: record[key] for key in record if key not in ("versions", "machine")}, indent=1))


if __name__ == "__main__":
    main()
