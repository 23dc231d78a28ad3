"""The low-bit matrix product as LLVM IR: tiles of packed codes times rows of activations.

`module_text` writes one module for a width of codes, a kind of activations and an instruction set:

    project(codes, scales, base, K, N, rows, R)   rows are R pairs (address of a row, address of its outputs)
    quantise(x, G, row)                           float32 x [32 G] into a row of 16-bit activations, if `wide`

all int64 addresses or counts. Rows and outputs are padded: to G groups of 32 inputs, A blocks of 16 outputs. Row kinds:
    float32  32 G floats; weights are dequantised in registers and multiplied with fused multiply-add
    wide     32 G 16-bit integers, 64 bytes to a group, then G pairs (float32 step, int32 correction). A group's dot
             product, less the codes' midpoint, is an exact integer: rounded once when it becomes a float, and rounded
             again by the one multiply-add that adds it to the output. Error 4e-5 of the output's norm.
Either way groups are added in rising order, one lane to an output, so that the bits of a row depend on nothing but the
row: not on the rows beside it, nor on the instruction set. Rows go in blocks, a tile being unpacked once for a block.

Reads codes, scales and rows to their last byte and no further; prefetches beyond never fault. Does not know records,
experts or who compiles the text. Neighbours: machine_code.py compiles it, expert_numba.py calls it.

Tried and dropped: 8-bit activations (up to 1.8 times the rate from 8 rows on; error 5e-3); no prefetch (2.7 times as
long at 8 rows); with 16 registers and 8 rows, all 16 outputs at once or unrolled vectors (what does not fit goes by the
stack: 1.6 times as long); byte products (`vpmaddubsw`) on AVX2 (as fast as 16-bit ones, and saturate at 8 bits); fp16
scales (a call into libgcc where F16C is missing).

Legend: A blocks of 16 outputs, G groups of 32 inputs, R rows, b an `ir.IRBuilder`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import torch
from llvmlite import ir

from buddymoe_ray.kernels.lowbit_format import BLOCK, GROUP, LowbitFormat
from buddymoe_ray.kernels.lowbit_scales import scales_of_16, scales_of_octaves
from buddymoe_ray.kernels.trellis_tiles import levels_of_quad
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
    internal,
    load,
    loop,
    prefetch,
    splat,
    vec,
)

__all__ = ["LEVELS", "TOP", "Level", "host_level", "module_text", "to_16_bits"]

QUADS = GROUP // 4
ROW_BLOCKS = (8, 4, 2, 1)
TOGETHER = 2
"""Up to so many rows all 16 outputs are computed at once where a vector has 8: more would not fit into 16 registers."""
AHEAD = 8192
"""Bytes that the codes' prefetch runs ahead."""
TOP = 16256
"""The largest 16-bit activation: 127 * 128, whose upper part is a signed byte and whose lower part 7 bits."""
MAGIC, MAGIC_BITS = 12582912.0, 0x4B400000  # 1.5 * 2**23: adding it rounds to an integer, which the low bits then are


class Level(NamedTuple):
    """An instruction set: lanes of a vector of float32 (tiles are computed in parts of as many outputs), whether dot
    products are taken by vpdpbusd (`vnni`), else by AVX2's vpmaddwd, or in plain IR, and how trellis codes are read."""

    lanes: int
    vnni: bool
    avx2: bool
    windows: str


LEVELS = {
    "avx512vbmi": Level(lanes=16, vnni=True, avx2=True, windows="vbmi"),
    "avx512vnni": Level(lanes=16, vnni=True, avx2=True, windows="shuffles"),
    "avxvnni": Level(lanes=8, vnni=True, avx2=True, windows="shuffles"),
    "avx2": Level(lanes=8, vnni=False, avx2=True, windows="shuffles"),
    "plain": Level(lanes=8, vnni=False, avx2=False, windows="plain"),
}


def host_level() -> str:
    """The best level of this CPU."""
    has = llvm.get_host_cpu_features()
    if has.get("avx512vnni") and has.get("avx512vl") and has.get("avx512bw"):
        return "avx512vbmi" if has.get("avx512vbmi") else "avx512vnni"
    if not (has.get("avx2") and has.get("fma")):
        return "plain"
    return "avxvnni" if has.get("avxvnni") else "avx2"


def module_text(fmt: LowbitFormat, *, wide: bool, level: str) -> str:
    """The module's IR."""
    made = _Tiles(fmt, LEVELS[level], wide)
    made.project()
    if wide:
        made.quantise()
    return str(made.module)


class _Row(NamedTuple):
    """One row of activations in a tile: its address, and for each part of the outputs that is computed with the others
    the places of a group's sums and of the totals."""

    x: Any
    sums: list[Any]
    totals: list[Any]


class _Part(NamedTuple):
    """A tile and those of its outputs that are computed."""

    tile: Any
    outputs: range


