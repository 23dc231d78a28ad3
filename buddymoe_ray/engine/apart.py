"""Finds which of a batch are at fault when its work raises: only those fail. Knows nothing of what the work is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

__all__ = ["apart"]

T = TypeVar("T")
R = TypeVar("R")


def apart(
    items: list[T], work: Callable[[list[T]], R], *, fail: Callable[[T, Exception], None]
) -> list[tuple[list[T], R]]:
    """`work` on all items; where it raises, on each half, down to those at fault, which `fail` is told of.

    Raises what `fail` raises.
    """
    if not items:
        return []
    try:
        return [(items, work(items))]
    except Exception as error:
        if len(items) == 1:
            fail(items[0], error)
            return []
    halves = items[: len(items) // 2], items[len(items) // 2 :]
    return [done for half in halves for done in apart(half, work, fail=fail)]
