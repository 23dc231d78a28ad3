"""Attention over the paged KV cache, registered with transformers under the name `buddymoe_paged`.

All rows of a pass lie in one packed sequence `[1, heads, T, d]`; `PackedPass` says which rows belong to whom. On a CPU
one call of `kernels.PagedLayer` computes them all where keys and values are; on a device apart `decode_attention` those
of decode. Else it is torch: decode rows of all sequences share one padded attention call, every prefill chunk has its
own. Does not know the scheduler.

Legend: T rows, B sequences, Q query heads, H key-value heads, G = Q / H, d head size, L context length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from buddymoe_ray.device import upload
from buddymoe_ray.engine.kv import KVPool, KVShape, contiguous_start
from buddymoe_ray.errors import CheckpointError, UnsupportedModel
from buddymoe_ray.kernels import PagedLayer, decode_attention

__all__ = ["NAME", "ChunkRows", "PagedAttention", "PackedPass", "attach", "register"]

NAME = "buddymoe_paged"

_PLAIN = {"dropout", "sliding_window", "s_aux", "position_ids", "use_cache"}
"""What families tell an attention that this one honours, or that says nothing of its own."""


@dataclass(frozen=True, kw_only=True)
class ChunkRows:
    """One sequence's part of a pass: rows `[row, row + count)` are its tokens `[start, start + count)`. `owner` keeps
    the states that layers carry from one to the next; None: they are not wanted after the pass. Tokens from position
    `prompt` on (None: none) were generated: such layers compute them one by one, as they did then."""

    row: int
    count: int
    start: int
    blocks: tuple[int, ...]
    owner: object | None = None
    prompt: int | None = None

    @property
    def end(self) -> int:
        """Context length after the chunk."""
        return self.start + self.count


class PackedPass:
    """The rows of one forward pass, and where they are written and read in whichever form their attention wants.

    `decode` passes have one row per chunk. Masks are built once per pass.
    """

    def __init__(self, chunks: Sequence[ChunkRows], *, decode: bool, block_size: int, device: torch.device) -> None:
        self.chunks, self.decode = tuple(chunks), decode
        self.masks: dict[Any, Tensor | None] = {}
        self._block_size, self._device = block_size, device

    @classmethod
    def fixed(cls, slots_T: Tensor, blocks_BM: Tensor, lengths_B: Tensor) -> PackedPass:
        """Of decode rows that are told by what these hold when they are read, on a device apart."""
        made = cls((), decode=True, block_size=0, device=slots_T.device)
        made.slots_T, made.blocks_BM, made.lengths_B = slots_T, blocks_BM, lengths_B
        return made

    @cached_property
    def spans_S4(self) -> Tensor:
        """See `PagedLayer`."""
        begins = accumulate((len(chunk.blocks) for chunk in self.chunks), initial=0)
        spans = [(chunk.row, chunk.count, chunk.start, at) for chunk, at in zip(self.chunks, begins, strict=False)]
        return torch.from_numpy(np.array(spans, np.int64))  # in half the time of `torch.tensor`

    @cached_property
    def blocks(self) -> Tensor:
        """The block tables of all chunks, one behind the other."""
        return torch.from_numpy(np.array([block for chunk in self.chunks for block in chunk.blocks], np.int64))

    @cached_property
    def longest(self) -> int:
        """The largest context after the pass."""
        return max(chunk.end for chunk in self.chunks)

    @cached_property
    def _tables(self) -> list[slice | Tensor]:
        return [_positions(chunk, self._block_size) for chunk in self.chunks]

    @cached_property
    def slots_T(self) -> Tensor:
        """The pool position of every row."""
        written = [_tail(table, chunk) for table, chunk in zip(self._tables, self.chunks, strict=True)]
        return upload(torch.cat(written), self._device)

    @cached_property
    def where(self) -> tuple[slice | Tensor, ...]:
        """The pool positions that each chunk reads."""
        return tuple(t if isinstance(t, slice) else upload(t, self._device) for t in self._tables)

    @cached_property
    def lengths_B(self) -> Tensor:
        """Of a decode pass."""
        return upload(torch.tensor([chunk.end for chunk in self.chunks]), self._device)

    @cached_property
    def blocks_BM(self) -> Tensor:
        """Of a decode pass, the block tables one below the other; of so many columns that kernels are made once."""
        most = max(len(chunk.blocks) for chunk in self.chunks)
        blocks_BM = torch.zeros(len(self.chunks), -(-most // 16) * 16, dtype=torch.int64)
        for row, chunk in enumerate(self.chunks):
            blocks_BM[row, : len(chunk.blocks)] = torch.tensor(chunk.blocks)
        return upload(blocks_BM, self._device)

    @cached_property
    def padded_BL(self) -> Tensor | None:
        """The positions that the rows of a decode pass read, None where there are not several rows."""
        if not self.decode or len(self.chunks) == 1:
            return None
        padded_BL = torch.zeros(len(self.chunks), self.longest, dtype=torch.int64)
        for row, table in enumerate(self._tables):
            flat = torch.arange(table.start, table.stop) if isinstance(table, slice) else table
            padded_BL[row, : len(flat)] = flat
        return upload(padded_BL, self._device)


def _positions(chunk: ChunkRows, block_size: int) -> slice | Tensor:
    start = contiguous_start(list(chunk.blocks))
    if start is not None:
        return slice(start * block_size, start * block_size + chunk.end)
    offsets = torch.arange(block_size)
    return (torch.tensor(chunk.blocks).unsqueeze(1) * block_size + offsets).reshape(-1)[: chunk.end]


def _tail(table: slice | Tensor, chunk: ChunkRows) -> Tensor:
    flat = torch.arange(table.start, table.stop) if isinstance(table, slice) else table
    return flat[chunk.start : chunk.end]


@dataclass(frozen=True, kw_only=True)
class PackedMask:
    """What a family's mask comes to: causal, within `window` tokens (itself included) where there is one."""

    window: int | None


