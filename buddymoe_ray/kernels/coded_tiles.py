"""The product with a quantised matrix as a checkpoint stores it (see coded.py), as LLVM IR.

    project(codes, scales, zeros, K, N, rows, R)   rows are R pairs (address of a row, address of its outputs)
    spread(x, G, row)                              inputs in the order in which codes come out of their bytes

As stored_tiles.py, whose tiles these are: float32 rows, 16 sums to an output, the bits of an output depend on its row
and its weights alone. Codes become float32 exactly; the sums of a block are multiplied by its scale once. Codes that
are no number (e4m3 has two) count as ±480: quantisers write none, and files are not read for them.

Blocks of 16 inputs are multiplied one by one. A global scale comes last, to the output.

e4m3 and e2m1 go by float16, whose exponents they fit into, shifted: the difference of the biases is part of the scale.
e4m3 in blocks of whole lines needs no such conversion: see coded_fp8.py.
With AVX-512 a code of 4 bits is looked up in one permute instead. Reads codes and scales to their last byte and no
further.

Tried and dropped: blocks of fp8 unrolled (.8 times as fast: registers do not do); e4m3 by float16 throughout (.8); 2
outputs of 8 rows at once (.7 times as fast as 4 of 4).

Legend: N outputs and K inputs of the matrix, C columns of scales, R rows, b an `ir.IRBuilder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

from buddymoe_ray.kernels.coded_format import E2M1, FP4
from buddymoe_ray.kernels.coded_fp8 import as_floats, bfloat16s
from buddymoe_ray.kernels.lowbit_format import GROUP
from buddymoe_ray.kernels.stored_tiles import FLOATS, INTS, LANES, LINE, MANY_ROWS, ONE_ROW, StoredTiles, lane_sum
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

__all__ = ["SCALE_BYTES", "CodedTiles", "coded_module_text", "has_permutes"]

BYTES = vec(I8, LANES)
ONE_ROW_OF_32 = {8: (1,), 1: (1,)}
MANY_ROWS_OF_32 = {4: (4, 2, 1), 1: (4, 2, 1)}
"""With 32 registers: many rows are 1.4 times as fast."""
_AT_ONCE = 8
"""Scales that are converted at once where blocks are small."""
SCALE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "e8m0": 1, "float8_e4m3fn": 1}


def has_permutes() -> bool:
    """Whether this CPU looks 16 floats up at once."""
    return bool(llvm.get_host_cpu_features().get("avx512f"))


def coded_module_text(fmt: CodeFormat, *, permutes: bool) -> str:
    """The module's IR for matrices of `fmt`."""
    made = CodedTiles(fmt, permutes)
    made.project()
    if made.order is not None:
        made.spread()
    return str(made.module)


