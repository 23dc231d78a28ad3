"""Reading trellis codes as LLVM IR: the levels of a quad of inputs, a byte to a weight.

With VBMI one instruction takes eight windows out of every qword (`vpmultishiftqb`: a ring lies in each, twice its first
two bytes where it has six), and one looks all of them up (`vpermi2b`, which asks for no more than 7 bits). Else a
window is the upper byte of a product of the two bytes that it lies in, and tables of 16 are chosen from. Bits are the
same. Reads a quad's bytes and no others. Neighbours: lowbit_tiles.py multiplies, trellis.py is the spec.

Legend: P positions of a ring, b an `ir.IRBuilder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from buddymoe_ray.kernels.trellis_tables import QUAD, RINGS, TABLES, WINDOW
from buddymoe_ray.kernels.vector_ir import I8, I16, I32, I64, call, const, load, vec

__all__ = ["levels_of_quad"]

_WINDOWS = 1 << WINDOW


def levels_of_quad(b: Any, place: Any, bits: int, outputs: range, kind: str) -> Any:
    """Bytes of the levels of four inputs of these outputs, `4n + i` that of output n; `place` is where the quad's codes
    begin. `kind` is what the CPU has: `vbmi`, `shuffles` of bytes (AVX2, or with 16 outputs AVX-512) or `plain`."""
    ring = _Ring(bits, outputs)
    if kind == "vbmi":
        windows = _taken_out(b, ring.load(b, place), ring)
        halves = [const(vec(I8, 64), TABLES[bits][at : at + 64]) for at in (0, 64)]
        operands = [halves[0], windows, halves[1]]
        return call(b, "llvm.x86.avx512.vpermi2var.qi.512", windows.type, operands)
    windows = _multiplied_out(b, ring.load(b, place), ring)
    return (_look_up_16 if kind == "shuffles" else _look_up)(b, windows, bits)


class _Ring:
    """Where the windows of some outputs lie."""

    def __init__(self, bits: int, outputs: range) -> None:
        positions = range(QUAD * outputs.start, QUAD * outputs.stop)
        P, self.nbytes = RINGS[bits], RINGS[bits] * bits // 8
        begin = positions.start // P  # the first ring that is read
        self.offset = begin * self.nbytes
        self._size = (positions[-1] // P + 1 - begin) * self.nbytes
        self._whole = 8 if self._size < 16 else 16
        self.rings = [position // P - begin for position in positions]
        self.bits = [(bits * (position % P + 1) - WINDOW) % (8 * self.nbytes) for position in positions]

    def load(self, b: Any, place: Any) -> tuple[Any, Any]:
        """All bytes, as two vectors that may overlap."""
        kind = vec(I8, self._whole)
        first = load(b, place, kind, self.offset)
        rest = self._size - self._whole
        return first, load(b, place, kind, self.offset + rest) if rest else first

    def lane(self, ring: int, byte: int) -> int:
        """Where that byte of a ring, which goes round, is in what was loaded."""
        at = ring * self.nbytes + byte % self.nbytes
        return at if at < self._whole else at - self._size + 2 * self._whole


def _taken_out(b: Any, loaded: tuple[Any, Any], ring: _Ring) -> Any:
    lanes = [ring.lane(ring.rings[8 * qword], byte) for qword in range(len(ring.bits) // 8) for byte in range(8)]
    qwords = b.shuffle_vector(*loaded, const(vec(I32, len(lanes)), lanes))
    operands = [const(qwords.type, ring.bits), qwords]
    return call(b, "llvm.x86.avx512.pmultishift.qb.512", qwords.type, operands)


def _multiplied_out(b: Any, loaded: tuple[Any, Any], ring: _Ring) -> Any:
    """Windows of even and of odd places, from words of the two bytes of each."""
    parts, words = [], vec(I16, len(ring.bits) // 2)
    for odd in (0, 1):
        where = list(zip(ring.rings, ring.bits, strict=True))[odd::2]
        lanes = [ring.lane(number, bit // 8 + byte) for number, bit in where for byte in (0, 1)]
        pairs = b.bitcast(b.shuffle_vector(*loaded, const(vec(I32, len(lanes)), lanes)), words)
        product = b.mul(pairs, const(words, [1 << (8 - bit % 8) for _, bit in where]))
        parts.append(b.and_(product, const(words, 0xFF00)) if odd else b.lshr(product, const(words, 8)))
    found = b.bitcast(b.or_(*parts), vec(I8, len(ring.bits)))
    return b.and_(found, const(found.type, _WINDOWS - 1))


def _look_up_16(b: Any, windows: Any, bits: int) -> Any:
    """From tables of 16, chosen by the upper bits."""
    kind, lanes = windows.type, windows.type.count
    name = "llvm.x86.avx2.pshuf.b" if lanes == 32 else "llvm.x86.avx512.pshuf.b.512"
    low = b.and_(windows, const(kind, 15))
    found = []
    for at in range(0, _WINDOWS, 16):
        table: Sequence[int] = TABLES[bits][at : at + 16]
        found.append(call(b, name, kind, [const(kind, [*table] * (lanes // 16)), low]))
    for shift in (3, 2, 1):  # bits 4, 5, 6 as signs
        upper = b.icmp_signed("<", b.shl(windows, const(kind, shift)), const(kind, 0))
        found = [b.select(upper, high, one) for one, high in zip(found[::2], found[1::2], strict=True)]
    return found[0]


def _look_up(b: Any, windows: Any, bits: int) -> Any:
    """Lane by lane from memory."""
    kind, name = ir.ArrayType(I8, _WINDOWS), f"levels{bits}"
    table = b.module.globals.get(name)
    if table is None:
        table = ir.GlobalVariable(b.module, kind, name)
        table.global_constant, table.linkage = True, "internal"
        table.initializer = ir.Constant(kind, list(TABLES[bits]))
    found = const(windows.type, 0)
    for lane in range(windows.type.count):
        place = b.zext(b.extract_element(windows, I32(lane)), I64)
        found = b.insert_element(found, b.load(b.gep(table, [I64(0), place])), I32(lane))
    return found
