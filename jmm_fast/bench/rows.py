"""The table: what is compared to what, and the bar each comparison must clear."""

from dataclasses import dataclass
from typing import Literal

from jmm_fast.bench.case import Case

CONTENDERS = {
    "cpu": "C++",
    "triton": "Triton",
    "cuda": "CUDA C++",
    "auto": "default backends",
    "reference": "reference",
    "compiled": "torch.compile of the reference",
    "eager": "PyTorch ops in float32",
    "sdpa": "SDPA without bias",
    "sdpa_mask": "SDPA with a learned mask",
    "flex": "FlexAttention",
    "numpy": "numpy + F.interpolate feeder",
    "numpy_lean": "the same, made lean",
    "numpy_16": "numpy + F.interpolate feeder, 16 processes",
}
DIRECTIONS = {"forward": "forward", "forward_backward": "forward+backward", "step": "step"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One comparison.

    Attributes:
        ours, against: the two sides; equal inputs.
        bar: ``against / ours`` must reach this; None for a comparison that is only shown.
        at_most: say the bar the other way round, as ours in units of the other (a bar of 1: "<= 1x its time").
        quantity: ``time``, peak ``memory``, or ``share``: the rate of the products of ``ours`` as a part of that of one
            large product on the GPU, which is what ``bar`` is then; ``against`` is ``ours`` too.
        threads: of both sides; None takes torch's.
        device: kind of device that both sides need.
        isa: instruction set that the bar is meant for; None for any.
    """

    ours: Case
    against: Case
    bar: float | None = None
    at_most: bool = False
    quantity: Literal["time", "memory", "share"] = "time"
    threads: int | None = None
    device: str = "cpu"
    isa: str | None = None

    @property
    def what(self) -> str:
        parts = [self.ours.shape, self.ours.dtype]
        if self.ours.direction != "step":
            parts.append(DIRECTIONS[self.ours.direction])
        if self.threads is not None:
            parts.append(f"{self.threads} thread" + "s" * (self.threads > 1))
        if self.quantity == "memory":
            parts.append("peak memory")
        return ", ".join(parts)

    @property
    def versus(self) -> str:
        if self.quantity == "share":
            return "limit of the matrix units"
        if self.against.contender == self.ours.contender:
            return f"ours in {self.against.dtype}"
        same = self.against.dtype == self.ours.dtype
        return CONTENDERS[self.against.contender] + ("" if same else f" in {self.against.dtype}")

    @property
    def bar_text(self) -> str:
        if self.bar is None:
            return ""
        if self.quantity == "share":
            return f">= {100 * self.bar:.0f} % of it"
        noun = "time" if self.quantity == "time" else "memory"
        if self.at_most:
            return f"<= {_number(1 / self.bar)}x its {noun}"
        return f">= {_number(self.bar)}x " + ("faster" if self.quantity == "time" else "less memory")

    def measured_text(self, ratio: float) -> str:
        """``against / ours``, or the share, in the words of the bar."""
        if self.quantity == "share":
            return f"{100 * ratio:.0f} % of it"
        if self.at_most:
            return f"{1 / ratio:.2f}x its time"
        if self.quantity == "memory":
            return f"{ratio:.2f}x less"
        return f"{ratio:.1f}x faster" if ratio >= 10 else f"{ratio:.2f}x faster"

    def holds(self, ratio: float) -> bool | None:
        """Whether the bar is cleared; None without one."""
        return None if self.bar is None else ratio >= self.bar


def _number(value: float) -> str:
    return f"{value:.3g}" if value != int(value) else str(int(value))


def _attention() -> list[Row]:
    def case(shape, contender, direction, dtype="float32"):
        return Case("topology_attention", shape, dtype, direction, contender)

    def row(shape, peer, direction, dtype="float32", **bar):
        return Row(ours=case(shape, "cpu", direction, dtype), against=case(shape, peer, direction, dtype), **bar)

    rows = [
        row("decoder", "sdpa", "forward", bar=1.0, at_most=True),
        row("decoder", "sdpa", "forward_backward", bar=1.0, at_most=True),
        row("decoder", "sdpa_mask", "forward_backward", bar=3.0),
        row("decoder", "reference", "forward", bar=6.0),
        row("decoder", "reference", "forward_backward", bar=3.5),
    ]
    for direction in ("forward", "forward_backward"):
        rows.append(
            Row(
                ours=case("decoder", "cpu", direction, "bfloat16"),
                against=case("decoder", "cpu", direction, "float32"),
                bar=1.8,
                isa="avx512bf16",
            )
        )
    rows += [
        row("decoder", "sdpa_mask", "forward"),
        row("decoder", "flex", "forward"),
        row("decoder", "sdpa", "forward", "bfloat16", at_most=True),
        row("decoder", "sdpa", "forward_backward", "bfloat16", at_most=True),
        row("decoder", "flex", "forward", "bfloat16"),
    ]
    for shape in ("encoder", "decoder_d16", "decoder_d64"):
        for direction in ("forward", "forward_backward"):
            rows.append(row(shape, "sdpa", direction, at_most=True))
            if shape == "encoder":
                rows.append(row(shape, "sdpa_mask", direction))
                rows.append(row(shape, "reference", direction))
    rows.append(row("encoder", "flex", "forward"))
    return rows


def _gpu_attention() -> list[Row]:
    # The bars are for what `auto` takes; the two kernels that it chooses from are compared where both run.
    bars = {"flex": 1.5, "sdpa": 1 / 1.15, "sdpa_mask": 4.0, "reference": 15.0}
    directions = ("forward", "forward_backward")

    def row(shape, direction, ours, peer):
        bar, at_most = bars.get(peer), peer == "sdpa"
        return _pair(
            *("topology_attention", shape, "bfloat16", direction, ours, peer), bar=bar, at_most=at_most, device="cuda"
        )

    rows = [
        row(shape, direction, "auto", peer)
        for shape in ("gpu_decoder", "gpu_encoder")
        for direction in directions
        for peer in bars
    ]
    return rows + [row("gpu_encoder", direction, "cuda", "triton") for direction in directions]


def _pair(op, shape, dtype, direction, ours, against, **bar) -> Row:
    return Row(ours=Case(op, shape, dtype, direction, ours), against=Case(op, shape, dtype, direction, against), **bar)


def _step(shape: str, dtype: str, against: str, peer: str = "reference", **bar) -> Row:
    return Row(
        ours=Case("step", shape, dtype, "step", "auto"), against=Case("step", shape, against, "step", peer), **bar
    )


ROWS: tuple[Row, ...] = (
    *_attention(),
    *_gpu_attention(),
    _pair("motion_mask", "b96", "float32", "forward", "cpu", "reference", bar=10.0),
    _pair("motion_mask", "b96", "float32", "forward", "cpu", "eager"),
    _pair("motion_mask", "b96_paper", "float32", "forward", "cpu", "reference"),
    _pair("motion_mask", "b8", "float32", "forward", "cpu", "reference"),
    _pair("motion_mask", "gpu_b1024", "float32", "forward", "cuda", "reference", bar=15.0, device="cuda"),
    _pair("motion_mask", "gpu_b1024", "float32", "forward", "cuda", "eager", device="cuda"),
    _pair("clip_window", "ntu48", "float32", "forward", "cpu", "numpy", bar=30.0, threads=1),
    _pair("clip_window", "ntu48", "float32", "forward", "cpu", "numpy_lean", threads=1),
    _pair("clip_window", "ntu48", "float32", "forward", "cpu", "reference"),
    _pair("clip_window", "gpu_ntu512", "float32", "forward", "triton", "reference", device="cuda"),
    _pair("motion_loss", "full", "float32", "forward_backward", "cpu", "reference", bar=5.0),
    _pair("motion_loss", "masked", "float32", "forward_backward", "cpu", "reference"),
    _pair("motion_loss", "full", "bfloat16", "forward_backward", "cpu", "reference"),
    _pair("motion_loss", "full", "float32", "forward", "cpu", "reference"),
    _pair("motion_loss", "gpu_masked", "bfloat16", "forward_backward", "triton", "reference", device="cuda"),
    _pair("token_grid", "gather", "float32", "forward", "cpu", "reference"),
    _pair("token_grid", "scatter", "float32", "forward_backward", "cpu", "reference"),
    _pair("token_grid", "gpu_scatter", "bfloat16", "forward_backward", "triton", "reference", device="cuda"),
    _pair("block", "decoder", "float32", "forward_backward", "auto", "reference"),
    _pair("block", "decoder", "bfloat16", "forward_backward", "auto", "reference"),
    _pair("block", "encoder", "float32", "forward_backward", "auto", "reference"),
    *(
        _pair("block", shape, "bfloat16", direction, "auto", peer, device="cuda")
        for shape in ("gpu_decoder", "gpu_encoder")
        for direction in ("forward", "forward_backward")
        for peer in ("reference", "compiled")
    ),
    _pair("feeder", "ntu48", "float32", "forward", "auto", "numpy", threads=1),
    _pair("feeder", "ntu48", "float32", "forward", "auto", "numpy_lean", threads=1),
    _pair("feeder", "ntu48", "float32", "forward", "auto", "reference"),
    _pair("feeder", "gpu_ntu48", "float32", "forward", "auto", "numpy_16", device="cuda"),
    _pair("feeder", "gpu_ntu48", "float32", "forward", "auto", "reference", device="cuda"),
    _step("released", "float32", "float32", bar=2.2),
    _step("released", "bfloat16", "float32", bar=4.0, isa="avx512bf16"),
    _step("released", "float32", "float32", bar=3.0, quantity="memory"),
    _step("released", "bfloat16", "float32", bar=3.0, quantity="memory"),
    _step("released", "float32", "float32", "compiled"),
    _step("released", "bfloat16", "bfloat16", isa="avx512bf16"),
    _step("released", "bfloat16", "bfloat16", "compiled", isa="avx512bf16"),
    _step("small", "float32", "float32"),
    _step("small", "bfloat16", "float32"),
    _step("gpu_released", "bfloat16", "bfloat16", bar=8.0, device="cuda"),
    _pair("step", "gpu_released", "bfloat16", "step", "auto", "auto", bar=0.4, quantity="share", device="cuda"),
    _step("gpu_released", "bfloat16", "bfloat16", "compiled", device="cuda"),
    _step("gpu_released", "float32", "float32", device="cuda"),
    _step("gpu_released", "float32", "float32", "compiled", device="cuda"),
)
"""Comparisons with a bar are what the project promises; the others tell where the op stands elsewhere.

The reference path in float32 is what the authors' code computes, so it is the other side of both dtypes of the step.
"""
