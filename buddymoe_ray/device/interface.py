"""What the layers above need of a device, whichever it is."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Copy", "Device"]


class Copy(Protocol):
    """Bytes on their way to a device."""

    def done(self) -> bool:
        """Whether they have arrived, and their source may be overwritten."""

    def wait(self) -> None:
        """Until then. Raises what went wrong."""


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

    def pin(self, memory: Tensor) -> None:
        """Have the device read host memory without the host's help. Raises BudgetError where that is refused."""

    def unpin(self, memory: Tensor) -> None:
        """The memory may be given back."""

    def copy(self, target: Tensor, source: Tensor) -> Copy:
        """Begin to copy host memory to the device, once what was computed so far has read the target."""

    def admit(self, copy: Copy) -> None:
        """What is computed from now on reads the copy; whoever calls need not wait for it."""
