"""Turns a scheduled step into forward passes and logits. Two twins behind one seam.

`PackedRunner` lays the rows of all sequences into one packed pass over the paged KV cache. `SoloRunner` runs one
forward per sequence on transformers' own cache: slower, right for families with recurrent state, and the oracle of the
other. Neither knows the scheduler, sampling or text.

Legend: T rows, B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Rows
from typing import Any, Protocol

import torch
from torch import Tensor

from buddymoe_ray.engine.attention import ChunkRows, PackedPass, PagedAttention
from buddymoe_ray.engine.kv import KVPool, KVShape
from buddymoe_ray.engine.scheduler import PrefillChunk
from buddymoe_ray.engine.sequence import Sequence
from buddymoe_ray.models.load import LoadedModel
from buddymoe_ray.moe import Phase, StepOutcome, StepState, StepTerms

SCORED_CHUNK = 64
"""Tokens of one exact scoring pass: small, so that it holds up no decode step for long."""

__all__ = ["PackedRunner", "Runner", "SoloRunner", "probe_kv_shapes"]


class Runner(Protocol):
    """What the engine asks of a model.

    `packed`: a pass may have several sequences, and one that failed may be computed again. A row whose expert could not
    be had is in the step's `failed`, by its number in the pass; the others are worth what they always are.
    """

    packed: bool

    def prefill(self, chunks: Rows[PrefillChunk]) -> Tensor:
        """Compute prompt chunks; float32 logits `[chunks, V]` of each chunk's last token."""

    def decode(self, sequences: Rows[Sequence], terms: StepTerms) -> tuple[Tensor, StepOutcome]:
        """Compute each sequence's newest token; float32 logits `[B, V]`, and what its expert uses came to."""

    def score(
        self, token_ids: Rows[int], blocks: Rows[int], *, chunk: int = SCORED_CHUNK
    ) -> Iterator[tuple[int, Tensor]]:
        """Compute a whole text exactly, a chunk a time: `(start, float32 logits [chunk, V])` of consecutive chunks.

        `blocks` are KV blocks for all of it, held by the caller.
        """

    def release(self, sequence: Sequence | None) -> None:
        """Forget what is kept for a sequence that ended; None: for all."""


class PackedRunner:
    """Ragged rows of all sequences in one pass. `block_size` is that of the pool."""

    packed = True

    def __init__(self, loaded: LoadedModel, paged: PagedAttention, pool: KVPool, step: StepState) -> None:
        self._model, self._device = loaded.model, loaded.device
        self._paged, self._pool, self._step = paged, pool, step
        paged.pool = pool

    def prefill(self, chunks: Rows[PrefillChunk]) -> Tensor:
        rows, ids, positions = [], list[int](), list[int]()
        for chunk in chunks:
            count = chunk.end - chunk.start
            rows.append(ChunkRows(row=len(ids), count=count, start=chunk.start, blocks=tuple(chunk.seq.blocks)))
            ids += chunk.seq.token_ids(chunk.start, chunk.end)
            positions += range(chunk.start, chunk.end)
        last = torch.tensor([r.row + r.count - 1 for r in rows], device=self._device)
        return self._forward(Phase.PREFILL, rows, ids, positions, last)

    def decode(self, sequences: Rows[Sequence], terms: StepTerms) -> tuple[Tensor, StepOutcome]:
        rows, ids, positions = [], [], []
        for row, seq in enumerate(sequences):
            at = seq.num_computed
            rows.append(ChunkRows(row=row, count=1, start=at, blocks=tuple(seq.blocks)))
            ids += seq.token_ids(at, at + 1)
            positions.append(at)
        logits_BV = self._forward(Phase.DECODE, rows, ids, positions, 0, terms)
        return logits_BV, self._step.outcome

    def score(
        self, token_ids: Rows[int], blocks: Rows[int], *, chunk: int = SCORED_CHUNK
    ) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, len(token_ids), chunk):
            ids = list(token_ids[start : start + chunk])
            rows = [ChunkRows(row=0, count=len(ids), start=start, blocks=tuple(blocks))]
            positions = list(range(start, start + len(ids)))
            yield start, self._forward(Phase.PREFILL, rows, ids, positions, 0, isolate=False)

    def release(self, sequence: Sequence | None) -> None:
        """Nothing is kept per sequence: its blocks are the scheduler's."""

    def _forward(
        self,
        phase: Phase,
        rows: list[ChunkRows],
        ids: list[int],
        positions: list[int],
        keep: Any,
        terms: StepTerms | None = None,
        *,
        isolate: bool = True,
    ) -> Tensor:
        self._step.begin(phase, len(ids), terms, isolate=isolate)
        decode = phase is Phase.DECODE
        self._paged.current = PackedPass.build(
            rows, decode=decode, block_size=self._pool.block_size, device=self._device
        )
        with torch.inference_mode():
            out = self._model(
                input_ids=torch.tensor([ids], device=self._device),
                position_ids=torch.tensor([positions], device=self._device),
                use_cache=False,
                logits_to_keep=keep,
            )
        return out.logits[0].float()


class SoloRunner:
    """One forward per sequence on the model's own cache; a prompt is computed whole."""

    packed = False

    def __init__(self, loaded: LoadedModel, step: StepState) -> None:
        self._model, self._device, self._step = loaded.model, loaded.device, step
        self._caches: dict[str, Any] = {}

    def prefill(self, chunks: Rows[PrefillChunk]) -> Tensor:
        [chunk] = chunks
        self._step.begin(Phase.PREFILL, chunk.end - chunk.start, isolate=True)
        return self._one(chunk.seq, chunk.start, chunk.end)

    def decode(self, sequences: Rows[Sequence], terms: StepTerms) -> tuple[Tensor, StepOutcome]:
        [seq] = sequences
        self._step.begin(Phase.DECODE, 1, terms, isolate=True)
        return self._one(seq, seq.num_computed, seq.num_computed + 1), self._step.outcome

    def score(
        self, token_ids: Rows[int], blocks: Rows[int], *, chunk: int = SCORED_CHUNK
    ) -> Iterator[tuple[int, Tensor]]:
        self._step.begin(Phase.PREFILL, len(token_ids))
        with torch.inference_mode():
            out = self._model(input_ids=torch.tensor([list(token_ids)], device=self._device), use_cache=False)
        yield 0, out.logits[0].float()

    def release(self, sequence: Sequence | None) -> None:
        if sequence is None:
            self._caches.clear()
        else:
            self._caches.pop(sequence.request_id, None)

    def _one(self, seq: Sequence, start: int, end: int) -> Tensor:
        with torch.inference_mode():
            out = self._model(
                input_ids=torch.tensor([seq.token_ids(start, end)], device=self._device),
                past_key_values=self._caches.get(seq.request_id),
                use_cache=True,
                logits_to_keep=1,
            )
        self._caches[seq.request_id] = out.past_key_values
        return out.logits[0, -1:].float()


def probe_kv_shapes(loaded: LoadedModel, paged: PagedAttention, step: StepState) -> dict[int, KVShape]:
    """Learn every attention layer's KV shape from one token; no expert is loaded."""
    step.begin(Phase.PROBE, 1)
    with torch.inference_mode():
        zero = torch.zeros(1, 1, dtype=torch.int64, device=loaded.device)
        loaded.model(input_ids=zero, position_ids=zero, use_cache=False, logits_to_keep=1)
    return dict(sorted(paged.shapes.items()))
