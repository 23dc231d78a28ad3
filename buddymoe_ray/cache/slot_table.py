"""Which expert each of a worker's device slots holds, in host memory that the node's other workers read.

Readers take no lock: they validate. A slot's word is even while its bytes are the expert's that stands beside it, odd
while they are nothing or being written. Whoever copied a slot looks at the word again: the same one says that what was
copied is that expert. Memory of one generation is never another's: its number, unlike any other's, is taken back first.

Legend: C slots.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np

from buddymoe_ray.device import SharedMemory, open_device
from buddymoe_ray.types import ExpertKey

__all__ = ["SlotTable", "pack_key", "unpack_key"]

_ITEM = 8


class SlotTable:
    """Of `slots`, in `memory`, whose only writer is who `made` it; `generation` is what its reader was told."""

    def __init__(self, memory: np.ndarray[tuple[int], np.dtype[np.uint8]], slots: int, generation: int) -> None:
        words = memory[: self.nbytes_for(slots)].view(np.int64)
        self._now, self._word_C, self._key_C = words[:1], words[1 : 1 + slots], words[1 + slots :]
        self.generation = generation

    @staticmethod
    def nbytes_for(slots: int) -> int:
        """Of a table."""
        return _ITEM * (1 + 2 * slots)

    @classmethod
    def made(cls, slots: int) -> tuple[SlotTable, SharedMemory]:
        """One of slots that hold nothing. Raises BudgetError."""
        memory, generation = open_device("cpu").share(cls.nbytes_for(slots)), secrets.randbits(62) | 1
        table = cls(memory.tensor.numpy(), slots, generation)
        table._key_C[:], table._word_C[:], table._now[0] = -1, 1, generation
        return table, memory

    @property
    def is_current(self) -> bool:
        """Whether the memory is still that of the generation."""
        return int(self._now[0]) == self.generation

    def publish(self, slot: int, key: ExpertKey) -> None:
        """The slot's bytes are the expert's, on the device, until `withdraw`."""
        self.withdraw(slot)
        self._key_C[slot] = pack_key(key)
        self._word_C[slot] += 1

    def withdraw(self, slot: int) -> None:
        """The slot's bytes are going to be something else."""
        self._word_C[slot] |= 1

    def retire(self) -> None:
        """None of the slots holds anything any more, for good."""
        self._word_C |= 1
        self._now[0] = 0

    def find(self, key: ExpertKey) -> tuple[int, int] | None:
        """A slot that holds the expert, and its word."""
        for slot in np.flatnonzero(self._key_C == pack_key(key)).tolist():
            word = int(self._word_C[slot])
            if word % 2 == 0 and self._key_C[slot] == pack_key(key) and self.is_current:
                return slot, word
        return None

    def experts(self, layer: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Those of a layer that some slot holds now, in any order."""
        key_C = self._key_C[(self._word_C % 2 == 0) & (self._key_C >> 32 == layer)]
        return key_C & 0xFFFFFFFF if self.is_current else key_C[:0]

    def lacks(self, keys: Sequence[ExpertKey]) -> bool:
        """Whether no slot holds some of the experts now."""
        held = self._key_C[self._word_C % 2 == 0]
        return not np.isin([pack_key(key) for key in keys], held).all()

    def holds(self, slot: int, word: int) -> bool:
        """Whether nothing was done to the slot since its word was `word`."""
        return int(self._word_C[slot]) == word and self.is_current


def pack_key(key: ExpertKey) -> int:
    """As tables and messages have an expert."""
    return key.layer << 32 | key.expert


def unpack_key(number: int) -> ExpertKey:
    """The expert that a table or a message names."""
    return ExpertKey(number >> 32, number & 0xFFFFFFFF)
