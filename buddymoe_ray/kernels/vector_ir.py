"""Words for writing vector code as LLVM IR: what the kernels need beyond llvmlite's builder.

Every function takes the builder first and emits instructions; nothing here computes. Addresses are int64 and become
pointers where they are used. Knows no kernels.

Legend: b an `ir.IRBuilder`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

__all__ = ["F32", "I8", "I16", "I32", "I64", "VOID", "at", "call", "const", "load", "loop", "splat", "vec"]

VOID = ir.VoidType()
F32, I8, I16, I32, I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)


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
