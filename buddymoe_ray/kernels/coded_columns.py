"""The product with a matrix of GPTQ or AWQ as a checkpoint stores it (see coded.py), as LLVM IR.

    project(codes, scales, zeros, K, N, rows, R)   rows are R pairs (address of a row, address of its outputs)

Such a matrix lies with its outputs side by side, so a lane is an output: the products of a group of inputs are added in
their order, times the group's scale to the output. Rows are float32; the bits of an output depend on its row and its
weights alone. A code becomes a float32 as the lowest bits of 2**23, from which that and the zero point are taken.

Legend: N outputs (a multiple of 8) and K inputs of the matrix, C groups of inputs, R rows, b an `ir.IRBuilder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from buddymoe_ray.kernels.coded_format import AWQ_ORDER
from buddymoe_ray.kernels.vector_ir import (
    F32,
    I16,
    I32,
    I64,
    VOID,
    at,
    blocks,
    call,
    const,
    internal,
    load,
    loop,
    prefetch,
    splat,
    vec,
)
from buddymoe_ray.types import CodeFormat

__all__ = ["Columns", "columns_module_text"]

SHIFTED, SHIFTED_BITS = float(1 << 23), 0x4B000000
WIDE, NARROW = 16, 8
MANY = (4, 2, 1)
"""Rows at once where there are several."""


def columns_module_text(fmt: CodeFormat) -> str:
    """The module's IR for matrices of `fmt`."""
    made = Columns(fmt)
    made.project()
    return str(made.module)


