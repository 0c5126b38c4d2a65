"""Nearest neighbours on features or on raw poses: the driver behind ``jmm-fast knn``."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from jmm_fast import ops
from jmm_fast.data import ClipStore, Split
from jmm_fast.data.batches import to_modality
from jmm_fast.models import Encoder
from jmm_fast.skeleton import Skeleton
from jmm_fast.train import distributed, environment
from jmm_fast.train.config import RunConfig
from jmm_fast.train.evaluate import (
    EncoderKind,
    Score,
    Source,
    batches,
    check_joints,
    open_data,
    pooled_features,
    record,
    score,
    summary,
)


def knn(
    source: Source,
    *,
    data: Path,
    encoder: EncoderKind = "pretrained",
    raw: bool = False,
    say: Callable[[str], None] = print,
) -> dict:
    """Classify each test clip by its nearest training clips.

    Features: cosine similarity of the encoder's pooled features, of centre crops or, for the training clips, of
    ``knn.augment_views`` random crops each. ``raw``: Euclidean distance of whole clips resampled to ``knn.frames``
    frames, relative to the hips and turned so that these face one way, as ``data.modality`` shows them; no network is
    involved. Deterministic.

    Args:
        source: from :func:`jmm_fast.train.evaluate.open_source`; settings: ``source.config.knn``.
        data: a clip store.
        encoder: the pretrained one, or the same architecture with random first weights.

    Returns:
        The line written to ``evaluations.jsonl``.
    """
    began = time.monotonic()
    say = distributed.only_first(say)
    store, split, config = open_data(data, source.config, need_test=True)
    settings = config.knn
    if raw:
        train, test = (
            raw_poses(store, ids, settings.frames, settings.root, config.data.modality)
            for ids in (split.train, split.test)
        )
        result = _neighbour_score(lambda rows: -torch.cdist(rows, train), train, test, store, split, settings.k)
    else:
        check_joints(config, store)
        backbone = distributed.together(lambda: source.encoder(encoder, seed=settings.seed))
        result = knn_score(backbone, store, split, config, environment.device(config.device))
    line = record(
        source.folder,
        store,
        split,
        result,
        name=f"knn-{'raw' if raw else encoder}",
        protocol="knn",
        encoder="raw" if raw else encoder,
        modality=config.data.modality,
        k=settings.k,
        **(
            {"frames": settings.frames, "root": settings.root}
            if raw
            else {"standardize": settings.standardize, "augment_views": settings.augment_views}
        ),
        train_clips=len(split.train),
        seed=settings.seed,
        seconds=round(time.monotonic() - began, 1),
    )
    say(summary(line))
    return line


def knn_score(encoder: Encoder, store: ClipStore, split: Split, config: RunConfig, device: torch.device) -> Score:
    """Score of the nearest neighbours among the features of ``encoder``; settings: ``config.knn``."""
    settings = config.knn

    def features(ids: Tensor, title: str, view: int | None) -> Tensor:
        clips = batches(
            store,
            ids,
            config,
            train=view is not None,
            batch_size=config.data.batch_size,
            seed=settings.seed,
            device=device,
            shuffle=False,
        )
        return pooled_features(encoder, clips, device=device, dtype=config.dtype, title=title, epoch=view or 0)[0]

    views = range(settings.augment_views) if settings.augment_views else (None,)
    train = torch.cat([features(split.train, "features of training clips", view) for view in views])
    test = features(split.test, "features of test clips", None)
    if settings.standardize:
        mean, deviation = train.mean(0), train.std(0).clamp(min=1e-6)
        train, test = (train - mean) / deviation, (test - mean) / deviation
    train, test = functional.normalize(train, dim=1), functional.normalize(test, dim=1)
    return _neighbour_score(lambda rows: rows @ train.T, train, test, store, split, settings.k)


def _neighbour_score(
    similarity: Callable[[Tensor], Tensor], train: Tensor, test: Tensor, store: ClipStore, split: Split, k: int
) -> Score:
    labels = store.labels[split.train].repeat(len(train) // len(split.train))
    parts = test.split(1024)
    ranked = (
        neighbour_ranking(similarity(rows), labels, k, store.num_classes)
        for rows in parts[distributed.rank() :: distributed.size()]
    )
    ranking = torch.cat(list(distributed.in_order(ranked, len(parts))))
    return score(ranking, store.labels[split.test], store.num_classes)


def neighbour_ranking(similarity: Tensor, labels: Tensor, k: int, num_classes: int) -> Tensor:
    """Best five classes of each clip.

    First the class with most votes among the ``k`` nearest (a tie goes to the larger sum of similarities), then the
    other classes by their nearest clip.

    Args:
        similarity: ``[n, N]`` to the training clips, larger is nearer.
        labels: int64 ``[N]``, classes of the training clips.

    Returns:
        int64 ``[n, min(5, classes)]``.
    """
    near = similarity.topk(min(k, similarity.shape[1]), dim=1)
    voters = labels[near.indices]
    shape = (len(similarity), num_classes)
    votes = torch.zeros(shape).scatter_add_(1, voters, torch.ones_like(near.values))
    total = torch.zeros(shape, dtype=similarity.dtype).scatter_add_(1, voters, near.values)
    leading = votes == votes.amax(1, keepdim=True)
    first = total.masked_fill(~leading, -torch.inf).argmax(1)
    best = torch.full(shape, -torch.inf, dtype=similarity.dtype)
    best.scatter_reduce_(1, labels.expand(len(similarity), -1), similarity, "amax")
    best.scatter_(1, first[:, None], torch.inf)
    return best.topk(min(5, num_classes), dim=1).indices


def raw_poses(store: ClipStore, ids: Tensor, frames: int, root: str = "first", modality: str = "joint") -> Tensor:
    """Whole clips as plain vectors.

    Each body is resampled to ``frames`` frames. The joint that the first body's hips hang from, where it is in the
    first frame or in each, is subtracted, and everything is turned about the vertical (y) axis so that the first body's
    hip line points along x in the first frame.

    Args:
        ids: int64, clips.
        frames: of each body.
        root: ``first`` or ``frame``: whose position becomes the origin.
        modality: what is compared, see :class:`jmm_fast.data.BodyBatches`.

    Returns:
        float32 ``[len(ids), bodies * frames * V * 3]``; absent bodies are zero.
    """
    first, count = store.clip_bodies[ids].unbind(1)
    rows = []
    for body in range(store.max_bodies):
        present = count > body
        index = torch.where(present, first + body, first)
        start = store.body_offsets[index]
        length = torch.where(present, store.body_offsets[index + 1] - start, 0)
        rows.append(ops.clip_window(store.frames, start, length, window=frames))
    bodies = torch.stack(rows, 1)
    seen = bodies.abs().amax((3, 4), keepdim=True) > 0
    left, right = hips(store.skeleton)
    origin = bodies[:, :1, :, max(store.skeleton.parents[left], 0), None]
    across = bodies[:, 0, 0, left] - bodies[:, 0, 0, right]
    bodies = (bodies - (origin[:, :, :1] if root == "first" else origin)) * seen
    angle = torch.atan2(across[:, 2], across[:, 0])
    cos, sin = (function(angle)[:, None, None, None] for function in (torch.cos, torch.sin))
    x, y, z = bodies.unbind(-1)
    turned = torch.stack([cos * x + sin * z, y, cos * z - sin * x], -1)
    return to_modality(turned, modality, torch.as_tensor(store.skeleton.bone_parents())).flatten(1)


def hips(skeleton: Skeleton) -> tuple[int, int]:
    """Left and right hip: the pair named ``hip``, ``upleg`` or ``thigh``, else the one nearest the root."""
    pairs = skeleton.pairs or ((skeleton.root, skeleton.root),)
    for word in ("hip", "upleg", "thigh"):
        for pair in pairs:
            if word in skeleton.joint_names[pair[0]].lower():
                return pair
    hops = skeleton.hops()[skeleton.root]
    return min(pairs, key=lambda pair: hops[pair[0]])
