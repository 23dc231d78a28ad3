"""Turns a scheduled step into forward passes and logits. Two twins behind one seam.

`PackedRunner` lays the rows of all sequences into one packed pass over the paged KV cache and the pool of states.
`SoloRunner` runs one forward per sequence on transformers' own cache: slower, right for any family, and the oracle of
the other. Neither knows the scheduler, sampling or text.

Legend: T rows, B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Rows
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from buddymoe_ray.device import upload
from buddymoe_ray.engine.attention import ChunkRows, PackedPass, PagedAttention
from buddymoe_ray.engine.plain_forward import ForwardPass, own_forward
from buddymoe_ray.engine.recorded import RecordedDecode
from buddymoe_ray.engine.scheduler import PrefillChunk
from buddymoe_ray.engine.sequence import Sequence
from buddymoe_ray.engine.states import StatePool
from buddymoe_ray.engine.suspended import PassParts
from buddymoe_ray.models.hf_loading import recomputes_at_switch, refusing, switch_length
from buddymoe_ray.models.load import LoadedModel
from buddymoe_ray.moe import Phase, StepOutcome, StepState, StepTerms

SCORED_CHUNK = 64
"""Tokens of one exact scoring pass: small, so that it holds up no decode step for long."""

__all__ = ["PackedRunner", "Runner", "SoloRunner", "probe"]


class Runner(Protocol):
    """What the engine asks of a model.

    `packed`: a pass may have several sequences, and one that failed may be computed again. `repeatable`: a token's KV
    has the same bits whenever it is computed, and in whatever pass. `shares`: a text may begin with the KV blocks of
    another. `parts` are what passes that can be set aside are made of, None where none can; `recorded` has decode steps
    that are replayed, None where none are. A row whose expert could
    not be had is in the step's `failed`, by its number in the pass; the others are worth what they always are.
    """

    packed: bool
    repeatable: bool
    shares: bool
    parts: PassParts | None
    recorded: RecordedDecode | None

    def prefill(self, chunks: Rows[PrefillChunk]) -> Tensor:
        """Compute prompt chunks; float32 logits `[chunks, V]` of each chunk's last token."""

    def prefill_whole(self, chunks: Rows[PrefillChunk]) -> Tensor:
        """Compute the one chunk; float32 logits `[T, V]` of its tokens. Where a prompt is computed whole: of all its
        tokens with the last chunk, of none before."""

    def decode(self, sequences: Rows[Sequence], terms: StepTerms) -> tuple[Tensor, StepOutcome]:
        """Compute each sequence's newest token; float32 logits `[B, V]`, and what its expert accesses came to."""

    def score(
        self, token_ids: Rows[int], blocks: Rows[int], *, prompt: int | None = None, chunk: int = SCORED_CHUNK
    ) -> Iterator[tuple[int, Tensor]]:
        """Compute a whole text exactly, a chunk a time: `(start, float32 logits [chunk, V])` of consecutive chunks.

        `blocks` are KV blocks for all of it, held by the caller; `prompt` tokens of it (None: all) were not generated.
        """

    def score_side_by_side(self, texts: Rows[Rows[int]], blocks: Rows[Rows[int]]) -> list[Tensor]:
        """Compute whole texts exactly, in one pass if it may have several: float32 logits `[tokens, V]` of each, which
        has its own of the `blocks`."""

    def release(self, sequence: Sequence | None) -> None:
        """Forget what is kept for a sequence that ended; None: for all."""


