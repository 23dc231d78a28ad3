"""How long a prompt's forwards take: what cuts them and begins them."""

from __future__ import annotations

from math import sqrt

import numpy as np

from buddymoe_ray.engine.pieces import Piece

__all__ = ["ForwardSeconds"]

_KEPT = 0.98  # of what is known, with every measurement
_FAR = 1024  # tokens: rows and their reach are numbers of a size then


class ForwardSeconds:
    """What a forward takes to its next MoE layer: so long for a row, and so long for a token that a row looks back to,
    fitted to those measured, the latest most. Of OLMoE a row at token 2,000 takes twice as long as one at 60."""

    def __init__(self) -> None:
        self._inputs_22, self._seconds_2 = np.zeros((2, 2)), np.zeros(2)
        self._row, self._token = 0.0, 0.0

    @property
    def known(self) -> bool:
        """Whether any was measured."""
        return self._row > 0

    def measured(self, piece: Piece, seconds: float) -> None:
        """The forward took so long."""
        inputs_2 = np.array([len(piece.ids), _reach(piece) / _FAR])
        self._inputs_22 = _KEPT * self._inputs_22 + np.outer(inputs_2, inputs_2)
        self._seconds_2 = _KEPT * self._seconds_2 + inputs_2 * seconds
        row, far = np.linalg.solve(self._inputs_22 + 1e-3 * self._inputs_22[0, 0] * np.eye(2), self._seconds_2)
        if min(row, far) <= 0:
            row, far = self._seconds_2[0] / self._inputs_22[0, 0], 0.0
        self._row, self._token = float(row), float(far) / _FAR

    def of(self, piece: Piece) -> float:
        """How long it will take; 0 if none was measured."""
        return self._row * len(piece.ids) + self._token * _reach(piece)

    def rows(self, start: int, seconds: float) -> int:
        """Of a forward that takes so long and begins behind `start` tokens. To be asked where that is `known`."""
        each = self._row + self._token * start
        return int(2 * seconds / (each + sqrt(each * each + 2 * self._token * seconds)))


def _reach(piece: Piece) -> int:
    """Tokens that its rows look back to, themselves among them."""
    return sum(piece.positions) + len(piece.positions)
