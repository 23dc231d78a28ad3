"""What Triton's compiler makes of the kernels, without a GPU: `python ahead_of_time.py` prints a line of JSON a kernel.

A process of its own, because one that has imported triton under TRITON_INTERPRET compiles nothing. Registers, stack and
machine code are ptxas' own, of the assembler in triton's wheel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from buddymoe_ray.kernels import LowbitFormat, record_tensors
from buddymoe_ray.kernels.triton import programs
from buddymoe_ray.kernels.triton.experts import OPTIONS
from buddymoe_ray.kernels.triton.forms import Form, Use
from buddymoe_ray.kernels.triton.products import packed
from buddymoe_ray.types import SlotTensor

CAPABILITIES = (80, 90, 100, 120)
D, F, K = 2048, 768, 8  # Qwen3-30B-A3B's
SHAPES = {"gate_up_proj": (2 * F, D), "down_proj": (D, F)}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@triton.jit
def misplaced(x, records, out, FORM: tl.constexpr):
    """The negative case: a record whose begin the compiler knows nothing of."""
    record = (records.to(tl.int64) + tl.load(out + FORM.N).to(tl.int64)).to(tl.pointer_type(tl.uint8))
    y = packed(record + FORM.codes, record + FORM.scales, tl.program_id(0) + tl.arange(0, 1), x, FORM)
    tl.store(out + tl.arange(0, 16), tl.reshape(y, [16]))


def forms() -> Iterator[tuple[str, str, Form]]:
    """What is computed, the dtype of its rows, and how."""
    for name, shares, rows in (("gate_up_proj", K, "*bf16"), ("down_proj", 1, "*fp32")):
        use = Use(experts=128, shares=shares, outputs=1)
        for bits in (8, 4, 3, 2):
            fmt = LowbitFormat(bits=bits)
            yield f"{bits} bit {name}", rows, Form.packed(record_tensors(SHAPES, fmt)[0], name, fmt, (0, ""), use)
        for dtype in ("bfloat16", "float16", "float32"):
            yield f"{dtype} {name}", rows, Form.plain(stored(name, dtype), (1 << 20, dtype), use, transposed=False)
        yield f"transposed {name}", rows, Form.plain(stored(name, "bfloat16", -1), (0, ""), use, transposed=True)


def stored(name: str, dtype: str, step: int = 1) -> SlotTensor:
    return SlotTensor(name=name, shape=SHAPES[name][::step], dtype=dtype, offset=64, nbytes=0)


def figures(kernel: Any, kinds: dict[str, str], constants: dict[str, Any], capability: int) -> dict[str, Any]:
    """Registers, bytes of stack, widths of the loads of weights, barriers inside loops of the PTX and in all."""
    signature = {name: kinds.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(signature) if signature[name][0] == "*"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=OPTIONS)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        used, code = (
            subprocess.run([CUOBJDUMP, what, cubin.name], capture_output=True, text=True, check=True).stdout
            for what in ("-res-usage", "-sass")
        )
    weights = [line for line in code.splitlines() if "LDG" in line and ".EF" in line]  # evict_first marks them
    return {
        "registers": int(re.findall(r"REG:(\d+)", used)[0]),
        "stack": int(re.findall(r"STACK:(\d+)", used)[0]) + len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "narrow": sum(".128" not in line for line in weights),
        "wide": sum(".128" in line for line in weights),
        "barriers_in_loops": barriers_in_loops(compiled.asm["ptx"]),
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
    tables = {"expert_N": "*i64", "at_E": "*i64", "out": "*fp32"}
    for name, rows, form in forms():
        everywhere = "down" in name and form.weights in ("", "bfloat16")
        for capability in CAPABILITIES if everywhere else (90,):
            where = {"records": "*u8"} if form.bits else {}
            constants: dict[str, Any] = {"FORM": form} | ({} if where else {"records": None})
            found = figures(programs.project, {"x": rows, **where, **tables}, constants, capability)
            say(name, capability, found)
    four = next(form for name, _, form in forms() if name == "4 bit down_proj")
    wrong = figures(misplaced, {"x": "*fp32", "records": "*u8", "out": "*fp32"}, {"FORM": four}, 90)
    say("misplaced", 90, wrong)
    both = {"both": "*fp32", "expert_N": "*i64", "at_E": "*i64", "hidden": "*fp32"}
    combined = {"y": "*bf16", "weight": "*fp32", "out": "*bf16"}
    for formula, capability in enumerate(CAPABILITIES):
        constants = {"DOWN": four, "FORMULA": formula, "BF": 256}
        say(f"activate {formula}", capability, figures(programs.activate, both, constants, capability))
        say("combine", capability, figures(programs.combine, combined, {"D": D, "K": K, "BD": 256}, capability))


def say(name: str, capability: int, found: dict[str, Any]) -> None:
    print(json.dumps({"kernel": name, "capability": capability, **found}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