class CodedTiles(StoredTiles):
    """Emits one module. For one row codes come so many tiles ahead."""

    _tiles_ahead = 2

    def __init__(self, fmt: CodeFormat, permutes: bool) -> None:
        self.module = ir.Module(name=f"coded-{fmt}")
        self._fmt, self._permutes = fmt, permutes
        self._one = ONE_ROW_OF_32 if permutes else ONE_ROW
        self._many = MANY_ROWS_OF_32 if permutes else MANY_ROWS
        self.two_to_a_byte = fmt.codes in ("int4", *FP4)
        self._by_lines = fmt.codes == "fp8" and fmt.block[1] % LINE == 0
        self._group = (
            LINE if self._by_lines else min(GROUP, fmt.block[1] or GROUP)
        )  # inputs that are multiplied at once
        self._group_bytes = self._group // 2 if self.two_to_a_byte else self._group
        self._factor = 2.0 ** (8 * (fmt.scale == "float8_e4m3fn"))  # what is left of float16's bias
        if fmt.codes == "fp8":
            self._factor *= 2.0**8
        elif fmt.codes in FP4 and not permutes:
            self._factor *= 2.0**14

    def project(self) -> None:
        """Every block of outputs times every block of rows."""
        shapes = (self._one, self._many)
        tiles = {
            (outputs, rows): self._tile(outputs, rows)
            for outputs, rows in sorted({(o, r) for shape in shapes for o, several in shape.items() for r in several})
        }
        kernel = ir.Function(self.module, ir.FunctionType(VOID, [I64] * 7), "project")
        codes, scales, zeros, K, N, rows, R = kernel.args
        b = ir.IRBuilder(kernel.append_basic_block())
        stride = b.mul(_ceil(b, K, 8), I64(4)) if self.two_to_a_byte else K
        with b.if_else(b.icmp_signed("==", R, I64(1))) as branches:
            for branch, shape in zip(branches, shapes, strict=True):
                with branch:
                    for outputs, n in blocks(b, N, shape):
                        place, column = b.add(codes, b.mul(n, stride)), b.mul(n, I64(4))
                        for size, row in blocks(b, R, shape[outputs]):
                            pairs = b.add(rows, b.mul(row, I64(16)))
                            b.call(tiles[outputs, size], [place, stride, scales, zeros, n, K, pairs, column])
        b.ret_void()

    def _tile(self, outputs: int, rows: int) -> Any:
        """Some outputs of some rows, over all inputs."""
        tile = internal(self.module, f"tile{outputs}x{rows}", 8)
        codes, stride, scales, zeros, n, K, pairs, column = tile.args
        b = ir.IRBuilder(tile.append_basic_block())
        self._ahead = b.mul(stride, I64(outputs * (self._tiles_ahead if rows == 1 else 2)))
        self._w = [b.add(codes, b.mul(stride, I64(i))) for i in range(outputs)]
        self._x = [load(b, pairs, I64, 16 * r) for r in range(rows)]
        y = [b.add(load(b, pairs, I64, 16 * r + 8), column) for r in range(rows)]
        self._sums, self._totals = ([[b.alloca(FLOATS) for _ in self._w] for _ in y] for _ in range(2))
        self._part = [self._room(b) for _ in self._w]
        inputs = self._fmt.block[1]
        C = _ceil(b, K, inputs) if inputs else I64(1)
        self._scales_at = [self._scale_row(b, scales, b.add(n, I64(i)), C) for i in range(outputs)]
        self._zeros_at = [
            self._zero_row(b, zeros, b.add(n, I64(i)), C) for i in range(outputs if self._fmt.zeros else 0)
        ]
        room = ir.ArrayType(F32, _AT_ONCE)
        self._scale_rooms, self._zero_rooms = (
            [b.ptrtoint(b.alloca(room), I64) for _ in places] for places in (self._scales_at, self._zeros_at)
        )
        for place in (place for row in (*self._totals, *self._sums) for place in row):
            b.store(const(FLOATS, 0.0), place)
        if inputs:
            self._blocks(b, K, inputs)
        else:
            self._groups(b, I64(0), K)
            self._scale_sums(b, I64(0), None)
        self._finish(b, y, self._totals, zeros)
        return tile

    def _finish(self, b: Any, y: Sequence[Any], totals: Sequence[Sequence[Any]], beside: Any) -> None:
        """Sums of lanes to the outputs."""
        factor = load(b, beside, F32) if self._fmt.global_scale else None
        for out, row in zip(y, totals, strict=True):
            for i, place in enumerate(row):
                value = lane_sum(b, b.load(place))
                if factor is not None:
                    value = b.fmul(value, factor) if self._fmt.global_scale == "*" else b.fdiv(value, factor)
                b.store(value, at(b, out, F32, 4 * i), align=4)
        b.ret_void()

    def _blocks(self, b: Any, K: Any, inputs: int) -> None:
        """As many as have their scales converted at once, a line or more at a time, and what is left one by one."""
        per = inputs // self._group
        together = max(1, LINE // (per * self._group_bytes))
        ahead = _AT_ONCE if together > 1 else 1
        runs = b.sdiv(K, I64(inputs * ahead))
        with loop(b, runs) as run:
            begin = b.mul(run, I64(ahead))
            if ahead > 1:
                self._convert(b, begin)
            with loop(b, I64(ahead // together)) as turn:
                for i in range(together):
                    near = b.add(b.mul(turn, I64(together)), I64(i))
                    block = b.add(begin, near)
                    first = b.mul(block, I64(per))
                    if i == 0:
                        self._fetch(b, first, together * per * self._group_bytes)
                    self._zero_points(b, block, near if ahead > 1 else None)
                    if per <= 4 and not self._by_lines:
                        for g in range(per):
                            self._add_codes(b, b.add(first, I64(g)))
                    else:
                        with loop(b, I64(per)) as g:
                            self._add_codes(b, b.add(first, g))
                    self._scale_sums(b, block, near if ahead > 1 else None)
        done = b.mul(runs, I64(ahead))
        with loop(b, b.sub(_ceil(b, K, inputs), done)) as turn:
            block = b.add(done, turn)
            left = b.sub(K, b.mul(block, I64(inputs)))
            count = b.select(b.icmp_signed("<", left, I64(inputs)), left, I64(inputs))
            self._zero_points(b, block, None)
            self._groups(b, b.mul(block, I64(per)), count)
            self._scale_sums(b, block, None)

    def _convert(self, b: Any, begin: Any) -> None:
        """Scales and zero points of some blocks, to float32 in memory."""
        floats, words = vec(F32, _AT_ONCE), vec(I32, _AT_ONCE)
        for place, room in zip(self._scales_at, self._scale_rooms, strict=True):
            source = b.add(place, b.mul(begin, I64(SCALE_BYTES[self._fmt.scale])))
            b.store(self._scale(b, source, _AT_ONCE), at(b, room, floats), align=4)
        for (place, shift), room in zip(self._zeros_at, self._zero_rooms, strict=True):
            held = b.lshr(load(b, b.add(place, b.mul(begin, I64(4))), words), splat(b, shift, _AT_ONCE))
            b.store(b.uitofp(b.and_(held, const(words, 15)), floats), at(b, room, floats), align=4)

    def _groups(self, b: Any, first: Any, inputs: Any) -> None:
        """From group `first` on so many inputs, the last group of which may be short."""
        whole, rest = b.sdiv(inputs, I64(self._group)), b.srem(inputs, I64(self._group))
        together = LINE // self._group_bytes
        runs = b.sdiv(whole, I64(together))
        with loop(b, runs) as turn:
            here = b.add(first, b.mul(turn, I64(together)))
            self._fetch(b, here, LINE)
            for g in range(together):
                self._add_codes(b, b.add(here, I64(g)))
        done = b.mul(runs, I64(together))
        with loop(b, b.sub(whole, done)) as turn:
            here = b.add(first, b.add(done, turn))
            self._fetch(b, here, 1)
            self._add_codes(b, here)
        with b.if_then(b.icmp_signed(">", rest, I64(0))):
            group = b.add(first, whole)
            self._fetch(b, group, 1)
            count = b.mul(_ceil(b, rest, 8), I64(4)) if self.two_to_a_byte else rest
            for copy, place in zip(self._part, self._w, strict=True):
                self._copy(b, b.add(place, b.mul(group, I64(self._group_bytes))), copy, count)
            self._add_group(b, self._part, self._rows_at(b, group), self._sums)

    def _rows_at(self, b: Any, group: Any) -> list[Any]:
        return [b.add(place, b.mul(group, I64(4 * self._group))) for place in self._x]

    def _fetch(self, b: Any, group: Any, nbytes: int) -> None:
        """Bring what the next tile reads in the place of this one's bytes."""
        offset = b.add(b.mul(group, I64(self._group_bytes)), self._ahead)
        for place in self._w:
            for line in range(0, nbytes, LINE):
                prefetch(b, b.add(place, offset), line)

    def _add_codes(self, b: Any, group: Any) -> None:
        offset = b.mul(group, I64(self._group_bytes))
        self._add_group(b, [b.add(place, offset) for place in self._w], self._rows_at(b, group), self._sums)

    def _add_group(self, b: Any, weights: Sequence[Any], rows: Sequence[Any], sums: list[list[Any]]) -> None:
        """`sums[r][n] += codes[n] * rows[r]`, 16 products at a time."""
        zeros = self._zeros if self._fmt.zeros else [None] * len(weights)
        wide = [self._values(b, place, zero) for place, zero in zip(weights, zeros, strict=True)]
        for part in range(self._group // LANES):
            for row, places in zip(rows, sums, strict=True):
                x = load(b, row, FLOATS, 4 * LANES * part)
                for values, place in zip(wide, places, strict=True):
                    operands = [values[part], x, b.load(place)]
                    b.store(call(b, f"llvm.fma.v{LANES}f32", FLOATS, operands), place)

    def _values(self, b: Any, place: Any, zero: Any) -> Sequence[Any]:
        """A group as float32, 16 inputs at a time, in the order of a row."""
        if self._by_lines:
            return [value for words in bfloat16s(b, load(b, place, vec(I8, LINE))) for value in as_floats(b, words)]
        codes, low, high = self._fmt.codes, range(LANES), range(LANES, 2 * LANES)
        if codes == "int8":
            first, second = (b.sitofp(b.sext(load(b, place, BYTES, LANES * i), INTS), FLOATS) for i in (0, 1))
            return first, second
        if codes == "fp8":
            wide = _from_e4m3(b, load(b, place, vec(I8, GROUP)))
            return [b.shuffle_vector(wide, wide, const(INTS, part)) for part in (low, high)]
        held = load(b, place, vec(I8, self._group_bytes))
        if self._group == LANES:
            words = [b.zext(b.shuffle_vector(held, b.lshr(held, const(held.type, 4)), const(INTS, low)), INTS)]
        else:
            words = [b.zext(held, INTS)]
            words.append(b.lshr(words[0], const(INTS, 4)))
        return [self._nibble(b, nibble, zero) for nibble in words]

    @property
    def order(self) -> list[int] | None:
        """Of the inputs in a row, for so many at a time; None: as they are."""
        if self._by_lines:
            return [4 * i + part for part in (0, 2, 1, 3) for i in range(LANES)]
        if not self.two_to_a_byte:
            return None
        return [g + i for g in range(0, GROUP, self._group) for odd in (0, 1) for i in range(odd, self._group, 2)]

    def spread(self) -> None:
        """One row, with zeros for groups that are not there."""
        order = self.order
        assert order is not None, "rows of such codes are as they are"
        kernel = ir.Function(self.module, ir.FunctionType(VOID, [I64] * 3), "spread")
        x, G, row = kernel.args
        b, floats, count = ir.IRBuilder(kernel.append_basic_block()), vec(F32, GROUP), len(order) // GROUP
        none = b.ptrtoint(b.alloca(ir.ArrayType(F32, GROUP)), I64)
        b.store(const(floats, 0.0), at(b, none, floats), align=4)
        with loop(b, _ceil(b, G, count)) as turn:
            first = b.mul(turn, I64(count))
            groups = [b.add(first, I64(i)) for i in range(count)]
            offsets = [b.mul(group, I64(4 * GROUP)) for group in groups]
            there = [b.icmp_signed("<", group, G) for group in groups]
            places = [b.select(is_, b.add(x, by), none) for is_, by in zip(there, offsets, strict=True)]
            values = [load(b, place, floats) for place in places]
            for part in range(0, len(order), LANES):
                some = b.shuffle_vector(values[0], values[-1], const(INTS, order[part : part + LANES]))
                b.store(some, at(b, row, FLOATS, b.add(offsets[0], I64(4 * part))), align=4)
        b.ret_void()

    def _nibble(self, b: Any, words: Any, zero: Any) -> Any:
        """The lower four bits as they count."""
        if self._fmt.codes in FP4 and not self._permutes:
            return _from_halves(b, b.trunc(words, vec(I16, LANES)), 12, 3, -0x7200)
        if self._fmt.codes in FP4:
            return self._looked_up(b, words, (*E2M1, *(-value for value in E2M1)))
        if self._permutes:
            value = self._looked_up(b, words, range(-8, 8) if zero is None else range(16))
            return value if zero is None else b.fsub(value, zero)
        value = b.sitofp(b.and_(words, const(INTS, 15)), FLOATS)
        return b.fsub(value, const(FLOATS, 8.0) if zero is None else zero)

    def _looked_up(self, b: Any, index: Any, values: Sequence[float]) -> Any:
        """By the lower four bits."""
        operands = [const(FLOATS, [float(value) for value in values]), index]
        return call(b, "llvm.x86.avx512.permvar.sf.512", FLOATS, operands)

    def _scale_row(self, b: Any, scales: Any, n: Any, C: Any) -> Any:
        """Where the scales of an output begin."""
        outputs = self._fmt.block[0]
        if not outputs:
            return scales
        return b.add(scales, b.mul(b.mul(b.sdiv(n, I64(outputs)), C), I64(SCALE_BYTES[self._fmt.scale])))

    def _scale_sums(self, b: Any, block: Any, near: Any) -> None:
        """`totals += scale * sums`, and the sums begin anew. `near` is the block's place among those converted."""
        size = SCALE_BYTES[self._fmt.scale]
        for i, (place, room) in enumerate(zip(self._scales_at, self._scale_rooms, strict=True)):
            if near is None:
                scale = b.extract_element(self._scale(b, b.add(place, b.mul(block, I64(size))), 1), I32(0))
            else:
                scale = load(b, room, F32, b.mul(near, I64(4)))
            factor = splat(b, scale, LANES)
            for sums, totals in zip(self._sums, self._totals, strict=True):
                operands = [b.load(sums[i]), factor, b.load(totals[i])]
                b.store(call(b, f"llvm.fma.v{LANES}f32", FLOATS, operands), totals[i])
                b.store(const(FLOATS, 0.0), sums[i])

    def _scale(self, b: Any, place: Any, count: int, there: Any = None) -> Any:
        """So many scales, one after the other, as float32, or those that are `there` and others that are finite."""
        kind, floats, words = self._fmt.scale, vec(F32, count), vec(I32, count)

        def read(item: Any, rest: int = 0) -> Any:
            some = vec(item, count)
            return load(b, place, some) if there is None else first_items(b, place, there, some, rest)

        if kind == "float32":
            scale = read(F32)
        elif kind == "bfloat16":
            scale = b.bitcast(b.shl(b.zext(read(I16), words), const(words, 16)), floats)
        elif kind == "float16":
            scale = b.fpext(read(ir.HalfType()), floats)
        elif kind == "float8_e4m3fn":
            scale = _from_e4m3(b, read(I8))
        else:
            bits = b.shl(b.zext(read(I8, 1), words), const(words, 23))  # not 0: its subnormal takes 100 cycles
            scale = b.bitcast(
                call(b, f"llvm.umax.v{count}i32", words, [bits, const(words, 1 << 22)]), floats
            )  # 2**-127
        return scale if self._factor == 1.0 else b.fmul(scale, const(floats, self._factor))

    def _zero_row(self, b: Any, zeros: Any, n: Any, C: Any) -> tuple[Any, Any]:
        """The word of an output's first zero point, and where it is in its words."""
        word = b.mul(b.mul(b.sdiv(n, I64(8)), C), I64(4))
        return b.add(zeros, word), b.trunc(b.mul(b.srem(n, I64(8)), I64(4)), I32)

    def _zero_points(self, b: Any, block: Any, near: Any) -> None:
        """Of a block, for every output."""
        self._zeros = []
        for (place, shift), room in zip(self._zeros_at, self._zero_rooms, strict=True):
            if near is None:
                held = b.lshr(load(b, b.add(place, b.mul(block, I64(4))), I32), shift)
                zero = b.uitofp(b.and_(held, I32(15)), F32)
            else:
                zero = load(b, room, F32, b.mul(near, I64(4)))
            self._zeros.append(splat(b, zero, LANES))


def _from_e4m3(b: Any, held: Any) -> Any:
    """Bytes to float32, 2**8 times too small."""
    return _from_halves(b, b.zext(held, vec(I16, held.type.count)), 8, 1, -0x4080)


def _from_halves(b: Any, held: Any, up: int, down: int, mask: int) -> Any:
    """What becomes float16s when its sign is shifted up to the top, and its size down to its place, to float32."""
    bits = b.ashr(b.shl(held, const(held.type, up)), const(held.type, down))
    halves = b.bitcast(b.and_(bits, const(held.type, mask)), vec(ir.HalfType(), held.type.count))
    return b.fpext(halves, vec(F32, held.type.count))


def _ceil(b: Any, size: Any, whole: int) -> Any:
    return b.sdiv(b.add(size, I64(whole - 1)), I64(whole))
