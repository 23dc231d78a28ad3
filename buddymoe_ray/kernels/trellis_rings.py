"""The search for the codes of rings as LLVM IR: Viterbi's algorithm, 16 rings side by side, one to a lane.

`module_text` writes one module for a width of codes:

    search(x, weight, codes, table, first, free, scratch, count)    all int64 addresses or counts

`x` and `weight` are float32 [count, P, 16], `codes` uint8 [count, P, 16], read (those before `first`) and written,
`table` the float32 values of the 128 windows. `scratch` is SCRATCH_BYTES of room, aligned to 64. A ring that is `free`
is begun in any state at position `first`, and may end in another one; else it keeps the state that its codes have
there. Where a weight is negative the code is 0.

The constant part of an error is left out, and a cost's lowest bits are which of the states before it was best: so a
step of a state is two multiply-adds, an `and`, an `or` and a minimum. Does not know matrices.

Tried and dropped: the states of one ring side by side, by numba (2 to 8 times as long: neighbours compete).

Legend: P positions of a ring, S states, B codes, b an `ir.IRBuilder`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from llvmlite import ir

from buddymoe_ray.kernels.trellis_tables import DEAR, RINGS, WINDOW
from buddymoe_ray.kernels.vector_ir import F32, I8, I32, I64, VOID, at, call, const, internal, load, loop, splat, vec

__all__ = ["LANES", "SCRATCH_BYTES", "module_text"]

LANES = 16
_FLOATS, _INTS, _BYTES = (vec(kind, LANES) for kind in (F32, I32, I8))
_COSTS = 4 * LANES << (WINDOW - 1)  # of as many states as there can be
SCRATCH_BYTES = 2 * _COSTS + (LANES * max(RINGS.values()) << (WINDOW - 1))
_MINIMUM = f"llvm.minnum.v{LANES}f32"


def module_text(bits: int) -> str:
    """The module's IR."""
    module, P = ir.Module(name="trellis"), RINGS[bits]
    one = _one(module, bits)
    search = ir.Function(module, ir.FunctionType(VOID, [I64] * 8), "search")
    x, weight, codes, *same, count = search.args
    b = ir.IRBuilder(search.append_basic_block())
    with loop(b, count) as n:
        floats, items = b.mul(n, I64(4 * P * LANES)), b.mul(n, I64(P * LANES))
        b.call(one, [b.add(x, floats), b.add(weight, floats), b.add(codes, items), *same])
    b.ret_void()
    return str(module)


