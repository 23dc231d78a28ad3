"""The product of 4-bit codes as a checkpoint stores them (mxfp4, nvfp4, int4) with rows of 16-bit integers, as LLVM IR
for AVX-512 with VNNI.

    project(codes, scales, zeros, K, N, rows, R)   rows are R pairs (address of a row, address of its outputs)
    quantise(x, G, row)                            float32 x [32 G] into such a row: ROW bytes to four groups, steps

For rows that were bfloat16: as in lowbit_tiles.py a group's dot product is an exact integer, rounded once when it
becomes a float and once more by the multiply-add that brings its scale; error 4e-5 of the output's norm, and bits that
depend on the row and its weights alone. coded_tiles.py computes float32 rows, and all on other CPUs.

A vector of 64 bytes of codes is four groups: their even inputs are its low halves, their odd ones its high halves. A
row has for each four groups, in 320 bytes: upper parts of even and odd inputs, lower 7 bits of even and odd inputs, of
each group in four lanes the correction for codes that are counted from above 0 (in the first, of blocks of 16 inputs
in the first of two; where there are zero points, the sum of the group instead, as a float). Behind all of them are the
steps, one after the other, a float to a group, or to a block where that is smaller: 16 at a time are multiplied by
their scales, for all outputs of a tile, before their codes come (those of one vector at a time: 1.1 times the cycles of
a line). Scales that are not there must become no subnormals: those took 100 cycles of every tile of 2,880 inputs.

Each line is fetched two tiles before it is read, by the tile in whose place it lies, the short one at the end of a row
too: without those, 2,880 inputs take 1.15 times as long. Tried and dropped for one row: lines fetched in the order in
which they lie (.95 times as fast), 4 outputs at once (.98), 16 (.88), scales of e8m0 spread as bytes (.98); upper and
lower parts summed beside each other instead of one after the other (.85 of the cycles in the first-level cache, .94
times as fast from memory at 2,880 inputs), each line's fetch beside its product (.94 there), fetches into the
second-level cache (.73 to 1.07).

Legend: N outputs and K inputs of the matrix, G groups of 32 inputs, R rows, b an `ir.IRBuilder`.
"""

from __future__ import annotations

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
    first_items,
    internal,
    load,
    loop,
    prefetch,
    splat,
    vec,
)
from buddymoe_ray.types import CodeFormat

__all__ = ["has_wide", "wide_module_text"]

