"""The product of GPTQ's and AWQ's matrices as a checkpoint stores them with rows of 16-bit integers, as LLVM IR for
AVX-512 with VNNI.

    project(codes, scales, zeros, K, N, rows, R)   rows are R pairs (address of a row, address of its outputs)
    quantise(x, G, row)                            float32 x [32 G] into such a row, STEP_BYTES to a group

For rows that were bfloat16, as coded_wide.py: the dot product of 32 inputs, less what their zero point takes off, is an
exact integer. Steps and scales come after it, so the bits of an output depend on its row and its weights alone.
coded_columns.py computes float32 rows, and all on other CPUs.

A product instruction takes four inputs of an output side by side. GPTQ's words hold them, the even ones in the low
halves of their bytes. AWQ's hold outputs: bytes of four inputs are interleaved, which leaves outputs in another order;
`_end` puts them back. All outputs of 32 inputs (AWQ: of 8, whose dot products wait in memory) go before the next: rows
lie powers of two apart, and of more of them what was prefetched was gone from the first cache before it was used.

Tried and dropped: prefetches in the order in which codes lie, one by one (.8 times as fast) or in bursts (.9), or to
the second cache (.8); totals of a whole panel cleared where fewer outputs are (.7); 4 rows of AWQ at once (.6).

Legend: N outputs and K inputs of the matrix, G groups of 32 inputs, R rows, b an `ir.IRBuilder`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

from llvmlite import ir

from buddymoe_ray.kernels.coded_columns import Columns
from buddymoe_ray.kernels.coded_format import AWQ_ORDER
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
    blocks,
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

__all__ = ["has_wide_columns", "wide_columns_module_text"]

STEP_BYTES = 2 * GROUP + 8
"""Of a group in a row: upper parts, lower 7 bits, the step, the sum of the inputs in steps."""
LINE = 64
BYTES, HALVES = vec(I8, LINE), vec(I16, LINE // 2)
OUTPUTS = 8 * LANES
"""Of a line of AWQ's words."""
NEAR = 8
"""Inputs of AWQ that go together."""
PANEL = 4096
ROOM = PANEL + OUTPUTS
"""Outputs whose totals are on the stack at once, and for how many of a row there is room."""


def has_wide_columns(fmt: CodeFormat) -> bool:
    """Whether there is such a kernel for a format."""
    return fmt.codes in ("gptq", "awq") and fmt.block[1] > 0 and fmt.block[1] % GROUP == 0


def wide_columns_module_text(fmt: CodeFormat) -> str:
    """The module's IR for matrices of `fmt`, which `has_wide_columns` says yes to."""
    made = (_Words if fmt.codes == "gptq" else _Rows)(fmt)
    made.project()
    made.quantise()
    return str(made.module)


