"""The product of fp8 codes as a checkpoint stores them with rows of two bfloat16s an input, as LLVM IR for AVX-512 with
its bfloat16 products.

    project(codes, scales, zeros, K, N, rows, R)   rows are R pairs (address of a row, address of its outputs)
    quantise(x, G, row)                            float32 x [32 G] into such a row, 4 bytes an input

For rows that were bfloat16 or came of such: an input is its nearest bfloat16 and that of what is left, 16 bits in all.
A code is a bfloat16 to the last bit, its product with an input exact; sums are as in coded_tiles.py, whose tiles these
are, and codes stay pairs in words, so a line takes 12 instructions instead of 17. Bits of an output depend on its row
and its weights alone. coded_tiles.py computes float32 rows, and all on other CPUs.

One row goes over four outputs at once, whose codes come four tiles ahead: 1.02 to 1.2 times as fast from memory as
eight and two tiles. Tried and dropped: four and two (1.06 to 1.14), three and three (1.03 to 1.2), two and four (.77 at
768 inputs), one output after the other, 4 to 16 KB ahead (.81 to .92).

Legend: N outputs and K inputs of the matrix, G groups of 32 inputs, R rows, b an `ir.IRBuilder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

from buddymoe_ray.kernels.coded_fp8 import bfloat16s
from buddymoe_ray.kernels.coded_tiles import CodedTiles
from buddymoe_ray.kernels.lowbit_format import GROUP
from buddymoe_ray.kernels.stored_tiles import FLOATS, INTS, LANES, LINE, ONE_ROW
from buddymoe_ray.kernels.vector_ir import F32, I8, I32, I64, VOID, at, call, const, load, loop, nearest_halves, vec
from buddymoe_ray.types import CodeFormat

__all__ = ["has_pairs", "pairs_module_text"]


def has_pairs(fmt: CodeFormat) -> bool:
    """Whether there is such a kernel for a format, and a CPU that runs it."""
    return fmt.codes == "fp8" and fmt.block[1] % LINE == 0 and bool(llvm.get_host_cpu_features().get("avx512bf16"))


def pairs_module_text(fmt: CodeFormat) -> str:
    """The module's IR for matrices of `fmt`, which `has_pairs` says yes to."""
    made = _Pairs(fmt)
    made.project()
    made.quantise()
    return str(made.module)


class _Pairs(CodedTiles):
    """Emits one module; a row has, for each line of codes, even and odd inputs, then what is left of both."""

    def __init__(self, fmt: CodeFormat) -> None:
        super().__init__(fmt, permutes=True)
        self._one, self._tiles_ahead = ONE_ROW, 4

    def _add_group(self, b: Any, weights: Sequence[Any], rows: Sequence[Any], sums: list[list[Any]]) -> None:
        wide = [bfloat16s(b, load(b, place, vec(I8, LINE))) for place in weights]
        for part in range(4):
            for row, places in zip(rows, sums, strict=True):
                x = load(b, row, INTS, LINE * part)
                for words, place in zip(wide, places, strict=True):
                    # the operands are the older ones, int32 throughout: LLVM takes them for the newer
                    operands = [b.load(place), words[part % 2], x]
                    b.store(call(b, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, operands), place)

    def quantise(self) -> None:
        """One row, with zeros for groups that are not there."""
        kernel = ir.Function(self.module, ir.FunctionType(VOID, [I64] * 3), "quantise")
        x, G, row = kernel.args
        b, floats = ir.IRBuilder(kernel.append_basic_block()), vec(F32, GROUP)
        none = b.ptrtoint(b.alloca(ir.ArrayType(F32, GROUP)), I64)
        b.store(const(floats, 0.0), at(b, none, floats), align=4)
        with loop(b, b.sdiv(b.add(G, I64(1)), I64(2))) as turn:
            for i in range(2):
                g = b.add(b.mul(turn, I64(2)), I64(i))
                source = b.select(b.icmp_signed("<", g, G), b.add(x, b.mul(g, I64(4 * GROUP))), none)
                value = load(b, source, floats)
                upper = nearest_halves(b, value)
                back = b.bitcast(b.shl(b.zext(upper, vec(I32, GROUP)), const(vec(I32, GROUP), 16)), floats)
                for part, halves in enumerate((upper, nearest_halves(b, b.fsub(value, back)))):
                    for odd in (0, 1):
                        some = b.shuffle_vector(halves, halves, const(INTS, range(odd, GROUP, 2)))
                        offset = b.add(b.mul(turn, I64(4 * LINE)), I64(LINE * (2 * part + odd) + 2 * LANES * i))
                        b.store(some, at(b, row, some.type, offset), align=1)
        b.ret_void()
