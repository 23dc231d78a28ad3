"""How well any expert answers for any other: least-squares scale and error of every pair in a layer.

E^2 evaluations on a few rows each, so it is asked for only where buddies are wanted. Knows no losses.

Legend: E experts, n rows kept of all experts, R of one, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from buddymoe_ray.calibrate.samples import ExpertSample

__all__ = ["PairRows"]

_PAIR_ROWS, _LAYER_ROWS = 64, 2048
"""Most rows of an expert, and of all experts of a layer."""

Floats = npt.NDArray[np.float32]


class PairRows:
    """Some rows of each of a layer's E experts with its own answers, and how all others would have answered them."""

    def __init__(self, E: int) -> None:
        self._rows = max(1, min(_PAIR_ROWS, _LAYER_ROWS // E))
        self._kept: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * E

    def add(self, sample: ExpertSample) -> None:
        """Keep rows of one expert."""
        last = max(0, (sample.own or len(sample.token_R)) - 1)
        x_RD = sample.inputs(torch.linspace(0, last, self._rows).long().unique())
        self._kept[sample.expert] = x_RD, sample.answers(x_RD).double()

    def errors(self, walk: Callable[[], Iterable[ExpertSample]]) -> tuple[Floats, Floats]:
        """`(error_EE, scale_EE)` once all are kept: row i are tokens routed to i, column j answers with `scale *
        E_j(x)`. `walk` lends every expert once more.

        scale = <y_i, y_j> / <y_j, y_j>, error = mean |y_i - scale y_j|^2.
        """
        E, counts = len(self._kept), [len(x_RD) for x_RD, _ in self._kept]
        x_nD, y_nD = (torch.cat(parts) for parts in zip(*self._kept, strict=True))
        energy_E = torch.stack([part.square().sum() for part in y_nD.split(counts)])
        error_EE, scale_EE = np.zeros((E, E), np.float32), np.zeros((E, E), np.float32)
        for sample in walk():
            theirs_nD = sample.answers(x_nD).double()
            dot_E = torch.stack([part.sum() for part in (theirs_nD * y_nD).split(counts)])
            norm_E = torch.stack([part.square().sum() for part in theirs_nD.split(counts)])
            scale_E = dot_E / norm_E.clamp_min(1e-300)
            left_E = (energy_E - scale_E * dot_E).clamp_min(0) / torch.tensor(counts)
            error_EE[:, sample.expert], scale_EE[:, sample.expert] = left_E.numpy(), scale_E.numpy()
        return error_EE, scale_EE
