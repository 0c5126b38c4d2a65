"""Between our parameter names and those of the authors' JMM-TGT code, which MAMP's code shares.

Theirs: blocks ``blocks.i``/``decoder_blocks.i``, a Conv2d patch embedding ``[d, C, u, 1]``,
embeddings with leading ones.
Ours: ``encoder.stack.blocks.i``/``decoder.stack.blocks.i``, a Linear ``[d, u*C]`` in (frame, coordinate) order.
"""

import re

from torch import Tensor

from jmm_fast.errors import UserError
from jmm_fast.models.config import ModelConfig

_RENAME = {
    "norm.weight": "encoder.stack.norm.weight",
    "norm.bias": "encoder.stack.norm.bias",
    "joints_embed.proj.bias": "encoder.patch.bias",
    "decoder_embed.weight": "decoder.embed.weight",
    "decoder_embed.bias": "decoder.embed.bias",
    "decoder_norm.weight": "decoder.stack.norm.weight",
    "decoder_norm.bias": "decoder.stack.norm.bias",
    "decoder_pred.weight": "decoder.head.weight",
    "decoder_pred.bias": "decoder.head.bias",
}
_HEADS = {
    "head.fc.0.running_mean": "norm.running_mean",
    "head.fc.0.running_var": "norm.running_var",
    "head.fc.0.num_batches_tracked": "norm.num_batches_tracked",
    "head.fc.1.weight": "linear.weight",
    "head.fc.1.bias": "linear.bias",
    "head.bn.weight": "norm.weight",
    "head.bn.bias": "norm.bias",
    "head.bn.running_mean": "norm.running_mean",
    "head.bn.running_var": "norm.running_var",
    "head.bn.num_batches_tracked": "norm.num_batches_tracked",
    "head.fc1.weight": "fc1.weight",
    "head.fc1.bias": "fc1.bias",
    "head.fc2.weight": "fc2.weight",
    "head.fc2.bias": "fc2.bias",
}
_SHAPED = {
    "temp_embed": "encoder.time",
    "pos_embed": "encoder.joint",
    "decoder_temp_embed": "decoder.time",
    "decoder_pos_embed": "decoder.joint",
    "mask_token": "decoder.mask_token",
}
_PATCH = "joints_embed.proj.weight"


def is_authors(state: dict[str, Tensor]) -> bool:
    """Whether these are the authors' (or MAMP's) parameter names."""
    return _PATCH in state


def from_authors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' parameters (or gradients) under our names and shapes.

    Raises:
        UserError: a name that neither code base knows.
    """
    ours = {}
    for name, value in state.items():
        name = name.removeprefix("module.")
        block = re.fullmatch(r"(decoder_)?blocks\.(\d+\..+)", name)
        if block:
            ours[f"{'decoder' if block[1] else 'encoder'}.stack.blocks.{block[2]}"] = value
        elif name == _PATCH:
            ours["encoder.patch.weight"] = value.squeeze(-1).transpose(1, 2).flatten(1)
        elif name in _SHAPED:
            ours[_SHAPED[name]] = value.reshape(-1, value.shape[-1])
        elif name in _RENAME or name in _HEADS:
            ours[_RENAME.get(name) or _HEADS[name]] = value
        else:
            raise UserError(f"parameter {name} is not one of the released JMM-TGT or MAMP models")
    return ours


def to_authors(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our parameters under the authors' names and shapes; the inverse of ``from_authors``.

    Raises:
        UserError: the model has a topology table, for which the authors' code has no place.
    """
    linear = "linear.weight" in state
    heads = {ours: name for name, ours in _HEADS.items() if name.startswith("head.fc.") == linear}
    rename = {ours: name for name, ours in _RENAME.items()} | heads
    shaped = {ours: name for name, ours in _SHAPED.items()}
    theirs = {}
    for name, value in state.items():
        block = re.fullmatch(r"(encoder|decoder)\.stack\.blocks\.(\d+\..+)", name)
        if block:
            theirs[f"{'decoder_' if block[1] == 'decoder' else ''}blocks.{block[2]}"] = value
        elif name == "encoder.patch.weight":
            theirs[_PATCH] = value.unflatten(1, (config.t_patch, config.channels)).transpose(1, 2)[..., None]
        elif name == "decoder.mask_token":
            theirs["mask_token"] = value[None]
        elif name in shaped:
            theirs[shaped[name]] = value[None, :, None] if name.endswith("time") else value[None, None]
        elif name in rename:
            theirs[rename[name]] = value
        else:
            raise UserError(f"parameter {name} has no place in the authors' format (topology tables are ours alone)")
    return theirs


def infer_config(state: dict[str, Tensor], heads: int | None) -> ModelConfig:
    """Sizes of an authors' checkpoint, read off its shapes; heads are not stored there (None: 8, the released)."""
    dim, channels, t_patch, _ = state[_PATCH].shape
    steps, joints = state["temp_embed"].shape[1], state["pos_embed"].shape[2]

    def depth(prefix: str) -> int:
        return len({name.split(".")[1] for name in state if name.startswith(prefix)})

    heads = 8 if heads is None else heads
    has_decoder = "decoder_embed.weight" in state
    return ModelConfig(
        skeleton="ntu25" if joints == 25 else "custom",
        num_joints=joints,
        num_frames=steps * t_patch,
        t_patch=t_patch,
        channels=channels,
        dim=dim,
        depth=depth("blocks."),
        heads=heads,
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        decoder_dim=state["decoder_embed.weight"].shape[0] if has_decoder else dim,
        decoder_depth=depth("decoder_blocks."),
        decoder_heads=heads,
    )
