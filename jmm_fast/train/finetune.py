"""Supervised training of the whole network: the driver behind ``jmm-fast finetune``."""

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch.nn import functional

from jmm_fast.errors import SharedError, UserError
from jmm_fast.models import FinetuneClassifier, parameter_layers
from jmm_fast.train import distributed, environment, sharding
from jmm_fast.train.config import FREE_ON_RESUME, check_unchanged, load_config, to_dict
from jmm_fast.train.evaluate import (
    Score,
    Source,
    batches,
    check_joints,
    of_every_clip,
    open_data,
    rank,
    record,
    record_start,
    score,
    summary,
)
from jmm_fast.train.loop import LoopConfig, autocast, fit, step_seed
from jmm_fast.train.metrics import read_lines
from jmm_fast.train.optim import adamw


def finetune(
    source: Source,
    *,
    data: Path,
    encoder: Literal["pretrained", "scratch"] = "pretrained",
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> dict:
    """Train encoder and head with labels and score them on the test clips.

    AdamW with layer decay, drop path, head dropout and label smoothing; settings: ``source.config.finetune``. With
    ``labels`` below 1 only that part of the training labels is used (:meth:`jmm_fast.data.ClipStore.labelled`): the
    subset that the store names for this split and part, else one drawn by class and fixed by the seed. The score is
    that of the **last** epoch; with ``eval_every`` the best one seen is noted beside it, as what it is: chosen on the
    test clips. ``scratch`` starts the same network from random weights and drops the layer decay, whose purpose is to
    keep pretrained layers.

    Several processes share the encoder's work; each computes the head on the features of the whole batch, so that
    batch normalisation, dropout and drop path are those of a single process.

    Files go to ``finetune/<encoder>[-labels<part>]/`` in the run. Resumption and determinism are those of pretraining.

    Args:
        source: from :func:`jmm_fast.train.evaluate.open_source`.
        data: a clip store.
        encoder: start from the pretrained encoder or from random weights.
        resume: continue from the newest checkpoint.
        overwrite: remove the finetuning that is there.

    Returns:
        The line written to ``evaluations.jsonl``.
    """
    if resume and overwrite:
        raise SharedError("--resume and --overwrite exclude each other: continue the run or remove it")
    began = time.monotonic()
    say = distributed.only_first(say)
    store, split, config = open_data(data, source.config, need_test=True)
    settings = config.finetune
    check_joints(config, store)
    device = environment.device(config.device)
    train = store.labelled(split, settings.labels, settings.seed)
    if len(train) < 2:
        raise SharedError(f"{data}: split {split.name!r} has {len(train)} training clips, finetuning needs at least 2")
    batch_size = min(settings.batch_size, len(train))
    part = "" if settings.labels == 1 else f"-labels{settings.labels:g}"
    folder = source.folder / "finetune" / f"{encoder}{part}"
    optim = settings.optim if encoder == "pretrained" else dataclasses.replace(settings.optim, layer_decay=None)
    distributed.check_batch("finetune.batch_size", batch_size)
    with distributed.holding(folder):
        distributed.from_first(lambda: _prepare_folder(folder, config, resume=resume, overwrite=overwrite))
        backbone = distributed.together(
            lambda: source.encoder(encoder, seed=settings.seed, drop_path=settings.drop_path)
        )
        torch.manual_seed(step_seed(settings.seed, 0))
        model = FinetuneClassifier(backbone, store.num_classes, hidden=settings.hidden, dropout=settings.dropout).to(
            device
        )
        optimizer = adamw(model, optim, layers=parameter_layers(model, config.model.depth))
        clips = batches(
            store,
            train,
            config,
            train=True,
            batch_size=batch_size,
            part=(distributed.rank(), distributed.size()),
            seed=settings.seed,
            device=device,
            drop_last=True,
        )
        test = batches(store, split.test, config, train=False, batch_size=2 * batch_size, seed=0, device=device)

        def loss_of(batch, _epoch: int) -> tuple[torch.Tensor, int]:
            # Every process computes the head, with its batch normalisation and dropout, on the clips of all of them.
            distributed.share_drop_path(model, len(batch.clip_ids))
            features = distributed.gather_rows(model.features(batch.clips, batch.clip_of_body, len(batch.index)))
            labels = distributed.gather_rows(batch.labels)
            logits = model.head(features).float()
            return functional.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing), 1

        def after_epoch(done: int) -> dict:
            if not settings.eval_every or done % settings.eval_every or done == settings.epochs:
                return {}
            result = _evaluate(sharding.whole_model(model), test, store.num_classes, device, config.dtype)
            return {"top1": result.top1, "top5": result.top5}

        record_start(folder, config, store, device)
        say(
            f"finetuning the {encoder} encoder on {len(train)} of {len(split.train)} training clips of {data}, "
            f"{len(clips)} steps an epoch, {settings.epochs} epochs"
        )
        fit(
            model,
            optimizer,
            clips,
            loss_of,
            config=LoopConfig.of(config, settings, optim),
            folder=folder,
            device=device,
            title=f"finetune {encoder}",
            fingerprint=store.fingerprint,
            resume=resume,
            after_epoch=after_epoch,
            say=say,
        )
        result = _evaluate(sharding.whole_model(model), test, store.num_classes, device, config.dtype)
    lines = distributed.from_first(lambda: read_lines(folder / "metrics.jsonl"))
    seen = [(line["top1"], line["epoch"]) for line in lines if "top1" in line]
    best, best_epoch = max([*seen, (result.top1, settings.epochs)])
    line = record(
        source.folder,
        store,
        split,
        result,
        name=f"finetune-{encoder}{part}",
        protocol="finetune",
        encoder=encoder,
        modality=config.data.modality,
        labels=settings.labels,
        epochs=settings.epochs,
        **({"best_top1": round(best, 3), "best_epoch": best_epoch} if settings.eval_every else {}),
        train_clips=len(train),
        seed=settings.seed,
        seconds=round(time.monotonic() - began, 1),
    )
    say(summary(line) + " after the last epoch")
    if settings.eval_every:
        say(f"best seen on the test clips, not a fair figure: top-1 {best:.1f} % after epoch {best_epoch}")
    return line


@torch.no_grad()
def _evaluate(model: FinetuneClassifier, test, num_classes: int, device: torch.device, dtype: str) -> Score:
    model.eval()

    def ranked(batch) -> torch.Tensor:
        with autocast(device, dtype):
            logits = model(batch.clips, batch.clip_of_body, len(batch.index))
        return rank(logits.float())

    return score(*of_every_clip(test, ranked, title="test clips"), num_classes)


def _prepare_folder(folder: Path, config, *, resume: bool, overwrite: bool) -> None:
    if not (folder / "config.yaml").exists():
        return
    if overwrite:
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != ".lock":  # It is held: a new file of its name would be another lock.
                path.unlink()
        return
    if not resume:
        raise UserError(f"{folder} already holds a finetuning: --resume continues it, --overwrite removes it")
    before, now = to_dict(load_config(folder / "config.yaml")), to_dict(config)
    # The other protocols' settings and the pace of writing do not change these weights.
    for values in (before, now):
        for name in set(FREE_ON_RESUME) - {"finetune"}:
            values.pop(name)
        values["finetune"].pop("eval_every")
    check_unchanged(folder, before, now)
