"""Everything a run can be told, as typed dataclasses, and their YAML form.

``RunConfig`` is complete: with the clip store's path it says all that decides the result. A recipe
(:mod:`jmm_fast.recipes`) returns one; the command line changes single fields; ``RUN/config.yaml`` holds what came out.
"""

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from tyro.conf import arg

from jmm_fast.errors import UserError
from jmm_fast.files import atomic_write_text
from jmm_fast.models import ModelConfig
from jmm_fast.reference import num_visible

Variant = Literal["released", "paper", "mamp"]


@dataclass(kw_only=True, slots=True)
class MaskConfig:
    """Which tokens pretraining hides."""

    variant: Variant = "paper"
    """Score of a token: released (difference + similarity as published), paper (gated, correlation) or mamp
    (difference)."""
    mask_ratio: float = 0.9
    """Part of the tokens that is hidden; K = int(L * (1 - mask_ratio)) stay visible."""
    tau: float = 0.8
    """Temperature of the mask probabilities."""
    gate: float | None = None
    """Weight of the difference against the similarity in the paper variant (None: 0.5)."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Which clips are used and how they are cut, turned and batched."""

    split: Annotated[str | None, arg(aliases=("--split",))] = None
    """Name of a stored split, or an expression over columns such as "subject in 0,2,4" (those train, the rest test).
    None: the stored split, where there is exactly one."""
    batch_size: int = 48
    """Clips in a batch, of all processes together; a clip brings all of its bodies."""
    crop: tuple[float, float] = (0.5, 1.0)
    """Range of the part of a clip that a training crop keeps."""
    eval_crop: float = 0.95
    """Part of a clip that the centre crop of evaluation keeps."""
    min_length: int = 64
    """Frames that a training crop keeps at least, where the clip has them."""
    rotation: float = 0.3
    """Largest random rotation about each axis in training, in radians."""
    modality: Literal["joint", "bone", "motion", "bone_motion"] = "joint"
    """What the model sees of a pose."""
    min_confidence: float = 0.0
    """In data with confidences, joints count as seen in frames where theirs is above this. Tokens not seen in all of
    their frames are kept from the encoder in pretraining, are not predicted, and do not enter pooled features."""
    empty_bodies: Literal["skip", "keep"] = "skip"
    """skip: only the bodies that are there; keep: always two a clip, absent ones all zero, as released code does."""


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW and its schedule: linear warm-up per step, then half a cosine from lr to min_lr."""

    lr: float = 1e-3
    """Highest learning rate (absolute, not scaled by the batch)."""
    min_lr: float = 1e-4
    """Learning rate at the end."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's two running means."""
    weight_decay: float = 0.05
    """Decay of matrices and embeddings; none on biases, norms, other one-dimensional parameters and topology tables."""
    layer_decay: float | None = None
    """Learning rate scale per block counted from the head (None: the same rate everywhere)."""
    clip_grad: float | None = None
    """Largest norm of the gradient (None: not clipped)."""
    accumulate: int = 1
    """Parts in which each process computes its share of a batch, one after the other: less memory, the same update."""


@dataclass(kw_only=True, slots=True)
class LossConfig:
    """What pretraining predicts."""

    stride: int = 1
    """Frames between the two poses whose difference is the motion target."""
    normalize: bool = True
    """Normalise the target of each token by its own mean and variance."""