class PackedRunner:
    """Ragged rows of all sequences in one pass. `repeatable` if rows do not see others, `parts` if kernels compute all
    of it, `states` if layers carry any."""

    packed = True

    def __init__(
        self,
        compute: ForwardPass,
        paged: PagedAttention,
        step: StepState,
        *,
        device: torch.device,
        repeatable: bool = False,
        parts: PassParts | None = None,
        states: StatePool | None = None,
    ) -> None:
        self._compute, self._device = compute, device
        self.recorded: RecordedDecode | None = None
        self._paged, self._step, self._states = paged, step, states
        self.repeatable, self.parts, self.shares = repeatable, parts, states is None

    def prefill(self, chunks: Rows[PrefillChunk]) -> Tensor:
        rows, ids, positions = [], list[int](), list[int]()
        for chunk in chunks:
            rows.append(_rows_of(chunk, len(ids)))
            ids += chunk.seq.token_ids(chunk.start, chunk.end)
            positions += range(chunk.start, chunk.end)
        last = upload(torch.tensor([r.row + r.count - 1 for r in rows]), self._device)
        return self._forward(Phase.PREFILL, rows, ids, positions, last)

    def prefill_whole(self, chunks: Rows[PrefillChunk]) -> Tensor:
        [chunk] = chunks
        return self._chunk(chunk.seq.token_ids(chunk.start, chunk.end), _rows_of(chunk, 0), isolate=True)

    def decode(self, sequences: Rows[Sequence], terms: StepTerms) -> tuple[Tensor, StepOutcome]:
        rows, ids, positions = [], [], []
        for row, seq in enumerate(sequences):
            at = seq.num_computed
            rows.append(ChunkRows(row=row, count=1, start=at, blocks=tuple(seq.blocks), owner=seq))
            ids += seq.token_ids(at, at + 1)
            positions.append(at)
        logits_BV = None if self.recorded is None else self.recorded.decode(rows, ids, terms)
        if logits_BV is None:
            logits_BV = self._forward(Phase.DECODE, rows, ids, positions, 0, terms)
        return logits_BV, self._step.outcome

    def score(
        self, token_ids: Rows[int], blocks: Rows[int], *, prompt: int | None = None, chunk: int = SCORED_CHUNK
    ) -> Iterator[tuple[int, Tensor]]:
        owner = object() if len(token_ids) > chunk else None
        try:
            for start in range(0, len(token_ids), chunk):
                ids = list(token_ids[start : start + chunk])
                rows = ChunkRows(row=0, count=len(ids), start=start, blocks=tuple(blocks), owner=owner, prompt=prompt)
                yield start, self._chunk(ids, rows, isolate=False)
        finally:
            if self._states is not None:
                self._states.release(owner)

    def score_side_by_side(self, texts: Rows[Rows[int]], blocks: Rows[Rows[int]]) -> list[Tensor]:
        rows, ids, positions = [], list[int](), list[int]()
        for text, own in zip(texts, blocks, strict=True):
            rows.append(ChunkRows(row=len(ids), count=len(text), start=0, blocks=tuple(own)))
            ids += text
            positions += range(len(text))
        return list(self._forward(Phase.PREFILL, rows, ids, positions, 0, isolate=False).split([r.count for r in rows]))

    def release(self, sequence: Sequence | None) -> None:
        """States alone are kept per sequence: its blocks are the scheduler's."""
        if self.recorded is not None and sequence is None:
            self.recorded.forget()
        if self._states is not None and sequence is None:
            self._states.reset()
        elif self._states is not None:
            self._states.release(sequence)

    def _chunk(self, ids: list[int], rows: ChunkRows, *, isolate: bool) -> Tensor:
        return self._forward(Phase.PREFILL, [rows], ids, list(range(rows.start, rows.end)), 0, isolate=isolate)

    def _forward(
        self,
        phase: Phase,
        rows: list[ChunkRows],
        ids: list[int],
        positions: list[int],
        keep: int | Tensor,
        terms: StepTerms | None = None,
        *,
        isolate: bool = True,
    ) -> Tensor:
        self._step.begin(phase, len(ids), terms, isolate=isolate, tokens=ids)
        decode, states = phase is Phase.DECODE, self._states
        self._paged.current = PackedPass(rows, decode=decode, block_size=self._paged.block_size, device=self._device)
        with nullcontext() if states is None else states.passing(rows, decode=decode), torch.inference_mode():
            ids_1T, positions_1T = (upload(torch.tensor([row]), self._device) for row in (ids, positions))
            return self._compute(ids_1T, positions_1T, keep).float()


def _rows_of(chunk: PrefillChunk, row: int) -> ChunkRows:
    seq, start = chunk.seq, chunk.start
    return ChunkRows(
        row=row,
        count=chunk.end - start,
        start=start,
        blocks=tuple(seq.blocks),
        owner=seq,
        prompt=seq.prompt_length,
    )


