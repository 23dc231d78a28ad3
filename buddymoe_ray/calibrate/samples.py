"""One expert at a time: its weights, the rows that the router sent it, and what it answers.

Reads through the engine's own cache, so a model larger than memory is walked within the budget. Knows no stand-ins.

Legend: T tokens, K slots, R rows of one expert, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from buddymoe_ray.cache import EngineCache
from buddymoe_ray.calibrate.trace import Trace
from buddymoe_ray.kernels import ExpertMath, expert_forward

__all__ = ["ExpertSample", "plain_math", "walk_layer"]

_MOST_ROWS = 4096
_FEW_ROWS = 64
_BORROWED_WEIGHT = 0.1


@dataclass(frozen=True, kw_only=True)
class ExpertSample:
    """An expert and its rows. `weights` are float32 `[out, in]`; `own` counts rows the router really sent (0 to R).

    Rows beyond `own` are borrowed from other tokens with a small weight, where the router sent few.
    """

    expert: int
    weights: Mapping[str, Tensor]
    x_RD: Tensor
    weight_R: Tensor
    y_RD: Tensor
    own: int


def plain_math(math: ExpertMath) -> ExpertMath:
    """The same arithmetic on matrices that lie `[out, in]`."""
    return replace(math, transposed=False)


def walk_layer(cache: EngineCache, trace: Trace, layer: int, math: ExpertMath) -> Iterator[ExpertSample]:
    """Every expert of a layer, in the order the cache lends them."""
    ids_TK, weight_TK = trace.ids(layer), trace.weights(layer)
    hidden_TD = trace.hidden(layer)
    E = cache.layout.experts_per_layer[layer]
    for leases in cache.stream(layer, range(E), protect_residency=True):
        for lease in leases:
            expert = lease.key.expert
            weights = _widened(lease.tensors(), math.transposed)
            token_R, slot_R = (ids_TK == expert).nonzero(as_tuple=True)
            token_R, slot_R = _spread(token_R), _spread(slot_R)
            x_RD, weight_R = hidden_TD[token_R].float(), weight_TK[token_R, slot_R].float()
            own = len(token_R)
            if own < _FEW_ROWS:
                others_R = torch.arange(0, len(hidden_TD), max(1, len(hidden_TD) // _FEW_ROWS))[:_FEW_ROWS]
                x_RD = torch.cat([x_RD, hidden_TD[others_R].float()])
                weight_R = torch.cat([weight_R, torch.full((len(others_R),), _BORROWED_WEIGHT / trace.top_k)])
            y_RD = expert_forward(x_RD, weights, plain_math(math))
            yield ExpertSample(expert=expert, weights=weights, x_RD=x_RD, weight_R=weight_R, y_RD=y_RD, own=own)


def _widened(tensors: Mapping[str, Tensor], transposed: bool) -> dict[str, Tensor]:
    wide = {name: t.detach().float().cpu() for name, t in tensors.items()}
    return {name: t.T.contiguous() if transposed and t.ndim == 2 else t.clone() for name, t in wide.items()}


def _spread(index_R: Tensor) -> Tensor:
    """At most so many entries, spread evenly."""
    if len(index_R) <= _MOST_ROWS:
        return index_R
    return index_R[torch.linspace(0, len(index_R) - 1, _MOST_ROWS).long()]
