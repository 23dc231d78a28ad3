"""The product of a matrix as a checkpoint stores it in bfloat16 with rows of bfloat16, as LLVM IR for AVX-512 with its
bfloat16 products.

    project(weights, 0, 0, K, N, rows, R)   rows are R pairs (address of a row, address of its outputs)
    round(x, G, row)                        float32 x [32 G] into such a row, each to the nearest, 2 bytes an input

To the bits of stored_tiles.py over the same rows, but that numbers below 1.2e-38 count as none: the instruction adds a
word's upper product to its sum, then its lower one, rounding each time (measured on Zen 5; Intel says the same), and
its lanes are the 16 sums of an output there. A core of Zen 5, 2,048 x 2,048 from memory at 37 GB/s, GB/s of weights at
1, 4, 8, 16, 32 and 128 rows: 37, 38, 29, 22, 12.6 and 3.6 (464 of 530 GFLOP/s), where float32 rows take 33, 30, 21, 12,
5.5. Few rows go over one output after the other, so that weights are read as they lie: four outputs at once take 1.2
times as long. Five to twelve rows go over two (one is .6 times as fast), as long as the nearest cache holds them: 4 of
14,336 take 1.5 times as long so. Others go by fours over six outputs, which reads them from the second-level cache two
thirds as often as by sixes over four: 16, 20, 32 and 128 rows take .84 to .97, .74 to .9, .78 to .91 and .92 of the
time, but 12 of 2,048 inputs 1.05; 8 outputs of 3 rows and 5 of 5 are slower, and so is to ask again for the weights of
the first block of rows. What holds 5 to 10 rows back is that they and the weights share the nearest cache: were rows
always there, 8 of 2,048 inputs would take .8 of the time. To go over a stretch of inputs of 16 outputs at a time, with
the sums set aside, is 1.2 to 1.3 times as slow, but for 14,336 inputs (.8). By rows that lie one behind the other 16 to
128 of them take 1.2 times as long: their streams from the second-level cache are too many. Read at two places far apart
memory gives 40 GB/s, but only to who does nothing else: as soon as four rows wait for each line it takes 1.2 times as
long.

Legend: N outputs and K inputs of the matrix, G groups of 32 inputs, R rows, b an `ir.IRBuilder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

from buddymoe_ray.kernels.expert_calls import LINE, PANEL
from buddymoe_ray.kernels.lowbit_format import GROUP
from buddymoe_ray.kernels.stored_tiles import FLOATS, INTS, Shape, StoredTiles
from buddymoe_ray.kernels.vector_ir import F32, I64, VOID, at, call, load, loop, nearest_halves, vec

__all__ = ["dots_module_text", "has_dots"]

MANY_ROWS: Shape = {6: (PANEL, 3, 2, 1), 1: (PANEL, 1)}


def has_dots() -> bool:
    """Whether this CPU has the products."""
    has = llvm.get_host_cpu_features()
    return bool(has.get("avx512bf16") and has.get("avx512vnni"))


def dots_module_text() -> str:
    """The module's IR."""
    made = _Dots("bfloat16", many_rows=MANY_ROWS)
    made.project()
    made.round()
    return str(made.module)


class _Dots(StoredTiles):
    """Emits the module."""

    row_bytes, panel, in_turn = 2 * GROUP, PANEL, 12

    def _add_group(self, b: Any, weights: Sequence[Any], rows: Sequence[Any], sums: list[list[Any]]) -> None:
        wide = [load(b, place, INTS) for place in weights]
        for row, places in zip(rows, sums, strict=True):
            x = load(b, row, INTS)
            for words, place in zip(wide, places, strict=True):
                # the operands are the older ones, int32 throughout: LLVM takes them for the newer
                operands = [b.load(place), words, x]
                b.store(call(b, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, operands), place)

    def round(self) -> None:
        """One row."""
        kernel = ir.Function(self.module, ir.FunctionType(VOID, [I64] * 3), "round")
        x, G, row = kernel.args
        b = ir.IRBuilder(kernel.append_basic_block())
        with loop(b, G) as g:
            halves = nearest_halves(b, load(b, x, vec(F32, GROUP), b.mul(g, I64(4 * GROUP))))
            b.store(halves, at(b, row, halves.type, b.mul(g, I64(LINE * PANEL))), align=1)
        b.ret_void()