class _WideColumns(Columns, ABC):
    """What both have: the walk, rows, what becomes of a dot product. A panel's totals of a group are in memory."""

    order: Sequence[int]
    """Of a group's inputs in a row."""
    rows: Sequence[int]
    """How many at once."""
    shares: Sequence[int]
    """Where of a group of 32 inputs those begin that go over all outputs together."""
    ahead: int
    """Bytes of a row that the prefetch is ahead, measured: half of it or twice as much cost a tenth."""

    def project(self) -> None:
        """Group of a scale by group, 32 inputs at a time."""
        kernel = ir.Function(self.module, ir.FunctionType(VOID, [I64] * 7), "project")
        codes, scales, zeros, K, N, pairs, R = kernel.args
        shapes = [(shape, size) for size in self.rows for shape in self.strips(size)]
        products = {(*shape, share): self._product(*shape, share) for shape in shapes for share in self.shares}
        ends = {(shape, size): self._end(shape, size) for shape, size in shapes}
        b = ir.IRBuilder(kernel.append_basic_block())
        self.clear(b, pairs, R, N)
        totals = b.ptrtoint(b.alloca(F32, size=I64(min(2, len(self.shares)) * ROOM * max(self.rows))), I64)
        groups = b.sdiv(b.add(K, I64(self._group - 1)), I64(self._group))
        for size, row in blocks(b, R, self.rows):
            at_rows = b.add(pairs, b.mul(row, I64(16)))
            with loop(b, b.sdiv(b.add(N, I64(PANEL - 1)), I64(PANEL))) as panel, loop(b, groups) as group:
                start, k = b.mul(panel, I64(PANEL)), b.mul(group, I64(self._group))
                here, left = b.sub(totals, b.mul(start, I64(4))), b.sub(K, k)
                count = b.select(b.icmp_signed("<", left, I64(self._group)), left, I64(self._group))
                width = b.sub(N, start)
                width = b.select(b.icmp_signed("<", width, I64(PANEL)), width, I64(PANEL))
                for r in range(size):  # no more than is used, or codes that were prefetched leave the cache
                    with loop(b, b.sdiv(b.add(width, I64(OUTPUTS - 1)), I64(LANES))) as n:
                        place = b.add(totals, b.add(b.mul(n, I64(LINE)), I64(4 * ROOM * r)))
                        b.store(const(FLOATS, 0.0), at(b, place, FLOATS), align=4)
                with loop(b, b.sdiv(b.add(count, I64(GROUP - 1)), I64(GROUP))) as turn:
                    inputs = b.add(k, b.mul(turn, I64(GROUP)))
                    for share in self.shares:
                        for shape, n in self._over(b, width, size):
                            place = [K, N, inputs, b.add(start, n), at_rows, here]
                            b.call(products[shape, size, share], [codes, zeros, *place])
                for shape, n in self._over(b, width, size):
                    b.call(ends[shape, size], [scales, zeros, K, N, k, b.add(start, n), at_rows, here])
        b.ret_void()

    @abstractmethod
    def strips(self, rows: int) -> Sequence[int]:
        """Outputs of the strips that cover all of them."""

    @abstractmethod
    def _over(self, b: Any, N: Any, rows: int) -> Iterator[tuple[int, Any]]:
        """Emits what is done to each strip."""

    @abstractmethod
    def _product(self, outputs: int, rows: int, share: int) -> Any:
        """`totals += codes . x` of the 32 inputs from k on and the outputs from n on; of a share that is not the last,
        its part of the dot products."""

    @abstractmethod
    def _end(self, outputs: int, rows: int) -> Any:
        """`out += scale * totals` of the outputs from n on, in the group of input k."""

    def _totals(self, b: Any, args: Any, row: int) -> Any:
        """Where those of a row are, from output n on; behind those of all rows are dot products to be gone on with."""
        _, _, _, _, _, n, _, totals = args
        return b.add(totals, b.mul(b.add(I64(ROOM * row), n), I64(4)))

    def _at_group(self, b: Any, k: Any) -> Any:
        """Bytes from a row's begin."""
        return b.mul(b.sdiv(k, I64(GROUP)), I64(STEP_BYTES))

    def _lead(self, b: Any, stride: Any, column: Any, width: int, rows: int) -> Any:
        """Bytes from a strip to what is computed that far ahead, in these rows or in those after them."""
        there = b.add(column, I64(self.ahead))
        down = b.udiv(there, stride)
        return b.add(I64(self.ahead), b.mul(down, b.mul(stride, I64(rows - 1))))

    def _dot(self, b: Any, total: Any, codes: Sequence[Any], x: Any) -> Any:
        """`total + codes . x` of inputs from address `x` on, four to each vector of codes: 128 upper + lower."""
        name, upper = f"llvm.x86.avx512.vpdpbusd.{32 * self._lanes}", const(self._ints, 0)
        for i, four in enumerate(codes):
            upper = call(b, name, self._ints, [upper, four, splat(b, load(b, x, I32, 4 * i), self._lanes)])
            total = call(b, name, self._ints, [total, four, splat(b, load(b, x, I32, GROUP + 4 * i), self._lanes)])
        return b.add(b.shl(upper, const(self._ints, 7)), total)

    def _add_dots(self, b: Any, x: Any, middle: Sequence[Any], dots: Sequence[Any], totals: Any) -> None:
        """`totals += step * (dot - zero * sum)` of a group at `x`; what is in brackets is exact."""
        step, total = (splat(b, load(b, x, F32, 2 * GROUP + at_), self._lanes) for at_ in (0, 4))
        for v, (zero, dot) in enumerate(zip(middle, dots, strict=True)):
            value = self._fma(b, b.fneg(zero), total, b.sitofp(dot, self._floats))
            place = at(b, totals, self._floats, 4 * self._lanes * v)
            b.store(self._fma(b, value, step, b.load(place, align=4)), place, align=4)

    def _scales_at(self, b: Any, scales: Any, place: tuple[Any, Any, Any], v: int) -> Any:
        k, N, n = place
        size = I64(4 if self._fmt.scale == "float32" else 2)
        output = b.add(b.add(b.mul(b.sdiv(k, I64(self._group)), N), n), I64(v * self._lanes))
        here = b.add(scales, b.mul(output, size))
        prefetch(b, b.add(here, b.mul(N, size)))  # those of the next group
        return self._scale(b, here)

    def quantise(self) -> None:
        """One row to 16 bits. A group that holds an inf or a nan makes all of the row's outputs nan."""
        kernel = ir.Function(self.module, ir.FunctionType(VOID, [I64] * 3), "quantise")
        x, G, row = kernel.args
        b, floats, order = (
            ir.IRBuilder(kernel.append_basic_block()),
            vec(F32, GROUP),
            const(vec(I32, GROUP), self.order),
        )
        with loop(b, G) as g:
            q, top = to_16_bits(b, load(b, x, floats, b.mul(g, I64(4 * GROUP))))
            place, mixed = b.add(row, b.mul(g, I64(STEP_BYTES))), b.shuffle_vector(q, q, order)
            for part, values in enumerate((b.ashr(mixed, const(q.type, 7)), b.and_(mixed, const(q.type, 127)))):
                target = at(b, place, vec(I8, GROUP), GROUP * part)
                b.store(b.trunc(values, vec(I8, GROUP)), target, align=1)
            total = call(b, "llvm.vector.reduce.add.v32i32", I32, [q])
            b.store(b.fmul(top, F32(1 / TOP)), at(b, place, F32, 2 * GROUP), align=1)
            b.store(b.sitofp(total, F32), at(b, place, F32, 2 * GROUP + 4), align=1)
        b.ret_void()


