"""The bytes of random weights, by each tensor's role: every tensor is a run of one seeded block of normal numbers.

A run begins at an offset drawn from the tensor's key, so nothing waits for a random number generator and no two experts
are equal. Does not know files.

How popularity works in stock transformers. Hidden channel 0 is constant: the embedding's column 0 is 1, and that row of
every o_proj and down_proj is 0. All other channels together stay 50 times below it in energy, so RMSNorm divides by a
constant, and the norm weights multiply it back. An expert of popularity rank r then gets a router logit of
-skew * ln(r) from the router's column 0 alone. With two hot sets the upper half of the vocabulary has -1 there, so
that its tokens prefer the experts that the others avoid: a text that changes halves shifts the hot set.

Legend: E experts, D hidden, F ffn, V vocabulary, R rows of a piece.
"""

from __future__ import annotations

import math
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from buddymoe_ray.errors import ConfigError
from buddymoe_ray.models.shard_writer import StoredTensor

__all__ = ["UNIFORM", "Popularity", "SynthWeights", "popularity_ranks"]

BLOCK_NUMBERS = 33_554_393  # 64 MB of bfloat16; prime, so that no row length divides its period
TINY_BLOCK_NUMBERS = 1_048_573
PIECE_NUMBERS = 1 << 22
OTHERS_ENERGY = 0.02  # of all other channels of the embedding together, against 1 of the constant channel
LOGIT_STD = 0.9
_ADDED = re.compile(r"\.(o_proj|down_proj|w2)(\.weight)?$")
"""What is added to the residual stream."""


def popularity_ranks(experts: int, *, layer: int, seed: int) -> tuple[int, ...]:
    """Popularity rank (1 is the most popular) of each expert of the model's layer `layer`, dense layers counted."""
    ranks = list(range(1, experts + 1))
    random.Random(f"{seed}/{layer}").shuffle(ranks)
    return tuple(ranks)


@dataclass(frozen=True, kw_only=True)
class Popularity:
    """Which experts tokens prefer: one of popularity rank r gets a router logit shift of `-skew * ln(r)`, 0 is uniform.
    With 2 `hot_sets` tokens of the upper half of the vocabulary prefer the experts that the others avoid. Raises
    ConfigError."""

    skew: float = 0.0
    hot_sets: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.skew) and self.skew >= 0):
            raise ConfigError(f"skew is {self.skew}, must be 0 or more. hint: 1.0 is Zipf's law")
        if self.hot_sets not in (1, 2):
            raise ConfigError(f"hot_sets is {self.hot_sets}, must be 1 or 2. hint: leave it at 1")


UNIFORM = Popularity()


