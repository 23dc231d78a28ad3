"""Vector instructions for the numba kernel, as LLVM code that is portable between CPUs.

Why not leave it to the compiler's own vectoriser: it does not see through groups of 32 (five times slower), and what it
makes of a sum is not promised. Here the order of every sum is written down: 16 lanes, each adding every 16th product in
rising k with fused multiply-add, then a tree over lanes. It does not depend on how many rows are computed together.

Imports numba at the top: only `lowbit_numba` may import this module.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = [
    "LANES",
    "SLACK",
    "byte_pointer",
    "dot4",
    "dot4x4",
    "float_bits",
    "float_pointer",
    "from_bits",
    "unpack2",
    "unpack3",
    "unpack4",
    "widen1",
    "widen32",
    "widen8",
]

LANES = 16
"""Rows are padded with zeros to a multiple of this."""

SLACK = 32
"""`unpack` works on 32 bytes at a time: it reads and writes up to 31 bytes past the end of a row."""

_ADDRESS = types.int64
_F32, _I8, _I32, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
_LANES = ir.VectorType(_F32, LANES)


def _pointer_to(item: Any) -> Any:
    @intrinsic
    def pointer(typing: Any, address: Any) -> Any:
        """A raw address as a typed pointer for `numba.carray`."""

        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(item)(_ADDRESS), emit

    return pointer


float_pointer, byte_pointer = _pointer_to(types.float32), _pointer_to(types.uint8)


def _bitcast(source: Any, target: Any, code: Any) -> Any:
    @intrinsic
    def bitcast(typing: Any, value: Any) -> Any:
        """The same 32 bits as another type."""
        return target(source), lambda context, builder, signature, args: builder.bitcast(args[0], code)

    return bitcast


float_bits, from_bits = _bitcast(types.float32, types.int32, _I32), _bitcast(types.int32, types.float32, _F32)


def _unpack_of(bits: int) -> Any:
    @intrinsic
    def unpack(typing: Any, codes: Any, K: Any, q: Any) -> Any:
        """One row of packed codes (address) into `K` bytes at `q`, plane by plane: spill is overwritten by the next."""

        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            codes, K, q = args
            planes = 2 if bits == 4 else 4 if bits == 2 else 8
            plane = builder.sdiv(K, _I64(planes))
            chunks = builder.sdiv(builder.add(plane, _I64(SLACK - 1)), _I64(SLACK))
            for j in range(planes):
                start = builder.mul(plane, _I64(j))
                with cgutils.for_range(builder, chunks) as loop:
                    at = builder.mul(loop.index, _I64(SLACK))
                    if bits == 3:  # an eighth of the row: half a plane of low bits, and one bit of the high plane
                        low = builder.add(at, builder.mul(plane, _I64(j % 2)))
                        high = builder.add(at, builder.mul(plane, _I64(2)))
                        value = _bits_at(builder, builder.add(codes, low), 2 * (j // 2), 2)
                        bit = _bits_at(builder, builder.add(codes, high), j, 1)
                        value = builder.or_(value, builder.shl(bit, _constant(value.type, 2)))
                    else:
                        value = _bits_at(builder, builder.add(codes, at), j * bits, bits)
                    place = builder.add(builder.add(q, start), at)
                    builder.store(value, _at(builder, place, value.type), align=1)
            return context.get_dummy_value()

        return types.void(_ADDRESS, types.int64, _ADDRESS), emit

    return unpack


unpack2, unpack3, unpack4 = _unpack_of(2), _unpack_of(3), _unpack_of(4)


def _bits_at(builder: Any, address: Any, shift: int, width: int) -> Any:
    """`bytes >> shift & mask` of 32 bytes."""
    chunk = builder.load(_at(builder, address, ir.VectorType(_I8, SLACK)), align=1)
    return builder.and_(builder.lshr(chunk, _constant(chunk.type, shift)), _constant(chunk.type, (1 << width) - 1))


def _widen_of(count: int) -> Any:
    @intrinsic
    def widen(typing: Any, q: Any, w: Any, middle: Any, scale: Any) -> Any:
        """`w[i] = (q[i] - middle) * scale` for `count` codes: addresses of uint8 and float32."""

        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            q, w, middle, scale = args
            codes = builder.load(_at(builder, q, ir.VectorType(_I8, count)), align=1)
            wide = builder.sitofp(builder.zext(codes, ir.VectorType(_I32, count)), ir.VectorType(_F32, count))
            value = builder.fmul(builder.fsub(wide, _splat(builder, middle, count)), _splat(builder, scale, count))
            builder.store(value, _at(builder, w, value.type), align=4)
            return context.get_dummy_value()

        return types.void(_ADDRESS, _ADDRESS, types.float32, types.float32), emit

    return widen


widen32, widen8, widen1 = _widen_of(32), _widen_of(8), _widen_of(1)


def _emit_dots(context: Any, builder: Any, xs: Any, w: Any, length: Any, sums: Any) -> Any:
    """Dot products of every x row with 4 consecutive rows of w, all `length` floats long."""
    accumulators = [cgutils.alloca_once_value(builder, ir.Constant(_LANES, None)) for _ in range(4 * len(xs))]
    kind = ir.FunctionType(_LANES, [_LANES] * 3)
    fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
    with cgutils.for_range(builder, builder.sdiv(length, _I64(LANES))) as loop:
        offset = builder.mul(loop.index, _I64(4 * LANES))
        x_parts = [builder.load(_at(builder, builder.add(x, offset), _LANES), align=4) for x in xs]
        for m in range(4):
            row = builder.add(builder.add(w, offset), builder.mul(length, _I64(4 * m)))
            w_part = builder.load(_at(builder, row, _LANES), align=4)
            for r, x_part in enumerate(x_parts):
                total = accumulators[4 * r + m]
                builder.store(builder.call(fma, [x_part, w_part, builder.load(total)]), total)
    for at, total in enumerate(accumulators):
        place = builder.add(sums, _I64(4 * at))
        builder.store(_tree_sum(builder, builder.load(total)), _at(builder, place, _F32))
    return context.get_dummy_value()


@intrinsic
def _dot4(typing: Any, x: Any, w: Any, length: Any, sums: Any) -> Any:
    """Dot products of one row with 4 rows of w into `sums` [4]; `length` is a multiple of LANES and the stride of w.

    Everything but `length` is an address of float32.
    """

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _emit_dots(context, builder, [args[0]], *args[1:])

    return types.void(*[_ADDRESS] * 4), emit


@intrinsic
def _dot4x4(typing: Any, a: Any, b: Any, c: Any, d: Any, w: Any, length: Any, sums: Any) -> Any:
    """`dot4` of four rows at once into `sums` [4, 4], with the same bits: each load of w serves four rows."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _emit_dots(context, builder, list(args[:4]), *args[4:])

    return types.void(*[_ADDRESS] * 7), emit


dot4: Any = _dot4
dot4x4: Any = _dot4x4


def _at(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType(kind))


def _constant(vector: Any, value: int) -> Any:
    return ir.Constant(vector, [value] * vector.count)


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    vector = ir.VectorType(value.type, lanes)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))


def _tree_sum(builder: Any, vector: Any) -> Any:
    """Sum over lanes: halves are added until one lane is left."""
    lanes = vector.type.count
    while lanes > 1:
        lanes //= 2
        halves = [
            builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(_I32, lanes), list(range(at, at + lanes))))
            for at in (0, lanes)
        ]
        vector = builder.fadd(*halves)
    return builder.extract_element(vector, _I32(0))
