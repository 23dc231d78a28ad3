"""The states of layers that carry one from token to token, of every sequence: slots beside the blocks of the KV cache.

A pass reads one slot of each of its sequences and writes another; once it has come to its end the second is the
sequence's and the first is free: a pass that failed half way has changed nothing, and may be computed again. Rows of a
decode pass go through a layer as a batch, a prompt's chunk alone, and so does each generated token that is computed
again, for a layer's rule over several tokens has other bits than its steps. Slots are allocated once. Invariant: every
slot is free or holds one sequence's states (`check_integrity`).

Legend: T rows of a pass, D hidden, B sequences, S slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from buddymoe_ray.device import upload
from buddymoe_ray.engine.attention import ChunkRows, PagedAttention
from buddymoe_ray.engine.kv import contiguous_start
from buddymoe_ray.models.recurrent import RowStates, RunRows, StateShapes
from buddymoe_ray.policy import state_slots

__all__ = ["StatePool"]

Where = slice | Tensor  # slots, of as many sequences


class StatePool:
    """Of `running` sequences and of one text that is computed beside them."""

    def __init__(self, shapes: StateShapes, paged: PagedAttention, *, running: int, device: torch.device) -> None:
        self._slots, self._paged, self._device = state_slots(running), paged, device
        self._parts_S = {
            layer: tuple(
                None if part is None else torch.zeros(self._slots, *part[0], dtype=part[1], device=device)
                for part in parts
            )
            for layer, parts in shapes.of.items()
        }
        self._batch: tuple[Where, Where] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget every state."""
        self._at = dict[Any, int]()  # the slot of each owner
        self._next = dict[Any, int]()  # and the one that the pass in progress writes
        self._free = list(range(self._slots))

    def release(self, owner: object) -> None:
        """Forget the states of an owner, who may have none."""
        if owner in self._at:
            self._free.append(self._at.pop(owner))
            self._free.sort()

    @contextmanager
    def passing(self, chunks: Sequence[ChunkRows], *, decode: bool) -> Iterator[None]:
        """For a pass over these, `decode` if each is one row. What it leaves counts once it is through."""
        owners = [chunk.owner for chunk in chunks if chunk.owner is not None]
        taken, self._free = self._free[: len(owners)], self._free[len(owners) :]
        self._next = dict(zip(owners, taken, strict=True))
        try:
            if decode and len(owners) == len(chunks) and all(chunk.start for chunk in chunks):
                self._batch = self._where([self._at[owner] for owner in owners]), self._where(taken)
            yield
            taken = [self._at[owner] for owner in owners if owner in self._at]
            self._at |= self._next
        finally:
            self._free = sorted(self._free + taken)
            self._next, self._batch = {}, None

    @contextmanager
    def fixed(self, reads_T: Tensor, writes_T: Tensor) -> Iterator[None]:
        """Rows of a pass read and write the slots that these hold when they are read."""
        self._batch = reads_T, writes_T
        try:
            yield
        finally:
            self._batch = None

    def places(self, chunks: Sequence[ChunkRows], rows: int) -> list[list[int]]:
        """In a decode pass over these: the slots that so many rows read, and those that they write. Rows of padding
        have one that is nobody's."""
        padding = [self._free[0]] * (rows - len(chunks))
        return [[slots[chunk.owner] for chunk in chunks] + padding for slots in (self._at, self._next)]

    def run(self, layer: int, rows_1TD: Tensor, compute: RunRows) -> tuple[Tensor, ...]:
        """See `StateKeeper`. Texts of nobody leave nothing behind."""
        if self._batch is not None:
            reads, writes = self._batch
            states = self._read(layer, reads)
            out = compute(rows_1TD.transpose(0, 1), states)
            self._write(layer, writes, states)
            return tuple(part.transpose(0, 1) for part in out)
        current, outs = self._paged.current, []
        assert current is not None, "a layer runs in a pass"
        for chunk in current.chunks:
            states = self._read(layer, self._where([self._at[chunk.owner]])) if chunk.start else RowStates()
            rows_1nD = rows_1TD[:, chunk.row : chunk.row + chunk.count]
            outs += [compute(part, states) for part in rows_1nD.split(_calls(chunk), dim=1)]
            if chunk.owner in self._next:
                self._write(layer, self._where([self._next[chunk.owner]]), states)
        return outs[0] if len(outs) == 1 else tuple(torch.cat(parts, dim=1) for parts in zip(*outs, strict=True))

    def check_integrity(self) -> None:
        """Every slot is free or somebody's, between passes."""
        everything = sorted([*self._free, *self._at.values()])
        assert everything == list(range(self._slots)) and not self._next, (
            f"free {self._free}, held {self._at}, written {self._next} of {self._slots}"
        )

    def _read(self, layer: int, slots: Where) -> RowStates:
        """Copies, for layers write into what they read."""
        parts = (None if part_S is None else part_S[slots] for part_S in self._parts_S[layer])
        return RowStates(*(part.clone() if part is not None and isinstance(slots, slice) else part for part in parts))

    def _write(self, layer: int, slots: Where, states: RowStates) -> None:
        for part_S, part in zip(self._parts_S[layer], (states.conv, states.recurrent), strict=True):
            if part_S is not None and part is not None:
                part_S[slots] = part

    def _where(self, slots: list[int]) -> Where:
        start = contiguous_start(slots)
        if start is not None:
            return slice(start, start + len(slots))
        return upload(torch.tensor(slots), self._device)


def _calls(chunk: ChunkRows) -> list[int]:
    """The tokens of each call of a layer."""
    together = chunk.count if chunk.prompt is None else min(chunk.count, max(0, chunk.prompt - chunk.start))
    return [together] * (together > 0) + [1] * (chunk.count - together)
