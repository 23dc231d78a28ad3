"""A tensor of memory at an address, on the device that its caller names, by DLPack.

torch would ask the driver where memory lies, and takes what a GPU maps of another GPU's for that one's: then it copies.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_int32, c_int64, c_uint8, c_uint16, c_uint64, c_void_p

import torch
from torch import Tensor

__all__ = ["bytes_at"]

_CPU, _CUDA, _UNSIGNED = 1, 2, 1
_NAME = ctypes.c_char_p(b"dltensor")


class _Where(ctypes.Structure):
    """DLDevice."""

    _fields_ = (("kind", c_int32), ("index", c_int32))


class _Type(ctypes.Structure):
    """DLDataType."""

    _fields_ = (("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16))


class _Described(ctypes.Structure):
    """DLManagedTensor, of one dimension."""

    _fields_ = (
        ("data", c_void_p),
        ("where", _Where),
        ("dimensions", c_int32),
        ("dtype", _Type),
        ("shape", c_void_p),
        ("strides", c_void_p),
        ("offset", c_uint64),
        ("context", c_void_p),
        ("deleter", c_void_p),
    )


_held = dict[int, tuple[_Described, ctypes.Array[c_int64], Callable[[], None]]]()
"""By where they are described."""


def bytes_at(address: int, nbytes: int, device: torch.device, release: Callable[[], None]) -> Tensor:
    """uint8 `[nbytes]`; `release` is called once nothing is left that looks at it."""
    sizes = (c_int64 * 2)(nbytes, 1)
    described = _Described(
        data=address,
        where=_Where(_CUDA if device.type == "cuda" else _CPU, device.index or 0),
        dimensions=1,
        dtype=_Type(_UNSIGNED, 8, 1),
        shape=ctypes.addressof(sizes),
        strides=ctypes.addressof(sizes) + ctypes.sizeof(c_int64),
        deleter=ctypes.cast(_deleter, c_void_p).value,
    )
    at = ctypes.addressof(described)
    _held[at] = (described, sizes, release)
    return torch.from_dlpack(_capsule(at, _NAME, None))


def _gone(at: int) -> None:
    _held.pop(at)[2]()


_deleter = ctypes.CFUNCTYPE(None, c_void_p)(_gone)
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, (c_void_p, ctypes.c_char_p, c_void_p)
