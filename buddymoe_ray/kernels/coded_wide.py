"""The product of 4-bit codes as a checkpoint stores them (mxfp4, nvfp4, int4) with rows of 16-bit integers, as LLVM IR
for AVX-512 with VNNI.

    project(codes, scales, zeros, K, N, rows, R)   rows are R pairs (address of a row, address of its outputs)
    quantise(x, G, row)                            float32 x [32 G] into such a row, ROW bytes to four groups

For rows that were bfloat16: as in lowbit_tiles.py a group's dot product is an exact integer, rounded once when it
becomes a float and once more by the multiply-add that brings its scale; error 4e-5 of the output's norm, and bits that
depend on the row and its weights alone. coded_tiles.py computes float32 rows, and all on other CPUs.

A vector of 64 bytes of codes is four groups: their even inputs are its low halves, their odd ones its high halves. A
row has for each four groups, in 384 bytes: upper parts of even and odd inputs, lower 7 bits of even and odd inputs, of
each group in four lanes the correction for codes that are counted from above 0 (in the first, of blocks of 16 inputs
in the first of two; where there are zero points, the sum of the group instead, as a float), and the step.

Each line is fetched two tiles before it is read, by the tile in whose place it lies, the short one at the end of a row
too: without those, 2,880 inputs take 1.15 times as long. Tried and dropped for one row: lines fetched in the order in
which they lie (.95 times as fast), 4 outputs at once (.98), 16 (.88), scales of e8m0 spread as bytes (.98).

Legend: N outputs and K inputs of the matrix, G groups of 32 inputs, R rows, b an `ir.IRBuilder`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

from buddymoe_ray.kernels.coded_format import E2M1, FP4
from buddymoe_ray.kernels.coded_tiles import SCALE_BYTES, CodedTiles
from buddymoe_ray.kernels.lowbit_format import GROUP
from buddymoe_ray.kernels.lowbit_tiles import TOP, to_16_bits
from buddymoe_ray.kernels.stored_tiles import FLOATS, INTS, LANES
from buddymoe_ray.kernels.vector_ir import (
    F32,
    I8,
    I16,
    I32,
    I64,
    VOID,
    at,
    call,
    const,
    first_bytes,
    internal,
    load,
    loop,
    prefetch,
    splat,
    vec,
)
from buddymoe_ray.types import CodeFormat

__all__ = ["has_wide", "wide_module_text"]

CODES, FOUR, ROW = 64, 4 * GROUP, 384
"""Bytes of codes that are multiplied at once, their inputs, and what a row has for them."""
BYTES, WORDS = vec(I8, CODES), vec(I16, CODES // 2)


def has_wide(fmt: CodeFormat) -> bool:
    """Whether there is such a kernel for a format."""
    return fmt.codes in ("int4", *FP4) and fmt.block[0] == 1 and fmt.block[1] > 0 and FOUR % fmt.block[1] == 0


def wide_module_text(fmt: CodeFormat, *, by_six_bits: bool | None = None) -> str:
    """The module's IR for matrices of `fmt`, which `has_wide` says yes to. `by_six_bits`: whether codes of FP4 are
    looked up by as many of each byte; None: where this CPU can."""
    six = bool(llvm.get_host_cpu_features().get("avx512vbmi")) if by_six_bits is None else by_six_bits
    made = _WideTiles(fmt, six)
    made.project()
    made.quantise()
    return str(made.module)


class _WideTiles(CodedTiles):
    """Emits one module; the blocks of outputs and rows are those of its parent."""

    def __init__(self, fmt: CodeFormat, by_six_bits: bool) -> None:
        super().__init__(fmt, permutes=True)
        self._many = {4: (3, 2, 1), 1: (3, 2, 1)}
        self._counted = [12 + round(2 * sign * value) for sign in (1, -1) for value in E2M1]  # 0 to 24, in halves
        self._middles: list[tuple[Any, Any]] = []  # where zero points of outputs are, and where in their words
        self._left: tuple[Any, Any] | None = None  # bytes of codes and scales, where four groups are not whole
        self._by_six_bits = by_six_bits
        self._middle, self._unit = (12, 0.5) if fmt.codes in FP4 else (8, 1.0)

    def _tile(self, outputs: int, rows: int) -> Any:
        """Some outputs of some rows, over all inputs."""
        tile = internal(self.module, f"tile{outputs}x{rows}", 8)
        codes, stride, scales, zeros, n, K, pairs, column = tile.args
        b = ir.IRBuilder(tile.append_basic_block())
        per, size = FOUR // self._fmt.block[1], SCALE_BYTES[self._fmt.scale]
        C = b.sdiv(b.add(K, I64(self._fmt.block[1] - 1)), I64(self._fmt.block[1]))
        w = [b.add(codes, b.mul(stride, I64(i))) for i in range(outputs)]
        s = [self._scale_row(b, scales, b.add(n, I64(i)), C) for i in range(outputs)]
        z = [self._zero_row(b, zeros, b.add(n, I64(i)), C) for i in range(outputs if self._fmt.zeros else 0)]
        x = [load(b, pairs, I64, 16 * r) for r in range(rows)]
        y = [b.add(load(b, pairs, I64, 16 * r + 8), column) for r in range(rows)]
        totals = [[b.alloca(FLOATS) for _ in w] for _ in x]
        self._scales_left = b.ptrtoint(b.alloca(ir.ArrayType(F32, per)), I64)
        for place in (place for row in totals for place in row):
            b.store(const(FLOATS, 0.0), place)
        for place, each in ((s[0], outputs * size), *((place, 4) for place, _ in z[:1])):  # of the tile after the next
            nbytes = b.mul(C, I64(each))
            with loop(b, b.sdiv(b.add(nbytes, I64(CODES - 1)), I64(CODES))) as line:
                prefetch(b, b.add(place, b.add(b.mul(nbytes, I64(2)), b.mul(line, I64(CODES)))))
        whole = b.sdiv(K, I64(FOUR))
        with loop(b, whole) as turn:
            offset = b.mul(turn, I64(CODES))
            here = [b.add(place, offset) for place in w]
            for place in here:
                prefetch(b, b.add(place, b.mul(stride, I64(2 * outputs))))
            factors = [b.add(place, b.mul(turn, I64(per * size))) for place in s]
            self._middles = [(b.add(place, b.mul(turn, I64(4 * per))), shift) for place, shift in z]
            self._add_four(b, here, factors, [b.add(place, b.mul(turn, I64(ROW))) for place in x], totals)
        left = b.sub(K, b.mul(whole, I64(FOUR)))
        with b.if_then(b.icmp_signed(">", left, I64(0))):
            here = [b.add(place, b.mul(whole, I64(CODES))) for place in w]
            for place in here:
                prefetch(b, b.add(place, b.mul(stride, I64(2 * outputs))))
            factors = [b.add(place, b.mul(whole, I64(per * size))) for place in s]
            self._middles = [(b.add(place, b.mul(whole, I64(4 * per))), shift) for place, shift in z]
            self._left = b.mul(b.sdiv(b.add(left, I64(7)), I64(8)), I64(4)), b.sub(C, b.mul(whole, I64(per)))
            self._add_four(b, here, factors, [b.add(place, b.mul(whole, I64(ROW))) for place in x], totals)
            self._left = None
        self._finish(b, y, totals, zeros)
        return tile

    def _add_four(self, b: Any, codes: list[Any], scales: list[Any], rows: list[Any], totals: list[list[Any]]) -> None:
        """`totals += scale * step * dot` of four groups."""
        for i, (place, factor) in enumerate(zip(codes, scales, strict=True)):
            evens, odds = (b.bitcast(counts, INTS) for counts in self._counts(b, self._codes(b, place)))
            scale = self._lanes_of(b, factor, SCALE_BYTES[self._fmt.scale], partial(self._scale, b))
            middle = self._middle_lanes(b, i) if self._fmt.zeros else None
            for x, row in zip(rows, totals, strict=True):
                parts = [load(b, x, INTS, CODES * part) for part in range(5)]
                upper = self._dot(b, self._dot(b, const(INTS, 0), evens, parts[0]), odds, parts[1])
                start = b.shl(upper, const(INTS, 7))
                if middle is None:
                    start = b.add(start, parts[4])
                dot = b.sitofp(self._dot(b, self._dot(b, start, evens, parts[2]), odds, parts[3]), FLOATS)
                if middle is not None:
                    sums = b.bitcast(parts[4], FLOATS)
                    dot = call(b, f"llvm.fma.v{LANES}f32", FLOATS, [b.fneg(middle), sums, dot])
                step = b.fmul(scale, load(b, x, FLOATS, 5 * CODES))
                b.store(call(b, f"llvm.fma.v{LANES}f32", FLOATS, [dot, step, b.load(row[i])]), row[i])

    def _codes(self, b: Any, place: Any) -> Any:
        """Of four groups, or of what is left of them and zeros."""
        return load(b, place, BYTES) if self._left is None else first_bytes(b, place, self._left[0], CODES)

    def _counts(self, b: Any, held: Any) -> tuple[Any, Any]:
        """The codes in the low and in the high halves of bytes as numbers from 0 up."""
        if self._fmt.codes in FP4 and self._by_six_bits:  # the upper two do not matter: 3 instructions instead of 5
            high = b.bitcast(b.lshr(b.bitcast(held, WORDS), const(WORDS, 4)), BYTES)
            name, table = "llvm.x86.avx512.permvar.qi.512", const(BYTES, self._counted * 4)
            low, high = (call(b, name, BYTES, [table, index]) for index in (held, high))
            return low, high
        low, high = b.and_(held, const(BYTES, 15)), b.lshr(held, const(BYTES, 4))
        if self._fmt.codes in FP4:
            name, table = "llvm.x86.avx512.pshuf.b.512", const(BYTES, self._counted * 4)
            low, high = (call(b, name, BYTES, [table, index]) for index in (low, high))
        return low, high

    def _dot(self, b: Any, total: Any, codes: Any, x: Any) -> Any:
        return call(b, "llvm.x86.avx512.vpdpbusd.512", INTS, [total, codes, x])

    def _lanes_of(self, b: Any, place: Any, size: int, read: Callable[[Any, int], Any]) -> Any:
        """What a block has one of, `size` bytes from one to the next, for four groups: each in four lanes."""
        count = FOUR // self._fmt.block[1]
        if self._left is not None:  # those that are not there count for codes that are not
            there = first_bytes(b, place, b.mul(self._left[1], I64(size)), count * size)
            b.store(there, at(b, self._scales_left, there.type), align=1)
            place = self._scales_left
        found = read(place, count)
        return b.shuffle_vector(found, found, const(INTS, [lane * count // LANES for lane in range(LANES)]))

    def _middle_lanes(self, b: Any, output: int) -> Any:
        """Zero points of four groups of an output of the tile."""
        first, shift = self._middles[output]

        def read(place: Any, count: int) -> Any:
            held = b.lshr(load(b, place, vec(I32, count)), splat(b, shift, count))
            return b.uitofp(b.and_(held, const(held.type, 15)), vec(F32, count))

        return self._lanes_of(b, first, 4, read)

    def quantise(self) -> None:
        """One row to 16 bits, of groups that are not there to zeros. A group that holds an inf or a nan makes all of
        the row's outputs nan."""
        kernel = ir.Function(self.module, ir.FunctionType(VOID, [I64] * 3), "quantise")
        x, G, row = kernel.args
        b, floats, four = ir.IRBuilder(kernel.append_basic_block()), vec(F32, GROUP), vec(I32, 4)
        none = b.ptrtoint(b.alloca(ir.ArrayType(F32, GROUP)), I64)
        b.store(const(floats, 0.0), at(b, none, floats), align=4)
        with loop(b, b.sdiv(b.add(G, I64(3)), I64(4))) as turn:
            place = b.add(row, b.mul(turn, I64(ROW)))
            for i in range(4):
                g = b.add(b.mul(turn, I64(4)), I64(i))
                source = b.select(b.icmp_signed("<", g, G), b.add(x, b.mul(g, I64(4 * GROUP))), none)
                q, top = to_16_bits(b, load(b, source, floats))
                for part, values in enumerate((b.ashr(q, const(q.type, 7)), b.and_(q, const(q.type, 127)))):
                    for odd in (0, 1):
                        some = b.shuffle_vector(values, values, const(INTS, range(odd, GROUP, 2)))
                        target = at(b, place, vec(I8, LANES), CODES * (2 * part + odd) + LANES * i)
                        b.store(b.trunc(some, vec(I8, LANES)), target, align=1)
                lanes, size = const(four, 0), min(GROUP, self._fmt.block[1])
                for begin in range(0, GROUP, size):
                    some = b.shuffle_vector(q, q, const(vec(I32, size), range(begin, begin + size)))
                    total = call(b, f"llvm.vector.reduce.add.v{size}i32", I32, [some])
                    total = (
                        b.bitcast(b.sitofp(total, F32), I32) if self._fmt.zeros else b.mul(total, I32(-self._middle))
                    )
                    lanes = b.insert_element(lanes, total, I32(4 * begin // GROUP))
                b.store(lanes, at(b, place, four, 4 * CODES + 16 * i), align=1)
                step = splat(b, b.fmul(top, F32(self._unit / TOP)), 4)
                b.store(step, at(b, place, vec(F32, 4), 5 * CODES + 16 * i), align=1)
        b.ret_void()
