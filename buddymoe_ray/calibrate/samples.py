"""One expert at a time: its weights, the rows that the router sent it, and what it answers.

Reads through the engine's own cache, so a model larger than memory is walked within the budget. Rows are gathered and
answered only where somebody asks for them: all answers of a large model's experts would take ten times as long as
everything else that is done with them. Knows no stand-ins.

Legend: T tokens, K slots, R rows of one expert, n some of them, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor

from buddymoe_ray.cache import ExpertCache
from buddymoe_ray.calibrate.rounding import ExpertRows
from buddymoe_ray.calibrate.trace import Trace
from buddymoe_ray.kernels import ExpertMath, LowbitFormat, PackedMatrix, expert_forward, pack_plain, plain_weights

__all__ = ["ENOUGH", "ExpertSample", "plain_math", "walk_layer"]

ENOUGH = 20
"""Rows that the router must have sent an expert for its own error to mean something."""
_MOST_ROWS = 4096
_FEW_ROWS = 64
_BORROWED_WEIGHT = 0.1
_BLOCK = 64
"""Rows that are answered at once where nobody knows yet how many it takes."""
_MOST_BLOCKS = 8
_HELD = 5
"""One of so many rows is not fitted on."""


@dataclass(frozen=True, kw_only=True)
class ExpertSample:
    """An expert and its rows. `weights` are float32 `[out, in]`; `own` counts rows the router really sent (0 to R).

    Rows beyond `own` are borrowed from other tokens with a small weight, where the router sent few.
    """

    expert: int
    weights: Mapping[str, Tensor]
    math: ExpertMath
    hidden_TD: Tensor
    token_R: Tensor
    weight_R: Tensor
    own: int
    _blocks: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _packed: dict[tuple[int, LowbitFormat], PackedMatrix] = field(default_factory=dict)

    def inputs(self, rows_n: Tensor | None = None) -> Tensor:
        """Float32 `[n, D]` of some rows; None: of all."""
        return self.hidden_TD[self.token_R if rows_n is None else self.token_R[rows_n]].float()

    def answers(self, x_nD: Tensor) -> Tensor:
        """What the expert answers, float32 `[n, D]`."""
        return expert_forward(x_nD, self.weights, plain_math(self.math))

    def fitted(self, most: int | None = None) -> Tensor:
        """Rows to fit on, all or `most` of them spread evenly: with enough rows not the held ones, see `held`."""
        rows_R = torch.arange(len(self.token_R))
        if self.own >= ENOUGH:
            rows_R = rows_R[(rows_R % _HELD != _HELD - 1) | (rows_R >= self.own)]
        return rows_R if most is None else _spread(rows_R, most)

    @cached_property
    def rounded_for(self) -> ExpertRows:
        """All rows to fit on, for the roundings of all widths."""
        rows_R = self.fitted()
        return ExpertRows(self.weights, self.inputs(rows_R), self.weight_R[rows_R], plain_math(self.math))

    def packed(self, weight: Tensor, fmt: LowbitFormat) -> PackedMatrix:
        """One of the weights rounded plainly, once for all records that have it."""
        key = weight.data_ptr(), fmt
        if key not in self._packed:
            self._packed[key] = pack_plain(weight, fmt)
        return self._packed[key]

    def held(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Blocks `(x_nD, y_nD, weight_n)` of rows that nothing is fitted on, each spread over the whole text.

        Every fifth row the router sent; with too few of those, the last rows there are. A block is gathered and
        answered at its first use, and kept.
        """
        most = _BLOCK * _MOST_BLOCKS
        if self.own < ENOUGH:
            rows_R = torch.arange(len(self.token_R))[-most:]
        else:
            rows_R = _spread(torch.arange(_HELD - 1, self.own, _HELD), most)
        count = -(-len(rows_R) // _BLOCK)
        for at in range(count):
            rows_n = rows_R[at::count]
            if at not in self._blocks:
                x_nD = self.inputs(rows_n)
                self._blocks[at] = x_nD, self.answers(x_nD)
            yield *self._blocks[at], self.weight_R[rows_n]


def plain_math(math: ExpertMath) -> ExpertMath:
    """The same arithmetic on matrices that lie `[out, in]`."""
    return replace(math, transposed=False)


def walk_layer(
    cache: ExpertCache, trace: Trace, layer: int, math: ExpertMath, experts: Sequence[int] | None = None
) -> Iterator[ExpertSample]:
    """Every expert of a layer, in the order the cache lends them; or these, in this order."""
    ids_TK, weight_TK, hidden_TD = trace.ids(layer), trace.weights(layer), trace.hidden(layer)
    E, others = cache.layout.experts_per_layer[layer], max(1, len(hidden_TD) // _FEW_ROWS)
    for named in [range(E)] if experts is None else [[expert] for expert in experts]:
        for lease in chain.from_iterable(cache.stream(layer, named, protect_residency=True)):
            token_R, slot_R = (ids_TK == lease.key.expert).nonzero(as_tuple=True)
            token_R, slot_R = _spread(token_R, _MOST_ROWS), _spread(slot_R, _MOST_ROWS)
            weight_R, own = weight_TK[token_R, slot_R].float(), len(token_R)
            if own < _FEW_ROWS:
                borrowed_R = torch.arange(0, len(hidden_TD), others)[:_FEW_ROWS]
                token_R = torch.cat([token_R, borrowed_R])
                weight_R = torch.cat([weight_R, torch.full((len(borrowed_R),), _BORROWED_WEIGHT / trace.top_k)])
            yield ExpertSample(
                expert=lease.key.expert,
                weights=_widened(plain_weights(lease.tensors(), cache.layout.coded), math.transposed),
                math=math,
                hidden_TD=hidden_TD,
                token_R=token_R,
                weight_R=weight_R,
                own=own,
            )


def _widened(tensors: Mapping[str, Tensor], transposed: bool) -> dict[str, Tensor]:
    wide = {name: t.detach().float().cpu() for name, t in tensors.items()}
    return {
        name: t.T.contiguous() if transposed and t.ndim == 2 else t.clone() if t.dtype == tensors[name].dtype else t
        for name, t in wide.items()
    }


def _spread(index_R: Tensor, most: int) -> Tensor:
    """At most so many entries, spread evenly."""
    if len(index_R) <= most:
        return index_R
    return index_R[torch.linspace(0, len(index_R) - 1, most).long()]