class _Tiles:
    """Emits one module."""

    def __init__(self, fmt: LowbitFormat, level: Level, wide: bool) -> None:
        self.module = ir.Module(name="lowbit")
        self._fmt, self._level, self._wide, self._unrolled = fmt, level, wide, False
        self._scale_bytes = BLOCK * fmt.scale_bits // 8
        self._bytes, self._words, self._ints, self._floats = (
            vec(kind, level.lanes * count) for kind, count in ((I8, 4), (I16, 2), (I32, 1), (F32, 1))
        )

    def project(self) -> None:
        """Every block of outputs times every block of rows."""
        tiles = {rows: self._tile(rows) for rows in ROW_BLOCKS}
        kernel = ir.Function(self.module, ir.FunctionType(VOID, [I64] * 7), "project")
        codes, scales, base, K, N, rows, R = kernel.args
        b = ir.IRBuilder(kernel.append_basic_block())
        G, A = (b.sdiv(b.add(size, I64(whole - 1)), I64(whole)) for size, whole in ((K, GROUP), (N, BLOCK)))
        code_stride, scale_stride = (b.mul(G, I64(size)) for size in (self._fmt.tile_bytes, self._scale_bytes))
        with loop(b, A) as block:
            places = [b.add(codes, b.mul(block, code_stride)), b.add(scales, b.mul(block, scale_stride)), base, G]
            column = b.mul(block, I64(4 * BLOCK))
            for size, row in blocks(b, R, tiles):
                b.call(tiles[size], [*places, b.add(rows, b.mul(row, I64(16))), column])
        b.ret_void()

    def _tile(self, rows: int) -> Any:
        """16 outputs of `rows` rows, over all groups."""
        tile = internal(self.module, f"tile{rows}", 6)
        codes, scales, base, G, pairs, column = tile.args
        # with few registers and many rows the vectors are a loop, for LLVM's scheduler would hold all of them at once
        self._unrolled = self._level.lanes == 16 or rows == 1
        b = ir.IRBuilder(tile.append_basic_block())
        x = [load(b, pairs, I64, 16 * r) for r in range(rows)]
        y = [b.add(load(b, pairs, I64, 16 * r + 8), column) for r in range(rows)]
        lanes = self._level.lanes
        firsts = range(0, BLOCK, lanes)
        totals = [[b.alloca(self._floats) for _ in firsts] for _ in x]
        together = [list(firsts)] if self._wide and rows <= TOGETHER else [[first] for first in firsts]
        sums = [[b.alloca(self._ints if self._wide else self._floats) for _ in together[0]] for _ in x]
        for total in chain(*totals):
            b.store(const(self._floats, 0.0), total)
        with loop(b, G) as g:
            place = b.add(codes, b.mul(g, I64(self._fmt.tile_bytes)))
            for line in range(self._fmt.bits):
                prefetch(b, place, AHEAD + 64 * line)
            for some in together:
                codes_at = [_Part(place, range(first, first + lanes)) for first in some]
                scales_at = [_Part(b.add(scales, b.mul(g, I64(self._scale_bytes))), part.outputs) for part in codes_at]
                theirs = [[row[first // lanes] for first in some] for row in totals]
                rows_at = [_Row(*row) for row in zip(x, sums, theirs, strict=True)]
                self._add_group(b, (codes_at, scales_at, base), rows_at, (g, G))
        for row, out in zip(totals, y, strict=True):
            for first, total in zip(firsts, row, strict=True):
                b.store(b.load(total), at(b, out, self._floats, 4 * first), align=4)
        b.ret_void()
        return tile

    def _add_group(self, b: Any, parts: tuple[Any, Any, Any], rows: list[_Row], at_g: tuple[Any, Any]) -> None:
        """`total += scale * (codes - midpoint) . x` of one group and some parts of its outputs."""
        (codes_at, scales_at, base), (g, G) = parts, at_g
        group_bytes = (2 if self._wide else 4) * GROUP
        here = [row._replace(x=b.add(row.x, b.mul(g, I64(group_bytes)))) for row in rows]
        if not self._wide:
            [codes], [place] = codes_at, scales_at
            self._add_floats(b, codes, self._scales(b, place, base), here)
            return
        for place in chain(*(row.sums for row in here)):
            b.store(const(self._ints, 0), place)
        (self._dots_of_bytes if self._level.vnni else self._dots_of_words)(b, codes_at, here)
        scales = [self._scales(b, place, base) for place in scales_at]
        tail = b.add(b.mul(G, I64(2 * GROUP)), b.mul(g, I64(8)))
        for row in rows:
            step = splat(b, load(b, row.x, F32, tail), self._level.lanes)
            centre = splat(b, load(b, row.x, I32, b.add(tail, I64(4))), self._level.lanes)
            for scale, dot_at, total in zip(scales, row.sums, row.totals, strict=True):
                dot = b.load(dot_at)
                value = b.sitofp(b.add(b.add(dot, dot), centre), self._floats)  # twice: the midpoint is a half
                b.store(self._fma(b, value, b.fmul(scale, step), b.load(total)), total)

    def _quads(self, b: Any, tiles: list[_Part], part: int = 0, parts: int = 1) -> Iterator[tuple[Any, list[Any]]]:
        """The levels of tiles, or of one part of their inputs, a byte each: `(j, every tile's quad j)`, vector by
        vector."""
        if self._fmt.trellis:
            yield from self._trellis_quads(b, tiles, I64(part * QUADS // parts), QUADS // parts)
            return
        width = self._fmt.bits
        fields = range(0, QUADS, width)
        if width < parts:  # a vector has quads of every part
            fields = fields[part * QUADS // parts : (part + 1) * QUADS // parts]
            part, parts = 0, 1
        begin, count = part * width // parts, width // parts
        if self._unrolled:
            for first in range(begin, begin + count):
                yield from self._vectors(b, tiles, I64(first), fields)
        else:
            with loop(b, I64(count)) as turn:
                yield from self._vectors(b, tiles, b.add(turn, I64(begin)), fields)

    def _trellis_quads(self, b: Any, tiles: list[_Part], first: Any, count: int) -> Iterator[tuple[Any, list[Any]]]:
        def quad(turn: Any) -> tuple[Any, list[Any]]:
            j, bits, kind = b.add(first, turn), self._fmt.bits, self._level.windows
            at_j = b.mul(j, I64(self._fmt.tile_bytes // QUADS))
            return j, [levels_of_quad(b, b.add(tile, at_j), bits, outputs, kind) for tile, outputs in tiles]

        if self._unrolled:
            yield from map(quad, map(I64, range(count)))
        else:
            with loop(b, I64(count)) as turn:
                yield quad(turn)

    def _vectors(self, b: Any, tiles: list[_Part], first: Any, fields: range) -> Iterator[tuple[Any, list[Any]]]:
        for same in zip(*(self._vector(b, tile, first, fields) for tile in tiles), strict=True):
            yield same[0][0], [quad for _, quad in same]

    def _vector(self, b: Any, tile: _Part, first: Any, fields: range) -> Iterator[tuple[Any, Any]]:
        """The quads of a vector, `first + i` for each of its `fields` i."""
        vector = load(b, tile.tile, self._bytes, b.add(b.mul(first, I64(64)), I64(4 * tile.outputs.start)))
        for i in fields:
            yield b.add(first, I64(i)), _field(b, vector, i, fields.step)

    def _scales(self, b: Any, part: _Part, base_at: Any) -> Any:
        read = scales_of_16 if self._fmt.scale_bits == 4 else scales_of_octaves
        return read(b, part.tile, base_at, part.outputs, avx2=self._level.avx2)

    def _dots_of_bytes(self, b: Any, codes: list[Any], rows: list[_Row]) -> None:
        """By vpdpbusd: the upper bytes of the activations first, then the lower 7 bits."""
        # the operands are the older ones, int32 throughout: LLVM takes them for the newer when it reads the text
        name = f"llvm.x86.avx512.vpdpbusd.{32 * self._level.lanes}"
        for part in (0, GROUP):
            if part:
                for place in chain(*(row.sums for row in rows)):
                    b.store(b.shl(b.load(place), const(self._ints, 7)), place)
            for j, quads in self._quads(b, codes):
                for row in rows:
                    four = load(b, row.x, I32, b.add(b.mul(j, I64(4)), I64(part)))
                    x = splat(b, four, self._level.lanes)
                    for quad, place in zip(quads, row.sums, strict=True):
                        operands = [b.load(place), b.bitcast(quad, self._ints), x]
                        b.store(call(b, name, self._ints, operands), place)

    def _dots_of_words(self, b: Any, codes: list[Any], rows: list[_Row]) -> None:
        """By 16-bit products of even and of odd inputs, which `quantise` has put side by side."""
        for j, quads in self._quads(b, codes):
            pairs = [b.bitcast(quad, self._words) for quad in quads]
            for odd in (0, 1):
                shift, mask = const(self._words, 8), const(self._words, 255)
                words = [b.lshr(pair, shift) if odd else b.and_(pair, mask) for pair in pairs]
                for row in rows:
                    two = splat(b, load(b, row.x, I32, b.add(b.mul(j, I64(8)), I64(4 * odd))), self._level.lanes)
                    x = b.bitcast(two, self._words)
                    for word, place in zip(words, row.sums, strict=True):
                        b.store(b.add(b.load(place), self._dot_words(b, word, x)), place)

    def _dot_words(self, b: Any, words: Any, x: Any) -> Any:
        if self._level.avx2:
            return call(b, "llvm.x86.avx2.pmadd.wd", self._ints, [words, x])
        products = []
        for odd in (0, 1):
            lanes = const(self._ints, range(odd, 2 * self._level.lanes, 2))
            products.append(b.mul(*(b.sext(b.shuffle_vector(v, v, lanes), self._ints) for v in (words, x))))
        return b.add(*products)

    def _add_floats(self, b: Any, codes: Any, scale: Any, rows: list[_Row]) -> None:
        """In two sums of 16 inputs, so that neither is a long chain."""
        middle, lanes = const(self._floats, self._fmt.midpoint), self._level.lanes
        for part in (0, 1):
            for row in rows:
                b.store(const(self._floats, 0.0), row.sums[0])
            for j, [quad] in self._quads(b, [codes], part, 2):
                for i in range(4):
                    code = b.and_(b.lshr(b.bitcast(quad, self._ints), const(self._ints, 8 * i)), const(self._ints, 255))
                    weight = b.fsub(b.sitofp(code, self._floats), middle)
                    for row in rows:
                        x = splat(b, load(b, row.x, F32, b.add(b.mul(j, I64(16)), I64(4 * i))), lanes)
                        b.store(self._fma(b, weight, x, b.load(row.sums[0])), row.sums[0])
            for row in rows:
                b.store(self._fma(b, b.load(row.sums[0]), scale, b.load(row.totals[0])), row.totals[0])

    def _fma(self, b: Any, x: Any, y: Any, z: Any) -> Any:
        return call(b, f"llvm.fma.v{self._level.lanes}f32", self._floats, [x, y, z])

    def quantise(self) -> None:
        """One row to 16 bits. A group that holds an inf or a nan makes all of the row's outputs nan."""
        kernel = ir.Function(self.module, ir.FunctionType(VOID, [I64] * 3), "quantise")
        x, G, row = kernel.args
        b = ir.IRBuilder(kernel.append_basic_block())
        floats = vec(F32, GROUP)
        tail = b.add(row, b.mul(G, I64(2 * GROUP)))
        with loop(b, G) as g:
            value = load(b, x, floats, b.mul(g, I64(4 * GROUP)))
            q, top = to_16_bits(b, value)
            self._store_row(b, q, b.add(row, b.mul(g, I64(2 * GROUP))))
            total = call(b, "llvm.vector.reduce.add.v32i32", I32, [q])
            pair = b.mul(g, I64(8))
            b.store(b.fmul(top, F32(_float32(0.5 / TOP))), at(b, tail, F32, pair))
            b.store(b.mul(total, I32(-int(2 * self._fmt.midpoint))), at(b, tail, I32, b.add(pair, I64(4))))
        b.ret_void()

    def _store_row(self, b: Any, q: Any, place: Any) -> None:
        kind = q.type
        if self._level.vnni:
            parts = [b.ashr(q, const(kind, 7)), b.and_(q, const(kind, 127))]
            for i, part in enumerate(parts):
                b.store(b.trunc(part, vec(I8, GROUP)), at(b, place, vec(I8, GROUP), GROUP * i), align=1)
            return
        order = [4 * j + i for j in range(QUADS) for i in (0, 2, 1, 3)]
        mixed = b.shuffle_vector(q, q, const(vec(I32, GROUP), order))
        b.store(b.trunc(mixed, vec(I16, GROUP)), at(b, place, vec(I16, GROUP)), align=1)


def to_16_bits(b: Any, value: Any) -> tuple[Any, Any]:
    """A group of float32 as int32 between -TOP and TOP, in steps of its largest size over TOP, and that size; nan for a
    group that holds an inf or a nan."""
    floats, ints = vec(F32, GROUP), vec(I32, GROUP)
    sizes = b.and_(b.bitcast(value, ints), const(ints, 0x7FFFFFFF))  # in integers nan > inf > all else
    largest = call(b, "llvm.vector.reduce.smax.v32i32", I32, [sizes])
    finite = b.icmp_signed("<", largest, I32(0x7F800000))
    top = b.select(finite, b.bitcast(largest, F32), F32(float("nan")))
    counts = b.fcmp_ordered(">", top, F32(1e-30))  # smaller groups count as zeros
    inverse = b.select(counts, b.fdiv(F32(float(TOP)), top), F32(0.0))
    shifted = b.fadd(b.fmul(value, splat(b, inverse, GROUP)), const(floats, MAGIC))
    q = b.sub(b.bitcast(shifted, ints), const(ints, MAGIC_BITS))
    return q, top


def _field(b: Any, vector: Any, shift: int, width: int) -> Any:
    if width == 8:
        return vector
    moved = b.lshr(vector, const(vector.type, shift)) if shift else vector
    return b.and_(moved, const(vector.type, (1 << width) - 1))


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))
