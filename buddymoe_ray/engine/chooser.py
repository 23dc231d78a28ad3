"""Who picks the next tokens of sequences from their logits: the sampler under each one's rule, or whoever is put in
its place to score a text.

Knows sequences, not when they run. On the token path: runner → `choose` → `Sequence.append`.

Legend: B sequences, R of them with a rule, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import Protocol

import torch
from torch import Tensor

from buddymoe_ray.engine.recorded import RecordedDecode
from buddymoe_ray.engine.sampler import Sampled, prepare_sampling, sample
from buddymoe_ray.engine.sequence import Sequence
from buddymoe_ray.engine.structured import mask_logits

__all__ = ["Chooser", "SamplingChooser"]


class Chooser(Protocol):
    """Picks the next token of every sequence; the sampler, or a forced one that scores a text."""

    def choose(self, logits_BV: Tensor, sequences: Rows[Sequence]) -> list[Sampled]:
        """One choice per row."""


class SamplingChooser:
    """The chooser that serves: each sequence's own SamplingParams, of what its rule allows. Of decode steps that are
    `recorded` the device chooses by itself, where it can."""

    def __init__(self, device: torch.device, recorded: RecordedDecode | None = None) -> None:
        prepare_sampling(device)
        self._recorded = recorded
        if recorded is not None:
            recorded.ahead = True

    def choose(self, logits_BV: Tensor, sequences: Rows[Sequence]) -> list[Sampled]:
        chosen = None if self._recorded is None else self._recorded.chosen(sequences)
        if chosen is not None:
            return [Sampled(token_id=token) for token in chosen]
        ruled = {row: rule for row, seq in enumerate(sequences) if (rule := seq.rule) is not None}
        states, allowed_RV = [seq.sampling_state for seq in sequences], logits_BV[:0]
        if ruled:
            allowed_RV = logits_BV[[*ruled]]
            mask_logits(allowed_RV, [*ruled.values()])
        return sample(logits_BV, states, ruled=[*ruled], allowed_RV=allowed_RV)
