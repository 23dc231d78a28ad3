"""One MoE layer, from the router's choice to the summed output. The page to read first.

    route    the router named K experts per token (transformers computed ids and weights)
    resolve  in decode, each access whose expert is not resident is answered by a fetch or by a stand-in
    group    rows of the same expert together
    ensure   the cache streams leases: resident experts first, missing ones as their bytes arrive
    matmul   each leased expert, and each stand-in record, runs over its rows
    combine  per-slot outputs are weighted and summed in slot order

Does not know files, tiers or requests. Invariant: outputs are kept per (token, slot) until all are there, so neither
the order of arrival nor the number of waves changes a bit.

Legend: T tokens, K experts per token, N = T*K accesses, E experts, D hidden, R rows of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from buddymoe_ray.cache import Experts
from buddymoe_ray.errors import CacheError
from buddymoe_ray.kernels import combine
from buddymoe_ray.moe.peers import PeerExperts
from buddymoe_ray.moe.rows import Rows, group
from buddymoe_ray.moe.standins import Standins
from buddymoe_ray.moe.step import Phase, StepState
from buddymoe_ray.policy import Action, Resolution

__all__ = ["ExpertCompute", "MoEBlock"]

ExpertCompute = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
"""`compute(x_RD, a slot's tensors) -> y_RD`, before the router weight."""

Ints = npt.NDArray[np.int64]

_OWN, _DROP, _FETCH = Action.OWN, Action.DROP, Action.FETCH  # an enum's members cost two frames a look on Python 3.11
_PROBE, _DECODE = Phase.PROBE, Phase.DECODE
_RUNS = np.array([action in (Action.HIT, Action.BUDDY) for action in Action])  # resident experts that run
_FULL = {Action.HIT, Action.FETCH, Action.BUDDY}


class MoEBlock:
    """Replaces the experts module of MoE layer `layer`. Called as `block(hidden_TD, ids_TK, weights_TK) -> [T, D]`.

    `standins` is None where every miss is fetched; `peers`, once there are any, compute some of what is missing.
    """

    def __init__(
        self,
        *,
        layer: int,
        cache: Experts,
        compute: ExpertCompute,
        step: StepState,
        standins: Standins | None,
    ) -> None:
        self.layer = layer
        self.peers: PeerExperts | None = None
        self._cache, self._compute, self._step, self._standins = cache, compute, step, standins

    def __call__(self, hidden_TD: Tensor, ids_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """An expert whose bytes cannot be read costs the rows that need it (`StepState.failed`), or raises CacheError;
        the cache stays usable."""
        step = self._step
        if step.phase is _PROBE:
            return torch.zeros_like(hidden_TD)
        if step.observer is not None:
            step.observer(self.layer, hidden_TD, ids_TK, weight_TK)
        y_ND = hidden_TD.new_empty(ids_TK.numel(), hidden_TD.shape[1])
        ids = ids_TK.cpu().numpy()
        if step.phase is _DECODE:
            weight_TK = self._decode(hidden_TD, ids, weight_TK, y_ND)
        else:
            self._run_here(hidden_TD, group(ids, hidden_TD.device), y_ND, protect=True)
        return combine(y_ND.view(*ids_TK.shape, -1), weight_TK).to(hidden_TD.dtype)

    def _decode(self, hidden_TD: Tensor, ids_TK: Ints, weight_TK: Tensor, y_ND: Tensor) -> Tensor:
        """Fill `y_ND`; returns the weights to combine it with."""
        self._cache.count(self.layer, ids_TK)
        standins, step = self._standins, self._step
        if standins is None or not standins.may_answer(self.layer, step):
            hit_TK = self._cache.resident_mask(self.layer)[ids_TK]
            step.outcome.count_exact(hit_TK)
            self._run_full(hidden_TD, group(ids_TK, hidden_TD.device), y_ND, set(ids_TK[~hit_TK].tolist()))
            return weight_TK
        resident_E = self._cache.resident_mask(self.layer).copy()
        while True:
            resolution = standins.resolve(self.layer, ids_TK, weight_TK, resident_E, step)
            runs = {e for e in resolution.expert_TK[_RUNS[resolution.action_TK]].tolist() if resident_E[e]}
            with self._cache.holding(self.layer, sorted(runs)) as held:
                if len(held) == len(runs):
                    standins.book(self.layer, resolution, step)
                    self._answer(standins, hidden_TD, resolution, y_ND)
                    return torch.from_numpy(resolution.weight_TK).to(weight_TK)
            resident_E = resident_E.copy()
            resident_E[list(runs.difference(held))] = False  # moved away since: decide again

    def _answer(self, standins: Standins, hidden_TD: Tensor, resolution: Resolution, y_ND: Tensor) -> None:
        """Compute every access as it was decided."""
        action_TK, expert_TK = resolution.action_TK, resolution.expert_TK
        actions = set(action_TK.ravel().tolist())
        if _OWN in actions:
            standins.answer(self.layer, hidden_TD, np.where(action_TK == _OWN, expert_TK, -1), y_ND)
        if _DROP in actions:
            y_ND[torch.from_numpy((action_TK == _DROP).reshape(-1))] = 0
        if actions & _FULL:
            others = actions - _FULL
            full_TK = (action_TK != _OWN) & (action_TK != _DROP) if others else None
            # without those that are another row's buddy too, as a replay may have it
            fetched = set(expert_TK[action_TK == _FETCH].tolist()) - set(expert_TK[_RUNS[action_TK]].tolist())
            self._run_full(hidden_TD, group(expert_TK, hidden_TD.device, full_TK), y_ND, fetched)

    def _run_full(self, hidden_TD: Tensor, rows_of: Rows, y_ND: Tensor, fetched: set[int]) -> None:
        """Run the experts themselves: of those whose accesses were counted as fetched some at a peer, while the others
        run here. What is resident is not looked at again: others change it meanwhile."""
        able = self.peers.able(self.layer, sorted(fetched)) if self.peers is not None and fetched else ()
        if self.peers is None or not able:
            self._run_here(hidden_TD, rows_of, y_ND, protect=False)
            return
        asked = {expert: rows_of[expert] for expert in able}
        answers = self.peers.ask(self.layer, {e: hidden_TD.index_select(0, asked[e][1]) for e in asked})
        self._run_here(hidden_TD, {e: rows for e, rows in rows_of.items() if e not in asked}, y_ND, protect=False)
        answered = answers.collect()
        accesses_T = np.zeros(len(hidden_TD), np.int64)
        for expert, y_RD in answered.items():
            rows_R, tokens_R = asked[expert]
            y_ND.index_copy_(0, rows_R, y_RD.to(y_ND))
            accesses_T += np.bincount(tokens_R.cpu().numpy(), minlength=len(accesses_T))
        self._step.outcome.count_peer(accesses_T)
        rest = {e: rows for e, rows in asked.items() if e not in answered}
        self._run_here(hidden_TD, rest, y_ND, protect=False)

    def _run_here(self, hidden_TD: Tensor, rows_of: Rows, y_ND: Tensor, *, protect: bool) -> None:
        """Run experts as the cache lends them."""
        rest = dict(rows_of)
        try:
            if rest:
                self._run_waves(hidden_TD, rest, y_ND, protect=protect)
        except CacheError as error:
            if self._step.failed is None:
                raise
            if error.expert not in rest and len(rest) > 1:  # nobody knows which one it is
                for expert, rows in rest.items():
                    self._run_here(hidden_TD, {expert: rows}, y_ND, protect=protect)
                return
            rows_R, tokens_R = rest.pop(error.expert) if error.expert in rest else rest.popitem()[1]
            y_ND[rows_R] = 0
            self._step.failed |= dict.fromkeys(tokens_R.tolist(), str(error))
            self._run_here(hidden_TD, rest, y_ND, protect=protect)

    def _run_waves(self, hidden_TD: Tensor, rest: Rows, y_ND: Tensor, *, protect: bool) -> None:
        """Run experts as they are lent, and take each out of `rest`."""
        with closing(self._cache.stream(self.layer, list(rest), protect_residency=protect)) as waves:
            for leases in waves:
                for lease in leases:
                    rows_R, tokens_R = rest[lease.key.expert]
                    x_RD = hidden_TD.index_select(0, tokens_R)
                    y_ND.index_copy_(0, rows_R, self._compute(x_RD, lease.tensors()))
                    del rest[lease.key.expert]
