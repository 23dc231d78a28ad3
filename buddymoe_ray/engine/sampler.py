"""Logits to tokens: greedy, temperature, top-k, top-p, min-p, biases, penalties, log probabilities.

Random numbers come from a counter-based generator keyed by (seed, position): a request gives the same tokens alone, in
any batch, and when it is resumed elsewhere. Knows neither text nor scheduling.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from buddymoe_ray.kernels.sample import SamplingState, choose_rows

__all__ = ["Sampled", "SamplingState", "sample"]


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """One choice. `logprob` and `top` are of the model's own distribution; None and empty unless asked for."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(logits_BV: Tensor, states: Sequence[SamplingState]) -> list[Sampled]:
    """Choose one token per row of float32 logits."""
    if all(state.plain for state in states):
        chosen = logits_BV.argmax(dim=-1).tolist()
    else:
        chosen = choose_rows(logits_BV, states)
    return [_report(logits_BV[row], token, states[row].params.logprobs) for row, token in enumerate(chosen)]


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
