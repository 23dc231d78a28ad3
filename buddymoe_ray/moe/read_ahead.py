"""Guesses what the next MoE layer will ask for while this one computes, and whether that pays.

The guess is the next layer's router on this layer's own input: the residual stream changes little from one layer to the
next. What is done with it is the cache's, whether it is worth anything `policy.ReadAheadGain`'s. Knows no bytes.

Legend: T tokens, K experts per token, D hidden.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from buddymoe_ray.cache import Experts
from buddymoe_ray.observe import smoothed
from buddymoe_ray.policy import ReadAheadGain

__all__ = ["Choice", "ReadAhead"]

Choice = Callable[[Tensor], Tensor]
"""A router as `[T, D] -> ids [T, K]`, its first choice first."""

_SMOOTHING = 0.05


class ReadAhead:
    """One per engine. `choices` are the routers of all MoE layers."""

    def __init__(self, cache: Experts, choices: Sequence[Choice], *, experts_per_token: int) -> None:
        self.gain = ReadAheadGain(len(choices), experts_per_token)
        self._cache, self._choices = cache, choices
        self._passes = 0
        self._missing = dict[int, dict[int, int]]()  # by layer that was guessed: rank by expert
        self._begun = (0.0, 0.0)  # when the latest guess was made, and what had been waited for by then
        self._layer_seconds = 0.0  # without what was waited for

    def guesses(self, layer: int) -> bool:
        """Whether this pass guesses what `layer` will ask for."""
        return layer < len(self._choices) and self.gain.guesses(layer, self._passes)

    def choose(self, layer: int, hidden_TD: Tensor) -> Tensor:
        """A guess `[T, K]`: what `layer` would choose if `hidden_TD`, which the layer before reads, were its own."""
        return self._choices[layer](hidden_TD)

    def wanted(self, layer: int, guess_TK: Tensor) -> Sequence[int]:
        """Experts of a guess, best first: what is resident, and what is worth reading; none if that is nothing."""
        ranks = dict[int, int]()
        for rank, experts in enumerate(guess_TK.T.tolist()):
            for expert in experts:
                ranks.setdefault(expert, rank)
        resident_E, reads_K = self._cache.resident_mask(layer), self.gain.reads(layer)
        missing = self._missing[layer] = {expert: rank for expert, rank in ranks.items() if not resident_E[expert]}
        self._begun = (time.perf_counter(), self._cache.stall_seconds)
        if not any(reads_K[rank] for rank in missing.values()):
            return ()
        return [expert for expert, rank in ranks.items() if expert not in missing or reads_K[rank]]

    def awaits(self, layer: int) -> bool:
        """Whether what was guessed of the layer waits to be judged, by the time that one layer takes too."""
        return bool(self._missing.get(layer))

    def used(self, layer: int, ids_TK: npt.NDArray[np.int64]) -> None:
        """The layer asks for these, or has: what the guess was worth, and how long a layer takes."""
        self._passes += layer == len(self._choices) - 1
        missing = self._missing.pop(layer, None)
        if not missing:
            return
        then, stalled = self._begun
        seconds = time.perf_counter() - then - (self._cache.stall_seconds - stalled)
        self._layer_seconds = smoothed(self._layer_seconds, seconds, _SMOOTHING)
        cost = self._cache.read_seconds / self._layer_seconds
        self.gain.note(layer, missing, set(ids_TK.ravel().tolist()), read_cost=cost)