CODES, FOUR, ROW = 64, 4 * GROUP, 320
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
        self._fine = min(GROUP, fmt.block[1])  # inputs of a step
        self._span = LANES * self._fine // FOUR  # vectors of codes to 16 steps
        self._by_six_bits = by_six_bits
        self._middle, self._unit = (12, 0.5) if fmt.codes in FP4 else (8, 1.0)

    def _tile(self, outputs: int, rows: int) -> Any:
        """Some outputs of some rows, over all inputs."""
        tile = internal(self.module, f"tile{outputs}x{rows}", 8)
        codes, stride, scales, zeros, n, K, pairs, column = tile.args
        b = ir.IRBuilder(tile.append_basic_block())
        C, turns = (b.sdiv(b.add(K, I64(size - 1)), I64(size)) for size in (self._fmt.block[1], FOUR))
        w = [b.add(codes, b.mul(stride, I64(i))) for i in range(outputs)]
        per_row = b.mul(C, I64(SCALE_BYTES[self._fmt.scale]))
        self._s = [b.add(scales, b.mul(per_row, b.add(n, I64(i)))) for i in range(outputs)]
        self._z = [self._zero_row(b, zeros, b.add(n, I64(i)), C) for i in range(outputs if self._fmt.zeros else 0)]
        x = [load(b, pairs, I64, 16 * r) for r in range(rows)]
        y = [b.add(load(b, pairs, I64, 16 * r + 8), column) for r in range(rows)]
        self._steps = [b.add(place, b.mul(turns, I64(ROW))) for place in x]
        self._factors, totals = ([[b.alloca(FLOATS) for _ in w] for _ in x] for _ in range(2))
        self._middles = [b.alloca(FLOATS) for _ in self._z]
        for place in (place for row in totals for place in row):
            b.store(const(FLOATS, 0.0), place)
        for place, each in ((self._s[0], per_row), *((place, b.mul(C, I64(4))) for place, _ in self._z[:1])):
            nbytes = b.mul(each, I64(outputs))  # of the tile after the next
            with loop(b, b.sdiv(b.add(nbytes, I64(CODES - 1)), I64(CODES))) as line:
                prefetch(b, b.add(place, b.add(b.mul(nbytes, I64(2)), b.mul(line, I64(CODES)))))
        whole, left = b.sdiv(K, I64(FOUR)), b.srem(K, I64(FOUR))

        def add(turn: Any, near: Any, inputs: Any = None) -> None:
            here = [b.add(place, b.mul(turn, I64(CODES))) for place in w]
            for place in here:
                prefetch(b, b.add(place, b.mul(stride, I64(2 * outputs))))
            held = [self._codes(b, place, inputs) for place in here]
            self._add_four(b, held, [b.add(place, b.mul(turn, I64(ROW))) for place in x], near, totals)

        with loop(b, b.sdiv(b.add(turns, I64(self._span - 1)), I64(self._span))) as run:
            self._scaled_steps(b, run, C)
            first = b.mul(run, I64(self._span))
            rest = b.sub(whole, first)
            with loop(b, b.select(b.icmp_signed("<", rest, I64(self._span)), rest, I64(self._span))) as near:
                add(b.add(first, near), near)
        with b.if_then(b.icmp_signed(">", left, I64(0))):
            add(whole, b.srem(whole, I64(self._span)), left)
        self._finish(b, y, totals, zeros)
        return tile

    def _scaled_steps(self, b: Any, run: Any, C: Any) -> None:
        """What the dot products of 16 steps are multiplied by, of every row and output, and zero points of outputs."""
        inputs, size = self._fmt.block[1], SCALE_BYTES[self._fmt.scale]
        count = LANES * self._fine // inputs
        begin = b.mul(run, I64(count))
        left = b.sub(C, begin)
        left = b.select(b.icmp_signed("<", left, I64(count)), left, I64(count))
        lanes = const(INTS, [lane * count // LANES for lane in range(LANES)])

        def to_steps(values: Any) -> Any:
            return b.shuffle_vector(values, values, lanes)

        steps = [load(b, place, FLOATS, b.mul(run, I64(4 * LANES))) for place in self._steps]
        for i, place in enumerate(self._s):
            scale = to_steps(self._scale(b, b.add(place, b.mul(begin, I64(size))), count, left))
            for step, factors in zip(steps, self._factors, strict=True):
                b.store(b.fmul(scale, step), factors[i])
        for (place, shift), room in zip(self._z, self._middles, strict=True):
            held = first_items(b, b.add(place, b.mul(begin, I64(4))), left, vec(I32, count))
            held = b.and_(b.lshr(held, splat(b, shift, count)), const(held.type, 15))
            b.store(to_steps(b.uitofp(held, vec(F32, count))), room)

    def _add_four(self, b: Any, held: list[Any], rows: list[Any], near: Any, totals: list[list[Any]]) -> None:
        """`totals += scale * step * dot` of four groups."""
        for i, bytes_ in enumerate(held):
            evens, odds = (b.bitcast(counts, INTS) for counts in self._counts(b, bytes_))
            middle = self._lanes_of(b, self._middles[i], near) if self._fmt.zeros else None
            for x, factors, row in zip(rows, self._factors, totals, strict=True):
                parts = [load(b, x, INTS, CODES * part) for part in range(5)]
                upper = self._dot(b, self._dot(b, const(INTS, 0), evens, parts[0]), odds, parts[1])
                start = b.shl(upper, const(INTS, 7))
                if middle is None:
                    start = b.add(start, parts[4])
                dot = b.sitofp(self._dot(b, self._dot(b, start, evens, parts[2]), odds, parts[3]), FLOATS)
                if middle is not None:
                    sums = b.bitcast(parts[4], FLOATS)
                    dot = call(b, f"llvm.fma.v{LANES}f32", FLOATS, [b.fneg(middle), sums, dot])
                step = self._lanes_of(b, factors[i], near)
                b.store(call(b, f"llvm.fma.v{LANES}f32", FLOATS, [dot, step, b.load(row[i])]), row[i])

    def _codes(self, b: Any, place: Any, inputs: Any) -> Any:
        """Of four groups, or of what is left of them and zeros."""
        if inputs is None:
            return load(b, place, BYTES)
        return first_items(b, place, b.mul(b.sdiv(b.add(inputs, I64(7)), I64(8)), I64(4)), BYTES)

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

    def _lanes_of(self, b: Any, room: Any, near: Any) -> Any:
        """What four groups have of 16 steps, each in its lanes."""
        count = LANES // self._span
        found = load(b, b.ptrtoint(room, I64), vec(F32, count), b.mul(near, I64(4 * count)))
        return b.shuffle_vector(found, found, const(INTS, [lane // self._span for lane in range(LANES)]))

    def quantise(self) -> None:
        """One row to 16 bits, of groups that are not there to zeros. A group that holds an inf or a nan makes all of
        the row's outputs nan."""
        kernel = ir.Function(self.module, ir.FunctionType(VOID, [I64] * 3), "quantise")
        x, G, row = kernel.args
        b, floats, four = ir.IRBuilder(kernel.append_basic_block()), vec(F32, GROUP), vec(I32, 4)
        none = b.ptrtoint(b.alloca(ir.ArrayType(F32, GROUP)), I64)
        b.store(const(floats, 0.0), at(b, none, floats), align=4)
        turns, some_steps = b.sdiv(b.add(G, I64(3)), I64(4)), vec(F32, GROUP // self._fine)
        steps = b.add(row, b.mul(turns, I64(ROW)))
        b.store(const(FLOATS, 0.0), at(b, steps, FLOATS, b.mul(turns, I64(4 * LANES // self._span))), align=1)
        with loop(b, turns) as turn:
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
                lanes, size = const(four, 0), self._fine
                for begin in range(0, GROUP, size):
                    some = b.shuffle_vector(q, q, const(vec(I32, size), range(begin, begin + size)))
                    total = call(b, f"llvm.vector.reduce.add.v{size}i32", I32, [some])
                    total = (
                        b.bitcast(b.sitofp(total, F32), I32) if self._fmt.zeros else b.mul(total, I32(-self._middle))
                    )
                    lanes = b.insert_element(lanes, total, I32(4 * begin // GROUP))
                b.store(lanes, at(b, place, four, 4 * CODES + 16 * i), align=1)
                step = splat(b, b.fmul(top, F32(self._unit / TOP)), some_steps.count)
                b.store(step, at(b, steps, some_steps, b.mul(g, I64(4 * some_steps.count))), align=1)
        b.ret_void()