@dataclass(kw_only=True, slots=True)
class ProbeConfig:
    """Linear evaluation: a BatchNorm without weights and a linear layer on the frozen encoder's pooled features."""

    epochs: int = 100
    """Passes over the training clips."""
    warmup_epochs: int = 0
    """Epochs of linear warm-up."""
    batch_size: int = 48
    """Clips in a batch."""
    lr: float = 0.1
    """Highest learning rate of SGD; half a cosine to min_lr."""
    min_lr: float = 0.0
    """Learning rate at the end."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 0.0
    """Weight decay of SGD."""
    features: Literal["cached", "online"] = "online"
    """online: every epoch sees new random crops and rotations through the encoder, as the released protocol does.
    cached: features are extracted once and only the head is trained, many times faster; see augment_views."""
    augment_views: int = 0
    """With cached features: 0 extracts the centre crop of each training clip once; k > 0 extracts k random views,
    and epoch e trains on view e mod k."""
    seed: int = 0
    """Order of the clips, random views and first weights of the head (and of the untrained encoder)."""


@dataclass(kw_only=True, slots=True)
class KnnConfig:
    """Nearest neighbours by cosine similarity of pooled features; test clips by their centre crops."""

    k: int = 1
    """Neighbours that vote; a tie goes to the class with the larger sum of similarities."""
    standardize: bool = False
    """Bring each feature to mean 0 and variance 1 over the training clips first."""
    augment_views: int = 0
    """0 compares with the centre crop of each training clip; k > 0 with k random crops and rotations of each."""
    frames: int = 32
    """Frames that a clip is resampled to for the raw-pose neighbours (--raw)."""
    root: Literal["first", "frame"] = "first"
    """Raw poses are relative to where the hips are in the first frame (first), or in each frame (frame)."""
    seed: int = 0
    """First weights of the untrained encoder."""


@dataclass(kw_only=True, slots=True)
class FinetuneConfig:
    """Supervised training of the whole network from the pretrained encoder."""

    epochs: int = 100
    """Passes over the training clips."""
    warmup_epochs: int = 5
    """Epochs of linear warm-up."""
    batch_size: int = 32
    """Clips in a batch (the published semi-supervised protocol takes 24)."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=5e-4, min_lr=0.0, betas=(0.9, 0.999), layer_decay=0.8)
    )
    drop_path: float = 0.3
    """Chance of skipping the last block's branches; it grows linearly from 0 at the first block."""
    dropout: float = 0.3
    """Dropout of the head."""
    hidden: int = 2048
    """Width of the head."""
    label_smoothing: float = 0.1
    """Part of each target that is spread over all classes."""
    labels: float = 1.0
    """Part of the training labels that is used (semi-supervised: 0.01, 0.1): the subset that the store names for it,
    else one drawn by class and fixed by the seed."""
    eval_every: int = 0
    """Epochs between evaluations on the test clips (0: only after the last epoch)."""
    seed: int = 0
    """Order of the clips, random views, labels used and first weights of what is not pretrained."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """A pretraining run and the protocols that evaluate it."""

    recipe: str = "paper"
    """Name of the recipe that this started from."""
    epochs: int = 400
    """Passes over the training clips."""
    warmup_epochs: int = 20
    """Epochs of linear warm-up."""
    seed: int = 0
    """Seed of first weights, order of clips, crops, rotations and masks."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward pass; weights and optimiser stay float32."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes the GPU when there is one."""
    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"
    """Backend of the ops; see jmm-fast doctor."""
    compile: bool = False
    """Compile mask, forward pass and loss of pretraining by torch.compile."""
    graph: Literal["auto", "on", "off"] = "auto"
    """Capture the steps of pretraining as CUDA graphs, the same weights in less of the host's time. auto: wherever it
    can be, which is on a GPU, with optim.accumulate 1 and without shards."""
    prefetch: int = 2
    """Batches that are made ahead, by a thread (0: none)."""
    log_every: int = 10
    """Steps between lines of metrics."""
    checkpoint_every: int = 500
    """Steps between checkpoints; there is one more at the end of each epoch."""
    keep: int = 2
    """Checkpoints that are kept."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What a step does whose loss or gradient is not finite: end the run, or change no weight and go on. Either way
    its clips are listed in nonfinite.json."""
    nonfinite_limit: int = 10
    """Steps in a row that may be skipped before the run ends."""
    shard: Literal["none", "full"] = "none"
    """full: of several processes each holds a part of weights, gradients and optimiser state (FSDP2), for networks
    that are too large to be held whole. none: each holds all (DistributedDataParallel)."""
    probe_every: int = 0
    """Epochs between evaluations during pretraining, by linear probe (cached features) and nearest neighbours on the
    test clips; their scores go to the metrics (0: none)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    knn: KnnConfig = field(default_factory=KnnConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)


