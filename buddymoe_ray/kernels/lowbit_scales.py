"""Reading the scales of a tile as LLVM IR: a vector of float32 for some of its outputs, in one group.

Codes of a byte are exponents: the octave's part is taken off the exponent, the rest looked up among 24 steps. Codes of
4 bits choose from the 16 scales that the matrix has itself. Bits are the same on every instruction set. Reads the
group's codes and the table and no more. Neighbours: lowbit_tiles.py multiplies, lowbit_format.py is the spec.

Legend: b an `ir.IRBuilder`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from llvmlite import ir

from buddymoe_ray.kernels.lowbit_format import BLOCK, STEPS_PER_OCTAVE, scale_table
from buddymoe_ray.kernels.vector_ir import F32, I8, I32, I64, call, const, load, splat, vec

__all__ = ["scales_of_16", "scales_of_octaves"]


def scales_of_octaves(b: Any, place: Any, base_at: Any, outputs: range, *, avx2: bool) -> Any:
    """`base * 2 ** (-code / 24)`; `place` is where the codes of the tile's outputs are, a byte each."""
    lanes = len(outputs)
    ints, floats = vec(I32, lanes), vec(F32, lanes)
    code = b.zext(load(b, place, vec(I8, lanes), outputs.start), ints)
    octave = b.lshr(b.mul(code, const(ints, 2731)), const(ints, 16))  # code // 24 for every byte
    rest = b.sub(code, b.mul(octave, const(ints, STEPS_PER_OCTAVE)))
    steps = scale_table(torch.device("cpu"))[:STEPS_PER_OCTAVE].tolist()
    if lanes == 16:
        lower, upper = const(floats, steps[:16]), const(floats, steps[16:] + [0.0] * 8)
        found = call(b, "llvm.x86.avx512.vpermi2var.ps.512", floats, [lower, rest, upper])
    elif avx2:
        found = _permuted(b, rest, [const(floats, steps[i : i + 8]) for i in (0, 8, 16)])
    else:
        table = _table(b, steps)
        found = _look_up(b, rest, lambda lane: b.load(b.gep(table, [I32(0), lane])))
    scale = b.bitcast(b.sub(b.bitcast(found, ints), b.shl(octave, const(ints, 23))), floats)
    return b.fmul(scale, splat(b, load(b, base_at, F32), lanes))


def scales_of_16(b: Any, place: Any, base_at: Any, outputs: range, *, avx2: bool) -> Any:
    """Entries of the table at `base_at`; `place` is where the codes are, two outputs to a byte."""
    lanes, half = len(outputs), vec(I8, BLOCK // 2)
    ints, floats = vec(I32, lanes), vec(F32, lanes)
    packed = load(b, place, half)
    parts = [b.and_(packed, const(half, 15)), b.lshr(packed, const(half, 4))]
    if lanes == 16:
        code = b.zext(b.shuffle_vector(*parts, const(vec(I32, BLOCK), range(BLOCK))), ints)
        table = load(b, base_at, floats)
        return call(b, "llvm.x86.avx512.vpermi2var.ps.512", floats, [table, code, table])
    code = b.zext(parts[outputs.start // lanes], ints)
    if not avx2:
        return _look_up(b, code, lambda lane: load(b, base_at, F32, b.shl(b.zext(lane, I64), I64(2))))
    return _permuted(b, code, [load(b, base_at, floats, 32 * part) for part in (0, 1)])


def _permuted(b: Any, index: Any, tables: list[Any]) -> Any:
    """From tables of 8 behind one another, by a permute of each."""
    found, *others = (call(b, "llvm.x86.avx2.permps", table.type, [table, index]) for table in tables)
    for part, other in enumerate(others):
        found = b.select(b.icmp_signed(">", index, const(index.type, 8 * part + 7)), other, found)
    return found


def _table(b: Any, steps: list[float]) -> Any:
    kind = ir.ArrayType(F32, len(steps))
    table = b.module.globals.get("steps")
    if table is None:
        table = ir.GlobalVariable(b.module, kind, "steps")
        table.global_constant, table.linkage, table.initializer = True, "internal", ir.Constant(kind, steps)
    return table


def _look_up(b: Any, index: Any, entry: Callable[[Any], Any]) -> Any:
    """Lane by lane from memory."""
    found = const(vec(F32, index.type.count), 0.0)
    for lane in range(index.type.count):
        found = b.insert_element(found, entry(b.extract_element(index, I32(lane))), I32(lane))
    return found
