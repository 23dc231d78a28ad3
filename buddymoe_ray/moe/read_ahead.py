"""Guesses what the next MoE layer will ask for while this one computes, and whether that pays.

The guess is the next layer's router on this layer's own input: the residual stream changes little from one layer to the
next. What the first layer will ask for is guessed by the tokens, as soon as these are chosen: before the step that
computes them. What is done with a guess is the cache's, whether it is worth anything `policy.ReadAheadGain`'s. Knows no
bytes.

Legend: T tokens, K experts per token, D hidden.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from buddymoe_ray.cache import ExpertCache
from buddymoe_ray.moe.first_layer import FirstLayer
from buddymoe_ray.observe import smoothed
from buddymoe_ray.policy import ReadAheadGain

__all__ = ["Choice", "ReadAhead"]

Ints = npt.NDArray[np.int64]
Choice = Callable[[Tensor], Tensor]
"""A router as `[T, D] -> ids [T, K]`, its first choice first."""

_SMOOTHING = 0.05
_PROMPT_ROWS = 256
"""Of a prompt so many rows are looked at: an expert that none of them wants is hardly wanted."""


@dataclass(frozen=True, slots=True)
class _Guess:
    """Missing experts of a layer that were guessed in one `way`: their ranks, when, and what had been waited for by
    then."""

    way: int
    missing: dict[int, int]
    then: float
    stalled: float


class ReadAhead:
    """One per engine. `choices` are the routers of all MoE layers; `first` is None where the first is not guessed.

    There is one way to guess a layer, of the same number, and one more for the first.
    """

    def __init__(
        self, cache: ExpertCache, choices: Sequence[Choice], *, experts_per_token: int, first: FirstLayer | None
    ) -> None:
        ways = len(choices) + 1
        self.gain = ReadAheadGain(ways, experts_per_token)
        self._cache, self._choices, self._first = cache, choices, first
        self._passes = 0
        self._guesses: list[list[_Guess]] = [[] for _ in choices]  # that wait to be judged, by layer
        self._seconds = [0.0] * ways  # from a guess to its judgement, without what was waited for

    def begin(self, tokens: Sequence[int]) -> None:
        """The next pass computes these tokens: begin to read what the first layer will probably ask for."""
        if self._first is None or not tokens:
            return
        self._guesses[0].clear()  # of a pass that never came
        ways = 0, len(self._choices)
        asked = [self.gain.guesses(way, self._passes) for way in ways]
        if not any(asked):
            return
        coming = list[int]()
        for way, guess_TK in zip(ways, self._first.guesses(tokens), strict=True):
            if len(guess_TK) and asked[way > 0]:
                coming += self._wanted(0, guess_TK, way)
        if coming:
            self._cache.read_ahead(0, list(dict.fromkeys(coming)))

    def guesses(self, layer: int) -> bool:
        """Whether this pass guesses what `layer` will ask for."""
        return layer < len(self._choices) and self.gain.guesses(layer, self._passes)

    def choose(self, layer: int, hidden_TD: Tensor) -> Tensor:
        """A guess `[T, K]`: what `layer` would choose if `hidden_TD`, which the layer before reads, were its own."""
        return self._choices[layer](hidden_TD)

    def wanted(self, layer: int, guess_TK: Tensor) -> Sequence[int]:
        """Experts of a guess, best first: what is resident, and what is worth reading; none if that is nothing."""
        return self._wanted(layer, guess_TK.numpy(), layer)

    def expect(self, layer: int, experts: Sequence[int]) -> bool:
        """A prompt asks for these of the layer soon: begin to read them; whether all are there or on their way."""
        return self._cache.read_ahead(layer, experts, protect_residency=True)

    def resident(self, layer: int) -> npt.NDArray[np.bool_] | None:
        """Which of the layer's experts are resident now; None behind the last."""
        return None if layer == len(self._choices) else self._cache.resident_mask(layer).copy()

    def coming(self, layer: int, hidden_TD: Tensor) -> list[int]:
        """What `layer` will ask for, if the layer before reads these rows of a prompt: what most rows want first."""
        if layer == len(self._choices) or not len(hidden_TD):
            return []
        rows_TD = hidden_TD[:: -(-len(hidden_TD) // _PROMPT_ROWS)]
        experts, counts = np.unique(self.choose(layer, rows_TD).numpy(), return_counts=True)
        found: list[int] = experts[np.argsort(-counts, kind="stable")].tolist()
        return found

    def awaits(self, layer: int) -> bool:
        """Whether what was guessed of the layer waits to be judged, by the time that one layer takes too."""
        return bool(self._guesses[layer])

    def learn(self, layer: int, tokens: Sequence[int], ids_TK: Ints) -> None:
        """The layer asks for these, of tokens that are known."""
        if layer == 0 and self._first is not None and tokens:
            self._first.learn(tokens, ids_TK)

    def used(self, layer: int, tokens: Sequence[int], ids_TK: Ints) -> None:
        """A decode step's layer asks for these, or has: what the guess was worth, and how long a layer takes."""
        self._passes += layer == len(self._choices) - 1
        self.learn(layer, tokens, ids_TK)
        if not self._guesses[layer]:
            return
        guesses, self._guesses[layer] = self._guesses[layer], []
        used, now, stalled = set(ids_TK.ravel().tolist()), time.perf_counter(), self._cache.stall_seconds
        for guess in guesses:
            seconds = now - guess.then - (stalled - guess.stalled)
            self._seconds[guess.way] = smoothed(self._seconds[guess.way], seconds, _SMOOTHING)
            cost = self._cache.read_seconds / self._seconds[guess.way]
            self.gain.note(guess.way, guess.missing, used, read_cost=cost)

    def _wanted(self, layer: int, guess_TK: Ints, way: int) -> Sequence[int]:
        ranks = dict[int, int]()
        for rank, experts in enumerate(guess_TK.T.tolist()):
            for expert in experts:
                ranks.setdefault(expert, rank)
        resident_E, reads_K = self._cache.resident_mask(layer), self.gain.reads(way)
        missing = {expert: rank for expert, rank in ranks.items() if not resident_E[expert]}
        if missing:
            self._guesses[layer].append(_Guess(way, missing, time.perf_counter(), self._cache.stall_seconds))
        if not any(reads_K[rank] for rank in missing.values()):
            return ()
        return [expert for expert, rank in ranks.items() if expert not in missing or reads_K[rank]]