# What may differ between a run and its resumption: none of it changes the weights that a checkpoint can hold.
FREE_ON_RESUME = (
    "device",
    "graph",
    "prefetch",
    "log_every",
    "checkpoint_every",
    "keep",
    "nonfinite",
    "nonfinite_limit",
    "shard",
    "probe_every",
    "probe",
    "knn",
    "finetune",
)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dict of a config dataclass: numbers, strings, lists, None."""
    return _plain(dataclasses.asdict(config))


def from_dict(kind: type, values: dict[str, Any], *, where: str = "config") -> Any:
    """The config of type ``kind`` from its plain form; absent fields take their defaults.

    Raises:
        UserError: an unknown field (with the nearest known one) or a value of another type; names the field.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a mapping of fields, got {values!r}")
    hints = typing.get_type_hints(kind)
    known = [item.name for item in dataclasses.fields(kind)]
    for name in values:
        if name not in known:
            raise UserError(f"{where}: unknown field {name!r}{suggestion(str(name), known)}")
    return kind(**{name: _typed(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def save_config(path: Path, config: RunConfig) -> None:
    """Write the resolved config as YAML, whole or not at all."""
    atomic_write_text(path, yaml.safe_dump(to_dict(config), sort_keys=False))


def load_config(path: Path) -> RunConfig:
    """Read what :func:`save_config` wrote (or a hand-written file).

    Raises:
        UserError: missing or broken file, unknown field, value of another type.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    config = from_dict(RunConfig, values, where=str(path))
    check_config(config)
    return config


def differences(a: Any, b: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Fields in which two plain configs differ, as ``(dotted name, value in a, value in b)``."""
    found = []
    for name in dict.fromkeys([*a, *b]):
        left, right = a.get(name), b.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            found += differences(left, right, f"{prefix}{name}.")
        elif left != right:
            found.append((f"{prefix}{name}", left, right))
    return found


def suggestion(name: str, known: typing.Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known name, or the list of known names."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(known)}"


def check_unchanged(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """UserError naming the first setting in which a resumed run in ``folder`` would differ from what was started."""
    for name, old, new in differences(before, now):
        raise UserError(f"{folder} was started with {name} = {old}, not {new}: a resumed run keeps its settings")


def check_config(config: RunConfig) -> None:
    """Refuse values that no run can have.

    Raises:
        UserError: names the field, its value and what was expected.
    """
    model, mask, data, loss = config.model, config.mask, config.data, config.loss
    fine = config.finetune
    model.check()
    tokens = model.num_tokens
    for name, value in {
        "epochs": config.epochs,
        "log_every": config.log_every,
        "checkpoint_every": config.checkpoint_every,
        "keep": config.keep,
        "nonfinite_limit": config.nonfinite_limit,
        "data.batch_size": data.batch_size,
        "data.min_length": data.min_length,
        "probe.epochs": config.probe.epochs,
        "optim.accumulate": config.optim.accumulate,
        "knn.k": config.knn.k,
        "finetune.epochs": fine.epochs,
        "finetune.hidden": fine.hidden,
    }.items():
        _expect(value >= 1, name, value, "at least 1")
    # Batch normalisation over a single clip has no variance.
    for name, value in {"probe.batch_size": config.probe.batch_size, "finetune.batch_size": fine.batch_size}.items():
        _expect(value >= 2, name, value, "at least 2")
    for name, value in {
        "probe_every": config.probe_every,
        "prefetch": config.prefetch,
        "probe.augment_views": config.probe.augment_views,
        "finetune.eval_every": fine.eval_every,
    }.items():
        _expect(value >= 0, name, value, "0 or more")
    _expect(config.knn.frames >= 2, "knn.frames", config.knn.frames, "at least 2")
    _expect(0 <= config.warmup_epochs <= config.epochs, "warmup_epochs", config.warmup_epochs, f"0..{config.epochs}")
    _expect(0 <= fine.warmup_epochs <= fine.epochs, "finetune.warmup_epochs", fine.warmup_epochs, f"0..{fine.epochs}")
    _expect(
        0 <= config.probe.warmup_epochs <= config.probe.epochs,
        "probe.warmup_epochs",
        config.probe.warmup_epochs,
        f"0..{config.probe.epochs}",
    )
    _expect(0 < mask.mask_ratio < 1, "mask.mask_ratio", mask.mask_ratio, "between 0 and 1")
    _expect(mask.tau > 0, "mask.tau", mask.tau, "above 0")
    _expect(mask.gate is None or 0 <= mask.gate <= 1, "mask.gate", mask.gate, "between 0 and 1")
    _expect(mask.gate is None or mask.variant == "paper", "mask.gate", mask.gate, "None unless mask.variant is paper")
    _expect(
        0 < num_visible(tokens, mask.mask_ratio) < tokens,
        "mask.mask_ratio",
        mask.mask_ratio,
        f"a ratio that leaves some of the {tokens} tokens of a clip visible and hides some",
    )
    _expect(
        0 < data.crop[0] <= data.crop[1] <= 1,
        "data.crop",
        data.crop,
        "two parts of a clip, 0 < smallest <= largest <= 1",
    )
    _expect(0 < data.eval_crop <= 1, "data.eval_crop", data.eval_crop, "above 0 and at most 1")
    _expect(0 <= data.min_confidence < 1, "data.min_confidence", data.min_confidence, "at least 0 and below 1")
    _expect(data.rotation >= 0, "data.rotation", data.rotation, "0 or more radians")
    _expect(1 <= loss.stride < model.num_frames, "loss.stride", loss.stride, f"1..{model.num_frames - 1} frames")
    _expect(0 < fine.labels <= 1, "finetune.labels", fine.labels, "above 0 and at most 1")
    for name, value in {
        "finetune.drop_path": fine.drop_path,
        "finetune.dropout": fine.dropout,
        "finetune.label_smoothing": fine.label_smoothing,
    }.items():
        _expect(0 <= value < 1, name, value, "at least 0 and below 1")
    for name, optim in {"optim": config.optim, "finetune.optim": fine.optim}.items():
        _expect(optim.lr > 0, f"{name}.lr", optim.lr, "above 0")
        _expect(0 <= optim.min_lr <= optim.lr, f"{name}.min_lr", optim.min_lr, f"between 0 and lr ({optim.lr})")
        _expect(all(0 <= b < 1 for b in optim.betas), f"{name}.betas", optim.betas, "two numbers in [0, 1)")
        _expect(optim.weight_decay >= 0, f"{name}.weight_decay", optim.weight_decay, "0 or more")
        _expect(optim.clip_grad is None or optim.clip_grad > 0, f"{name}.clip_grad", optim.clip_grad, "above 0")
        decay = optim.layer_decay
        _expect(decay is None or 0 < decay <= 1, f"{name}.layer_decay", decay, "above 0 and at most 1")
    # The head's batch normalisation is over the whole batch at once.
    _expect(fine.optim.accumulate == 1, "finetune.optim.accumulate", fine.optim.accumulate, "1 (pretraining has it)")
    # The pretraining network is more than the encoder: there is no head to count layers from.
    _expect(config.optim.layer_decay is None, "optim.layer_decay", config.optim.layer_decay, "None (finetuning has it)")


def _expect(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise UserError(f"{name} is {value}: expected {expected}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _typed(hint: Any, value: Any, where: str) -> Any:
    """``value`` from YAML as the annotated type ``hint``, or a :class:`UserError` that names ``where``."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return _typed(typing.get_args(hint)[0], value, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where=where)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and types.NoneType in options:
            return None
        return _typed(next(option for option in options if option is not types.NoneType), value, where)
    if origin is Literal:
        if value in typing.get_args(hint):
            return value
        raise UserError(f"{where} is {value!r}: expected one of {', '.join(map(str, typing.get_args(hint)))}")
    if origin is tuple:
        items = typing.get_args(hint)
        variadic = len(items) == 2 and items[1] is Ellipsis
        if isinstance(value, (list, tuple)) and (variadic or len(value) == len(items)):
            return tuple(_typed(items[0] if variadic else items[i], item, where) for i, item in enumerate(value))
        raise UserError(
            f"{where} is {value!r}: expected a list of {'any number of' if variadic else len(items)} values"
        )
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 1e-3 (without a dot) as text.
        try:
            return float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UserError(f"{where} is {value!r}: expected {hint.__name__}")
