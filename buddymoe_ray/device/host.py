"""The CPU as a device: its memory is the host's, or, `apart`, kept behind it as a GPU's is.

Copies of a device apart are made by a thread, one after the other and not at once: who reads before `admit`, or gives a
source back before `done`, reads wrong bytes here too.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import torch
from torch import Tensor

from buddymoe_ray.device.interface import Copy

__all__ = ["Host"]


class _Copied:
    def __init__(self, future: Future[None]) -> None:
        self.future = future
        self.done: Callable[[], bool] = future.done

    def wait(self) -> None:
        self.future.result()


_HERE = _Copied(Future())
_HERE.future.set_result(None)


class Host:
    """`apart`: experts take a GPU's path, their kernels Triton's interpreter."""

    def __init__(self, *, apart: bool) -> None:
        self.torch, self.apart = torch.device("cpu"), apart
        self.name = platform.processor() or platform.machine()

    def free_bytes(self) -> int | None:
        """See Device."""
        return None

    def pin(self, memory: Tensor) -> None:
        """See Device; every page will do."""

    def unpin(self, memory: Tensor) -> None:
        """See Device."""

    def copy(self, target: Tensor, source: Tensor) -> Copy:
        """See Device."""
        if self.apart:
            return _Copied(self._copies.submit(_move, target, source))
        target.copy_(source)
        return _HERE

    def admit(self, copy: Copy) -> None:
        """See Device; what is computed is computed by the caller, who waits."""
        copy.wait()

    @cached_property
    def _copies(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="copies")


def _move(target: Tensor, source: Tensor) -> None:
    target.copy_(source)
