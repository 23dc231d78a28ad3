"""How well any expert answers for any other: least-squares scale and error of every pair in a layer.

E^2 evaluations on a few rows each, so it is asked for only where buddies are wanted. Knows no losses.

Legend: E experts, n rows kept per expert, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from buddymoe_ray.calibrate.samples import ExpertSample, plain_math
from buddymoe_ray.kernels import ExpertMath, expert_forward

__all__ = ["PAIR_ROWS", "pair_errors"]

PAIR_ROWS = 64

Floats = npt.NDArray[np.float32]


def pair_errors(walk: Callable[[], Iterable[ExpertSample]], E: int, math: ExpertMath) -> tuple[Floats, Floats]:
    """`(error_EE, scale_EE)`: row i are tokens routed to i, column j answers with `scale * E_j(x)`.

    scale = <y_i, y_j> / <y_j, y_j>, error = mean |y_i - scale y_j|^2. Both walks lend every expert once.
    """
    inputs, outputs = dict[int, Tensor](), dict[int, Tensor]()
    for sample in walk():
        rows = torch.linspace(0, max(0, (sample.own or len(sample.x_RD)) - 1), PAIR_ROWS).long().unique()
        inputs[sample.expert], outputs[sample.expert] = sample.x_RD[rows], sample.y_RD[rows]
    x_nD = torch.cat([inputs[e] for e in range(E)])
    y_nD = torch.cat([outputs[e] for e in range(E)]).double()
    counts = [len(inputs[e]) for e in range(E)]
    energy_E = torch.stack([part.square().sum() for part in y_nD.split(counts)])
    error_EE, scale_EE = np.zeros((E, E), np.float32), np.zeros((E, E), np.float32)
    for sample in walk():
        theirs_nD = expert_forward(x_nD, sample.weights, plain_math(math)).double()
        dot_E = torch.stack([part.sum() for part in (theirs_nD * y_nD).split(counts)])
        norm_E = torch.stack([part.square().sum() for part in theirs_nD.split(counts)])
        scale_E = dot_E / norm_E.clamp_min(1e-300)
        left_E = (energy_E - scale_E * dot_E).clamp_min(0) / torch.tensor(counts)
        error_EE[:, sample.expert], scale_EE[:, sample.expert] = left_E.numpy(), scale_E.numpy()
    return error_EE, scale_EE
