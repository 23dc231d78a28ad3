"""One row of logits to one token: the spec, by a full sort, which is a GPU's way too and waits for nothing, and the
CPU's, which sorts nothing. Knows the settings and where tokens were seen, neither sequences nor text.

Both give the same token, always, because both count with the same integers: a token's weight is `UNIT` times its
likeness exp((logit - largest) / temperature), rounded to an integer, so a sum does not depend on its order; exp is
written out in operations that are rounded once each. So the token depends on no batch, thread, vector width or libm.

Measured with `engine.sampler`, CPU ms a step of 1, 8, 32 rows of 151,936, one thread, before (sort) -> now:
temperature 1: 18, 156, 602 -> .95, 8.2, 31; .7 with top-p .9: 19, 151, 615 -> 1.1, 7.8, 36; top-k 50: 18, 143, 561 ->
.22, 1.1, 3.3; greedy: .45, 3.1, 12 -> .13, .6, 2.5; 5 log probabilities: 1.5, 7.1, 39 -> 1.2, 5.1, 26 (torch's own:
log_softmax of all rows at once gained nothing, topk a quarter). A third of that with 50,304. Of a row's .8 ms, .6 are
its exponentials. Compiling takes three times a router's (6 to 8 CPU-seconds); numba's inline="always" does not help.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from buddymoe_ray.device import upload
from buddymoe_ray.kernels.cpu import Kernel
from buddymoe_ray.kernels.sample_calls import (
    FARTHEST,
    LN2_HIGH,
    LN2_LOW,
    LOG2_E,
    ROUNDER,
    SERIES,
    UNIT,
    SampleCall,
    SampleRow,
)
from buddymoe_ray.types import SamplingParams

__all__ = [
    "SamplingState",
    "choose_by_sort",
    "choose_rows",
    "choose_sorted",
    "exponential_64",
    "sample_kernel",
    "settings_of",
    "uniform",
]

_POSITION, _SEEN = SampleRow._fields.index("position"), SampleRow._fields.index("seen_ids")
_SHARES = 2.0**53
_MOST = 2**19
_TOGETHER = 8  # rows that are sorted at once: of 151,936 they take .1 GB


class SamplingState:
    """What choosing one sequence's next token depends on. `token_ids` is the live list of prompt and output."""

    def __init__(self, *, params: SamplingParams, seed: int, token_ids: list[int], prompt_length: int) -> None:
        p = params
        self.params, self.seed, self.token_ids = params, seed & (2**64 - 1), token_ids
        self.penalised = p.repetition_penalty != 1.0 or bool(p.presence_penalty or p.frequency_penalty)
        self.shifts = self.penalised or bool(p.logit_bias)
        self.bias_ids = np.array(list(p.logit_bias), np.int64)
        self.biases = np.array(list(p.logit_bias.values()), np.float32)
        self._prompt_length, self._counted = prompt_length, 0
        self._places: dict[int, int] = {}
        self._ids, self._often = np.empty(0, np.int64), np.empty(0, np.float32)
        row = SampleRow(
            **{name: _bits(getattr(p, name)) for name in ("temperature", "top_p", "min_p")},
            top_k=min(p.top_k, 2**62),
            seed=_signed(self.seed),
            position=0,
            bias_ids=self.bias_ids.ctypes.data,
            biases=self.biases.ctypes.data,
            bias_count=len(self.biases),
            seen_ids=0,
            often=0,
            seen_count=0,
            repetition=_bits(p.repetition_penalty),
            presence=_bits(p.presence_penalty),
            frequency=_bits(p.frequency_penalty),
        )
        self._row = np.array(row, np.int64)
        self._at: int = self._row.ctypes.data

    @property
    def position(self) -> int:
        """Index of the token to choose, from the start of the prompt."""
        return len(self.token_ids)

    def seen(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Each token of prompt and output once, and how often it was generated; only what is new is counted."""
        places = self._places
        for at in range(self._counted, len(self.token_ids)):
            token = self.token_ids[at]
            place = places.setdefault(token, len(places))
            if place == len(self._ids):
                self._ids = np.concatenate((self._ids, np.zeros(place + 64, np.int64)))
                self._often = np.concatenate((self._often, np.zeros(place + 64, np.float32)))
            self._ids[place] = token
            self._often[place] += at >= self._prompt_length
        self._counted = len(self.token_ids)
        return self._ids[: len(places)], self._often[: len(places)]

    def row_at(self) -> int:
        """Address of the `SampleRow` that says what the next token depends on, for as long as this lives unchanged."""
        self._row[_POSITION] = len(self.token_ids)
        if self.penalised:
            ids, often = self.seen()
            self._row[_SEEN : _SEEN + 3] = ids.ctypes.data, often.ctypes.data, len(ids)
        return self._at


def choose_rows(logits_BV: Tensor, states: Sequence[SamplingState]) -> list[int]:
    """One token per row of float32 logits: those of `choose_by_sort`, on a CPU of all rows in one call, which leaves
    to it what is no distribution."""
    assert len(logits_BV) == len(states), f"{len(logits_BV)} rows, must be {len(states)}"
    if logits_BV.device.type != "cpu":
        if any(state.shifts for state in states):
            logits_BV = torch.stack([_shifted(row_V, state) for row_V, state in zip(logits_BV, states, strict=True)])
        return choose_sorted(logits_BV, settings_of(states)).tolist()  # type: ignore[no-any-return]
    assert logits_BV.shape[1] < _MOST, f"{logits_BV.shape[1]} logits, must be fewer than {_MOST}: sums are int64"
    assert logits_BV.dtype is torch.float32, f"logits are {logits_BV.dtype}, must be float32"
    logits_BV = logits_BV if logits_BV.stride(1) == 1 else logits_BV.contiguous()
    rows = np.array([state.row_at() for state in states], np.int64)
    tokens = np.empty(len(states), np.int64)
    places = (logits_BV.data_ptr(), logits_BV.stride(0), logits_BV.shape[1], rows.ctypes.data, tokens.ctypes.data)
    sample_kernel()((*places, len(states)), 0)
    chosen: list[int] = tokens.tolist()
    return [choose_by_sort(logits_BV[row], states[row]) if token < 0 else token for row, token in enumerate(chosen)]


def choose_by_sort(logits_V: Tensor, state: SamplingState) -> int:
    """The spec, of one row with its biases and penalties."""
    return int(choose_sorted(_shifted(logits_V, state)[None], settings_of([state])))


def settings_of(states: Sequence[SamplingState], *, ahead: int = 0) -> npt.NDArray[np.float64] | None:
    """For `choose_sorted`, `[5, B]`: temperature, top_p, min_p, top_k and `uniform`, of the token that comes `ahead`
    tokens behind the next one. None where all rows are greedy."""
    if all(state.params.temperature == 0.0 for state in states):
        return None
    rows = [(s.params, uniform(s.seed, s.position + ahead) if s.params.temperature else 0.0) for s in states]
    return np.array([(p.temperature, p.top_p, p.min_p, p.top_k, number) for p, number in rows], np.float64).T.copy()


def choose_sorted(logits_BV: Tensor, settings_5B: npt.NDArray[np.float64] | None) -> Tensor:
    """Tokens `[B]` int64, where the logits are; nobody waits for them.

    Tokens stand in falling order, of equal ones the first first. Each takes its weight of the line from 0 to the sum of
    the weights that are kept, and the one chosen is where `uniform` falls on it. Rows whose largest logit is not
    finite, or that hold one that is not a number, are no distribution: they give the token that is taken without
    temperature, the first of the largest, where what is not a number is largest.
    """
    if settings_5B is None:
        return logits_BV.argmax(dim=-1)
    assert logits_BV.shape[1] < _MOST, f"{logits_BV.shape[1]} logits, must be fewer than {_MOST}: sums are int64"
    rows = upload(torch.from_numpy(settings_5B), logits_BV.device).split(_TOGETHER, dim=1)
    return torch.cat([_drawn(part, *row) for part, row in zip(logits_BV.split(_TOGETHER), rows, strict=True)])


def _drawn(logits_BV: Tensor, *settings: Tensor) -> Tensor:
    temperature, top_p, min_p, top_k, number = (setting_B.unsqueeze(1) for setting_B in settings)
    last, greedy = logits_BV.shape[1] - 1, (temperature == 0.0) | ~logits_BV.amax(dim=1, keepdim=True).isfinite()
    values_BV, order_BV = logits_BV.sort(dim=1, descending=True, stable=True)
    least = values_BV.gather(1, (top_k.clamp(max=last + 1).long() - 1).clamp(min=0))
    out_BV = (top_k > 0) & (values_BV < least)  # ties with the k-th stay, as in transformers' TopKLogitsWarper
    # less the largest before the division: a tiny temperature must not make inf - inf
    values_BV = values_BV.double().sub_(values_BV[:, :1].double()).div_(temperature.masked_fill(greedy, 1.0))
    values_BV = exponential_64(values_BV)
    out_BV |= values_BV < min_p  # likeness to the likeliest, whatever else is kept
    sums_BV = values_BV.mul_(UNIT).round_().long().masked_fill_(out_BV, 0).cumsum_(dim=1)
    total = sums_BV[:, -1:]
    share = ((top_p * total).ceil().long() - 1).clamp(min=0)  # the last that is kept has less than top_p before it
    kept = sums_BV.gather(1, torch.searchsorted(sums_BV, share.minimum(total - 1), right=True).clamp(max=last))
    total = torch.where(top_p < 1.0, kept, total)
    at = torch.searchsorted(sums_BV, (number * total).long().minimum(total - 1), right=True).clamp(max=last)
    return torch.where(greedy, logits_BV.argmax(dim=1, keepdim=True), order_BV.gather(1, at))[:, 0]


def exponential_64(s_V: Tensor) -> Tensor:
    """exp of float64 numbers of at most 0, within 2 ulp down to `FARTHEST`, which it does not leave."""
    s_V = s_V.clamp(min=FARTHEST)
    shifted_V = s_V * LOG2_E + ROUNDER
    n_V = shifted_V - ROUNDER
    r_V = (s_V - n_V * LN2_HIGH) - n_V * LN2_LOW
    p_V = torch.full_like(s_V, SERIES[0])
    for factor in SERIES[1:]:
        p_V = p_V * r_V + factor
    return p_V * ((n_V.long() + 1023) << 52).view(torch.float64)


def uniform(seed: int, position: int) -> float:
    """One number in [0, 1) that depends on (seed, position) alone."""
    bits = np.random.Philox(key=seed, counter=position).random_raw()
    return (int(bits) >> 11) / _SHARES


@cache
def sample_kernel() -> Kernel:
    """The choice without a sort; made, or loaded, by the first call."""
    from buddymoe_ray.kernels.numba_calls import kernel
    from buddymoe_ray.kernels.sample_numba import compile_sample

    return kernel(compile_sample, len(SampleCall._fields))


def _shifted(logits_V: Tensor, state: SamplingState) -> Tensor:
    """Logits with biases, then penalties, as vLLM orders them."""
    p, where = state.params, logits_V.device
    if not state.shifts:
        return logits_V
    logits_V = logits_V.clone()
    logits_V[_moved(state.bias_ids, where)] += _moved(state.biases, where)
    if state.penalised:
        ids, often = (_moved(part, where) for part in state.seen())
        was = logits_V[ids]
        repetition = torch.tensor(p.repetition_penalty, dtype=was.dtype, device=where)
        now = torch.where(was > 0, was / repetition, was * repetition)
        logits_V[ids] = torch.where(often > 0, now - (p.presence_penalty + p.frequency_penalty * often), now)
    return logits_V


def _moved(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)


def _bits(number: float) -> int:
    return int(np.float64(number).view(np.int64))


def _signed(number: int) -> int:
    """The int64 of the same 64 bits."""
    return number - 2**64 if number >= 2**63 else number
