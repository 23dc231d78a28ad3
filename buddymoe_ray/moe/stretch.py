"""Consecutive MoE layers that one call may compute: how far it may go, and which of what it did counts.

Knows where experts are, not how they are computed. Neighbours: `engine.one_call` asks before a call of the kernels and
tells what it came to; a layer that it left open is its block's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from buddymoe_ray.cache import Glance
from buddymoe_ray.kernels import Tallies
from buddymoe_ray.moe.block import MoEBlock
from buddymoe_ray.moe.step import StepState

__all__ = ["Outlook", "Stretch"]


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a call can use, of the layers that it is to compute: where the experts of each are, and those of the one
    behind it where these are to be guessed; as `places`, with the words of the slots, for the kernel too. `tallies` are
    for it to write."""

    glances: Sequence[tuple[Glance, Glance | None]]
    places: tuple[Sequence[int], Sequence[int], Sequence[int]]
    tallies: Tallies


class Stretch:
    """The blocks of layers that follow one another."""

    def __init__(self, blocks: Sequence[MoEBlock], step: StepState) -> None:
        self.blocks, self._step = tuple(blocks), step
        self._reach = len(self.blocks)

    def outlook(self, first: int, most: int) -> Outlook | None:
        """For a call that begins with the `first` layer and computes `most` at most; None where what runs there is not
        for the router alone to say.

        Layers behind one that misses were looked at in vain: a call goes twice as far as the last one came.
        """
        glances = list[tuple[Glance, Glance | None]]()
        for block in self.blocks[first : first + min(most, self._reach)]:
            glance = block.glance()
            if glance is None:
                break
            glances.append((glance, block.glance_ahead()))
            if block.awaited:
                break
        if not glances:
            return None
        here = [glance.address for glance, _ in glances]
        behind = [0 if glance is None else glance.address for _, glance in glances]
        words = [glance.words_address for glance, _ in glances]
        return Outlook(glances, (here, behind, words), self._step.tallies(len(glances)))

    def settle(self, first: int, outlook: Outlook, ids_NTK: npt.NDArray[np.int64], done: int) -> None:
        """The accesses of the layers that were done are accounted for."""
        for n in range(done):
            self.blocks[first + n].settle(outlook.glances[n][0], ids_NTK[n])
        self._reach = 2 * done or 1
        if done:
            self._step.take(outlook.tallies, done)