def _one(module: Any, bits: int) -> Any:
    """Of 16 rings."""
    one = internal(module, "one", 7)
    x, weight, codes, table, first, free, scratch = one.args
    b = ir.IRBuilder(one.append_basic_block())
    made = _Rings(bits, (x, weight, codes, table), scratch)
    state = made.state(b, first)
    made.begin(b, state, free)
    with loop(b, I64(RINGS[bits] // 2)) as turn:
        for odd in (0, 1):  # costs go from one table to the other and back
            made.step(b, b.add(b.mul(turn, I64(2)), I64(odd)), first, odd)
    made.trace(b, made.end(b, state, free), first)
    b.ret_void()
    return one


class _Rings:
    """Emits the parts."""

    def __init__(self, bits: int, places: tuple[Any, Any, Any, Any], scratch: Any) -> None:
        self._bits, self._P, self._B, self._S = bits, RINGS[bits], 1 << bits, 1 << (WINDOW - bits)
        self._x, self._weight, self._codes, self._table = places
        self._scratch = scratch

    def state(self, b: Any, first: Any) -> Any:
        """What the codes before a position come to: the bits of a window but for its last code."""
        found = const(_INTS, 0)
        for back in range(1, -(-WINDOW // self._bits)):
            shift = WINDOW - self._bits * (back + 1)
            place = self._position(b, b.sub(first, I64(back)))
            code = b.zext(load(b, b.add(self._codes, b.mul(place, I64(LANES))), _BYTES), _INTS)
            moved = b.shl(code, const(_INTS, shift)) if shift >= 0 else b.lshr(code, const(_INTS, -shift))
            found = b.or_(found, moved)
        return found

    def begin(self, b: Any, state: Any, free: Any) -> None:
        """Costs before the first step."""
        all_free = splat(b, b.icmp_signed("!=", free, I64(0)), LANES)
        with loop(b, I64(self._S)) as s:
            here = b.icmp_signed("==", state, splat(b, b.trunc(s, I32), LANES))
            cost = b.select(b.or_(here, all_free), const(_FLOATS, 0.0), const(_FLOATS, DEAR))
            b.store(cost, self._cost(b, 0, s))

    def step(self, b: Any, turn: Any, first: Any, odd: int) -> None:
        """One position further: the best way into every state."""
        place = b.mul(self._position(b, b.add(first, turn)), I64(4 * LANES))
        stored = load(b, b.add(self._weight, place), _FLOATS)
        fixed = b.fcmp_ordered("<", stored, const(_FLOATS, 0.0))
        weight = b.select(fixed, const(_FLOATS, 0.0), stored)
        dear = b.select(fixed, const(_FLOATS, DEAR), const(_FLOATS, 0.0))
        slope = b.fmul(b.fmul(weight, load(b, b.add(self._x, place), _FLOATS)), const(_FLOATS, -2.0))
        chosen = b.add(self._scratch, b.add(I64(2 * _COSTS), b.mul(turn, I64(self._S * LANES))))
        with loop(b, I64(self._S)) as q:
            window, ways = b.mul(q, I64(self._B)), list[Any]()
            before = b.and_(window, I64(self._S - 1))
            for h in range(self._B):
                value = splat(b, load(b, self._table, F32, b.mul(b.add(window, I64(h)), I64(4))), LANES)
                rise = _fma(b, value, weight, slope)
                cost = _fma(b, value, rise, b.load(self._cost(b, odd, b.add(before, I64(h)))))
                marked = b.and_(b.bitcast(cost, _INTS), const(_INTS, -self._B))
                ways.append(b.bitcast(b.or_(marked, const(_INTS, h)), _FLOATS))
            best = _least(b, ways)
            zero = b.icmp_signed("<", q, I64(1 << (WINDOW - 2 * self._bits)))  # the code of all ways into the state
            price = b.select(splat(b, zero, LANES), const(_FLOATS, 0.0), dear)
            b.store(b.fadd(best, price), self._cost(b, 1 - odd, q))
            which = b.and_(b.bitcast(best, _INTS), const(_INTS, self._B - 1))
            b.store(b.trunc(which, _BYTES), at(b, chosen, _BYTES, b.mul(q, I64(LANES))), align=16)

    def end(self, b: Any, state: Any, free: Any) -> Any:
        """The state behind the last step: the cheapest one, or that of the beginning."""
        best, cost = b.alloca(_INTS), b.alloca(_FLOATS)
        b.store(const(_INTS, 0), best)
        b.store(const(_FLOATS, DEAR), cost)
        with loop(b, I64(self._S)) as s:
            theirs = b.load(self._cost(b, 0, s))
            less = b.fcmp_ordered("<", theirs, b.load(cost))
            b.store(b.select(less, theirs, b.load(cost)), cost)
            b.store(b.select(less, splat(b, b.trunc(s, I32), LANES), b.load(best)), best)
        return b.select(b.icmp_signed("!=", free, I64(0)), b.load(best), state)

    def trace(self, b: Any, state: Any, first: Any) -> None:
        """Back from there, writing codes."""
        place = b.alloca(_INTS)
        b.store(state, place)
        with loop(b, I64(self._P)) as turn:
            k = b.sub(I64(self._P - 1), turn)
            row = b.add(self._scratch, b.add(I64(2 * _COSTS), b.mul(k, I64(self._S * LANES))))
            state, which = b.load(place), const(_INTS, 0)
            for lane in range(LANES):
                s = b.zext(b.extract_element(state, I32(lane)), I64)
                byte = load(b, b.add(row, b.mul(s, I64(LANES))), I8, lane)
                which = b.insert_element(which, b.zext(byte, I32), I32(lane))
            window = b.or_(b.mul(state, const(_INTS, self._B)), which)
            code = b.trunc(b.lshr(window, const(_INTS, WINDOW - self._bits)), _BYTES)
            to = b.mul(self._position(b, b.add(first, k)), I64(LANES))
            b.store(code, at(b, self._codes, _BYTES, to), align=1)
            b.store(b.and_(window, const(_INTS, self._S - 1)), place)

    def _position(self, b: Any, k: Any) -> Any:
        return b.and_(k, I64(self._P - 1))

    def _cost(self, b: Any, table: int, state: Any) -> Any:
        return at(b, self._scratch, _FLOATS, b.add(I64(table * _COSTS), b.mul(state, I64(4 * LANES))))


def _fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    return call(b, f"llvm.fma.v{LANES}f32", _FLOATS, [x, y, z])


def _least(b: Any, items: list[Any]) -> Any:
    """Of numbers, neighbours first, so that no chain is long. A comparison and a choice would stay two instructions:
    LLVM chooses among the integers that the numbers were."""
    least = b.module.globals.get(_MINIMUM) or ir.Function(b.module, ir.FunctionType(_FLOATS, [_FLOATS] * 2), _MINIMUM)
    while len(items) > 1:
        items = [b.call(least, pair, fastmath=("nnan", "nsz")) for pair in list(pairwise(items))[::2]]
    return items[0]
