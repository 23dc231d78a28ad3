"""The product with a matrix as a checkpoint stores it, [N, K] in bfloat16, float16 or float32, as LLVM IR.

`stored_module_text` writes one module for a dtype of weights:

    project(weights, 0, 0, K, N, rows, R)            rows are R pairs (address of a row, address of its outputs)
    project_strided(weights, stride, K, N, rows, R, next)  the same where the inputs of an output are `stride` bytes
                           behind those of the one before; those come meanwhile that lie `next` bytes behind (0: the
                           next outputs')
    blend(weights, stride, K, N, rows, R, next)  the transposed product, added: a row of N numbers times the matrix, in
                           rising order of n, to an output of whole groups
    spread(x, G, row)    bfloat16 only: float32 x [32 G] with the odd inputs of a group before the even ones, for one
                         mask or shift widens every other weight of a vector; `blend` leaves its outputs so
    spread_rounded(...)  the same of the nearest bfloat16s

Rows are float32; those over inputs are padded with zeros to whole groups of 32. Products are exact or rounded once by a
fused multiply-add, 16 sums to an output of `project`, which are added in a fixed tree: the bits of an output depend on
its row and its weights alone, not on the rows or outputs beside it, nor on the width of the CPU's vectors.

Reads weights to their last byte and no further: a last group that is not whole is copied first.

Tried and dropped: no prefetch of the next outputs' weights (1.1 times as long at one row of bfloat16); 6 outputs at
once for one row, 4 rows at once (do not fit into 16 registers); where there are 32, 8 outputs of 3 rows, 6 of 4, 2 and
3 of 8 (.6, .95, .6 and .9 times as fast as 4 of 5 at 16 rows). Rows of `blend` at once, of 24: 8 take .6 of the time
of 2, 6 and 10 as long as 8, 12 .85 (registers).

Legend: N outputs and K inputs of the matrix, G groups of 32 inputs, R rows, b an `ir.IRBuilder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from buddymoe_ray.kernels.expert_calls import ITEM_BYTES, LINE
from buddymoe_ray.kernels.lowbit_format import GROUP
from buddymoe_ray.kernels.vector_ir import (
    F32,
    I8,
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
    nearest_halves,
    prefetch,
    splat,
    vec,
)

__all__ = ["StoredTiles", "lane_sum", "lane_sums", "stored_module_text"]

LANES = 16
FLOATS, INTS = vec(F32, LANES), vec(I32, LANES)
AHEAD_BYTES = 8192, 4096
"""For two outputs twice: a CPU leaves out what is too much at once (5 to 7 rows take .95 of the time)."""
NEAR = 16
"""Rows of the matrix that `blend` goes over at once."""
BLEND_ROWS, BLEND_ROWS_WIDE = (2, 1), (8, 4, 2, 1)
"""For so many rows at once, in 16 and 32 registers."""
NEAR_BYTES = 32768
Shape = dict[int, tuple[int, ...]]
ONE_ROW: Shape = {4: (1,), 1: (1,)}
MANY_ROWS: Shape = {2: (3, 2, 1), 1: (3, 2, 1)}
"""Outputs at once, each with the numbers of rows at once."""
MANY_ROWS_WIDE: Shape = {4: (5, 4, 3, 2, 1), 1: (4, 1)}


def stored_module_text(dtype: str, *, registers: int = 16) -> str:
    """The module's IR for weights of `dtype`, on a CPU with so many vector registers."""
    wide = registers >= 32
    made = StoredTiles(dtype, many_rows=MANY_ROWS_WIDE if wide else MANY_ROWS)
    made.project()
    made.blend(BLEND_ROWS_WIDE if wide else BLEND_ROWS)
    if dtype == "bfloat16":
        made.spread_row("spread", rounded=False)
        made.spread_row("spread_rounded", rounded=True)
    return str(made.module)


