"""What goes into a call of the sampler's machine code, and the numbers both twins of it count with. Knows neither torch
nor numba: both sides import it.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["FARTHEST", "LOG2_E", "LN2_HIGH", "LN2_LOW", "ROUNDER", "SERIES", "UNIT", "SampleCall", "SampleRow"]

UNIT = 2.0**44
"""The weight of a likeliest token. Weights are integers, so their sums are the same in any order; below 2**63, with
fewer than 2**19 tokens. A token that is 45 ln 2 = 31.2 nats less likely than the likeliest has none."""
FARTHEST = -64.0
"""Exponents are not followed further down: the weight is 0 long before."""
LOG2_E = 1.4426950408889634
ROUNDER = 1.5 * 2.0**52
"""Added and taken away again it rounds to an integer."""
LN2_HIGH, LN2_LOW = 0.6931471803691238, 1.9082149292705877e-10
"""ln 2, the first part with so few bits that its product with a small integer is exact."""
SERIES = (
    *(1 / 479001600, 1 / 39916800, 1 / 3628800, 1 / 362880, 1 / 40320, 1 / 5040),
    *(1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0),
)
"""Of exp, to 2e-16 within ln 2 / 2 of 0; the highest power first."""


class SampleCall(NamedTuple):
    """Addresses of float32 logits, rows of V that lie `stride` items apart; of B addresses of a `SampleRow` each; and
    of B int64 for the tokens."""

    logits: int
    stride: int
    V: int
    rows: int
    tokens: int
    B: int


class SampleRow(NamedTuple):
    """What one row asks for; float64s by their bits. `bias_ids` (int64) and `biases` (float32) are addresses of
    `bias_count` items; `seen_ids` (int64) and `often` (float32, 0 for what only the prompt holds) of `seen_count`."""

    temperature: int
    top_p: int
    min_p: int
    top_k: int
    seed: int
    position: int
    bias_ids: int
    biases: int
    bias_count: int
    seen_ids: int
    often: int
    seen_count: int
    repetition: int
    presence: int
    frequency: int
