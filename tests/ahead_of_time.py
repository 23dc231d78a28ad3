"""What Triton's compiler makes of the kernels, without a GPU: `python ahead_of_time.py` prints a line of JSON a kernel.
With `all` of every kernel for every target, else for most of them of a few.

What is compiled is what `TritonExperts` launches, up to the launch. A process of its own, because one that has imported
triton under TRITON_INTERPRET compiles nothing. Registers, stack and machine code are ptxas' own, of triton's wheel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from lowbit_records import silu_gate
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from buddymoe_ray.kernels import (
    ExpertMath,
    LowbitFormat,
    RowTerms,
    TritonExperts,
    coded_shapes,
    combine_on_device,
    decode_attention,
    record_tensors,
    resolve_on_device,
)
from buddymoe_ray.kernels.triton import launching
from buddymoe_ray.kernels.triton.forms import Form, Use
from buddymoe_ray.kernels.triton.products import packed
from buddymoe_ray.models.expert_layout import slot_tensors
from buddymoe_ray.types import CodedMatrix, CodeFormat

D, F, K, E = 2048, 768, 8, 128  # Qwen3-30B-A3B's
SHAPES = {"gate_up_proj": (2 * F, D), "down_proj": (D, F)}
MATH = ExpertMath(activate=silu_gate)
PLAIN = ("bfloat16", "float32")
CODED = [
    CodeFormat(codes="fp8", block=(128, 128), scale="float32"),
    CodeFormat(codes="int8", block=(1, 0), scale="bfloat16"),
    CodeFormat(codes="int4", block=(1, 128), scale="bfloat16", zeros=True),
    CodeFormat(codes="mxfp4", block=(1, 32), scale="e8m0"),
    CodeFormat(codes="nvfp4", block=(1, 16), scale="float8_e4m3fn", global_scale="*"),
    CodeFormat(codes="gptq", block=(1, 128), scale="float16", zeros=True),
    CodeFormat(codes="awq", block=(1, 128), scale="float16", zeros=True),
]
ELSEWHERE = {80: ("4 bit", "2 bit", "fp8/128x128"), 100: ("bfloat16", "mxfp4"), 120: ("4 bit", "mxfp4", "nvfp4")}
"""What is compiled for others than 90, which has all: .5 s each."""
EVERYTHING = sys.argv[1:] == ["all"]
READ = ("first", "down", "attend", "misplaced")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class NoGpu:
    """As much of a driver as the compiler asks for."""

    def __init__(self, capability: int) -> None:
        self.get_current_target = lambda: GPUTarget("cuda", capability, 32)
        self.get_current_device = lambda: capability  # each has compiled kernels of its own
        self.get_current_stream = lambda _: 0
        self.get_active_torch_device = lambda: torch.device("cpu")


@triton.jit
def misplaced(x, records, out, FORM: tl.constexpr):
    """The negative case: a record whose begin the compiler knows nothing of."""
    record = (records.to(tl.int64) + tl.load(out + FORM.N).to(tl.int64)).to(tl.pointer_type(tl.uint8))
    y = packed(record + FORM.codes, record + FORM.scales, tl.program_id(0) + tl.arange(0, 1), x, FORM)
    tl.store(out + tl.arange(0, 16), tl.reshape(y, [16]))


def layers() -> Iterator[tuple[str, TritonExperts]]:
    for bits in (8, 4, 3, 2, 1):
        fmt = LowbitFormat(bits=bits)
        yield f"{bits} bit", TritonExperts(layout=record_tensors(SHAPES, fmt)[0], fmt=fmt, math=MATH)
    for dtype in PLAIN:
        layout = slot_tensors(SHAPES, dict.fromkeys(SHAPES, dtype))
        yield dtype, TritonExperts(layout=layout, fmt=None, math=MATH)
    turned = {name: shape[::-1] for name, shape in SHAPES.items()}
    layout = slot_tensors(turned, dict.fromkeys(turned, "bfloat16"))
    yield "transposed", TritonExperts(layout=layout, fmt=None, math=replace(MATH, transposed=True))
    for fmt in CODED:
        coded = [
            CodedMatrix(name=name, format=fmt, parts=parts, N=SHAPES[name][0], K=SHAPES[name][1])
            for name, parts in (("gate_up_proj", 2), ("down_proj", 1))
        ]
        sized = {f"{m.name}.{part}": found for m in coded for part, found in coded_shapes(m).items()}
        layout = slot_tensors({n: s for n, (s, _) in sized.items()}, {n: dtype for n, (_, dtype) in sized.items()})
        yield str(fmt), TritonExperts(layout=layout, fmt=None, math=MATH, coded=coded)


@cache
def figures(compiled: Any, *, read: bool) -> dict[str, Any]:
    """Registers, bytes of stack, widths of the loads of weights, copies of 16 bytes to shared memory and the bytes of
    that, instructions for which the smallest numbers are zeros, barriers inside loops of the PTX and in all. Machine
    code is `read` where a figure is asked that only it has: .2 s each."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [CUOBJDUMP, "-res-usage", *["-sass"] * read, cubin.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    weights = [line for line in code.splitlines() if "LDG" in line and ".EF" in line]  # evict_first marks them
    return {
        "registers": int(re.findall(r"REG:(\d+)", code)[0]),
        "stack": int(re.findall(r"STACK:(\d+)", code)[0]) + len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "narrow": sum(".128" not in line for line in weights),
        "wide": sum(".128" in line for line in weights),
        "barriers_in_loops": barriers_in_loops(compiled.asm["ptx"]),
        "copied": len(re.findall(r"LDGSTS\S*\.128", code)),
        "shared": compiled.metadata.shared,
        "flushed": compiled.asm["ptx"].count(".ftz"),
        "barriers": len(re.findall(r"\bBAR\b", code)),
    }


