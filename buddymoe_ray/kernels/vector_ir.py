"""Words for writing vector code as LLVM IR: what the kernels need beyond llvmlite's builder.

Every function takes the builder first and emits instructions; nothing here computes. Addresses are int64 and become
pointers where they are used. Knows no kernels.

Legend: b an `ir.IRBuilder`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

__all__ = [
    "F32",
    "F64",
    "I8",
    "I16",
    "I32",
    "I64",
    "VOID",
    "at",
    "blocks",
    "call",
    "const",
    "first_items",
    "internal",
    "load",
    "loop",
    "nearest_halves",
    "prefetch",
    "splat",
    "vec",
]

VOID = ir.VoidType()
F32, F64 = ir.FloatType(), ir.DoubleType()
I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)


def vec(item: Any, lanes: int) -> Any:
    """A vector type."""
    return ir.VectorType(item, lanes)


def at(b: Any, address: Any, kind: Any, offset: Any = 0) -> Any:
    """The place `offset` bytes (int or int64 value) after an address as a pointer to `kind`."""
    offset = I64(offset) if isinstance(offset, int) else offset
    return b.inttoptr(b.add(address, offset), ir.PointerType(kind))


def load(b: Any, address: Any, kind: Any, offset: Any = 0) -> Any:
    """Load from any address, aligned or not."""
    return b.load(at(b, address, kind, offset), align=1)


def first_items(b: Any, place: Any, count: Any, kind: Any, rest: int = 0) -> Any:
    """A vector of the first `count` items of a place, fewer than 256, and of `rest`; reads no further."""
    lanes, places = kind.count, vec(I8, kind.count)
    there = b.icmp_unsigned("<", const(places, range(lanes)), splat(b, b.trunc(count, I8), lanes))
    item = {"half": "f16", "float": "f32"}.get(str(kind.element), str(kind.element))
    return call(b, f"llvm.masked.load.v{lanes}{item}.p0", kind, [at(b, place, kind), I32(1), there, const(kind, rest)])


def const(kind: Any, value: float | Sequence[float]) -> Any:
    """A vector constant: one value in all lanes, or one for each."""
    lanes = [value] * kind.count if isinstance(value, int | float) else list(value)
    return ir.Constant(kind, lanes)


def splat(b: Any, value: Any, lanes: int) -> Any:
    """A scalar in all lanes."""
    one = b.insert_element(ir.Constant(vec(value.type, lanes), ir.Undefined), value, I32(0))
    return b.shuffle_vector(one, one, const(vec(I32, lanes), 0))


def call(b: Any, name: str, result: Any, args: Sequence[Any]) -> Any:
    """Call an LLVM intrinsic (or any function by name), declared at its first use."""
    found = b.module.globals.get(name)
    if found is None:
        found = ir.Function(b.module, ir.FunctionType(result, [arg.type for arg in args]), name)
    return b.call(found, args)


def nearest_halves(b: Any, value: Any) -> Any:
    """The nearest bfloat16s (int16) of float32s, ties to even; of what is no number, still none."""
    words, halves = (vec(item, value.type.count) for item in (I32, I16))
    bits = b.bitcast(value, words)
    even = b.and_(b.lshr(bits, const(words, 16)), const(words, 1))
    rounded = b.add(bits, b.add(even, const(words, 0x7FFF)))
    finite = b.icmp_unsigned("<=", b.and_(bits, const(words, 0x7FFFFFFF)), const(words, 0x7F800000))
    return b.trunc(b.lshr(b.select(finite, rounded, const(words, 0x7FC00000)), const(words, 16)), halves)


def prefetch(b: Any, address: Any, offset: int = 0, *, nearest: bool = True) -> None:
    """Bring a line into the nearest cache, or the one behind it; never faults."""
    call(b, "llvm.prefetch.p0", VOID, [at(b, address, I8, offset), I32(0), I32(3 if nearest else 2), I32(1)])


def internal(module: Any, name: str, arguments: int) -> Any:
    """A function of int64s for this module alone, which stays a function."""
    made = ir.Function(module, ir.FunctionType(VOID, [I64] * arguments), name)
    made.linkage = "internal"
    made.attributes.add("noinline")
    return made


def blocks(b: Any, count: Any, sizes: Iterable[int]) -> Iterator[tuple[int, Any]]:
    """Emit loops that cover 0 .. count - 1 in blocks of falling sizes, the last of which is 1: yields each size with
    the first index of its block."""
    done = I64(0)
    for size in sizes:
        times = b.sdiv(b.sub(count, done), I64(size))
        with loop(b, times) as turn:
            yield size, b.add(done, b.mul(turn, I64(size)))
        done = b.add(done, b.mul(times, I64(size)))


@contextmanager
def loop(b: Any, count: Any) -> Iterator[Any]:
    """Emit the body once, to run for 0 .. count - 1; yields the index (int64)."""
    before, head = b.block, b.append_basic_block("loop")
    body, done = b.append_basic_block("body"), b.append_basic_block("done")
    b.branch(head)
    b.position_at_end(head)
    index = b.phi(I64)
    index.add_incoming(I64(0), before)
    b.cbranch(b.icmp_signed("<", index, count), body, done)
    b.position_at_end(body)
    yield index
    index.add_incoming(b.add(index, I64(1)), b.block)
    b.branch(head)
    b.position_at_end(done)