class SoloRunner:
    """One forward per sequence on the model's own cache, fed as `generate` feeds it; a prompt is computed whole."""

    packed = repeatable = shares = False
    parts: PassParts | None = None
    recorded: RecordedDecode | None = None

    def __init__(self, loaded: LoadedModel, step: StepState) -> None:
        self._model, self._device, self._step = loaded.model, loaded.device, step
        self._vocab_size = loaded.vocab_size
        self._switch = switch_length(loaded.model)
        self._dynamic: list[Any] = [m for m in loaded.model.modules() if "dynamic" in str(getattr(m, "rope_type", ""))]
        self._caches: dict[str, Any] = {}

    def prefill(self, chunks: Rows[PrefillChunk]) -> Tensor:
        """A prompt is computed once its last chunk is due: recurrent layers and rotary switches give other values for
        one in pieces."""
        [chunk] = chunks
        if chunk.end < chunk.seq.prefill_length:
            return torch.zeros(1, self._vocab_size, device=self._device)
        return self._whole(chunk, keep=1)[-1][-1:]

    def prefill_whole(self, chunks: Rows[PrefillChunk]) -> Tensor:
        [chunk] = chunks
        if chunk.end < chunk.seq.prefill_length:
            return torch.zeros(0, self._vocab_size, device=self._device)
        return torch.cat(self._whole(chunk, keep=0))

    def _whole(self, chunk: PrefillChunk, *, keep: int) -> list[Tensor]:
        """Compute a prompt up to the end of its last chunk; logits of each pass it takes, as `_forward` has them."""
        seq, end, start, cache = chunk.seq, chunk.end, 0, None
        found = []
        for stop in [end] if recomputes_at_switch(self._model) else self._ends(seq.prompt_length, end):
            logits_nV, cache = self._forward(seq.token_ids(0, stop), start, cache, keep=keep)
            found.append(logits_nV[start - stop :] if keep == 0 else logits_nV)
            start = stop
        self._caches[seq.request_id] = cache
        return found

    def decode(self, sequences: Rows[Sequence], terms: StepTerms) -> tuple[Tensor, StepOutcome]:
        [seq] = sequences
        at, cache = seq.num_computed, self._caches.get(seq.request_id)
        logits_1V, self._caches[seq.request_id] = self._forward(seq.token_ids(0, at + 1), at, cache, terms=terms)
        return logits_1V[-1:], self._step.outcome

    def score(
        self, token_ids: Rows[int], blocks: Rows[int], *, prompt: int | None = None, chunk: int = SCORED_CHUNK
    ) -> Iterator[tuple[int, Tensor]]:
        start, cache = 0, None
        for end in self._ends(prompt or len(token_ids), len(token_ids)):
            logits_nV, cache = self._forward(list(token_ids[:end]), start, cache, keep=0)
            yield start, logits_nV[start - end :]
            start = end

    def score_side_by_side(self, texts: Rows[Rows[int]], blocks: Rows[Rows[int]]) -> list[Tensor]:
        pairs = zip(texts, blocks, strict=True)
        return [torch.cat([logits_nV for _, logits_nV in self.score(text, own)]) for text, own in pairs]

    def release(self, sequence: Sequence | None) -> None:
        if sequence is None:
            self._caches.clear()
        else:
            self._caches.pop(sequence.request_id, None)

    def _ends(self, prompt: int, end: int) -> Rows[int]:
        """Where passes must end over a text whose first `prompt` tokens were computed in one and the others one by one,
        to give the logits that they had."""
        if self._switch is None or end <= self._switch:
            return [end]
        return range(max(prompt, self._switch), end + 1)

    def _forward(
        self, ids: list[int], start: int, cache: Any, *, keep: int = 1, terms: StepTerms | None = None
    ) -> tuple[Tensor, Any]:
        """Logits of the last `keep` tokens of `ids` (0: of all that are computed), and the cache that now holds them.

        `cache` holds those before `start`; a family may drop it, then all are computed again, exactly.
        """
        for rotary in self._dynamic:  # or its frequencies would be those of the longest text so far
            rotary.max_seq_len_cached, rotary.inv_freq = rotary.original_max_seq_len, rotary.original_inv_freq
        model: Any = self._model
        inputs = model.prepare_inputs_for_generation(
            torch.tensor([ids], device=self._device),
            next_sequence_length=len(ids) - start,
            past_key_values=cache,
            position_ids=torch.arange(len(ids), device=self._device)[None],
            use_cache=True,
            is_first_iteration=start == 0,
            logits_to_keep=keep,
        )
        count, inputs["logits_to_keep"] = inputs["input_ids"].shape[1], keep  # nemotron_h sets its own
        decode = terms is not None and count == 1
        self._step.begin(Phase.DECODE if decode else Phase.PREFILL, count, terms if decode else None)
        with torch.inference_mode():
            out = model(**inputs)
        if terms is not None and not decode:
            self._step.begin(Phase.DECODE, 1)  # the step cost what a prompt costs: nothing that is booked
        return out.logits[0].float(), out.past_key_values


def probe(loaded: LoadedModel, step: StepState, *, use_cache: bool) -> None:
    """Compute one token with no expert loaded: a config that cannot run is known before the first request.

    Raises CheckpointError with what transformers said.
    """
    step.begin(Phase.PROBE, 1)
    zero = torch.zeros(1, 1, dtype=torch.int64, device=loaded.device)
    with refusing(loaded.config, dtype=loaded.compute_dtype), torch.inference_mode():
        if use_cache:
            loaded.model(input_ids=zero, position_ids=zero, use_cache=True, logits_to_keep=1)
        else:
            own_forward(loaded.model)(zero, zero, 1)
