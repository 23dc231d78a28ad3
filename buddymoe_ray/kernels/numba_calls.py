"""How machine code calls machine code, and how Python does.

What numba compiles here has one shape, `kernel(call_at, plan_at) -> status`: addresses of int64s that say what one call
is about, and of those that are the same in all calls; the status is never 0. So a kernel is compiled once and anybody
can call it by its address: Python, through `kernel`, and other kernels, which LLVM would otherwise make copies of (a
decoder layer took 47 CPU-seconds to compile, and 9 this way). Kernels copy arrays by loops: for `a[:] = b` numba first
compiles how to format its error, 5 to 15 CPU-seconds in every process that compiles. Imports numba at the top: only
modules that are imported late may import this one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import config as numba_config
from numba.cpython.unsafe.tuple import tuple_setitem
from numba.extending import intrinsic

from buddymoe_ray.kernels.expert_rows import ints_at
from buddymoe_ray.kernels.machine_code import code_folder, made_once
from buddymoe_ray.kernels.vector_ir import I64, VOID

__all__ = ["answered", "ask_native", "call_native", "compiled", "items", "kernel", "stamp_of"]

_alive: list[Any] = []
"""Compiled functions own their code."""


def _caller(returns: bool) -> Any:
    @intrinsic
    def call(typing: Any, address: Any, arguments: Any) -> Any:
        """Call a native function of int64s."""

        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            values = [builder.extract_value(args[1], i) for i in range(arguments.count)]
            kind = ir.FunctionType(I64 if returns else VOID, [I64] * arguments.count)
            answer = builder.call(builder.inttoptr(args[0], ir.PointerType(kind)), values)
            return answer if returns else context.get_dummy_value()

        return (types.int64 if returns else types.void)(types.int64, arguments), emit

    return call


call_native, ask_native = _caller(returns=False), _caller(returns=True)
_ask: Any = ask_native
_with: Any = tuple_setitem


@njit
def answered(status: Any) -> Any:
    """What a kernel answered. numba prints what is raised in one, which is where memory ends, and answers 0 for it: it
    is raised here."""
    if status == 0:
        raise MemoryError("a kernel failed, must have memory for its rows. hint: lower prefill_chunk or max_running")
    return status


@njit
def items(at: Any, zeros: Any) -> Any:
    """As many int64s from an address as there are zeros, as a tuple."""
    found, made = carray(ints_at(at), (len(zeros),)), zeros
    for i in range(len(zeros)):
        made = _with(made, i, found[i])
    return made


def compiled(function: Callable[[Any, Any], Any], folder: Path | None) -> int:
    """The address of a kernel's machine code, from `folder` when an earlier process left it there; None keeps none."""
    made = _cached(cfunc, types.int64(types.int64, types.int64), function, folder)
    _alive.append(made)
    return int(made.address)


def stamp_of(*names: str) -> int:
    """Checksum of the sources of some modules here. numba's cache knows a kernel's closure but not the code that it
    calls: a kernel that is kept must have its stamp in its closure."""
    common = ("expert_calls", "expert_rows", "lowbit_format", "numba_calls", "vector_ir")
    return crc32(b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in (*common, *names)))


def kernel(compile_: Callable[[Path | None], int], ints: int) -> partial[int]:
    """`call(the int64s of the call, plan_at) -> status` of a kernel, without the GIL; its address is the first of the
    `args`."""
    folder = code_folder()
    return partial(_entry(ints, folder), compile_(folder))


@cache
def _entry(ints: int, folder: Path | None) -> Callable[[int, tuple[int, ...], int], int]:
    """`call(kernel, the int64s of the call, plan_at) -> status` without the GIL, for calls of that many."""

    def enter(address: Any, call: Any, plan_at: Any) -> Any:
        at = np.empty(ints, np.int64)
        for i in range(ints):
            at[i] = call[i]
        status = answered(_ask(address, (at.ctypes.data, plan_at)))
        return status + at[0] - call[0]  # names the array, so that it lives until the kernel is done

    signature = types.int64(types.int64, types.UniTuple(types.int64, ints), types.int64)
    return _cached(lambda *a, **k: njit(*a, nogil=True, **k), signature, enter, folder)  # type: ignore[no-any-return]


def _cached(compiler: Any, signature: Any, function: Callable[..., Any], folder: Path | None) -> Any:
    """numba's own cache, in our folder. It is told of the folder in a variable of its module, read while decorating."""
    config: Any = numba_config
    before = config.CACHE_DIR
    config.CACHE_DIR = "" if folder is None else str(folder)
    try:
        with made_once(folder, f"{function.__module__}.{function.__qualname__}.{signature}".replace("/", "-")):
            return compiler(signature, cache=folder is not None)(function)
    finally:
        config.CACHE_DIR = before
