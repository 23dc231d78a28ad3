"""The paged KV cache: one K and one V pool per attention layer, cut into blocks of `block_size` tokens.

Knows block tables and tensors, not sequences, requests or the scheduler. Pools are allocated once, before the first
request, from shapes learnt by a probe pass; on CPU untouched pages cost nothing.

Legend: T rows, H key-value heads, d head size, N pool tokens, L tokens of one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["KVPool", "KVShape", "contiguous_start"]


@dataclass(frozen=True, kw_only=True)
class KVShape:
    """Per-token shape of one attention layer's cache: key-value heads, key size, value size."""

    heads: int
    key_dim: int
    value_dim: int

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of one token in one layer."""
        return self.heads * (self.key_dim + self.value_dim) * dtype.itemsize


class KVPool:
    """Pools for all layers. `shapes` maps the model's attention layer index to its shape."""

    def __init__(
        self, shapes: dict[int, KVShape], *, blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        assert blocks > 0, f"blocks is {blocks}, must be positive"
        tokens = blocks * block_size
        self.blocks, self.block_size = blocks, block_size
        self.keys_NHd = {
            layer: torch.empty(tokens, s.heads, s.key_dim, dtype=dtype, device=device) for layer, s in shapes.items()
        }
        self.values_NHd = {
            layer: torch.empty(tokens, s.heads, s.value_dim, dtype=dtype, device=device) for layer, s in shapes.items()
        }

    def of(self, layer: int) -> tuple[Tensor, Tensor, int]:
        """A layer's pools of keys and of values, and the tokens of a block."""
        return self.keys_NHd[layer], self.values_NHd[layer], self.block_size

    @staticmethod
    def bytes_per_token(shapes: dict[int, KVShape], dtype: torch.dtype) -> int:
        """Bytes one token takes over all layers."""
        return sum(shape.nbytes(dtype) for shape in shapes.values())

    def write(self, layer: int, key_THd: Tensor, value_THd: Tensor, slots_T: Tensor) -> None:
        """Store the rows' keys and values at pool positions `slots_T`."""
        self.keys_NHd[layer].index_copy_(0, slots_T, key_THd)
        self.values_NHd[layer].index_copy_(0, slots_T, value_THd)

    def read(self, layer: int, where: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values at pool positions `where` (a slice is a view, an index tensor `[...]` a gather)."""
        return self.keys_NHd[layer][where], self.values_NHd[layer][where]


def contiguous_start(blocks: list[int]) -> int | None:
    """First block when the table is a run of ascending neighbours (then read without a copy), else None."""
    start = blocks[0]
    return (
        start if blocks[-1] - start == len(blocks) - 1 and blocks == list(range(start, start + len(blocks))) else None
    )
