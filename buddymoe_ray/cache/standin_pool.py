"""The device memory of stand-ins that have bytes of their own: one tensor, one record per expert that needs one.

Records (packed low-bit copies, low-rank maps, mean vectors) are read once at start and stay. Does not know what a
record means or when it is used. Invariant: `nbytes` is what was planned; an expert has at most one record.
Neighbours: `models.standin_files` maps the files, `moe.standins` computes with the records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from buddymoe_ray.cache.disk import DiskReader
from buddymoe_ray.cache.pool import slot_views
from buddymoe_ray.types import ExpertKey, ExpertLayout

__all__ = ["StandinPool"]


class StandinPool:
    """Room for the records of `kind_of`.

    Args:
        layouts: per kind, how a record lies and where each expert's is on disk.
        kind_of: which experts have a record here, and of which kind.
        device: where the records live.
        memory: uint8 `[nbytes_for(...)]` to use instead of memory of its own: a node's one copy.
    """

    def __init__(
        self,
        layouts: Mapping[str, ExpertLayout],
        kind_of: Mapping[ExpertKey, str],
        device: torch.device,
        memory: Tensor | None = None,
    ) -> None:
        self.kind_of = dict(kind_of)
        self._layouts = layouts
        self.offset_of: dict[ExpertKey, int] = {}
        total = 0
        for key, kind in self.kind_of.items():
            self.offset_of[key] = total
            total += layouts[kind].slot_bytes
        assert memory is None or memory.numel() == total, f"memory is {memory.shape}, must be {total} bytes"  # type: ignore[union-attr]
        self.bytes = torch.empty(total, dtype=torch.uint8, device=device) if memory is None else memory
        self._views = {key: slot_views(self._record(key), layouts[kind]) for key, kind in self.kind_of.items()}

    @staticmethod
    def nbytes_for(layouts: Mapping[str, ExpertLayout], kind_of: Mapping[ExpertKey, str]) -> int:
        """Bytes of all records of `kind_of`."""
        return sum(layouts[kind].slot_bytes for kind in kind_of.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all records on the device."""
        return self.bytes.numel()

    def tensors(self, key: ExpertKey) -> Mapping[str, Tensor]:
        """The record's tensors by name, as views."""
        return self._views[key]

    def load(self, reader: DiskReader, progress: Callable[..., Iterable[ExpertKey]] = lambda items, **_: items) -> None:
        """Read every record. Raises CacheError; the pool must not be used then."""
        on_gpu = self.bytes.device.type != "cpu"
        for key in progress(list(self.kind_of), total=len(self.kind_of), desc="stand-ins"):
            record = self._record(key)
            target = torch.empty(record.shape, dtype=torch.uint8) if on_gpu else record
            reader.submit(self._layouts[self.kind_of[key]].pieces[key], target.numpy()).wait()
            if on_gpu:
                record.copy_(target)

    def _record(self, key: ExpertKey) -> Tensor:
        start = self.offset_of[key]
        return self.bytes[start : start + self._layouts[self.kind_of[key]].slot_bytes]
