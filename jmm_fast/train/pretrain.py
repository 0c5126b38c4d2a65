"""Masked motion pretraining: the driver behind ``jmm-fast pretrain``."""

import copy
import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from jmm_fast import ops
from jmm_fast import skeleton as layouts
from jmm_fast.data import ClipBatch, ClipStore, Split
from jmm_fast.errors import SharedError, UserError
from jmm_fast.models import JMMTGT, ModelConfig
from jmm_fast.train import distributed, environment, graph, sharding
from jmm_fast.train.config import FREE_ON_RESUME, RunConfig, check_unchanged, load_config, to_dict
from jmm_fast.train.evaluate import batches, check_joints, open_data, record_start
from jmm_fast.train.knn import knn_score
from jmm_fast.train.loop import LoopConfig, fit
from jmm_fast.train.optim import adamw
from jmm_fast.train.probe import linear_score

# All that a run leaves in its folder: what --overwrite removes. config.yaml, which tells a run from any other folder,
# goes last: an interrupted removal can be repeated.
CONTENTS = (
    "environment.json",
    "metrics.jsonl",
    "nonfinite.json",
    "profile",
    "evaluations.jsonl",
    "tensorboard",
    "checkpoints",
    "model",
    "figures",
    "predictions",
    "finetune",
    "report.html",
    "config.yaml",
)


