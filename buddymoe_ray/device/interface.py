"""What the layers above need of a device, whichever it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Copy", "Device", "Recording", "SharedMemory"]


class Copy(Protocol):
    """Bytes on their way to a device."""

    def done(self) -> bool:
        """Whether they have arrived, and their source may be overwritten."""

    def wait(self) -> None:
        """Until then. Raises what went wrong."""

    def seconds(self) -> float:
        """What it took once it was its turn; for one that is done."""


@dataclass(frozen=True, kw_only=True)
class SharedMemory:
    """uint8 `tensor` of a device's memory, and the file descriptor by which other processes map it: its holder's, who
    closes it. The memory is there for as long as a tensor on it, the descriptor or a mapping is."""

    tensor: Tensor
    fd: int


class Recording(Protocol):
    """What a device computed once, in pieces, to be computed again without the host: from what the buffers that were
    there before hold by then, into the memory that was written then. It keeps `nbytes` of the device's."""

    nbytes: int

    def replay(self, first: int, end: int) -> None:
        """Begin to compute the pieces `[first, end)`; nobody waits for them."""


class Device(Protocol):
    """`torch` is where tensors are. One with memory `apart` has experts of its own behind the host's, and finds them by
    address (kernels/triton); else the host's memory is the device's."""

    @property
    def torch(self) -> torch.device: ...
    @property
    def apart(self) -> bool: ...
    @property
    def name(self) -> str: ...
    def free_bytes(self) -> int | None:
        """Of its own memory; None where that is the host's."""

    def share(self, nbytes: int) -> SharedMemory:
        """Memory that other processes can map, not yet written. Raises BudgetError or CacheError where none is had."""

    def map(self, fd: int, nbytes: int) -> Tensor:
        """uint8, of memory that another process shares, to be read; unmapped with the last tensor on it. Raises
        CacheError for what is no such memory of that size."""

    def pin(self, memory: Tensor) -> None:
        """Have the device read host memory without the host's help. Raises BudgetError where that is refused."""

    def unpin(self, memory: Tensor) -> None:
        """The memory may be given back."""

    def copy(self, target: Tensor, source: Tensor) -> Copy:
        """Begin to copy host memory to the device, once what was computed so far has read the target."""

    def admit(self, copy: Copy) -> None:
        """What is computed from now on reads the copy; whoever calls need not wait for it."""

    def record(self, compute: Callable[[Callable[[], None]], None]) -> Recording:
        """Of what `compute` launches; it calls what it is given where a piece ends. What it writes is worth nothing
        before the first replay. Raises RuntimeError where it waits for the device."""