def barriers_in_loops(ptx: str) -> int:
    """PTX, not machine code: ptxas unrolls constant trips away."""
    lines = ptx.splitlines()
    begins = {found[1]: at for at, line in enumerate(lines) if (found := re.match(r"\s*(\$L__BB\S+):", line))}
    loops = [
        (begins[found[1]], at)
        for at, line in enumerate(lines)
        if (found := re.search(r"\bbra(?:\.uni)?\s+(\$L__BB\w+)", line)) and begins.get(found[1], at) < at
    ]
    barriers = [at for at, line in enumerate(lines) if "bar.sync" in line or "barrier.sync" in line]
    return sum(any(begin <= at <= end for begin, end in loops) for at in barriers)


def main() -> None:
    compiled: list[Any] = []
    options = launching.OPTIONS
    launching.launch = lambda kernel, grid, *args: compiled.append(kernel.warmup(*args, grid=grid, **options))
    x_TD, expert_TK = torch.empty(1, D, dtype=torch.bfloat16), torch.zeros(1, K, dtype=torch.int64)
    at_E, out_ND = torch.zeros(E, dtype=torch.int64), torch.empty(K, D, dtype=torch.bfloat16)
    records = torch.empty(0, dtype=torch.uint8)
    for capability in (80, 90, 100, 120):
        driver.set_active(NoGpu(capability))  # type: ignore[arg-type]
        for name, layer in layers():
            if EVERYTHING or name in ELSEWHERE.get(capability, (name,)):
                layer(x_TD, records if name.endswith("bit") else None, at_E, expert_TK, out_ND)
                for part, kernel in zip(("first", "activate", "down"), compiled, strict=True):
                    say(name, part, capability, kernel)
                compiled.clear()
        combine_on_device(out_ND[None], torch.empty(1, K))
        say("bfloat16", "combine", capability, compiled.pop())
        for known in (None, (torch.ones(E, dtype=torch.uint8), torch.ones(E))):
            resolving(at_E, known)
            say("hits" if known is None else "records", "resolve", capability, compiled.pop())
        for dtype in (torch.bfloat16, torch.float32) if EVERYTHING or capability == 90 else (torch.bfloat16,):
            attention(dtype)
            for part, kernel in zip(("attend", "join"), compiled, strict=True):
                say(str(dtype).removeprefix("torch."), part, capability, kernel)
            compiled.clear()
    fmt = LowbitFormat(bits=4)
    form = Form.packed(record_tensors(SHAPES, fmt)[0], "down_proj", fmt, (0, ""), Use(experts=E, shares=1, outputs=1))
    rows = torch.empty(K, F)
    say("4 bit", "misplaced", 90, misplaced.warmup(rows, records, torch.empty(K, D), form, grid=(1, 1)))


def attention(dtype: torch.dtype) -> None:
    Q, H, d = 32, 4, 128  # Qwen3-30B-A3B's
    pool = torch.empty(64, H, d, dtype=dtype)
    context = torch.zeros(1, 8, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    decode_attention(torch.empty(1, Q, d, dtype=dtype), (pool, pool, 16), context, scale=0.1, window=None, sinks_Q=None)


def resolving(at_E: torch.Tensor, records: tuple[torch.Tensor, torch.Tensor] | None) -> None:
    T, L, one = 64, 48, torch.zeros(1, dtype=torch.int64)
    mode_T, ids_TK = torch.zeros(T, dtype=torch.int64), torch.zeros(T, K, dtype=torch.int64)
    stalled_L, left_LT = torch.zeros(L + 1, dtype=torch.int64), torch.zeros(L + 1, T)
    terms = {"mode_T": mode_T, "price_T": torch.zeros(T), "left_LT": left_LT, "lengths_LT": left_LT.long()}
    rows = RowTerms(stalled_L=stalled_L, count=one, **terms)
    resolve_on_device(2, ids_TK, torch.zeros(T, K), at_E, records, rows, torch.zeros(3, T, K, dtype=torch.int64))


def say(name: str, part: str, capability: int, kernel: Any) -> None:
    found = figures(kernel, read=part in READ)
    print(json.dumps({"kernel": part, "of": name, "capability": capability, **found}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