def pretrain(
    config: RunConfig,
    *,
    data: Path,
    out: Path,
    resume: bool = False,
    overwrite: bool = False,
    profile: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Pretrain a model on the training clips of a split.

    Leaves ``config.yaml``, ``environment.json``, ``metrics.jsonl``, ``tensorboard/``, ``checkpoints/`` and ``model/``
    in ``out``. Deterministic on the CPU for a number of threads; a resumed run ends with the weights of one that was
    never interrupted, bit for bit.

    Several processes (:mod:`jmm_fast.train.distributed`) share each batch by clips; order, crops, masks and loss are
    those of a single process, so that loss and weights differ by rounding alone.

    Args:
        config: what to train; joints follow the data where the config leaves them at the default layout.
        data: a clip store.
        out: the run folder.
        resume: continue from the newest checkpoint; everything that decides the weights must be as before.
        overwrite: remove the run that is there.
        profile: write where the time of a few steps goes to ``profile/``.

    Raises:
        UserError: bad data, config or folder; another config or other data than the run that is resumed; another
            process that writes to ``out``; loss or gradient not finite; disk full.
        Stopped: on SIGINT or SIGTERM, with the checkpoint saved.
    """
    data, out = Path(data), Path(out)
    say = distributed.only_first(say)
    if resume and overwrite:
        raise SharedError("--resume and --overwrite exclude each other: continue the run or remove it")
    store, split, config = open_data(data, config, need_test=config.probe_every > 0)
    device = environment.device(config.device)
    config = dataclasses.replace(config, model=_with_layout(config.model, store))
    check_joints(config, store)
    distributed.check_batch("data.batch_size", config.data.batch_size, config.optim.accumulate)
    captured = graph.wanted(config.graph, device, config.optim.accumulate, config.shard)
    if config.compile and config.shard == "full" and distributed.size() > 1:
        # FSDP's hooks, which fetch a block's weights before it computes, cannot be part of a graph.
        raise SharedError("compile is on and shard is full: expected one of them, compile off or shard none")
    check = functools.partial(_check_folder, out, config, resume=resume, overwrite=overwrite)
    distributed.from_first(check)
    with distributed.holding(out):
        # Once more: what held the folder until now may have left a run.
        distributed.from_first(check)
        if overwrite:
            distributed.from_first(lambda: _remove(out))
        _train(config, store, split, device, out, captured=captured, resume=resume, profile=profile, say=say)
    return out


def _train(
    config: RunConfig,
    store: ClipStore,
    split: Split,
    device: torch.device,
    out: Path,
    *,
    captured: bool,
    resume: bool,
    profile: bool,
    say: Callable[[str], None],
) -> None:
    torch.manual_seed(config.seed)
    model = JMMTGT(config.model, backend=config.backend).to(device)
    optimizer = adamw(model, config.optim)
    clips = batches(
        store,
        split.train,
        config,
        train=True,
        batch_size=config.data.batch_size,
        part=(distributed.rank(), distributed.size()),
        seed=config.seed,
        device=device,
        drop_last=len(split.train) > config.data.batch_size,
    )

    def objective(clips, clip_ids, valid, known, epoch) -> tuple[torch.Tensor, torch.Tensor]:
        mask = ops.motion_mask(
            clips,
            mask_ratio=config.mask.mask_ratio,
            tau=config.mask.tau,
            t_patch=config.model.t_patch,
            variant=config.mask.variant,
            gate=config.mask.gate,
            seed=config.seed,
            epoch=epoch,
            clip_ids=clip_ids,
            valid=valid,
            backend=config.backend,
        )
        loss = ops.motion_loss(
            model(clips, mask, masked_only=config.backend != "reference").float(),
            clips,
            mask.mask,
            t_patch=config.model.t_patch,
            stride=config.loss.stride,
            normalize=config.loss.normalize,
            valid=known,
            backend=config.backend,
        )
        return loss, (mask.mask if known is None else mask.mask & known).sum()

    if config.compile:
        objective = torch.compile(objective, fullgraph=True)

    def loss_of(batch: ClipBatch, epoch: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        size, stride = config.model.t_patch, config.loss.stride
        return objective(batch.clips, batch.clip_ids, batch.valid(size), batch.predictable(size, stride), epoch)

    def after_epoch(done: int) -> dict:
        if not config.probe_every or done % config.probe_every:
            return {}
        # The probe freezes what it is given.
        encoder = copy.deepcopy(sharding.whole_model(model).encoder)
        cached = dataclasses.replace(config, probe=dataclasses.replace(config.probe, features="cached"))
        linear = linear_score(encoder, store, split, cached, device)
        return {"linear_top1": linear.top1, "knn_top1": knn_score(encoder, store, split, cached, device).top1}

    record_start(out, config, store, device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(
        f"pretraining {config.recipe} ({config.mask.variant}, topology {config.model.topology}, {parameters:,} "
        f"parameters) on {len(split.train)} clips of {store.path}, {len(clips)} steps an epoch, {config.epochs} epochs"
    )
    fit(
        model,
        optimizer,
        clips,
        loss_of,
        config=LoopConfig.of(config, config, config.optim),
        folder=out,
        device=device,
        title="pretrain",
        fingerprint=store.fingerprint,
        resume=resume,
        profile=profile,
        after_epoch=after_epoch,
        capture=graph.CudaGraphs(device, optimizer, strict=config.graph == "on") if captured else None,
        say=say,
    )
    trained = sharding.whole_model(model)
    distributed.from_first(lambda: trained.save_pretrained(out / "model"))
    say(f"model written to {out / 'model'}")


def _check_folder(out: Path, config: RunConfig, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds something else, a run that nobody said what to do with, or another run's config."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: --out needs a folder")
    held = sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) if out.exists() else []
    if not held:
        return
    if "config.yaml" not in held:
        raise UserError(f"{out} is not empty and holds no run (it has {held[0]}): choose another --out")
    if overwrite:
        return
    if not resume:
        raise UserError(f"{out} already holds a run: --resume continues it, --overwrite removes it")
    before, now = to_dict(load_config(out / "config.yaml")), to_dict(config)
    for name in FREE_ON_RESUME:
        before.pop(name), now.pop(name)
    check_unchanged(out, before, now)


def _remove(out: Path) -> None:
    for name in CONTENTS:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _with_layout(model: ModelConfig, store: ClipStore) -> ModelConfig:
    """``model`` with the joints of the data, unless another layout than the default was asked for."""
    default = ModelConfig()
    if (model.skeleton, model.parents, model.num_joints) != (default.skeleton, default.parents, default.num_joints):
        return model
    skeleton = store.skeleton
    known = skeleton.name in layouts.names() and layouts.get(skeleton.name).parents == skeleton.parents
    return dataclasses.replace(
        model,
        skeleton=skeleton.name,
        parents=None if known else skeleton.parents,
        num_joints=skeleton.num_joints,
    )
