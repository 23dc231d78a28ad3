"""Works on several things at once, in threads, in their order, with few of them in memory.

Knows nothing of what is worked on. Invariant: results come in the order of the items, and are those of one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["side_by_side"]

A = TypeVar("A")
B = TypeVar("B")


def side_by_side(work: Callable[[A], B], items: Iterable[A], threads: int) -> Generator[B]:
    """`work` of each item. Items are taken in this thread, one more than there are threads at most; torch does not
    split the work of one further. Closing it waits for what was begun."""
    if threads == 1:
        yield from map(work, items)
        return
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    pending: deque[Future[B]] = deque()
    try:
        with ThreadPoolExecutor(threads) as pool:
            try:
                for item in items:
                    pending.append(pool.submit(work, item))
                    if len(pending) > threads:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()
    finally:
        torch.set_num_threads(usual)