class SynthWeights:
    """Called with a tensor, yields its bytes in order. `tiny` uses a small block."""

    def __init__(self, popularity: Popularity, *, hidden: int, layers: int, seed: int, tiny: bool) -> None:
        self._skew, self._hot_sets, self._seed = popularity.skew, popularity.hot_sets, seed
        self._wide = LOGIT_STD / math.sqrt(hidden)
        self._embedding = math.sqrt(OTHERS_ENERGY / hidden)
        self._branch = self._wide * self._embedding / math.sqrt(2 * layers)
        self._norm = 1 / math.sqrt(OTHERS_ENERGY)
        self._constant = 1 / math.sqrt(hidden)
        numbers = TINY_BLOCK_NUMBERS if tiny else BLOCK_NUMBERS
        normal = torch.randn(numbers, generator=torch.Generator().manual_seed(seed))
        self._blocks = {std: (normal * std).bfloat16() for std in (self._wide, self._embedding, self._branch)}

    def __call__(self, tensor: StoredTensor) -> Iterator[memoryview]:
        """Pieces of at most a few MB."""
        return (_bytes(piece) for piece in self._pieces(tensor))

    def std(self, tensor: StoredTensor) -> float:
        """Width of the distribution of a linear layer's or expert's weights."""
        return self._branch if _ADDED.search(tensor.key) else self._wide

    def rows(self, tensor: StoredTensor) -> Iterator[Tensor]:
        """The weights of a linear layer, or of a stack of experts `[E, in, out]` as `[E, out, in]`, in pieces."""
        if len(tensor.shape) == 2:
            yield from self._pieces(tensor)
            return
        E, K, N = tensor.shape
        added = _ADDED.search(tensor.key) is not None
        for run in self._take(tensor, self.std(tensor), E * N * K, step=N * K):
            expert_NK = run.clone().view(N, K)
            if added:
                expert_NK[0] = 0
            yield expert_NK

    def _pieces(self, tensor: StoredTensor) -> Iterator[Tensor]:
        key, shape = tensor.key, tensor.shape
        if key.endswith("embed_tokens.weight"):
            return self._with_column(tensor, self._embedding, self._constant_V(shape[0]))
        if re.search(r"\.(gate|router)\.weight$", key):
            return self._with_column(tensor, self._wide, self._shift_E(tensor))
        if _ADDED.search(key) and len(shape) == 2:
            return self._with_zero_row(tensor)
        if key.endswith("experts.down_proj"):
            return self._with_column(tensor, self._branch, torch.zeros(math.prod(shape[:-1])))
        if key.endswith("bias"):
            return iter([torch.zeros(shape, dtype=torch.bfloat16)])
        if len(shape) == 1 and "norm" in key:
            return iter([self._norm_weight(key, shape[0])])
        return self._take(tensor, self._wide, math.prod(shape))

    def _take(self, tensor: StoredTensor, std: float, count: int, step: int = PIECE_NUMBERS) -> Iterator[Tensor]:
        """`count` numbers of the block from the tensor's own offset, in runs of `step` (the last may be shorter)."""
        block = self._blocks[std]
        at = zlib.crc32(f"{self._seed}/{tensor.key}".encode()) % len(block)
        for done in range(0, count, step):
            size = min(step, count - done)
            run = block[at : at + size]
            if len(run) < size:
                rest = size - len(run)
                run = torch.cat([run, block.repeat(-(-rest // len(block)))[:rest]])
            yield run
            at = (at + size) % len(block)

    def _with_column(self, tensor: StoredTensor, std: float, column_R: Tensor) -> Iterator[Tensor]:
        """Column 0 of the last dimension replaced, a few rows at a time."""
        D, at = tensor.shape[-1], 0
        for run in self._take(tensor, std, len(column_R) * D, step=max(1, PIECE_NUMBERS // D) * D):
            piece_RD = run.clone().view(-1, D)
            piece_RD[:, 0] = column_R[at : at + len(piece_RD)]
            at += len(piece_RD)
            yield piece_RD

    def _with_zero_row(self, tensor: StoredTensor) -> Iterator[Tensor]:
        """`[D, in]`, added to the residual stream: row 0 is 0, so that the constant channel stays."""
        D, width = tensor.shape
        yield torch.zeros(width, dtype=torch.bfloat16)
        yield from self._take(tensor, self._branch, (D - 1) * width)

    def _constant_V(self, size: int) -> Tensor:
        ones_V = torch.ones(size)
        if self._hot_sets == 2:
            ones_V[size // 2 :] = -1
        return ones_V

    def _shift_E(self, tensor: StoredTensor) -> Tensor:
        layer = int(tensor.key.split("layers.")[1].split(".")[0])
        ranks_E = torch.tensor(popularity_ranks(tensor.shape[0], layer=layer, seed=self._seed))
        return -self._skew * ranks_E.double().log()

    def _norm_weight(self, key: str, size: int) -> Tensor:
        """Norms on the residual stream undo its scale; the constant channel reaches routers and experts alone, as 1."""
        before_moe = key.endswith("post_attention_layernorm.weight")
        if not (before_moe or key.endswith(("input_layernorm.weight", "model.norm.weight"))):
            return torch.ones(size, dtype=torch.bfloat16)
        weight_D = torch.full((size,), self._norm, dtype=torch.bfloat16)
        weight_D[0] = self._constant if before_moe else 0.0
        return weight_D


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
