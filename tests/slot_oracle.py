"""Serves a loaded model's experts from one shuffled slot buffer with transformers' own eager arithmetic.

The slow twin of the cache and the block: every expert is read whole by its `ExpertPiece`s into a slot at a shuffled
place, and the family's original experts forward runs over views of those slots. Equal logits prove index and layout.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

from buddymoe_ray.models.experts_hook import ExpertsBlock, attach
from buddymoe_ray.models.load import LoadedModel
from buddymoe_ray.types import ExpertKey, ExpertLayout

__all__ = ["SlotBuffer", "attach_oracle"]


class SlotBuffer:
    """All experts of a model in one uint8 buffer, at shuffled slots; padding is poisoned."""

    def __init__(self, layout: ExpertLayout, *, seed: int = 0) -> None:
        self.layout = layout
        keys = list(layout.pieces)
        random.Random(seed).shuffle(keys)
        self.slot_of = {key: slot for slot, key in enumerate(keys)}
        self.bytes = torch.full((len(keys), layout.slot_bytes), 0xFF, dtype=torch.uint8)
        for key, slot in self.slot_of.items():
            for piece in layout.pieces[key]:
                with open(piece.path, "rb") as file:
                    file.seek(piece.offset)
                    run = torch.frombuffer(bytearray(file.read(piece.nbytes)), dtype=torch.uint8)
                self.bytes[slot, piece.slot_offset : piece.slot_offset + piece.nbytes] = run

    def tensor(self, key: ExpertKey, name: str) -> Tensor:
        """View of parameter `name` of an expert."""
        entry = next(t for t in self.layout.tensors if t.name == name)
        run = self.bytes[self.slot_of[key], entry.offset : entry.offset + entry.nbytes]
        return run.view(getattr(torch, entry.dtype)).view(entry.shape)


class _Stack:
    """Answers `stack[expert]` as the parameter `[E, ...]` would."""

    def __init__(self, buffer: SlotBuffer, layer: int, name: str, dtype: torch.dtype) -> None:
        self._buffer, self._layer, self._name, self._dtype = buffer, layer, name, dtype

    def __getitem__(self, expert: Any) -> Tensor:
        return self._buffer.tensor(ExpertKey(self._layer, int(expert)), self._name).to(self._dtype)


class _Proxy:
    """The experts module, its parameters replaced by stacks over slots."""

    def __init__(self, module: nn.Module, stacks: dict[str, _Stack]) -> None:
        self.__dict__.update(stacks)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


def attach_oracle(loaded: LoadedModel, *, seed: int = 0) -> SlotBuffer:
    """Attach to every MoE layer a block that runs the family's original forward over slots."""
    buffer = SlotBuffer(loaded.layout, seed=seed)

    def factory(layer: int, module: nn.Module) -> ExpertsBlock:
        names = [t.name for t in loaded.layout.tensors]
        proxy = _Proxy(module, {n: _Stack(buffer, layer, n, loaded.compute_dtype) for n in names})
        original = type(module).forward.__wrapped__
        return lambda hidden, ids, weights: original(proxy, hidden, ids, weights)

    attach(loaded.experts, factory)
    return buffer
