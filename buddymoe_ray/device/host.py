"""The CPU as a device: its memory is the host's, or, `apart`, kept behind it as a GPU's is.

Copies of a device apart are made by a thread, one after the other and not at once: who reads before `admit`, or gives a
source back before `done`, reads wrong bytes here too.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import torch
from torch import Tensor

from buddymoe_ray.device.host_recording import HostRecording
from buddymoe_ray.device.interface import Copy, Recording, SharedMemory
from buddymoe_ray.errors import BudgetError, CacheError

__all__ = ["Host"]

_FIXED_SIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class _Copied:
    def __init__(self, future: Future[float]) -> None:
        self.future = future
        self.done: Callable[[], bool] = future.done
        self.seconds: Callable[[], float] = future.result

    def wait(self) -> None:
        self.future.result()


_HERE = _Copied(Future())
_HERE.future.set_result(0.0)


class Host:
    """`apart`: experts take a GPU's path, their kernels Triton's interpreter."""

    def __init__(self, *, apart: bool) -> None:
        self.torch, self.apart = torch.device("cpu"), apart
        self.name = platform.processor() or platform.machine()

    def free_bytes(self) -> int | None:
        """See Device."""
        return None

    def share(self, nbytes: int) -> SharedMemory:
        """See Device; a file without a name, of fixed size."""
        fd = os.memfd_create("buddymoe", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(fd, 0, nbytes)  # now, and not when it is written
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _FIXED_SIZE)
            memory = mmap.mmap(fd, nbytes)
        except OSError as error:
            os.close(fd)
            raise BudgetError(
                f"{nbytes} bytes of shared memory cannot be had ({error.strerror}). hint: lower --memory"
            ) from error
        return SharedMemory(tensor=torch.frombuffer(memory, dtype=torch.uint8), fd=fd)

    def map(self, fd: int, nbytes: int) -> Tensor:
        """See Device."""
        try:
            fixed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _FIXED_SIZE == _FIXED_SIZE and os.fstat(fd).st_size == nbytes
            memory = mmap.mmap(fd, nbytes, flags=mmap.MAP_PRIVATE) if fixed else None  # what is written here stays here
        except OSError as error:
            raise CacheError(f"memory cannot be mapped ({error.strerror}). hint: restart the workers") from error
        if memory is None:
            raise CacheError(f"memory is no {nbytes} bytes of fixed size. hint: restart the workers")
        return torch.frombuffer(memory, dtype=torch.uint8)

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

    def record(self, compute: Callable[[Callable[[], None]], None]) -> Recording:
        """See Device."""
        return HostRecording(compute)

    @cached_property
    def _copies(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="copies")


def _move(target: Tensor, source: Tensor) -> float:
    began = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - began