class _Words(_WideColumns):
    """GPTQ: a word is eight inputs of an output, a lane is an output."""

    order = tuple(8 * word + i for word in range(GROUP // 8) for i in (0, 2, 4, 6, 1, 3, 5, 7))
    rows = (4, 2, 1)
    shares = (0,)
    ahead = 24 * LINE

    def strips(self, rows: int) -> Sequence[int]:
        return (64 if rows == 1 else 32, 16, 8)

    def _over(self, b: Any, N: Any, rows: int) -> Iterator[tuple[int, Any]]:
        strips = self.strips(rows)
        for eights, n in blocks(b, b.sdiv(N, I64(8)), [outputs // 8 for outputs in strips]):
            yield 8 * eights, b.mul(n, I64(8))

    def _product(self, outputs: int, rows: int, share: int) -> Any:
        tile = internal(self.module, f"product{outputs}x{rows}", 8)
        codes, zeros, K, N, k, n, pairs, _ = args = tile.args
        b = ir.IRBuilder(tile.append_basic_block())
        self._set(outputs)
        vectors, words = outputs // self._lanes, GROUP // 8
        x = [b.add(load(b, pairs, I64, 16 * r), self._at_group(b, k)) for r in range(rows)]
        stride, width = b.mul(N, I64(4)), 4 * outputs
        ahead = self._lead(b, stride, b.mul(n, I64(4)), width, words)
        begin = b.add(codes, b.mul(n, I64(4)))
        some: list[list[Any]] = [[] for _ in range(vectors)]
        for j in range(words):
            here, last = b.add(b.sdiv(k, I64(8)), I64(j)), b.sub(b.sdiv(K, I64(8)), I64(1))
            here = b.select(b.icmp_signed("<", here, last), here, last)  # rows have zeros for inputs that are not there
            here = b.add(begin, b.mul(here, stride))
            for line in range(0, width, LINE):
                prefetch(b, b.add(here, ahead), line)
            for v, codes_of in enumerate(some):
                held = load(b, here, vec(I8, 4 * self._lanes), 4 * self._lanes * v)
                nibbles = b.and_(held, const(held.type, 15)), b.lshr(held, const(held.type, 4))
                codes_of.extend(b.bitcast(part, self._ints) for part in nibbles)
        packed = b.add(zeros, b.sdiv(b.add(b.mul(b.sdiv(k, I64(self._group)), N), n), I64(2)))
        middle = [self._zero(b, b.add(packed, I64(v * self._lanes // 2))) for v in range(vectors)]
        for r, row in enumerate(x):
            dots = [self._dot(b, const(self._ints, 0), fours, row) for fours in some]
            self._add_dots(b, row, middle, dots, self._totals(b, args, r))
        b.ret_void()
        return tile

    def _set(self, outputs: int) -> None:
        self._lanes = min(LANES, outputs)
        self._floats, self._ints = vec(F32, self._lanes), vec(I32, self._lanes)

    def _zero(self, b: Any, place: Any) -> Any:
        held = b.and_(self._nibbles(b, place), const(self._ints, 15))
        return b.fadd(b.uitofp(held, self._floats), const(self._floats, 1.0))

    def _end(self, outputs: int, rows: int) -> Any:
        tile = internal(self.module, f"end{outputs}x{rows}", 8)
        scales, _, _, N, k, n, pairs, _ = args = tile.args
        b = ir.IRBuilder(tile.append_basic_block())
        self._set(outputs)
        for v in range(outputs // self._lanes):
            scale = self._scales_at(b, scales, (k, N, n), v)
            for r in range(rows):
                total = load(b, self._totals(b, args, r), self._floats, 4 * self._lanes * v)
                row = b.add(load(b, pairs, I64, 16 * r + 8), b.mul(n, I64(4)))
                out = at(b, row, self._floats, 4 * self._lanes * v)
                b.store(self._fma(b, scale, total, b.load(out, align=4)), out, align=4)
        b.ret_void()
        return tile


class _Rows(_WideColumns):
    """AWQ: a word is eight outputs of an input. A strip is 16 words' outputs, or what is left of them (0)."""

    order = range(GROUP)
    rows = (2, 1)
    shares = range(0, GROUP, NEAR)
    ahead = 32 * LINE

    def strips(self, rows: int) -> Sequence[int]:
        return (OUTPUTS, 0)

    def _over(self, b: Any, N: Any, rows: int) -> Iterator[tuple[int, Any]]:
        with loop(b, b.sdiv(N, I64(OUTPUTS))) as strip:
            yield OUTPUTS, b.mul(strip, I64(OUTPUTS))
        rest = b.srem(N, I64(OUTPUTS))
        with b.if_then(b.icmp_signed(">", rest, I64(0))):
            yield 0, b.sub(N, rest)

    def _product(self, outputs: int, rows: int, share: int) -> Any:
        tile = internal(self.module, f"product{outputs}x{rows}from{share}", 8)
        codes, zeros, K, N, k, n, pairs, _ = args = tile.args
        b = ir.IRBuilder(tile.append_basic_block())
        self._lanes, self._floats, self._ints = LANES, FLOATS, INTS
        words = None if outputs else b.sdiv(b.sub(N, n), I64(8))
        x = [b.add(load(b, pairs, I64, 16 * r), self._at_group(b, k)) for r in range(rows)]
        stride, column = b.sdiv(N, I64(2)), b.sdiv(n, I64(2))
        ahead, begin = self._lead(b, stride, column, LINE, NEAR), b.add(codes, column)
        held = []
        for i in range(share, share + NEAR):
            here, last = b.add(k, I64(i)), b.sub(K, I64(1))
            here = b.select(b.icmp_signed("<", here, last), here, last)  # rows have zeros for inputs that are not there
            here = b.add(begin, b.mul(here, stride))
            prefetch(b, b.add(here, ahead))
            held.append(self._held(b, here, words))
        mixed = [self._interleaved(b, held[i : i + 4]) for i in range(0, NEAR, 4)]
        some = [[self._half(b, four[v], half) for four in mixed] for half in (0, 1) for v in range(4)]
        places = [self._totals(b, args, r + max(self.rows)) for r in range(rows)]
        dots = [[self._known(b, place, v, share) for v in range(len(some))] for place in places]
        for v, fours in enumerate(some):
            for row, known in zip(x, dots, strict=True):
                known[v] = self._dot(b, known[v], fours, b.add(row, I64(share)))
        if share == self.shares[-1]:
            zero_row = b.add(zeros, b.add(b.mul(b.sdiv(k, I64(self._group)), stride), column))
            zero = self._interleaved(b, [self._held(b, zero_row, words), *[const(BYTES, 0)] * 3])
            middle = [b.uitofp(self._half(b, part, half), FLOATS) for half in (0, 1) for part in zero]
            for r, (row, known) in enumerate(zip(x, dots, strict=True)):
                self._add_dots(b, row, middle, known, self._totals(b, args, r))
        else:
            for place, known in zip(places, dots, strict=True):
                for v, dot in enumerate(known):
                    b.store(dot, at(b, place, INTS, LINE * v), align=4)
        b.ret_void()
        return tile

    def _known(self, b: Any, place: Any, v: int, share: int) -> Any:
        """What the shares before have come to."""
        return load(b, place, INTS, LINE * v) if share else const(INTS, 0)

    def _held(self, b: Any, place: Any, words: Any) -> Any:
        """A line of a row, or the words of it that are there and zeros."""
        if words is None:
            return load(b, place, BYTES)
        return first_items(b, place, b.mul(words, I64(4)), BYTES)

    def _half(self, b: Any, words: Any, half: int) -> Any:
        """Of each byte."""
        held = b.bitcast(words, BYTES)
        return b.bitcast(b.lshr(held, const(BYTES, 4)) if half else b.and_(held, const(BYTES, 15)), INTS)

    def _interleaved(self, b: Any, four: Sequence[Any]) -> list[Any]:
        """Four vectors of bytes as words of one byte of each; lane 4 c + i of vector v is byte 16 c + 4 v + i."""
        pairs = [[b.bitcast(part, HALVES) for part in _in_turn(b, two[0], two[1], 16)] for two in (four[:2], four[2:])]
        made = [part for first, second in zip(*pairs, strict=True) for part in _in_turn(b, first, second, 8)]
        return [b.bitcast(part, INTS) for part in made]

    def _end(self, outputs: int, rows: int) -> Any:
        """Word by word, in the order of outputs."""
        tile = internal(self.module, f"end{outputs}x{rows}", 8)
        scales, _, _, N, k, n, pairs, _ = args = tile.args
        b = ir.IRBuilder(tile.append_basic_block())
        words = b.sdiv(b.sub(N, n), I64(8))
        self._lanes, self._floats, self._ints = 8, vec(F32, 8), vec(I32, 8)
        outs = [b.add(load(b, pairs, I64, 16 * r + 8), b.mul(n, I64(4))) for r in range(rows)]
        totals = [self._totals(b, args, r) for r in range(rows)]
        lanes = [AWQ_ORDER.index(output) for output in range(8)]
        for word in range(OUTPUTS // 8):
            c, v = divmod(word, 4)
            order = const(self._ints, [4 * c + lane // 2 + LANES * (lane % 2) for lane in lanes])
            with nullcontext() if outputs else b.if_then(b.icmp_signed("<", I64(word), words)):
                scale = self._scales_at(b, scales, (k, N, n), word)
                for out, place in zip(outs, totals, strict=True):
                    low, high = (load(b, place, FLOATS, 4 * LANES * (4 * half + v)) for half in (0, 1))
                    target = at(b, out, self._floats, 32 * word)
                    value = self._fma(b, scale, b.shuffle_vector(low, high, order), b.load(target, align=4))
                    b.store(value, target, align=4)
        b.ret_void()
        return tile


def _in_turn(b: Any, one: Any, other: Any, per: int) -> list[Any]:
    """Items of both by turns, of the lower and of the upper halves of each `per`."""
    total = one.type.count
    made = []
    for begin in (0, per // 2):
        lanes = [c + begin + i for c in range(0, total, per) for i in range(per // 2)]
        order = [place for lane in lanes for place in (lane, lane + total)]
        made.append(b.shuffle_vector(one, other, const(vec(I32, total), order)))
    return made
