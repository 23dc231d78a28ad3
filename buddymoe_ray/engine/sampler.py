"""Logits to tokens: greedy, temperature, top-k, top-p, min-p, biases, penalties, log probabilities.

Random numbers come from a counter-based generator keyed by (seed, position): a request gives the same tokens alone, in
any batch, and when it is resumed elsewhere. Knows neither text nor scheduling; the choice itself is `kernels.sample`.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from buddymoe_ray.kernels.sample import SamplingState, choose_rows, sample_kernel

__all__ = ["Sampled", "SamplingState", "prepare_sampling", "reported", "sample"]


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """One choice. `logprob` and `top` are of the model's own distribution; None and empty unless asked for."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def prepare_sampling(device: torch.device) -> None:
    """Make what `sample` needs there, so that no step does (8 CPU-seconds at the first time on a machine)."""
    if device.type == "cpu":
        sample_kernel()


def sample(
    logits_BV: Tensor,
    states: Sequence[SamplingState],
    *,
    ruled: Sequence[int] = (),
    allowed_RV: Tensor | None = None,
) -> list[Sampled]:
    """Choose one token per row of float32 logits; for the rows `ruled` by `allowed_RV`, what is left of theirs. Log
    probabilities are of `logits_BV`."""
    if allowed_RV is None or not ruled:
        tokens = choose_rows(logits_BV, states)
    else:
        tokens, free = [0] * len(states), [row for row in range(len(states)) if row not in set(ruled)]
        for rows, logits in ((ruled, allowed_RV), (free, logits_BV[free])):
            chosen = choose_rows(logits, [states[row] for row in rows]) if rows else []
            for row, token in zip(rows, chosen, strict=True):
                tokens[row] = token
    found = [Sampled(token_id=token) for token in tokens]
    rows_of: dict[int, list[int]] = {}
    for row, state in enumerate(states):
        if state.params.logprobs is not None:
            rows_of.setdefault(state.params.logprobs, []).append(row)
    for count, rows in rows_of.items():
        asked_BV = logits_BV if len(rows) == len(states) else logits_BV[rows]
        for row, one in zip(rows, reported(asked_BV, [tokens[row] for row in rows], count), strict=True):
            found[row] = one
    return found


def reported(logits_BV: Tensor, tokens: list[int], count: int) -> list[Sampled]:
    """Choices with `count` alternatives. torch's softmax and topk look at each row for itself."""
    logprobs_BV = logits_BV.log_softmax(dim=-1)
    own = logprobs_BV[range(len(tokens)), tokens].tolist()
    values, ids = (part.tolist() for part in logprobs_BV.topk(min(count, logprobs_BV.shape[1])))
    tops = [tuple(zip(*best, strict=True)) for best in zip(ids, values, strict=True)]
    return [
        Sampled(token_id=token, logprob=logprob, top=_with(token, logprob, top) if count else ())
        for token, logprob, top in zip(tokens, own, tops, strict=True)
    ]


def _with(token: int, logprob: float, top: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    """The alternatives and, where it is none of them, the token chosen."""
    return top if any(token == other for other, _ in top) else (*top, (token, logprob))
