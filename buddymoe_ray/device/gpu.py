"""The CUDA half: a GPU's memory, its copy engine, host memory registered with it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from buddymoe_ray.device.gpu_memory import map_memory, shared_memory
from buddymoe_ray.device.gpu_recording import GpuRecording
from buddymoe_ray.device.interface import Copy, Recording, SharedMemory
from buddymoe_ray.errors import BudgetError

__all__ = ["Gpu", "current", "download", "upload"]


def current(where: torch.device) -> AbstractContextManager[object]:
    """While it lasts, kernels that this thread launches run there."""
    return torch.cuda.device(where) if where.type == "cuda" else nullcontext()


def upload(host: Tensor, where: torch.device) -> Tensor:
    """The tensor there, for what is computed from now on; nobody waits for the copy. On the CPU it is itself."""
    return (host.pin_memory() if where.type == "cuda" else host).to(where, non_blocking=True)


def download(*tensors: Tensor) -> Callable[[], list[Tensor]]:
    """Begin to bring to the host what was computed so far, on one device; who calls the answer waits for that alone,
    and not for what is computed since."""
    where = tensors[0].device
    if where.type != "cuda":
        here = [tensor.cpu() for tensor in tensors]
        return lambda: here
    stream, arrived = _downloads(where), torch.cuda.Event()
    stream.wait_stream(torch.cuda.current_stream(where))
    with torch.cuda.stream(stream):
        here = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
        for tensor, copy in zip(tensors, here, strict=True):
            copy.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)
        arrived.record(stream)

    def wait() -> list[Tensor]:
        arrived.synchronize()
        return here

    return wait


@cache
def _downloads(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@dataclass(frozen=True)
class _Event:
    begun: torch.cuda.Event
    event: torch.cuda.Event

    def done(self) -> bool:
        return self.event.query()

    def wait(self) -> None:
        self.event.synchronize()

    def seconds(self) -> float:
        return self.begun.elapsed_time(self.event) / 1e3


class Gpu:
    """Copies run on streams of their own, beside what is computed on torch's current one: one for those out of the
    host's memory, one for those out of another GPU's."""

    apart = True

    def __init__(self, device: torch.device) -> None:
        self.torch = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._streams = dict[str, torch.cuda.Stream]()

    @property
    def name(self) -> str:
        """As the driver tells it."""
        return torch.cuda.get_device_name(self.torch)

    def free_bytes(self) -> int | None:
        """See Device; what torch's allocator keeps is not free."""
        return int(torch.cuda.mem_get_info(self.torch)[0])

    def share(self, nbytes: int) -> SharedMemory:
        """See Device."""
        return shared_memory(self.torch, nbytes)

    def map(self, fd: int, nbytes: int) -> Tensor:
        """See Device."""
        return map_memory(self.torch, fd, nbytes)

    def pin(self, memory: Tensor) -> None:
        """See Device."""
        with current(self.torch):  # what another GPU pins is not pinned for this one
            code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        if code != 0:
            with suppress(RuntimeError):  # or whatever is launched next would raise it
                torch.zeros(1, device=self.torch)
            raise BudgetError(
                f"CUDA refused to pin {memory.nbytes} bytes of host memory (error {code}), must be allowed to. "
                "hint: lower --host-memory, or raise the locked-memory limit (ulimit -l)"
            )

    def unpin(self, memory: Tensor) -> None:
        """See Device."""
        with current(self.torch):
            torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())

    def copy(self, target: Tensor, source: Tensor) -> Copy:
        """See Device; of pageable memory the host's share is done at once."""
        if source.device.type not in self._streams:
            self._streams[source.device.type] = torch.cuda.Stream(self.torch)
        begun, copied = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = self._streams[source.device.type]
        stream.wait_stream(torch.cuda.current_stream(self.torch))
        with torch.cuda.stream(stream):
            begun.record(stream)
            target.copy_(source, non_blocking=True)
            copied.record(stream)
        return _Event(begun, copied)

    def admit(self, copy: Copy) -> None:
        """See Device."""
        assert isinstance(copy, _Event), f"copy is {copy}, must be this device's"
        torch.cuda.current_stream(self.torch).wait_event(copy.event)

    def record(self, compute: Callable[[Callable[[], None]], None]) -> Recording:
        """See Device."""
        return GpuRecording(self.torch, compute)
