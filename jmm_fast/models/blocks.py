"""Transformer blocks whose attention takes a joint-pair table."""

import torch
from torch import Tensor, nn

from jmm_fast import ops
from jmm_fast.models.config import ModelConfig
from jmm_fast.models.topology import make_table


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., ECCV 2016): drop a residual branch for a whole body, scale the kept ones.

    ``share = (first, all)``: the input is the bodies from ``first`` on of a batch of ``all``, for which is drawn.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.share: tuple[int, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        factor = self.factor(x)
        return x if factor is None else x * factor[:, None, None]

    def factor(self, x: Tensor) -> Tensor | None:
        """Of each body of ``x``, in its dtype: 0, or what makes up for the dropped ones; None where none is dropped."""
        if self.rate == 0.0 or not self.training:
            return None
        keep = 1 - self.rate
        first, bodies = self.share or (0, x.shape[0])
        kept = torch.empty(bodies, device=x.device, dtype=x.dtype).bernoulli_(keep).div_(keep)
        return kept[first : first + x.shape[0]]


class Attention(nn.Module):
    """Multi-head self-attention over tokens: ``proj(topology_attention(qkv(x)))``."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool, mode: str, backend: str):
        super().__init__()
        self.heads, self.mode, self.backend = heads, mode, backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, table: Tensor | None, joints: Tensor | None) -> Tensor:
        bodies, length, dim = x.shape
        q, k, v = self.qkv(x).view(bodies, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        out = ops.topology_attention(q, k, v, table, joints, mode=self.mode, backend=self.backend)
        return self.proj(out.transpose(1, 2).reshape(bodies, length, dim))


class Mlp(nn.Module):
    """``fc2(GELU(fc1(x)))``, exact GELU."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm block: ``x += attn(LN x)``, ``x += mlp(LN x)``."""

    def __init__(
        self, dim: int, heads: int, mlp_ratio: float, qkv_bias: bool, mode: str, drop_path: float, backend: str
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, qkv_bias, mode, backend)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Tensor | ops.Stream, table: Tensor | None, joints: Tensor | None, keep: Tensor | None = None
    ) -> Tensor | ops.Stream:
        """``[B,N,d]`` -> ``[B,N,d]``, or ``[B,M,d]``: the tokens ``keep [B,M]`` alone (each at most once)."""
        attn, mlp = self.attn, self.mlp
        shared = {"heads": attn.heads, "multiply": attn.mode == "scale", "keep": keep}
        if isinstance(x, ops.Stream):
            shared["backend"] = attn.backend
            x = ops.attention_half(x, self.norm1, attn.qkv, attn.proj, table, joints, **shared)
            x = x._replace(factor=self.drop_path.factor(x.x))
            x = ops.mlp_half(x, self.norm2, mlp.fc1, mlp.fc2)
            return x._replace(factor=self.drop_path.factor(x.x))
        kind = ops.block_backend(x, attn.backend, x.shape[2] // attn.heads, table)
        if kind == "triton":
            return self(ops.Stream(x), table, joints, keep).settle()
        if kind == "cpu":
            if self.drop_path.rate == 0 or not self.training:
                x = ops.attention_half(x, self.norm1, attn.qkv, attn.proj, table, joints, **shared)
                return ops.mlp_half(x, self.norm2, mlp.fc1, mlp.fc2)
            branch = ops.attention_half(x, self.norm1, attn.qkv, attn.proj, table, joints, **shared, add=False)
            x = (x if keep is None else take(x, keep)) + self.drop_path(branch)
            return x + self.drop_path(ops.mlp_half(x, self.norm2, mlp.fc1, mlp.fc2, add=False))
        branch = attn(self.norm1(x), table, joints)
        if keep is not None:
            x, branch = take(x, keep), take(branch, keep)
        x = x + self.drop_path(branch)
        return x + self.drop_path(mlp(self.norm2(x)))


def take(x: Tensor, tokens: Tensor) -> Tensor:
    """The rows ``tokens [B,M]`` of ``x [B,N,d]``: ``[B,M,d]``."""
    return x.gather(1, tokens[..., None].expand(-1, -1, x.shape[2]))


class Stack(nn.Module):
    """Blocks that share one topology table, and the LayerNorm that ends them.

    ``drop_path`` grows linearly from 0 at the first block to its full rate at the last.
    """

    def __init__(self, config: ModelConfig, dim: int, depth: int, heads: int, drop_path: float, backend: str):
        super().__init__()
        self.backend, self.head_dim = backend, dim // heads
        self.topology = make_table(config, heads)
        rates = torch.linspace(0, drop_path, depth).tolist()
        self.blocks = nn.ModuleList(
            Block(dim, heads, config.mlp_ratio, config.qkv_bias, config.topology_mode, rate, backend) for rate in rates
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, joints: Tensor, keep: Tensor | None = None, head: nn.Linear | None = None) -> Tensor:
        """Tokens ``[B,N,d]`` with their joints ``[N]`` or ``[B,N]`` -> ``[B,N,d]``.

        Args:
            keep: int64 ``[B,M]``: only these tokens of each body are wanted, each at most once.
            head: applied after the last LayerNorm.
        """
        table = None if self.topology is None else self.topology()
        joints = None if table is None else joints
        kind = ops.block_backend(x, self.backend, self.head_dim, table)
        if kind == "triton":
            x = ops.Stream(x)
        for block in self.blocks[:-1]:
            x = block(x, table, joints)
        x = self.blocks[-1](x, table, joints, keep)
        if kind == "triton" or (kind == "cpu" and head is not None):
            return ops.norm_linear(x, self.norm, head)
        return self.norm(x) if head is None else head(self.norm(x))


def init_weights(module: nn.Module) -> None:
    """Linear: Xavier-uniform, zero bias. LayerNorm keeps (1, 0). For ``module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def embedding(*shape: int) -> nn.Parameter:
    """A learned embedding, truncated normal with standard deviation 0.02."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=0.02))