class Columns:
    """Emits one module. A tile is some vectors of outputs of some rows over one group of inputs."""

    def __init__(self, fmt: CodeFormat) -> None:
        self.module = ir.Module(name=f"columns-{fmt}")
        self._fmt, self._group = fmt, fmt.block[1]
        self._gptq = fmt.codes == "gptq"

    def project(self) -> None:
        """Group by group, so that all of its bytes are read in one go."""
        kernel = ir.Function(self.module, ir.FunctionType(VOID, [I64] * 7), "project")
        codes, scales, zeros, K, N, rows, R = kernel.args
        several = [(vectors, lanes, r) for vectors, lanes in ((2, WIDE), (1, WIDE), (1, NARROW)) for r in MANY]
        tiles = {shape: self._tile(*shape) for shape in ((4, WIDE, 1), *several)}
        b = ir.IRBuilder(kernel.append_basic_block())
        self.clear(b, rows, R, N)
        place = [codes, scales, zeros, K, N]
        groups, alone = b.sdiv(b.add(K, I64(self._group - 1)), I64(self._group)), b.icmp_signed("==", R, I64(1))
        with loop(b, groups) as group, b.if_else(alone) as (one, more):
            for branch, widest, together in ((one, 8, (1,)), (more, 4, MANY)):
                with branch:
                    self._outputs(b, tiles, [*place, group], (widest, together), (rows, R))
        b.ret_void()

    def clear(self, b: Any, rows: Any, R: Any, N: Any) -> None:
        """Outputs to zeros."""
        with loop(b, R) as r:
            out = load(b, rows, I64, b.add(b.mul(r, I64(16)), I64(8)))
            with loop(b, N) as n:
                b.store(F32(0.0), at(b, out, F32, b.mul(n, I64(4))), align=4)

    def _outputs(
        self, b: Any, tiles: Any, place: list[Any], shape: tuple[int, tuple[int, ...]], rows: tuple[Any, Any]
    ) -> None:
        """Of one group and all rows; the widest tiles are of so many times eight."""
        (widest, together), (pairs, R) = shape, rows
        for eights, n in blocks(b, b.sdiv(place[4], I64(NARROW)), (widest, 2, 1)):
            tile = (max(1, eights // 2), WIDE if eights > 1 else NARROW)
            for size, row in blocks(b, R, together):
                at_rows = b.add(pairs, b.mul(row, I64(16)))
                b.call(tiles[*tile, size], [*place, b.mul(n, I64(NARROW)), at_rows])

    def _tile(self, vectors: int, lanes: int, rows: int) -> Any:
        tile = internal(self.module, f"tile{vectors}x{lanes}x{rows}", 8)
        codes, scales, zeros, K, N, group, n, pairs = tile.args
        b = ir.IRBuilder(tile.append_basic_block())
        self._lanes, self._floats, self._ints = lanes, vec(F32, lanes), vec(I32, lanes)
        first = b.mul(group, I64(self._group))
        left = b.sub(K, first)
        count = b.select(b.icmp_signed("<", left, I64(self._group)), left, I64(self._group))
        x = [b.add(load(b, pairs, I64, 16 * r), b.mul(first, I64(4))) for r in range(rows)]
        out = [b.add(load(b, pairs, I64, 16 * r + 8), b.mul(n, I64(4))) for r in range(rows)]
        sums = [[b.alloca(self._floats) for _ in range(vectors)] for _ in x]
        for place in (place for row in sums for place in row):
            b.store(const(self._floats, 0.0), place)
        packed = b.add(zeros, b.sdiv(b.add(b.mul(group, N), n), I64(2)))
        middle = [self._zeros(b, b.add(packed, I64(v * lanes // 2))) for v in range(vectors)]
        parts = x, middle, sums
        if self._gptq:
            begin = b.mul(b.add(b.mul(b.sdiv(first, I64(8)), N), n), I64(4))
            self._add_words(b, b.add(codes, begin), b.mul(N, I64(4)), b.sdiv(count, I64(8)), parts)
        else:
            begin = b.sdiv(b.add(b.mul(first, N), n), I64(2))
            self._add_rows(b, b.add(codes, begin), b.sdiv(N, I64(2)), count, parts)
        size = 4 if self._fmt.scale == "float32" else 2
        for v in range(vectors):
            scale = self._scale(b, b.add(scales, b.mul(b.add(b.add(b.mul(group, N), n), I64(v * lanes)), I64(size))))
            for r, place in enumerate(out):
                total = at(b, place, self._floats, 4 * lanes * v)
                b.store(self._fma(b, scale, b.load(sums[r][v]), b.load(total, align=4)), total, align=4)
        b.ret_void()
        return tile

    def _add_words(self, b: Any, place: Any, stride: Any, count: Any, parts: tuple[Any, Any, Any]) -> None:
        """GPTQ: a word is eight inputs of an output."""
        x, middle, sums = parts
        with loop(b, count) as j:
            here = b.add(place, b.mul(j, stride))
            words = [load(b, here, self._ints, 4 * self._lanes * v) for v in range(len(middle))]
            for line in range(0, 4 * self._lanes * len(middle), 64):
                prefetch(b, here, 4 * self._lanes * len(middle) + line)
            for i in range(8):
                shifted = [b.lshr(word, const(self._ints, 4 * i)) if i else word for word in words]
                self._add(
                    b, shifted, [load(b, row, F32, b.add(b.mul(j, I64(32)), I64(4 * i))) for row in x], middle, sums
                )

    def _add_rows(self, b: Any, place: Any, stride: Any, count: Any, parts: tuple[Any, Any, Any]) -> None:
        """AWQ: a word is eight outputs of an input."""
        x, middle, sums = parts
        with loop(b, count) as k:
            here = b.add(place, b.mul(k, stride))
            prefetch(b, here, 64)
            codes = [self._nibbles(b, b.add(here, I64(self._lanes // 2 * v))) for v in range(len(middle))]
            self._add(b, codes, [load(b, row, F32, b.mul(k, I64(4))) for row in x], middle, sums)

    def _add(
        self, b: Any, codes: Sequence[Any], x: Sequence[Any], middle: Sequence[Any], sums: list[list[Any]]
    ) -> None:
        """`sums += (codes - middle) * x` of one input; codes are the lowest four bits."""
        values = []
        for code, zero in zip(codes, middle, strict=True):
            bits = b.or_(b.and_(code, const(self._ints, 15)), const(self._ints, SHIFTED_BITS))
            values.append(b.fsub(b.bitcast(bits, self._floats), zero))
        for one, places in zip(x, sums, strict=True):
            wide = splat(b, one, self._lanes)
            for value, total in zip(values, places, strict=True):
                b.store(self._fma(b, value, wide, b.load(total)), total)

    def _nibbles(self, b: Any, place: Any) -> Any:
        """Of outputs side by side, each in the lowest four bits of a lane."""
        count = self._lanes // 8
        words = load(b, place, vec(I32, count))
        spread = b.shuffle_vector(words, words, const(self._ints, [lane // 8 for lane in range(self._lanes)]))
        order = range(8) if self._gptq else [AWQ_ORDER.index(n) for n in range(8)]
        return b.lshr(spread, const(self._ints, [4 * order[lane % 8] for lane in range(self._lanes)]))

    def _zeros(self, b: Any, place: Any) -> Any:
        """Zero points and 2**23."""
        held = b.and_(self._nibbles(b, place), const(self._ints, 15))
        return b.fadd(b.uitofp(held, self._floats), const(self._floats, SHIFTED + (1.0 if self._gptq else 0.0)))

    def _scale(self, b: Any, place: Any) -> Any:
        if self._fmt.scale == "float32":
            return load(b, place, self._floats)
        if self._fmt.scale == "float16":
            return b.fpext(load(b, place, vec(ir.HalfType(), self._lanes)), self._floats)
        words = b.zext(load(b, place, vec(I16, self._lanes)), self._ints)
        return b.bitcast(b.shl(words, const(self._ints, 16)), self._floats)

    def _fma(self, b: Any, x: Any, y: Any, z: Any) -> Any:
        return call(b, f"llvm.fma.v{self._lanes}f32", self._floats, [x, y, z])
