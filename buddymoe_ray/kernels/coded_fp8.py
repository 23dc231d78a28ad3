"""Codes of fp8 (e4m3) as bfloat16s, as LLVM IR: a line of 64 at a time, two to a word.

Sign and size are shifted to their places in a bfloat16 and keep float16's bias, which scales make up for. The smallest
codes have no leading one, which that would give them: lines that hold any are mended. Knows neither rows nor scales.

Legend: b an `ir.IRBuilder`.
"""

from __future__ import annotations

from typing import Any

from buddymoe_ray.kernels.lowbit_format import GROUP
from buddymoe_ray.kernels.stored_tiles import FLOATS, INTS
from buddymoe_ray.kernels.vector_ir import I16, I64, const, vec

__all__ = ["as_floats", "bfloat16s"]

_SMALLEST = (127 - 14) << 23
"""Bits of the smallest float32 that a code with a leading one becomes."""


def bfloat16s(b: Any, held: Any) -> list[Any]:
    """Words of the even inputs and of the odd ones, of `<64 x i8>`."""
    pairs = b.bitcast(held, vec(I16, GROUP))
    words = list[Any]()
    for both in (b.shl(pairs, const(pairs.type, 8)), pairs):
        bits = b.and_(b.ashr(both, const(pairs.type, 4)), const(pairs.type, -0x7810))
        words.append(b.bitcast(b.or_(bits, const(pairs.type, 0x3800)), INTS))
    small = b.icmp_unsigned("==", b.and_(held, const(held.type, 0x78)), const(held.type, 0))
    fast, mends = b.block, b.append_basic_block("mend")
    after = b.append_basic_block("line")
    b.cbranch(b.icmp_unsigned("!=", b.bitcast(small, I64), I64(0)), mends, after)
    b.position_at_end(mends)
    mended = list[Any]()
    for word in words:
        lower, upper = (b.bitcast(_mended(b, value), INTS) for value in as_floats(b, word))
        mended.append(b.or_(b.lshr(lower, const(INTS, 16)), upper))
    b.branch(after)
    b.position_at_end(after)
    found = [b.phi(INTS) for _ in words]
    for phi, word, other in zip(found, words, mended, strict=True):
        phi.add_incoming(word, fast)
        phi.add_incoming(other, mends)
    return found


def as_floats(b: Any, words: Any) -> tuple[Any, Any]:
    """The lower and the upper bfloat16s of words as float32."""
    upper = b.and_(words, const(INTS, -0x10000))
    return b.bitcast(b.shl(words, const(INTS, 16)), FLOATS), b.bitcast(upper, FLOATS)


def _mended(b: Any, value: Any) -> Any:
    """Twice as large less the one that was not there, which is exact."""
    bits = b.bitcast(value, INTS)
    one = b.bitcast(b.or_(b.and_(bits, const(INTS, -0x80000000)), const(INTS, _SMALLEST)), FLOATS)
    small = b.icmp_unsigned("<", b.and_(bits, const(INTS, 0x7FFFFFFF)), const(INTS, _SMALLEST))
    return b.select(small, b.fsub(b.fadd(value, value), one), value)
