"""Work on many items at once that a few of them may break: halved until those at fault are alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

__all__ = ["by_halves"]

T = TypeVar("T")
R = TypeVar("R")


def by_halves(
    items: list[T], work: Callable[[list[T]], R], at_fault: Callable[[T, Exception], None]
) -> list[tuple[list[T], R]]:
    """`work` on all items; where it raises, on each half, down to single ones, which `at_fault` is told with the error.

    Returns items in their order with what came of them, without those at fault. Raises what `at_fault` raises.
    """
    if not items:
        return []
    try:
        return [(items, work(items))]
    except Exception as error:
        if len(items) == 1:
            at_fault(items[0], error)
            return []
        halves = items[: len(items) // 2], items[len(items) // 2 :]
        return [done for half in halves for done in by_halves(half, work, at_fault)]
