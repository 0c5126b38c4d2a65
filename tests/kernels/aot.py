"""Compile every launch of :mod:`launches` for one architecture, without a GPU, and print what came out as JSON.

    python tests/kernels/aot.py sm_90
    python tests/kernels/aot.py sm_90 "topology_attention bfloat16 D=32 N=750 V=25"    # those of this name, loops too

A process of its own, as kernels imported for the interpreter cannot be compiled.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parent))

from launches import LAUNCHES, ONCE

from jmm_fast.kernels import config

OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
    torch.uint8: "u8",
}


def specialise(kernel: JITFunction, args: tuple, kwargs: dict):
    """Types, constants and divisibility of a launch's arguments, as Triton derives them when it runs."""
    held = dict(zip(kernel.arg_names, args, strict=False)) | {
        name: value for name, value in kwargs.items() if name in kernel.arg_names
    }
    constants = {
        name for name, parameter in zip(kernel.arg_names, kernel.params, strict=True) if parameter.is_constexpr
    }
    signature, constexprs, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        value = held[name]
        if (
            name in constants
            or value is None
            or (isinstance(value, int) and not isinstance(value, bool) and value == 1)
        ):
            signature[name], constexprs[(position,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i64" if abs(value) >= 2**31 else "i32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return signature, constexprs, attributes


def inspect(cubin: bytes, tool: str, option: str) -> str:
    """What a tool of Triton's wheel says about a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [Path(triton.__file__).parent / "backends/nvidia/bin" / tool, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def usage(cubin: bytes) -> dict:
    """Registers and bytes of spills of a compiled kernel."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", inspect(cubin, "cuobjdump", "-res-usage"))
    return {"registers": int(found[1]), "stack": int(found[2])}


def loop(cubin: bytes) -> dict[str, int]:
    """Instructions of a thread's turn in the loop with most exponentials (the shortest of them), by name."""
    places, instructions, jumps = {}, [], []
    for line in inspect(cubin, "nvdisasm", "-c").splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            places[label[1]] = len(instructions)
        elif code := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\S+)(.*);", line):
            if code[1].startswith("BRA") and (target := re.search(r"`\((\.L_x_\d+)\)", code[2])):
                jumps.append((len(instructions), target[1]))
            instructions.append(code[1])
    turns = [instructions[places[to] : at + 1] for at, to in jumps if places.get(to, at + 1) <= at]
    if not turns:
        return {}
    turn = max(turns, key=lambda turn: (turn.count("MUFU.EX2"), -len(turn)))
    return dict(Counter(name.split(".")[0] if name != "MUFU.EX2" else name for name in turn).most_common())


def main(architecture: str, wanted: str | None = None) -> None:
    launches = LAUNCHES | (ONCE if architecture == config.TARGET else {})
    if wanted is not None:
        launches = {wanted: launches[wanted]}
    config.TARGET = architecture
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    results, seen, launched = [], {}, []

    def record(kernel, *args, grid, warmup, **kwargs):
        launched.append((kernel, args, kwargs))

    JITFunction.run = record
    for name, launch in launches.items():
        launched.clear()
        launch()
        for kernel, args, kwargs in launched:
            signature, constexprs, attributes = specialise(kernel, args, kwargs)
            options = {option: kwargs[option] for option in OPTIONS if option in kwargs}
            key = repr((kernel.__name__, signature, constexprs, attributes, options))
            if key not in seen:
                source = ASTSource(kernel, signature, constexprs=constexprs, attrs=attributes)
                compiled = triton.compile(source, target=target, options=options)
                cubin = compiled.asm["cubin"]
                seen[key] = usage(cubin) | {"shared": compiled.metadata.shared}
                if wanted is not None:
                    numbers = {name: kwargs[name] for name in ("BM", "BN") if name in kwargs}
                    seen[key] |= numbers | {"loop": loop(cubin)}
            results.append({"launch": name, "kernel": kernel.__name__, **options, **seen[key]})
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
