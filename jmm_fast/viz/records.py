"""What a run left behind, read back: metrics, configuration, evaluations, predictions."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from jmm_fast.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """Answers of one evaluated classifier: true and predicted class of every test clip, and the class names."""

    labels: np.ndarray
    predicted: np.ndarray
    class_names: tuple[str, ...]

    @property
    def counts(self) -> np.ndarray:
        """int64 ``[classes, classes]``: rows are true classes, columns predicted ones."""
        size = len(self.class_names)
        flat = np.bincount(self.labels * size + self.predicted, minlength=size * size)
        return flat.reshape(size, size)

    @property
    def class_accuracy(self) -> np.ndarray:
        """float64 ``[classes]``: share of a class's clips that were recognised, NaN for a class without test clips."""
        counts = self.counts
        support = counts.sum(axis=1)
        return np.divide(np.diag(counts), support, out=np.full(len(support), np.nan), where=support > 0)


def run_folder(run: str | Path) -> Path:
    """``run`` as a path, checked to be a folder."""
    run = Path(run)
    if not run.is_dir():
        raise UserError(f"{run} is not a run folder: expected the folder that `jmm-fast pretrain --out` wrote")
    return run


def _json_lines(path: Path) -> list[dict]:
    """Objects of a JSON-lines file. A last line without an end is what a killed writer leaves: it is not counted."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(f"{path} line {number} is not JSON: {error.msg}") from error
        if not isinstance(record, dict):
            raise UserError(f"{path} line {number} is not a JSON object")
        records.append(record)
    return records


def read_training(run: str | Path) -> dict[str, np.ndarray]:
    """Columns ``step, epoch, loss, lr, time`` of the training lines of ``RUN/metrics.jsonl``.

    In order of steps; of a step logged twice the last line counts. ``epoch`` is fractional; ``time`` is in seconds of
    training, NaN where the log does not hold it.

    Raises:
        UserError: the file is missing, damaged or holds no training line.
    """
    path = run_folder(run) / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{path} is missing: nothing was trained in this folder")
    by_step = {}
    for record in _json_lines(path):
        if record.get("kind") == "train":
            missing = [
                name for name in ("step", "epoch", "loss", "lr") if not isinstance(record.get(name), int | float)
            ]
            if missing:
                raise UserError(f"{path}: a training line has no number under {missing[0]!r}")
            by_step[int(record["step"])] = record
    if not by_step:
        raise UserError(f"{path} holds no training line")
    steps = sorted(by_step)
    columns = {
        name: np.array([by_step[step][name] for step in steps], dtype=np.float64) for name in ("epoch", "loss", "lr")
    }
    columns["time"] = np.array([by_step[step].get("time", math.nan) for step in steps], dtype=np.float64)
    columns["step"] = np.array(steps, dtype=np.int64)
    return columns


def read_predictions(source: str | Path | Mapping) -> Predictions:
    """Predictions from ``RUN/predictions/*.npz`` or a mapping with ``labels``, ``predicted`` and ``class_names``.

    Raises:
        UserError: missing file or array, arrays of different lengths, classes outside the list.
    """
    name = "predictions" if isinstance(source, Mapping) else str(source)
    try:
        if not isinstance(source, Mapping):
            with np.load(source, allow_pickle=False) as file:
                source = {key: file[key] for key in file.files}
        labels, predicted, class_names = (np.asarray(source[key]) for key in ("labels", "predicted", "class_names"))
    except KeyError as error:
        raise UserError(f"{name} holds no array {error}: expected labels, predicted and class_names") from error
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read {name} as .npz: {error}") from error
    if labels.ndim != 1 or labels.shape != predicted.shape or labels.size == 0:
        raise UserError(f"{name}: labels and predicted must be [N], N >= 1, got {labels.shape} and {predicted.shape}")
    labels, predicted = labels.astype(np.int64), predicted.astype(np.int64)
    for key, values in (("labels", labels), ("predicted", predicted)):
        if values.min() < 0 or values.max() >= len(class_names):
            raise UserError(f"{name}: {key} must lie in 0..{len(class_names) - 1}, got {values.min()}..{values.max()}")
    return Predictions(labels=labels, predicted=predicted, class_names=tuple(str(item) for item in class_names))


def read_evaluations(run: str | Path) -> list[dict]:
    """Lines of ``RUN/evaluations.jsonl``, oldest first; none where nothing was evaluated."""
    path = run_folder(run) / "evaluations.jsonl"
    return _json_lines(path) if path.exists() else []


def read_config(run: str | Path) -> dict:
    """``RUN/config.yaml`` as nested dictionaries; empty where it is missing."""
    path = run_folder(run) / "config.yaml"
    if not path.exists():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold fields, got {type(config).__name__}")
    return config


def read_environment(run: str | Path) -> dict:
    """``RUN/environment.json``; empty where it is missing."""
    path = run_folder(run) / "environment.json"
    if not path.exists():
        return {}
    try:
        environment = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(environment, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(environment).__name__}")
    return environment


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over a centred window of ``window`` values, shorter at the ends; values that are not finite do not count."""
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    low, high = np.maximum(index - window // 2, 0), np.minimum(index + window // 2 + 1, len(values))
    number = count[high] - count[low]
    return np.divide(total[high] - total[low], number, out=np.full(len(values), math.nan), where=number > 0)
