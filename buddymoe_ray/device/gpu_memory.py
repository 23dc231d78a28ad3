"""GPU memory that other processes map: the driver's virtual memory calls and POSIX file descriptors, not legacy IPC.

Through ctypes on libcuda alone. Unproven: no GPU was there when it was written; `device_check` runs it on one. Both
processes must see the GPU (CUDA_VISIBLE_DEVICES), and the GPUs each other's memory (NVLink, or PCIe where the machine
allows it); what the driver refuses is a CacheError with its number.
Invariant: an address is unmapped with the last tensor on it, and a handle released as soon as it is mapped.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int, c_size_t, c_uint64, c_void_p
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from buddymoe_ray.device.at_address import bytes_at
from buddymoe_ray.device.interface import SharedMemory
from buddymoe_ray.errors import CacheError

__all__ = ["map_memory", "shared_memory"]

_PINNED = _FILE_DESCRIPTOR = _ON_DEVICE = 1
_READ_AND_WRITE = 3
_PROPERTIES = ("kind", "handles", "location", "windows", "flags")


class _Location(ctypes.Structure):
    _fields_ = (("kind", c_int), ("id", c_int))


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = tuple(zip(_PROPERTIES, (c_int, c_int, _Location, c_void_p, ctypes.c_ubyte * 8), strict=True))


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", c_int))


def shared_memory(device: torch.device, nbytes: int) -> SharedMemory:
    """On the device. Raises CacheError."""
    torch.zeros(1, device=device)  # so that the device's context is there, and this thread's
    handle, fd = c_uint64(), c_int(-1)
    _call("cuMemCreate", byref(handle), c_size_t(_whole(device, nbytes)), byref(_properties(device)), c_uint64(0))
    try:
        _call("cuMemExportToShareableHandle", byref(fd), handle, c_int(_FILE_DESCRIPTOR), c_uint64(0))
        return SharedMemory(tensor=_tensor(device, handle, nbytes), fd=fd.value)
    finally:
        _call("cuMemRelease", handle)


def map_memory(device: torch.device, fd: int, nbytes: int) -> Tensor:
    """uint8 that kernels on the device can read, of memory that another process shares. Raises CacheError."""
    torch.zeros(1, device=device)
    handle = c_uint64()
    _call("cuMemImportFromShareableHandle", byref(handle), c_void_p(fd), c_int(_FILE_DESCRIPTOR))
    try:
        return _tensor(device, handle, nbytes)
    finally:
        _call("cuMemRelease", handle)


def _tensor(device: torch.device, handle: c_uint64, nbytes: int) -> Tensor:
    whole, address = c_size_t(_whole(device, nbytes)), c_uint64()
    _call("cuMemAddressReserve", byref(address), whole, c_size_t(0), c_uint64(0), c_uint64(0))
    try:
        _call("cuMemMap", address, whole, c_size_t(0), handle, c_uint64(0))
        access = _Access(_Location(_ON_DEVICE, device.index), _READ_AND_WRITE)
        _call("cuMemSetAccess", address, whole, byref(access), c_size_t(1))
    except CacheError:
        _library().cuMemUnmap(address, whole)  # refused where nothing was mapped
        _call("cuMemAddressFree", address, whole)
        raise
    return bytes_at(address.value, nbytes, device, partial(_unmap, device, address.value, whole.value))


def _unmap(device: torch.device, address: int, nbytes: int) -> None:
    torch.cuda.synchronize(device)
    _library().cuMemUnmap(c_uint64(address), c_size_t(nbytes))
    _library().cuMemAddressFree(c_uint64(address), c_size_t(nbytes))


def _whole(device: torch.device, nbytes: int) -> int:
    """Bytes up to whole pages of the device."""
    page = c_size_t()
    _call("cuMemGetAllocationGranularity", byref(page), byref(_properties(device)), c_int(0))
    return -(-nbytes // page.value) * page.value


def _properties(device: torch.device) -> _Properties:
    return _Properties(kind=_PINNED, handles=_FILE_DESCRIPTOR, location=_Location(_ON_DEVICE, device.index))


def _call(name: str, *arguments: Any) -> None:
    code = int(getattr(_library(), name)(*arguments))
    if code:
        raise CacheError(f"{name} answered {code}, must be 0. hint: run workers that see the same GPUs, or one a node")


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
