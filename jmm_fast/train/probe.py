"""Linear evaluation: the driver behind ``jmm-fast probe``."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from jmm_fast.data import ClipStore, Split
from jmm_fast.errors import SharedError
from jmm_fast.models import Encoder, LinearProbe
from jmm_fast.progress import Progress
from jmm_fast.train import distributed, environment
from jmm_fast.train.config import ProbeConfig, RunConfig
from jmm_fast.train.evaluate import (
    EncoderKind,
    Score,
    Source,
    batches,
    check_joints,
    open_data,
    pooled_features,
    rank,
    record,
    score,
    summary,
)
from jmm_fast.train.loop import autocast, step_seed
from jmm_fast.train.optim import set_learning_rate
from jmm_fast.train.schedule import learning_rate


def probe(
    source: Source, *, data: Path, encoder: EncoderKind = "pretrained", say: Callable[[str], None] = print
) -> dict:
    """Train a linear classifier on the frozen encoder's pooled features and score it on the test clips.

    ``Linear(BatchNorm(mean over bodies, time and joints))``, SGD with momentum, half a cosine; settings:
    ``source.config.probe``. With ``features="online"`` each epoch sees new crops and rotations (the released protocol);
    with ``"cached"`` features are extracted once, of the centre crop or of ``augment_views`` random views. The score is
    that of the last epoch. Deterministic on the CPU for a number of threads.

    Args:
        source: from :func:`jmm_fast.train.evaluate.open_source`.
        data: a clip store.
        encoder: the pretrained one, or the same architecture with random first weights.

    Returns:
        The line written to ``evaluations.jsonl``.
    """
    began = time.monotonic()
    say = distributed.only_first(say)
    store, split, config = open_data(data, source.config, need_test=True)
    settings = config.probe
    check_joints(config, store)
    backbone = distributed.together(lambda: source.encoder(encoder, seed=settings.seed))
    result = linear_score(backbone, store, split, config, environment.device(config.device))
    line = record(
        source.folder,
        store,
        split,
        result,
        name=f"linear-{encoder}",
        protocol="linear",
        encoder=encoder,
        modality=config.data.modality,
        epochs=settings.epochs,
        features=settings.features,
        augment_views=settings.augment_views if settings.features == "cached" else None,
        train_clips=len(split.train),
        seed=settings.seed,
        seconds=round(time.monotonic() - began, 1),
    )
    say(summary(line))
    return line


def linear_score(encoder: Encoder, store: ClipStore, split: Split, config: RunConfig, device: torch.device) -> Score:
    """Score of a linear classifier on the features of ``encoder``; settings: ``config.probe``.

    Several processes share the encoder's work; the head, which is small, each trains alike.
    """
    settings = config.probe
    if len(split.train) < 2:
        raise SharedError(
            f"{store.path}: split {split.name!r} has {len(split.train)} training clips, a probe needs at least 2"
        )
    torch.manual_seed(step_seed(settings.seed, 0))
    model = LinearProbe(encoder, store.num_classes).to(device)
    batch_size = min(settings.batch_size, len(split.train))
    views = batches(
        store, split.train, config, train=True, batch_size=batch_size, seed=settings.seed, device=device, drop_last=True
    )
    if settings.features == "online":
        steps = len(views)
        epochs = _online(model, views, device, config.dtype)
    else:
        features, labels = _cached(model, store, split.train, config, device)
        steps = len(split.train) // batch_size
        epochs = _shuffled(features, labels, batch_size, settings.seed)
    _train_head(model, epochs, steps, settings)

    model.eval()
    test = batches(store, split.test, config, train=False, batch_size=2 * batch_size, seed=0, device=device)
    features, labels = pooled_features(
        model.encoder, test, device=device, dtype=config.dtype, title="features of test clips"
    )
    with torch.no_grad():
        logits = model.head(features.to(device)).cpu()
    return score(rank(logits), labels, store.num_classes)


def _online(model: LinearProbe, views, device: torch.device, dtype: str) -> Callable[[int], Iterator]:
    # Features do not depend on the head that is being trained: processes can take turns with whole batches.
    def mine(number: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in views.epoch(number, start=distributed.rank(), every=distributed.size()):
            with autocast(device, dtype):
                valid = batch.valid(model.encoder.config.t_patch)
                features = model.features(batch.clips, batch.clip_of_body, len(batch.index), valid)
            labels = batch.labels
            if distributed.size() > 1:
                features, labels = features.cpu(), labels.cpu()
            yield features.float(), labels

    def epoch(number: int) -> Iterator[tuple[Tensor, Tensor]]:
        for features, labels in distributed.in_order(mine(number), len(views)):
            yield features.to(device), labels.to(device)

    return epoch


def _cached(model: LinearProbe, store, ids: Tensor, config, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features ``[views, N, d]`` and labels ``[N]``, on the device."""
    settings = config.probe
    random = settings.augment_views > 0
    clips = batches(
        store,
        ids,
        config,
        train=random,
        batch_size=2 * settings.batch_size,
        seed=settings.seed,
        device=device,
        shuffle=False,
    )
    views = []
    for view in range(max(1, settings.augment_views)):
        title = f"features of view {view + 1}/{settings.augment_views}" if random else "features of training clips"
        features, labels = pooled_features(
            model.encoder, clips, device=device, dtype=config.dtype, title=title, epoch=view
        )
        views.append(features)
    return torch.stack(views).to(device), labels.to(device)


def _shuffled(features: Tensor, labels: Tensor, batch_size: int, seed: int) -> Callable[[int], Iterator]:
    def epoch(number: int) -> Iterator[tuple[Tensor, Tensor]]:
        view = features[number % len(features)]
        generator = torch.Generator().manual_seed(step_seed(seed, number))
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        for chosen in order[: len(order) // batch_size * batch_size].split(batch_size):
            yield view[chosen], labels[chosen]

    return epoch


def _train_head(
    model: LinearProbe,
    epochs: Callable[[int], Iterator],
    steps: int,
    settings: ProbeConfig,
) -> None:
    optimizer = torch.optim.SGD(
        model.linear.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    model.train()
    step = 0
    with Progress("linear probe", settings.epochs * steps, shown=distributed.is_first()) as progress:
        for epoch in range(settings.epochs):
            for features, labels in epochs(epoch):
                set_learning_rate(
                    optimizer,
                    learning_rate(
                        step / steps,
                        lr=settings.lr,
                        min_lr=settings.min_lr,
                        warmup_epochs=settings.warmup_epochs,
                        epochs=settings.epochs,
                    ),
                )
                loss = functional.cross_entropy(model.head(features), labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                step += 1
                progress.advance(len(labels), f"epoch {epoch + 1}/{settings.epochs}")
    if not torch.isfinite(model.linear.weight).all():
        raise SharedError(f"the linear probe diverged at learning rate {settings.lr}: try a smaller lr")
