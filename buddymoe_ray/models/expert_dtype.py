"""Experts in another precision than the checkpoint's: made once, kept in the user's cache, served like any others.

`int8` and `int4` are the packed low-bit format (groups of 32, nearest rounding), `bf16` is a plain cast. The copy is
bound to the checkpoint's hash; 100 % of memory then means all experts in that precision, and `exact` is exact to it.
Knows no slots and no budgets.

Legend: E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from buddymoe_ray.cache import DiskReader, slot_views
from buddymoe_ray.config import cache_folder
from buddymoe_ray.kernels import LowbitFormat, pack_plain, plain_weights, record_tensors
from buddymoe_ray.models.fingerprint import model_hash
from buddymoe_ray.models.standin_files import StandinWriter, standin_layouts
from buddymoe_ray.types import ExpertKey, ExpertLayout, SlotTensor

__all__ = ["format_of", "recoded_layout", "recoded_tensors"]

_BITS = {"int8": 8, "int4": 4}
_RECIPE = "unbiased 1"


def format_of(expert_dtype: str) -> LowbitFormat | None:
    """The packed format of experts served so, None when they are plain tensors."""
    return LowbitFormat(bits=_BITS[expert_dtype]) if expert_dtype in _BITS else None


def recoded_layout(
    layout: ExpertLayout,
    folder: Path,
    expert_dtype: str,
    *,
    transposed: bool,
    progress: Callable[..., Iterable[Any]] = lambda items, **_: items,
) -> ExpertLayout:
    """The layout of the same experts in `expert_dtype` (`native` is the layout itself).

    Args:
        layout: experts as stored in the checkpoint in `folder`.
        transposed: whether matrices are stored `[in, out]`; packed ones are always `[out, in]`.

    Raises ProfileError when the copy cannot be written.
    """
    if expert_dtype == "native":
        return layout
    recoder = _Recoder.make(layout.shapes, expert_dtype, transposed)
    fingerprint = model_hash(folder)
    target = cache_folder() / "experts" / fingerprint[:24]
    writer = StandinWriter(
        target,
        expert_dtype,
        layout=recoder.tensors,
        record_bytes=recoder.nbytes,
        model_hash=fingerprint,
        recipe=_RECIPE,
    )
    missing = [la for la in range(layout.layers) if not writer.has(la)]
    if missing:
        units = [(la, e) for la in missing for e in range(layout.experts_per_layer[la])]
        with _Reader(layout) as read:
            made: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
            for layer, expert in progress(units, total=len(units), desc=f"experts to {expert_dtype}"):
                made.append(recoder.record(read(ExpertKey(layer, expert))))
                if expert == layout.experts_per_layer[layer] - 1:
                    writer.write(layer, np.stack(made))
                    made = []
    return standin_layouts(target, fingerprint, kinds=(expert_dtype,))[expert_dtype]


def recoded_tensors(
    shapes: Mapping[str, tuple[int, ...]], expert_dtype: str, *, transposed: bool
) -> tuple[tuple[SlotTensor, ...], int]:
    """How one expert with parameters of such shapes lies in `expert_dtype` (not `native`), and its bytes. Makes
    nothing."""
    recoder = _Recoder.make(shapes, expert_dtype, transposed)
    return recoder.tensors, recoder.nbytes


@dataclass(frozen=True, kw_only=True)
class _Recoder:
    """How one expert's tensors become a record of `nbytes` bytes laid out as `tensors`."""

    tensors: tuple[SlotTensor, ...]
    nbytes: int
    fmt: LowbitFormat | None
    transposed: bool

    @classmethod
    def make(cls, stored: Mapping[str, tuple[int, ...]], expert_dtype: str, transposed: bool) -> _Recoder:
        if expert_dtype == "bf16":
            tensors, nbytes = _cast_layout(stored)
            return cls(tensors=tensors, nbytes=nbytes, fmt=None, transposed=transposed)
        fmt = LowbitFormat(bits=_BITS[expert_dtype])
        shapes = {name: s[::-1] if transposed and len(s) == 2 else s for name, s in stored.items()}
        tensors, nbytes = record_tensors(shapes, fmt)
        return cls(tensors=tensors, nbytes=nbytes, fmt=fmt, transposed=transposed)

    def record(self, weights: Mapping[str, Tensor]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The record's bytes."""
        made: dict[str, Tensor] = {}
        for name, weight in weights.items():
            if self.fmt is None or weight.ndim == 1:
                made[name] = weight
                continue
            packed = pack_plain(weight.T if self.transposed else weight, self.fmt)
            made |= packed.named(name)
        record = torch.zeros(self.nbytes, dtype=torch.uint8)
        for tensor in self.tensors:
            part = made[tensor.name].to(getattr(torch, tensor.dtype)).contiguous()
            record[tensor.offset : tensor.offset + tensor.nbytes] = part.view(torch.uint8).reshape(-1)
        return record.numpy()


class _Reader:
    """Reads one expert at a time into one buffer."""

    def __init__(self, layout: ExpertLayout) -> None:
        self._layout, self._disk = layout, DiskReader(depth=4, files=layout.files)
        self._slot = torch.empty(layout.slot_bytes, dtype=torch.uint8)

    def __enter__(self) -> Callable[[ExpertKey], Mapping[str, Tensor]]:
        return self._read

    def __exit__(self, *_: object) -> None:
        self._disk.close()

    def _read(self, key: ExpertKey) -> Mapping[str, Tensor]:
        self._disk.submit(self._layout.pieces[key], self._slot.numpy()).wait()
        return plain_weights(slot_views(self._slot, self._layout), self._layout.coded)


def _cast_layout(shapes: Mapping[str, tuple[int, ...]]) -> tuple[tuple[SlotTensor, ...], int]:
    made, at = [], 0
    for name, shape in shapes.items():
        nbytes = 2 * prod(shape)
        made.append(SlotTensor(name=name, shape=shape, dtype="bfloat16", offset=at, nbytes=nbytes))
        at += -(-nbytes // 64) * 64
    return tuple(made), at
