"""Triton's interpreter, without what it does again and again: half of its time.

At every launch, and at every call of a function within a program, it looks through its language for what to replace
and replaces it anew; every tensor wraps the numbers of its shape. Here each is done once, and stays: such a process
compiles nothing. Values are computed by the same code.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

__all__ = ["quicken_interpreter"]


@cache
def quicken_interpreter() -> None:
    """In this process, where TRITON_INTERPRET is 1."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.language import core
    from triton.runtime import interpreter

    replace: Any = interpreter._patch_lang
    make: Any = core.tensor.__init__
    shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}

    @cache
    def replaced(function: Any) -> Any:
        replace(function)
        return interpreter._LangPatchScope()  # of what is to be undone: nothing

    def made(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape.values) if type.is_block() else ()
        if key in shapes:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = shapes[key]
        else:
            make(self, handle, type)
            shapes[key] = self.shape, self.numel

    interpreter._patch_lang = replaced
    core.tensor.__init__ = made  # type: ignore[method-assign]
