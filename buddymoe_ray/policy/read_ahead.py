"""Whether it pays to read experts of the next layer before they are asked for. Pure.

A read that turns out useful hides behind the computation of a layer; one that does not keeps the disk from what is
waited for, and evicts an expert. So it depends on how often the guess is right and on how much of a layer's reading
there is computation to hide behind. Both are measured on the running model, by layer and by the rank that the guess
gave: a router's later choices are surer to be wrong.

Guesses are the next router's choice on this layer's own input. It finds .65 of the misses of builtin:tiny (.55 of what
it names is used), .90 of an OLMoE shape's (.89). Transitions between the experts of neighbouring layers, learnt while
running, found .23 and .00 of the same misses (a popular expert follows every other, and is resident): dropped.

Legend: L layers, K ranks of a guess (the router's first choice is rank 0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

__all__ = ["ReadAheadGain"]

_KEPT = 0.95
"""Of the counts, from one guess to the next: about the latest 20 decide."""
_FIRST, _EVERY = 8, 16


class ReadAheadGain:
    """What reading ahead gained in each of `layers`, for guesses of `ranks` experts per token. A layer guessed in
    two ways counts as two.

    A pass guesses where `guesses` says so, reads what `reads` allows, and tells `note` how it went. `useful` and
    `wasted` count experts that were read, of all layers since the start.
    """

    def __init__(self, layers: int, ranks: int) -> None:
        self.useful = self.wasted = 0
        self._layers = [_Layer(ranks) for _ in range(layers)]

    def guesses(self, layer: int, passes: int) -> bool:
        """Whether to guess the layer's experts after so many passes: where it pays, and now and then elsewhere."""
        return self._layers[layer].pays or self._layers[layer].noted < _FIRST or passes % _EVERY == 0

    def reads(self, layer: int) -> Sequence[bool]:
        """By rank, whether a guess is worth reading."""
        return self._layers[layer].reads_K

    def note(self, layer: int, missing: Mapping[int, int], used: AbstractSet[int], *, read_cost: float) -> None:
        """A pass guessed `missing` (rank by expert), of which `used` were asked for; decides what the next one reads.

        `read_cost` is the time that the disk takes for an expert over the time that a layer computes.
        """
        found = self._layers[layer]
        for expert, rank in missing.items():
            if found.reads_K[rank]:
                self.useful += expert in used
                self.wasted += expert not in used
        found.note(missing, used, read_cost)


class _Layer:
    """The counts of one, by rank."""

    def __init__(self, ranks: int) -> None:
        self.reads_K, self.pays, self.noted = [False] * ranks, False, 0
        self._useful_K, self._wasted_K, self._guesses = [0.0] * ranks, [0.0] * ranks, 0.0

    def note(self, missing: Mapping[int, int], used: AbstractSet[int], read_cost: float) -> None:
        self.noted += 1
        self._guesses = _KEPT * self._guesses + 1
        useful_K = self._useful_K = [_KEPT * count for count in self._useful_K]
        wasted_K = self._wasted_K = [_KEPT * count for count in self._wasted_K]
        for expert, rank in missing.items():
            (useful_K if expert in used else wasted_K)[rank] += 1
        if self.noted < _FIRST:
            return
        to_hide = sum(useful_K) / self._guesses * read_cost
        hidden = min(1.0, 1.0 / to_hide) if to_hide else 0.0
        self.reads_K = [hidden * useful > wasted for useful, wasted in zip(useful_K, wasted_K, strict=True)]
        self.pays = any(self.reads_K)
