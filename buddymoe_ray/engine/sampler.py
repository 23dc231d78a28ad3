"""Logits to tokens: greedy, temperature, top-k, top-p, min-p, biases, penalties, log probabilities.

Random numbers come from a counter-based generator keyed by (seed, position): a request gives the same tokens alone, in
any batch, and when it is resumed elsewhere. Knows neither text nor scheduling.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from buddymoe_ray.types import SamplingParams

__all__ = ["Sampled", "SamplingState", "sample"]


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """One choice. `logprob` and `top` are of the model's own distribution; None and empty unless asked for."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(kw_only=True)
class SamplingState:
    """What choosing one sequence's next token depends on. `token_ids` is the live list of prompt and output."""

    params: SamplingParams
    seed: int
    token_ids: list[int]
    prompt_length: int
    _counts: dict[int, int] = field(default_factory=dict)
    _counted: int = 0
    _bias: tuple[Tensor, Tensor] | None = None

    @property
    def position(self) -> int:
        """Index of the token to choose, from the start of the prompt."""
        return len(self.token_ids)

    def output_counts(self) -> dict[int, int]:
        """How often each token was generated so far."""
        for token in self.token_ids[max(self._counted, self.prompt_length) :]:
            self._counts[token] = self._counts.get(token, 0) + 1
        self._counted = len(self.token_ids)
        return self._counts

    def bias(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids of `logit_bias` and what is added to each, where the logits are."""
        if self._bias is None:
            bias = self.params.logit_bias
            ids = torch.tensor(list(bias), dtype=torch.long, device=like.device)
            self._bias = ids, torch.tensor(list(bias.values()), dtype=like.dtype, device=like.device)
        return self._bias


def sample(logits_BV: Tensor, states: Sequence[SamplingState]) -> list[Sampled]:
    """Choose one token per row of float32 logits."""
    if all(state.params.temperature == 0.0 and _unshifted(state.params) for state in states):
        chosen = logits_BV.argmax(dim=-1).tolist()
    else:
        chosen = [_choose(logits_V, state) for logits_V, state in zip(logits_BV, states, strict=True)]
    return [_report(logits_BV[row], token, states[row].params.logprobs) for row, token in enumerate(chosen)]


def _unshifted(p: SamplingParams) -> bool:
    plain = p.repetition_penalty == 1.0 and not p.presence_penalty and not p.frequency_penalty
    return plain and not p.logit_bias


def _choose(logits_V: Tensor, state: SamplingState) -> int:
    p = state.params
    logits_V = _shifted(logits_V, state)
    if p.temperature == 0.0:
        return int(logits_V.argmax())
    values_V, order_V = logits_V.sort(descending=True, stable=True)
    if 0 < p.top_k < len(values_V):  # ties with the k-th stay, as in transformers' TopKLogitsWarper
        values_V = values_V[values_V >= values_V[p.top_k - 1]]
    values_V = values_V.double()  # less the largest before the division: a tiny temperature must not make inf - inf
    scaled_V = (values_V - values_V[0]) / p.temperature
    if p.min_p:
        scaled_V = scaled_V[scaled_V.exp() >= p.min_p]  # exp: likeness to the likeliest, whatever else is kept
    probs_V = scaled_V.softmax(dim=-1)
    cumulative_V = probs_V.cumsum(dim=-1)
    if p.top_p < 1.0:
        kept = int((cumulative_V - probs_V < p.top_p).sum())
        cumulative_V = cumulative_V[: max(1, kept)]
    at = torch.searchsorted(cumulative_V, _uniform(state.seed, state.position) * cumulative_V[-1].item(), right=True)
    return int(order_V[min(int(at), len(cumulative_V) - 1)])


def _uniform(seed: int, position: int) -> float:
    """One number in [0, 1) that depends on (seed, position) alone."""
    bits = np.random.Philox(key=seed & (2**64 - 1), counter=position).random_raw()
    return (int(bits) >> 11) / 2.0**53


def _shifted(logits_V: Tensor, state: SamplingState) -> Tensor:
    """Logits with biases, then penalties, as vLLM orders them."""
    p = state.params
    if _unshifted(p):
        return logits_V
    logits_V = logits_V.clone()
    if p.logit_bias:
        ids, added = state.bias(logits_V)
        logits_V[ids] += added
    if p.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(state.token_ids)), device=logits_V.device)
        was = logits_V[seen]
        logits_V[seen] = torch.where(was > 0, was / p.repetition_penalty, was * p.repetition_penalty)
    counts = state.output_counts()
    if counts and (p.presence_penalty or p.frequency_penalty):
        ids = torch.tensor(list(counts), device=logits_V.device)
        often = torch.tensor(list(counts.values()), device=logits_V.device, dtype=logits_V.dtype)
        logits_V[ids] -= p.presence_penalty + p.frequency_penalty * often
    return logits_V


def _report(logits_V: Tensor, token: int, wanted: int | None) -> Sampled:
    if wanted is None:
        return Sampled(token_id=token)
    logprobs_V = logits_V.log_softmax(dim=-1)
    logprob = float(logprobs_V[token])
    if not wanted:
        return Sampled(token_id=token, logprob=logprob)
    values, ids = logprobs_V.topk(min(wanted, len(logprobs_V)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Sampled(token_id=token, logprob=logprob, top=top if token in ids else (*top, (token, logprob)))
