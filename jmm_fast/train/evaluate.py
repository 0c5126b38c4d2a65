"""What the protocols share: the encoder to evaluate, its features, the score, and the record of it."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from jmm_fast.data import BodyBatches, ClipBatch, ClipStore, Split
from jmm_fast.errors import SharedError, UserError
from jmm_fast.files import atomic_path, atomic_write_text
from jmm_fast.models import JMMTGT, Encoder, load_encoder, pool
from jmm_fast.ops.backend import OPS, choose
from jmm_fast.progress import Progress
from jmm_fast.train import checkpoint, distributed, environment
from jmm_fast.train.config import RunConfig, check_config, differences, load_config, save_config, to_dict
from jmm_fast.train.loop import autocast
from jmm_fast.train.metrics import read_lines

EncoderKind = Literal["pretrained", "untrained"]


@dataclass(kw_only=True, slots=True)
class Source:
    """Whose encoder is evaluated.

    Attributes:
        folder: the run, where results go.
        config: of the run; for foreign weights, of a recipe, with the sizes that the weights have.
        weights: file or folder of foreign weights; None for a run.
    """

    folder: Path
    config: RunConfig
    weights: Path | None = None

    def encoder(self, kind: str, *, seed: int, drop_path: float = 0.0) -> Encoder:
        """The pretrained encoder, or one of the same architecture with first weights from ``seed``."""
        config = self.config
        if kind != "pretrained":
            torch.manual_seed(seed)
            return Encoder(config.model, drop_path=drop_path, backend=config.backend)
        if self.weights is not None:
            return load_encoder(self.weights, heads=config.model.heads, drop_path=drop_path, backend=config.backend)
        if (self.folder / "model" / "config.json").exists():
            return load_encoder(self.folder, drop_path=drop_path, backend=config.backend)
        # Still training, or stopped: the newest checkpoint holds the weights.
        found = checkpoint.latest(self.folder / "checkpoints", distributed.only_first(print))
        if found is None:
            raise UserError(f"{self.folder} holds neither model/ nor a checkpoint: was it pretrained?")
        model = JMMTGT(config.model, backend=config.backend)
        checkpoint.restore(found, model)
        encoder = Encoder(config.model, drop_path=drop_path, backend=config.backend)
        encoder.load_state_dict(model.encoder.state_dict())
        return encoder


def open_source(path: Path, *, out: Path | None, fallback: RunConfig) -> Source:
    """A run folder, or foreign weights (an authors' or MAMP ``.pth``, a model folder).

    Args:
        path: what to evaluate.
        out: folder for the results; needed for foreign weights, the run itself otherwise.
        fallback: settings for foreign weights, whose sizes replace those in ``fallback.model``.

    Raises:
        UserError: nothing there, no model in it, or ``out`` missing.
    """
    path = Path(path)
    if (path / "config.yaml").is_file():
        return Source(
            folder=path if out is None else out,
            config=load_config(path / "config.yaml"),
            weights=None if out is None else path,
        )
    if not path.exists():
        raise UserError(f"{path} does not exist: expected a run folder, a model folder or a checkpoint file")
    if out is None:
        raise UserError(f"{path} is no run folder: say with --out where the results go")
    encoder = load_encoder(path, heads=fallback.model.heads)
    return Source(folder=out, config=dataclasses.replace(fallback, model=encoder.config), weights=path)


def open_data(path: Path, config: RunConfig, *, need_test: bool) -> tuple[ClipStore, Split, RunConfig]:
    """The clips, their split, and ``config`` with joints and split as the data has them.

    Raises:
        UserError: unreadable data, unknown split, another number of joints than the config asks for, no test clip;
            of several processes, one that has other data or another config.
    """

    def opened() -> tuple[ClipStore, Split, RunConfig]:
        store = ClipStore.open(path)
        split = store.split(config.data.split)
        if need_test and len(split.test) == 0:
            raise UserError(f"{path}: split {split.name!r} has no test clip to evaluate on")
        complete = dataclasses.replace(config, data=dataclasses.replace(config.data, split=split.name))
        check_config(complete)
        check_backend(complete)
        return store, split, complete

    store, split, complete = distributed.together(opened)
    told = distributed.gather((store.fingerprint, to_dict(complete)))
    for number, (fingerprint, settings) in enumerate(told):
        if fingerprint != told[0][0]:
            raise SharedError(f"rank {number} has other data in {path} than rank 0: expected the same file")
        for name, first, other in differences(told[0][1], settings):
            raise SharedError(f"rank {number} has {name} = {other}, rank 0 has {first}: expected the same")
    return store, split, complete


def check_backend(config: RunConfig) -> None:
    """Refuse a backend that was asked for by name and cannot run every op, before anything is written."""
    probe = torch.empty(0, device=environment.device(config.device))
    for op in OPS:
        try:
            choose(op, config.backend, probe)
        except ValueError as error:
            raise UserError(f"backend is {config.backend!r}: {error}") from error


def check_joints(config: RunConfig, store: ClipStore) -> None:
    """Refuse clips with another number of joints than the network's."""
    if store.skeleton.num_joints != config.model.num_joints:
        raise SharedError(
            f"{store.path} has {store.skeleton.num_joints} joints ({store.skeleton.name}), "
            f"the network has {config.model.num_joints} ({config.model.skeleton})"
        )


def record_start(folder: Path, config: RunConfig, store: ClipStore, device: torch.device) -> None:
    """Write the settings and what they run on into ``folder``; the first process does."""

    def write() -> None:
        save_config(folder / "config.yaml", config)
        environment.record(folder / "environment.json", environment.describe(store, device))

    distributed.from_first(write)


def batches(
    store: ClipStore,
    ids: Tensor,
    config: RunConfig,
    *,
    train: bool,
    batch_size: int,
    part: tuple[int, int] = (0, 1),
    seed: int,
    device: torch.device,
    shuffle: bool | None = None,
    drop_last: bool = False,
) -> BodyBatches:
    """Batches of ``ids`` as ``config.data`` wants them cut and turned."""
    data = config.data
    return BodyBatches(
        store,
        ids,
        batch_size=batch_size,
        part=part,
        window=config.model.num_frames,
        train=train,
        seed=seed,
        shuffle=shuffle,
        drop_last=drop_last,
        crop=data.crop,
        eval_crop=data.eval_crop,
        min_length=data.min_length,
        rotation=data.rotation,
        modality=data.modality,
        min_confidence=data.min_confidence,
        empty_bodies=data.empty_bodies,
        device=device,
        prefetch=config.prefetch,
        backend=config.backend,
    )


def of_every_clip(
    clips: BodyBatches, rows_of: Callable[[ClipBatch], Tensor], *, title: str, epoch: int = 0
) -> tuple[Tensor, Tensor]:
    """What ``rows_of`` gives for each clip of a batch, and the labels, of all batches in their order; on the CPU.

    Several processes take turns with whole batches and tell each other the results, so that these are, bit for bit,
    what one process computes on the same kind of machine with as many threads.
    """

    def mine() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in clips.epoch(epoch, start=distributed.rank(), every=distributed.size()):
            yield rows_of(batch).cpu(), batch.labels.cpu()

    rows, labels = [], []
    with Progress(title, len(clips), shown=distributed.is_first()) as progress:
        for found, truth in distributed.in_order(mine(), len(clips)):
            rows.append(found)
            labels.append(truth)
            progress.advance(len(truth))
    return torch.cat(rows), torch.cat(labels)


@torch.no_grad()
def pooled_features(
    encoder: Encoder, clips: BodyBatches, *, device: torch.device, dtype: str, title: str, epoch: int = 0
) -> tuple[Tensor, Tensor]:
    """Features and labels of every clip, in the order of the batches; see :func:`of_every_clip`.

    Returns:
        float32 ``[N,d]``, the mean over the tokens that were seen and over bodies, and int64 ``[N]``; both on the CPU.
    """
    encoder.to(device).eval()

    def pooled(batch: ClipBatch) -> Tensor:
        with autocast(device, dtype):
            tokens = encoder(batch.clips)
        valid = batch.valid(encoder.config.t_patch)
        return pool(tokens.float(), batch.clip_of_body, len(batch.index), valid)

    return of_every_clip(clips, pooled, title=title, epoch=epoch)


@dataclass(kw_only=True, slots=True)
class Score:
    """How often the right class came first, or among the first five.

    Attributes:
        top1, top5: percent of the clips.
        labels, predicted: int64 ``[N]``.
        per_class: percent of each class's clips, NaN for a class without test clips; float64 ``[classes]``.
        confusion: int64 ``[classes, classes]``, rows are true classes.
    """

    top1: float
    top5: float
    labels: np.ndarray
    predicted: np.ndarray
    per_class: np.ndarray
    confusion: np.ndarray


def score(ranking: Tensor, labels: Tensor, num_classes: int) -> Score:
    """Score of a ranking of the classes.

    Args:
        ranking: int64 ``[N, k]``, the best classes of each clip, best first; ``k >= min(5, classes)``.
        labels: int64 ``[N]``.
    """
    hits = ranking[:, :5] == labels[:, None]
    truth, predicted = labels.numpy(), ranking[:, 0].numpy()
    confusion = np.bincount(truth * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, -1)
    support = confusion.sum(axis=1)
    per_class = np.full(num_classes, np.nan)
    np.divide(100.0 * np.diag(confusion), support, out=per_class, where=support > 0)
    return Score(
        top1=100.0 * hits[:, 0].double().mean().item(),
        top5=100.0 * hits.any(1).double().mean().item(),
        labels=truth,
        predicted=predicted,
        per_class=per_class,
        confusion=confusion,
    )


def rank(logits: Tensor) -> Tensor:
    """Best five classes of each clip (all, when there are fewer), best first: int64 ``[N, min(5, classes)]``."""
    return logits.topk(min(5, logits.shape[1]), dim=1).indices


def record(folder: Path, store: ClipStore, split: Split, result: Score, *, name: str, **facts) -> dict:
    """Write ``predictions/<name>.npz`` and append a line to ``evaluations.jsonl``; the first process does.

    Args:
        name: of the predictions; a later evaluation of the same name replaces them, its line is appended.
        facts: what else the line holds.

    Returns:
        The line.
    """
    return distributed.from_first(lambda: _record(folder, store, split, result, name, facts))


def _record(folder: Path, store: ClipStore, split: Split, result: Score, name: str, facts: dict) -> dict:
    with atomic_path(folder / "predictions" / f"{name}.npz") as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file,
            labels=result.labels,
            predicted=result.predicted,
            class_names=np.array(store.class_names),
            confusion=result.confusion,
            per_class=result.per_class,
            clip=split.test.numpy(),
        )
    line = {
        **facts,
        "top1": round(result.top1, 3),
        "top5": round(result.top5, 3),
        "test_clips": len(result.labels),
        "split": split.name,
        "predictions": f"predictions/{name}.npz",
        "data": store.fingerprint,
        "commit": environment.commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    path = folder / "evaluations.jsonl"
    lines = [*read_lines(path), line]
    atomic_write_text(path, "".join(json.dumps(item) + "\n" for item in lines))
    return line


def summary(line: dict) -> str:
    """One line for the user."""
    what = "raw poses" if line["encoder"] == "raw" else f"{line['encoder']} encoder"
    return (
        f"{line['protocol']}, {what}: top-1 {line['top1']:.1f} %, top-5 {line['top5']:.1f} % "
        f"({line['train_clips']} training clips, {line['test_clips']} test clips, split {line['split']}, "
        f"{line['seconds']:.0f} s)"
    )