class StoredTiles:
    """Emits one module. `row_bytes` are those of a group of a row; the same group of `panel` rows lies side by side,
    and blocks of rows begin with a panel. Up to `in_turn` rows that are near go over few outputs at once,
    one after the other."""

    row_bytes, panel, in_turn = 4 * GROUP, 1, 0

    def __init__(self, dtype: str, *, many_rows: Shape = MANY_ROWS) -> None:
        self.module = ir.Module(name=f"stored-{dtype}")
        few_rows = {4: tuple(range(self.in_turn, 0, -1)), 1: (1,)} if self.in_turn else ONE_ROW
        self._dtype, self._bytes, self._shapes = dtype, ITEM_BYTES[dtype], (few_rows, many_rows)
        self._group_bytes = GROUP * self._bytes
        self._tiles = dict[tuple[int, int, int, bool], Any]()

    def project(self) -> None:
        """Every block of outputs times every block of rows."""
        kernel = ir.Function(self.module, ir.FunctionType(VOID, [I64] * 7), "project_strided")
        weights, stride, K, N, rows, R, following = kernel.args
        b = ir.IRBuilder(kernel.append_basic_block())
        few = b.icmp_signed("<=", R, I64(max(1, self.in_turn)))
        if self.in_turn:
            near = I64(NEAR_BYTES * GROUP // self.row_bytes)
            few = b.and_(few, b.icmp_signed("<=", b.mul(R, K), near))
        with b.if_else(few) as branches:
            for branch, shape, in_turn in zip(branches, self._shapes, (self.in_turn > 0, False), strict=True):
                with branch:
                    for outputs, n in blocks(b, N, shape):
                        place, column = b.add(weights, b.mul(n, stride)), b.mul(n, I64(4))
                        for size, row in blocks(b, R, shape[outputs]):
                            args = [place, stride, K, b.add(rows, b.mul(row, I64(16))), column]
                            if in_turn:
                                b.call(self._made(outputs, size, 0, in_turn=True), [*args, I64(0)])
                            else:
                                behind = b.mul(stride, I64(outputs))
                                behind = b.select(b.icmp_signed("==", following, I64(0)), behind, following)
                                args.append(b.add(place, behind))
                                self._call(b, args, (row, R), (outputs, size, shape[outputs][0]))
        b.ret_void()
        plain = ir.Function(self.module, ir.FunctionType(VOID, [I64] * 7), "project")
        weights, _, _, K, N, rows, R = plain.args
        b = ir.IRBuilder(plain.append_basic_block())
        b.call(kernel, [weights, b.mul(K, I64(self._bytes)), K, N, rows, R, I64(0)])
        b.ret_void()

    def _call(self, b: Any, args: list[Any], at_row: Any, sizes: tuple[int, int, int]) -> None:
        """A tile of the block of rows that begins at a row of R, on whose way some of the next outputs' weights come:
        `first` behind the first block, `each` behind each other one, until all have come: behind five blocks and more
        one output each takes .93 of the time of a third each, behind four those of the second and on .87. Of four
        outputs half behind each of two is as good."""
        (row, R), (outputs, size, most), [*args, there] = at_row, sizes, args
        half, third, last = -(-outputs // 2), -(-outputs // 3), most // 4  # nearly a block counts as one
        shares = {2: (half, half)}
        if outputs > 4:
            shares |= {3: (third, third), 4: (0, third), 5: (outputs - 4, 1)}
        count, turn = b.sdiv(b.add(R, I64(last)), I64(most)), b.sdiv(row, I64(most))
        first, each = I64(outputs), I64(0)
        for blocks_of_rows, share in shares.items():
            many = b.icmp_signed(">=", count, I64(blocks_of_rows))
            first, each = (b.select(many, I64(n), fewer) for n, fewer in zip(share, (first, each), strict=True))
        begins = b.icmp_signed("==", turn, I64(0))
        done = b.select(begins, I64(0), b.add(first, b.mul(b.sub(turn, I64(1)), each)))
        ahead = b.select(b.icmp_signed("<", done, I64(outputs)), b.select(begins, first, each), I64(0))
        args = [*args, b.add(there, b.mul(args[1], done))]
        spread = {n for share in shares.values() for n in share} if size > 1 and size >= most - last else set[int]()
        for n in sorted({0, outputs, *spread}):
            with b.if_then(b.icmp_signed("==", ahead, I64(n))):
                b.call(self._made(outputs, size, n, in_turn=False), args)

    def _made(self, outputs: int, rows: int, ahead: int, *, in_turn: bool) -> Any:
        """That of these sizes, made at its first call."""
        sizes = (outputs, rows, ahead, in_turn)
        if sizes not in self._tiles:
            self._tiles[sizes] = self._stored_tile(outputs, rows, ahead, in_turn=in_turn)
        return self._tiles[sizes]

    def _stored_tile(self, outputs: int, rows: int, ahead: int, *, in_turn: bool) -> Any:
        """Some outputs of some rows, over all inputs, while the weights of so many come that lie `there`; `in_turn`,
        where the next ones are at hand by themselves, one output after the other, or two where rows are many enough."""
        tile = internal(self.module, f"tile{outputs}x{rows}{'turn' if in_turn else 'ahead'}{ahead}", 6)
        weights, stride, K, pairs, column, there = tile.args
        b = ir.IRBuilder(tile.append_basic_block())
        coming = [b.add(there, b.mul(stride, I64(n))) for n in range(ahead)]
        w = [b.add(weights, b.mul(stride, I64(n))) for n in range(outputs)]
        x = [load(b, pairs, I64, 16 * r) for r in range(rows)]
        if self.panel > 1:
            x = [b.add(x[r - r % self.panel], I64(self.row_bytes * (r % self.panel))) for r in range(rows)]
        y = [b.add(load(b, pairs, I64, 16 * r + 8), column) for r in range(rows)]
        sums = [[b.alloca(FLOATS) for _ in w] for _ in x]
        part, step = [self._room(b) for _ in w], I64(self.row_bytes * self.panel)
        for place in (place for row in sums for place in row):
            b.store(const(FLOATS, 0.0), place)
        whole, rest = b.sdiv(K, I64(GROUP)), b.srem(K, I64(GROUP))
        at_once = outputs if not in_turn else min(outputs, 1 if rows <= 4 else 2)
        for turn in (list(range(n, n + at_once)) for n in range(0, outputs, at_once)):
            mine = [[row[n] for n in turn] for row in sums]
            with loop(b, whole) as g:
                offset = b.mul(g, I64(self._group_bytes))
                here = [b.add(w[n], offset) for n in turn]
                for place in coming:
                    for line in range(0, self._group_bytes, LINE):
                        prefetch(b, b.add(place, offset), line, nearest=rows == 1 or ahead < outputs)
                if in_turn:
                    behind = b.add(w[turn[0]], b.mul(offset, I64(len(turn))))  # lines in the order in which they lie
                    for line in range(0, len(turn) * self._group_bytes, LINE):
                        for bytes_ahead in AHEAD_BYTES[: len(turn)]:
                            prefetch(b, behind, bytes_ahead + line)
                self._add_group(b, here, [b.add(place, b.mul(g, step)) for place in x], mine)
            with b.if_then(b.icmp_signed(">", rest, I64(0))):
                offset = b.mul(whole, I64(self._group_bytes))
                for n in turn:
                    self._copy(b, b.add(w[n], offset), part[n], b.mul(rest, I64(self._bytes)))
                self._add_group(b, [part[n] for n in turn], [b.add(place, b.mul(whole, step)) for place in x], mine)
        for out, row in zip(y, sums, strict=True):
            for n in range(0, outputs, 4):
                totals = lane_sums(b, [b.load(place) for place in row[n : n + 4]])
                b.store(totals, at(b, out, totals.type, 4 * n), align=4)
        b.ret_void()
        return tile

    def _room(self, b: Any) -> Any:
        """The address of room for a group's weights."""
        return b.ptrtoint(b.alloca(ir.ArrayType(I8, self._group_bytes)), I64)

    def _copy(self, b: Any, source: Any, target: Any, count: Any) -> None:
        """`count` bytes and zeros behind them, to a whole group."""
        group = vec(I8, self._group_bytes)
        b.store(const(group, 0), at(b, target, group), align=1)
        words, rest = b.sdiv(count, I64(8)), b.srem(count, I64(8))
        for times, kind, begin in ((words, I64, I64(0)), (rest, I8, b.mul(words, I64(8)))):
            with loop(b, times) as i:
                here = b.add(begin, b.mul(i, I64(kind.width // 8)))
                b.store(load(b, source, kind, here), at(b, target, kind, here), align=1)

    def _add_group(self, b: Any, weights: Sequence[Any], rows: Sequence[Any], sums: list[list[Any]]) -> None:
        """`sums[r][n] += weights[n] * rows[r]`, 16 products at a time."""
        for half in (0, 1):
            wide = [self._widened(b, place, half) for place in weights]
            for row, places in zip(rows, sums, strict=True):
                x = load(b, row, FLOATS, 4 * LANES * half)
                for weight, place in zip(wide, places, strict=True):
                    b.store(call(b, f"llvm.fma.v{LANES}f32", FLOATS, [weight, x, b.load(place)]), place)

    def _widened(self, b: Any, place: Any, half: int) -> Any:
        """Half of a group as float32: in bfloat16 its odd or its even weights."""
        if self._dtype == "float32":
            return load(b, place, FLOATS, 4 * LANES * half)
        if self._dtype == "float16":
            return b.fpext(load(b, place, vec(ir.HalfType(), LANES), 2 * LANES * half), FLOATS)
        pairs = load(b, place, INTS)
        bits = b.shl(pairs, const(INTS, 16)) if half else b.and_(pairs, const(INTS, -0x10000))
        return b.bitcast(bits, FLOATS)

    def blend(self, sizes: Sequence[int]) -> None:
        """Some rows of the matrix after the other, each group of their inputs for so many rows at once."""
        tiles = {rows: self._blend_tile(rows) for rows in sizes}
        kernel = ir.Function(self.module, ir.FunctionType(VOID, [I64] * 7), "blend")
        weights, stride, K, N, rows, R, following = kernel.args
        b = ir.IRBuilder(kernel.append_basic_block())
        groups = b.sdiv(b.add(K, I64(GROUP - 1)), I64(GROUP))
        with loop(b, b.sdiv(b.add(N, I64(NEAR - 1)), I64(NEAR))) as block:
            first = b.mul(block, I64(NEAR))
            left = b.sub(N, first)
            count = b.select(b.icmp_signed("<", left, I64(NEAR)), left, I64(NEAR))
            with loop(b, groups) as g:
                place = b.add(b.add(weights, b.mul(first, stride)), b.mul(g, I64(self._group_bytes)))
                inputs = b.sub(K, b.mul(g, I64(GROUP)))
                for size, row in blocks(b, R, tiles):
                    places = [b.add(rows, b.mul(row, I64(16))), b.mul(first, I64(4)), b.mul(g, I64(4 * GROUP))]
                    b.call(tiles[size], [place, stride, inputs, count, *places, following])
        b.ret_void()

    def _blend_tile(self, rows: int) -> Any:
        """One group of outputs of some rows, over `count` rows of the matrix; `inputs` of the group are there."""
        tile = internal(self.module, f"blend{rows}", 8)
        weights, stride, inputs, count, pairs, skipped, column, following = tile.args
        b = ir.IRBuilder(tile.append_basic_block())
        shares = [b.add(load(b, pairs, I64, 16 * r), skipped) for r in range(rows)]
        outs = [b.add(load(b, pairs, I64, 16 * r + 8), column) for r in range(rows)]
        sums = [[b.alloca(FLOATS) for _ in (0, 1)] for _ in outs]
        part, is_whole = self._room(b), b.icmp_signed(">=", inputs, I64(GROUP))
        for out, halves in zip(outs, sums, strict=True):
            for half, place in enumerate(halves):
                b.store(load(b, out, FLOATS, 64 * half), place)
        with b.if_else(is_whole) as branches:
            for branch, copied in zip(branches, (False, True), strict=True):
                with branch, loop(b, count) as n:
                    place = b.add(weights, b.mul(n, stride))
                    for line in range(0, self._group_bytes, LINE):
                        prefetch(b, b.add(place, following), line)
                    if copied:
                        self._copy(b, place, part, b.mul(inputs, I64(self._bytes)))
                        place = part
                    self._blend_row(b, place, n, shares, sums)
        for out, halves in zip(outs, sums, strict=True):
            for half, place in enumerate(halves):
                b.store(b.load(place), at(b, out, FLOATS, 64 * half), align=4)
        b.ret_void()
        return tile

    def _blend_row(self, b: Any, place: Any, n: Any, shares: list[Any], sums: list[list[Any]]) -> None:
        for half in (0, 1):
            weight = self._widened(b, place, half)
            for share, halves in zip(shares, sums, strict=True):
                x = splat(b, load(b, share, F32, b.mul(n, I64(4))), LANES)
                total = call(b, f"llvm.fma.v{LANES}f32", FLOATS, [weight, x, b.load(halves[half])])
                b.store(total, halves[half])

    def spread_row(self, name: str, *, rounded: bool) -> None:
        """One row."""
        kernel = ir.Function(self.module, ir.FunctionType(VOID, [I64] * 3), name)
        x, G, row = kernel.args
        b, group, words = ir.IRBuilder(kernel.append_basic_block()), vec(F32, GROUP), vec(I32, GROUP)
        order = const(words, [*range(1, GROUP, 2), *range(0, GROUP, 2)])
        with loop(b, G) as g:
            value, offset = load(b, x, group, b.mul(g, I64(4 * GROUP))), b.mul(g, I64(4 * GROUP))
            if rounded:
                halves = b.zext(nearest_halves(b, value), words)
                value = b.bitcast(b.shl(halves, const(words, 16)), group)
            b.store(b.shuffle_vector(value, value, order), at(b, row, group, offset), align=1)
        b.ret_void()


def lane_sum(b: Any, vector: Any) -> Any:
    """Of all lanes, in halves."""
    return b.extract_element(lane_sums(b, [vector]), I32(0))


def lane_sums(b: Any, vectors: Sequence[Any]) -> Any:
    """Those of 1, 2, 4 ... vectors, as one vector; several take as many additions as one, as long as they can share."""
    parts, lanes = list(vectors), vectors[0].type.count
    while lanes > 1:
        others = parts[1::2] or parts
        count = parts[0].type.count * (1 + (len(parts) > 1))
        low = [lane for lane in range(count) if lane % lanes < lanes // 2]
        halves = [const(vec(I32, len(low)), [lane + shift for lane in low]) for shift in (0, lanes // 2)]
        parts = [
            b.fadd(*(b.shuffle_vector(one, other, half) for half in halves))
            for one, other in zip(parts[::2], others, strict=True)
        ]
        lanes //= 2
    return parts[0]