class PagedAttention:
    """Runs attention for every layer of a model. `current` is the pass in progress; None while probing shapes."""

    def __init__(self) -> None:
        self.pool: KVPool | None = None
        self.current: PackedPass | None = None
        self.shapes: dict[int, KVShape] = {}
        self._threads: int | None = None
        self._apart = False
        self._layers: dict[int, PagedLayer] = {}

    def open(self, pool: KVPool, *, threads: int = 1, apart: bool = False) -> None:
        """From now on keys and values are in `pool`, of a device `apart` or not. On a CPU the kernels read them, with
        `threads`; they are made here and not in the first step."""
        self.pool, self._layers, self._apart = pool, {}, apart
        if not apart and all(PagedLayer.covers(keys.dtype, keys.device) for keys in pool.keys_NHd.values()):
            self._threads = threads
            for dtype in {keys.dtype for keys in pool.keys_NHd.values()}:
                PagedLayer.prepare(dtype)

    @property
    def by_kernel(self) -> bool:
        """Whether the kernels attend, so that a row's bits depend on that row alone."""
        return self._threads is not None

    @property
    def one_thread(self) -> bool:
        """Whether the kernels attend, with one thread."""
        return self._threads == 1

    @property
    def block_size(self) -> int:
        """Tokens of a block of the pool."""
        assert self.pool is not None, "the pool is open"
        return self.pool.block_size

    def layer(self, layer: int) -> PagedLayer | None:
        """A layer's kernel, once it has run."""
        return self._layers.get(layer)

    def __call__(
        self,
        layer: int,
        q_QTd: Tensor,
        k_HTd: Tensor,
        v_HTd: Tensor,
        *,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """`[Q, T, d], [H, T, d], [H, T, dv] -> [T, Q, dv]`. `window` is a sliding window in tokens, itself included."""
        if self.pool is None or self.current is None:
            if window is not None and window < 1:
                raise CheckpointError(
                    f"sliding_window is {window} in a layer that slides, must be at least 1. hint: fix config.json"
                )
            self.shapes[layer] = KVShape(heads=k_HTd.shape[0], key_dim=k_HTd.shape[2], value_dim=v_HTd.shape[2])
            return q_QTd.new_zeros(q_QTd.shape[1], q_QTd.shape[0], v_HTd.shape[2])
        if self._threads is not None:
            current = self.current
            attend = self._layers.get(layer) or self._layer(layer, len(q_QTd), scale, window, sinks)
            return attend((q_QTd, k_HTd, v_HTd), current.spans_S4, current.blocks, current.longest)
        self.pool.write(layer, k_HTd.transpose(0, 1), v_HTd.transpose(0, 1), self.current.slots_T)
        if self._apart and self.current.decode:
            rows, context = q_QTd.transpose(0, 1), (self.current.blocks_BM, self.current.lengths_B)
            return decode_attention(rows, self.pool.of(layer), context, scale=scale, window=window, sinks_Q=sinks)
        if self.current.padded_BL is not None:
            return self._decode(layer, q_QTd, scale, window, sinks)
        return self._chunks(layer, q_QTd, scale, window, sinks)

    def _layer(self, layer: int, queries: int, scale: float, window: int | None, sinks: Tensor | None) -> PagedLayer:
        """A layer's kernel: what the first call says holds for all."""
        assert self.pool is not None and self._threads is not None
        made = PagedLayer(
            self.pool.of(layer), queries=queries, scale=scale, window=window, sinks_Q=sinks, threads=self._threads
        )
        self._layers[layer] = made
        return made

    def _decode(self, layer: int, q_QTd: Tensor, scale: float, window: int | None, sinks: Tensor | None) -> Tensor:
        assert self.pool is not None and self.current is not None and self.current.padded_BL is not None
        k_BLHd, v_BLHd = self.pool.read(layer, self.current.padded_BL)
        B, _, H, _ = k_BLHd.shape
        q_BHGd = q_QTd.transpose(0, 1).reshape(B, H, -1, q_QTd.shape[2])
        mask_B11L = self._decode_mask(window)
        out_BHGd = _attend(q_BHGd, k_BLHd.transpose(1, 2), v_BLHd.transpose(1, 2), mask_B11L, scale, sinks)
        return out_BHGd.reshape(B, -1, out_BHGd.shape[-1])

    def _decode_mask(self, window: int | None) -> Tensor:
        assert self.current is not None and self.current.padded_BL is not None
        key = ("decode", window)
        mask = self.current.masks.get(key)
        if mask is None:
            at_L = torch.arange(self.current.padded_BL.shape[1], device=self.current.padded_BL.device)
            length_B1 = self.current.lengths_B.unsqueeze(1)
            mask_BL = at_L < length_B1
            if window is not None:
                mask_BL &= at_L >= length_B1 - window
            mask = mask_BL[:, None, None, :]
            self.current.masks[key] = mask
        return mask

    def _chunks(self, layer: int, q_QTd: Tensor, scale: float, window: int | None, sinks: Tensor | None) -> Tensor:
        assert self.pool is not None and self.current is not None
        parts = []
        for index, chunk in enumerate(self.current.chunks):
            k_LHd, v_LHd = self.pool.read(layer, self.current.where[index])
            k_1HLd, v_1HLd = k_LHd.transpose(0, 1)[None], v_LHd.transpose(0, 1)[None]
            q_1Qtd = q_QTd[None, :, chunk.row : chunk.row + chunk.count]
            mask_tL = self._chunk_mask(index, window)
            if chunk.count == 1:
                H = k_1HLd.shape[1]
                q_1HGd = q_1Qtd.reshape(1, H, -1, q_1Qtd.shape[-1])
                out = _attend(q_1HGd, k_1HLd, v_1HLd, mask_tL, scale, sinks).reshape(1, -1, v_LHd.shape[-1])
            else:
                groups = q_1Qtd.shape[1] // k_1HLd.shape[1]
                k_1QLd, v_1QLd = (t.repeat_interleave(groups, dim=1) for t in (k_1HLd, v_1HLd))
                out = _attend(q_1Qtd, k_1QLd, v_1QLd, mask_tL, scale, sinks)[0].transpose(0, 1)
            parts.append(out)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _chunk_mask(self, index: int, window: int | None) -> Tensor | None:
        assert self.current is not None
        chunk = self.current.chunks[index]
        if chunk.count == 1 and (window is None or chunk.end <= window):
            return None
        key = (index, window)
        if key not in self.current.masks:
            device = self.current.slots_T.device
            at_t1 = torch.arange(chunk.start, chunk.end, device=device).unsqueeze(1)
            at_L = torch.arange(chunk.end, device=device)
            mask_tL = at_L <= at_t1
            if window is not None:
                mask_tL &= at_L > at_t1 - window
            self.current.masks[key] = mask_tL
        return self.current.masks[key]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, sinks: Tensor | None) -> Tensor:
    """Softmax attention; `sinks` (one logit per query head, GPT-OSS) give the softmax one more, valueless column."""
    if sinks is None:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    per_row = q.shape[1] * q.shape[2] == sinks.numel()  # rows are the query heads of a group, not tokens
    shape = (1, q.shape[1], q.shape[2], 1) if per_row else (1, q.shape[1], 1, 1)
    sink = sinks.reshape(shape).to(scores.dtype).expand(*scores.shape[:-1], 1)
    widened = torch.cat([scores, sink], dim=-1)
    widened = widened - widened.amax(dim=-1, keepdim=True)
    return torch.matmul(widened.softmax(dim=-1)[..., :-1], v)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls for every attention layer, with a batch of one packed sequence."""
    paged: PagedAttention = module.buddymoe_attention  # type: ignore[assignment]
    if not isinstance(attention_mask, PackedMask):
        raise _own_way(module, "a mask")
    asked = {name for name, value in kwargs.items() if value is not None and not name.startswith("output_")}
    more = asked - _PLAIN - ({"is_causal"} if kwargs.get("is_causal") is True else set())  # a config may say it, too
    if more:
        raise _own_way(module, min(more))
    out_TQd = paged(
        int(module.layer_idx),  # type: ignore[arg-type]
        query[0],
        key[0],
        value[0],
        scale=scaling,
        window=attention_mask.window,  # families differ in whether the call names it too; the mask is what they mean
        sinks=kwargs.get("s_aux"),
    )
    return out_TQd.unsqueeze(0), None


def _own_way(module: nn.Module, what: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{type(module).__name__} attends by {what} of its own, must by transformers' causal masks. "
        "hint: set batching to solo"
    )


def _mask(*, local_size: int | None = None, use_vmap: bool = False, **_: Any) -> PackedMask | None:
    """The function transformers calls for every mask that a model builds; `local_size` is a sliding one's. None where
    the family masks by a function of its own."""
    return None if use_vmap else PackedMask(window=local_size)


def register() -> None:
    """Make `buddymoe_paged` known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, _mask)


def attach(model: nn.Module, paged: PagedAttention) -> None:
    """Hand `paged` to every attention module of the model (those that know their layer index)."""
    for module in model.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "config"):
            module.buddymoe_attention = paged  # type: ignore[assignment]
