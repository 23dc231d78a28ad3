"""One MoE layer, from the router's choice to the summed output. The page to read first.

    route    the router named K experts per token (transformers computed ids and weights)
    resolve  in decode, each access whose expert is not resident is answered by a fetch or by a stand-in
    ensure   the cache streams leases: resident experts first, missing ones as their bytes arrive
    matmul   the leased experts of a wave, and the stand-in records, run over their rows
    combine  per-slot outputs are weighted and summed in slot order

Does not know files, tiers or requests. Invariant: outputs are kept per (token, slot) until all are there, so neither
the order of arrival nor the number of waves changes a bit.

Legend: T tokens, K experts per token, N = T*K accesses, E experts, D hidden, R rows of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from buddymoe_ray.cache import ExpertCache, Glance
from buddymoe_ray.device import download, upload
from buddymoe_ray.errors import CacheError
from buddymoe_ray.kernels import ExpertLayer, StandinRecords, unchanged
from buddymoe_ray.moe.peers import PeerExperts
from buddymoe_ray.moe.read_ahead import ReadAhead
from buddymoe_ray.moe.rows import Accesses
from buddymoe_ray.moe.standins import Standins
from buddymoe_ray.moe.step import Phase, StepState
from buddymoe_ray.moe.waves import OnDevice, WaveCompute
from buddymoe_ray.policy import Action, Resolution
from buddymoe_ray.types import EXACT

__all__ = ["MoEBlock"]

Ints = npt.NDArray[np.int64]

# an enum's members cost two frames a look on Python 3.11
_HIT, _OWN, _DROP, _FETCH = Action.HIT, Action.OWN, Action.DROP, Action.FETCH
_PROBE, _DECODE = Phase.PROBE, Phase.DECODE
_RUNS = np.array([action in (Action.HIT, Action.BUDDY) for action in Action])  # resident experts that run
_FULL, _NEWLY = {Action.HIT, Action.FETCH, Action.BUDDY}, {Action.FETCH, Action.BUDDY}


class MoEBlock:
    """Replaces the experts module of MoE layer `layer`. Called as `block(hidden_TD, ids_TK, weights_TK) -> [T, D]`.

    `standins` is None where every miss is fetched; `peers`, once there are any, compute some of what is missing.
    `prompts` is what computes those where it is not what decodes.
    """

    def __init__(
        self,
        *,
        layer: int,
        cache: ExpertCache,
        compute: WaveCompute,
        step: StepState,
        standins: Standins | None,
        ahead: ReadAhead | None = None,
        prompts: WaveCompute | None = None,
    ) -> None:
        self.layer = layer
        self.peers: PeerExperts | None = None
        self._cache, self._compute, self._step, self._standins = cache, compute, step, standins
        self._ahead, self._prompts = ahead, prompts or compute
        self._coming: Sequence[int] = ()  # experts that the next layer will probably ask for

    def __call__(
        self,
        hidden_TD: Tensor,
        ids_TK: Tensor,
        weight_TK: Tensor,
        *,
        glanced: bool = False,
        guess_TK: Tensor | None = None,
    ) -> Tensor:
        """An expert whose bytes cannot be read costs the rows that need it (`StepState.failed`), or raises CacheError;
        the cache stays usable. `glanced`: the caller tried what needs no leases, and it could not be. `guess_TK`: what
        the next layer will probably ask for, where the caller guessed."""
        step = self._step
        if step.phase is _PROBE:
            return torch.zeros_like(hidden_TD)
        if step.observer is not None:
            step.observer(self.layer, hidden_TD, ids_TK, weight_TK)
        if step.answer is not None:
            return step.answer(self, hidden_TD, ids_TK, weight_TK)
        if self._compute.beside and step.suspend is None and (glance := self.glance()) is not None:
            return self._beside(hidden_TD, ids_TK, weight_TK, glance)
        ids = ids_TK.cpu().numpy()
        if self._ahead is not None and step.phase is not _DECODE:
            self._ahead.learn(self.layer, step.tokens, ids)
        if step.suspend is not None:
            return step.suspend(self, hidden_TD, ids, weight_TK)
        if step.phase is not _DECODE:
            return self._exact(hidden_TD, ids, weight_TK)
        y_ND = hidden_TD.new_empty(ids_TK.numel(), hidden_TD.shape[1])
        self._look_ahead(hidden_TD, guess_TK)
        if not glanced and self._all_resident(hidden_TD, ids_TK, ids, y_ND):
            return self.combined(y_ND, weight_TK)
        weight_TK = self._decode(hidden_TD, ids, weight_TK, y_ND)
        return self.combined(y_ND, weight_TK)

    def begin_standing_in(self, standins: Standins) -> None:
        """From the next pass on they answer what is missing, as far as its rows allow; then nothing is read ahead."""
        self._standins, self._ahead = standins, None

    @property
    def standins(self) -> Standins | None:
        """What answers for missing experts."""
        return self._standins

    @property
    def resident_mask(self) -> npt.NDArray[np.bool_]:
        """`[E]`, True where the layer's expert is resident now."""
        return self._cache.resident_mask(self.layer)

    def run(self, hidden_TD: Tensor, accesses: Accesses, experts: Sequence[int], y_ND: Tensor) -> None:
        """Fill the rows of `y_ND` that prompts have from these experts, evicting nothing that is resident."""
        with self._cache.shared_reads(self.layer, experts):
            self._run_here(hidden_TD, accesses, experts, y_ND, protect=True)

    def exact(self, hidden_TD: Tensor, ids_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """The layer's output for some rows by the experts themselves, evicting nothing that is resident."""
        return self._exact(hidden_TD, ids_TK.cpu().numpy(), weight_TK)

    def _exact(self, hidden_TD: Tensor, ids_TK: Ints, weight_TK: Tensor) -> Tensor:
        y_ND = hidden_TD.new_empty(ids_TK.size, hidden_TD.shape[1])
        accesses = Accesses(ids_TK, hidden_TD.device)
        self.run(hidden_TD, accesses, accesses.experts, y_ND)
        return self.combined(y_ND, weight_TK)

    def stood_in(
        self,
        standins: Standins,
        resident_E: npt.NDArray[np.bool_],
        at: int,
        *rows: Tensor,
    ) -> tuple[Tensor, Resolution]:
        """The same for hidden rows, ids and weights, from row `at` on with `standins` for whatever is not in
        `resident_E`: those rows are counted and charged in the step."""
        early, (hidden_TD, ids_TK, weight_TK) = [part[:at] for part in rows], [part[at:] for part in rows]
        y_ND = hidden_TD.new_empty(ids_TK.numel(), hidden_TD.shape[1])
        resolution = standins.resolve(self.layer, ids_TK.cpu().numpy(), weight_TK, resident_E, self._step)
        standins.book(self.layer, resolution, self._step)
        self._answer(standins, hidden_TD, resolution, y_ND)
        late_TD = self.combined(y_ND, _as(hidden_TD, weight_TK.dtype, resolution.weight_TK))
        return torch.cat([self.exact(*early), late_TD]) if at else late_TD, resolution

    def combined(self, y_ND: Tensor, weight_TK: Tensor) -> Tensor:
        """The sum `[T, D]` of the experts' outputs, in slot order."""
        return self._compute.combine(y_ND.view(*weight_TK.shape, -1), weight_TK).to(y_ND.dtype)

    @property
    def on_device(self) -> OnDevice | None:
        """What computes decode beside the host, where there is such a thing."""
        return self._compute if isinstance(self._compute, OnDevice) else None

    def bring(self, hidden_TD: Tensor, ids_TK: Ints, weight_TK: Tensor, y_ND: Tensor) -> Tensor:
        """Of a decode layer that stalled, with its hits in `y_ND`: compute the rest; the weights to combine it with."""
        return self._decode(hidden_TD, ids_TK, weight_TK, y_ND, hits_ran=True)

    def answered(self, ids_TK: Ints, own_TK: Ints, weight_TK: npt.NDArray[np.float32]) -> None:
        """Book a decode layer whose accesses experts answered, and records those that `own_TK` names, else -1."""
        if (own_TK < 0).all():
            glance = self._cache.glance(self.layer)
            assert glance is not None, "slots of a device apart can be looked at"
            self.settle(glance, ids_TK)
            self._step.outcome.count_hits(ids_TK.shape[1])
            return
        assert self._standins is not None, f"records answered in layer {self.layer}, must be somebody's"
        self._count(ids_TK)
        resolution = self._standins.taken(self.layer, ids_TK, own_TK, weight_TK)
        self._standins.book(self.layer, resolution, self._step)

    def _beside(self, hidden_TD: Tensor, ids_TK: Tensor, weight_TK: Tensor, glance: Glance) -> Tensor:
        """Of a decode pass, beside the host: experts that are there run before it knows who is missing."""
        standins, step = self._standins, self._step
        asked = [ids_TK]
        if standins is not None and standins.may_answer(self.layer, step):  # or their policy would wait for what runs
            asked += [weight_TK.float(), *([step.scores[self.layer]] if self.layer in step.scores else [])]
        coming = None if self._compute.complete else download(*asked)
        y_ND = hidden_TD.new_empty(ids_TK.numel(), hidden_TD.shape[1])
        self._compute.resident(hidden_TD, ids_TK, glance.at_E, y_ND)
        told = [] if coming is None else coming()
        ids = told[0].numpy() if told else None
        if ids is None or ((glance.at_E[ids] >= 0).all() and self._settled(glance, ids)):
            step.outcome.count_hits(ids_TK.shape[1])
            return self.combined(y_ND, weight_TK)
        if told[2:]:
            step.scores[self.layer] = told[2]
        weights_TK = self._decode(hidden_TD, ids, told[1] if told[1:] else weight_TK, y_ND, hits_ran=True)
        return self.combined(y_ND, weights_TK.to(weight_TK.dtype))

    def _decode(
        self, hidden_TD: Tensor, ids_TK: Ints, weight_TK: Tensor, y_ND: Tensor, *, hits_ran: bool = False
    ) -> Tensor:
        """Fill `y_ND`, where `hits_ran` without the rows of resident experts; returns the weights to combine it
        with."""
        self._count(ids_TK)
        standins, step = self._standins, self._step
        if standins is None or not standins.may_answer(self.layer, step):
            hit_TK = self._cache.resident_mask(self.layer)[ids_TK]
            step.outcome.count_exact(hit_TK)
            accesses = Accesses(np.where(hit_TK, -1, ids_TK) if hits_ran else ids_TK, hidden_TD.device)
            self._run_full(hidden_TD, accesses, y_ND, set(ids_TK[~hit_TK].tolist()))
            return weight_TK
        resident_E = self._cache.resident_mask(self.layer).copy()
        while True:
            resolution = standins.resolve(self.layer, ids_TK, weight_TK, resident_E, step)
            runs = {e for e in resolution.expert_TK[_RUNS[resolution.action_TK]].tolist() if resident_E[e]}
            with self._cache.holding(self.layer, sorted(runs)) as held:
                if len(held) == len(runs):
                    standins.book(self.layer, resolution, step)
                    self._answer(standins, hidden_TD, resolution, y_ND, hits_ran=hits_ran)
                    return _as(hidden_TD, weight_TK.dtype, resolution.weight_TK)
            resident_E = resident_E.copy()
            resident_E[list(runs.difference(held))] = False  # moved away since: decide again

    def _all_resident(self, hidden_TD: Tensor, ids_TK: Tensor, ids: Ints, y_ND: Tensor) -> bool:
        """The short way of a layer that misses nothing: whether it could be gone."""
        glance = self.glance()
        if glance is None or (glance.at_E[ids] < 0).any():
            return False
        self._read_ahead()
        if not self._compute.resident(hidden_TD, ids_TK, glance.at_E, y_ND):
            return False
        if not self._settled(glance, ids):
            return False
        self._step.outcome.count_hits(ids.shape[1])
        return True

    @property
    def kernel(self) -> ExpertLayer | None:
        """What computes all experts of the layer in one call, where there is such a thing."""
        return self._compute.kernel

    def glance(self) -> Glance | None:
        """Where the experts are, for whoever can compute all accesses of a layer from them and from `records`; None
        where what runs is not for the router alone to say. What was computed counts if the slots' words stayed."""
        step = self._step
        if step.phase is not _DECODE or step.observer is not None or self.layer in step.overlays:
            return None
        return self._cache.glance(self.layer)

    def glance_ahead(self) -> Glance | None:
        """Where the next layer's experts are, for whoever can guess which of them it will ask for; None where this pass
        does not guess, as where stand-ins answer what is missing."""
        step, ahead, standins, layer = self._step, self._ahead, self._standins, self.layer + 1
        if ahead is None or step.phase is not _DECODE or step.observer is not None or not ahead.guesses(layer):
            return None
        return None if standins is not None and standins.may_answer(layer, step) else self._cache.glance(layer)

    @property
    def records(self) -> StandinRecords | None:
        """The stand-ins that whoever computes the layer in one call can use; None where there are none."""
        return None if self._standins is None else self._standins.records(self.layer)

    @property
    def awaited(self) -> bool:
        """Whether there is a guess at what the layer will ask for that is worth something only if it asks soon."""
        return self._ahead is not None and self._ahead.awaits(self.layer)

    def settle(self, glance: Glance, ids_TK: Ints) -> None:
        """What was computed counts: those that the layer asked for are told to whoever wants to know."""
        glance.used(ids_TK)
        self._count(ids_TK)

    def _settled(self, glance: Glance, ids_TK: Ints) -> bool:
        """`settle`, unless a slot's word moved on meanwhile."""
        if glance.words_2E is not None and not unchanged(ids_TK, glance.words_2E):
            return False
        self.settle(glance, ids_TK)
        return True

    def _count(self, ids_TK: Ints) -> None:
        """The layer's accesses, for whoever places experts or guesses at them."""
        self._cache.count(self.layer, ids_TK)
        if self._ahead is not None:
            self._ahead.used(self.layer, self._step.tokens, ids_TK)

    def _look_ahead(self, hidden_TD: Tensor, guess_TK: Tensor | None) -> None:
        """Note what the next layer will probably ask for."""
        self._coming = ()
        ahead = self._ahead
        if ahead is None:
            return
        if guess_TK is None and self.glance_ahead() is not None:
            guess_TK = ahead.choose(self.layer + 1, hidden_TD)
        if guess_TK is not None:
            self._coming = ahead.wanted(self.layer + 1, guess_TK)

    def _read_ahead(self) -> None:
        """Begin to read for the next layer, once what this one waits for is being read."""
        if self._coming:
            self._cache.read_ahead(self.layer + 1, self._coming)
            self._coming = ()

    def _answer(
        self,
        standins: Standins,
        hidden_TD: Tensor,
        resolution: Resolution,
        y_ND: Tensor,
        *,
        hits_ran: bool = False,
    ) -> None:
        """Compute every access as it was decided; hits, where they ran already, are done."""
        action_TK, expert_TK = resolution.action_TK, resolution.expert_TK
        actions = set(action_TK.ravel().tolist())
        if _OWN in actions:
            standins.answer(self.layer, hidden_TD, np.where(action_TK == _OWN, expert_TK, -1), y_ND)
        if _DROP in actions:
            y_ND[upload(torch.from_numpy((action_TK == _DROP).reshape(-1).nonzero()[0]), y_ND.device)] = 0
        if actions & (_NEWLY if hits_ran else _FULL):
            others_TK = (action_TK == _OWN) | (action_TK == _DROP) | (hits_ran & (action_TK == _HIT))
            # without those that are another row's buddy too, as a replay may have it
            fetched = set(expert_TK[action_TK == _FETCH].tolist()) - set(expert_TK[_RUNS[action_TK]].tolist())
            named_TK = np.where(others_TK, -1, expert_TK) if hits_ran or actions - _FULL else expert_TK
            self._run_full(hidden_TD, Accesses(named_TK, hidden_TD.device), y_ND, fetched)

    def _run_full(self, hidden_TD: Tensor, accesses: Accesses, y_ND: Tensor, fetched: set[int]) -> None:
        """Run the experts themselves: of those whose accesses were counted as fetched some at a peer, while the others
        run here. What is resident is not looked at again: others change it meanwhile."""
        peers, able = self.peers, self._able(accesses, fetched)
        if peers is None or not able:
            self._run_here(hidden_TD, accesses, accesses.experts, y_ND, protect=False)
            return
        asked = {expert: accesses.rows[expert] for expert in able}
        answers = peers.ask(self.layer, {e: hidden_TD.index_select(0, asked[e][1]) for e in asked})
        try:
            self._run_here(hidden_TD, accesses, [e for e in accesses.experts if e not in asked], y_ND, protect=False)
        finally:
            answered = answers.collect()
        for expert, y_RD in answered.items():
            y_ND.index_copy_(0, asked[expert][0], y_RD.to(y_ND))
        accesses_T = np.isin(accesses.expert_TK, [*answered]).sum(axis=1)
        self._step.outcome.count_elsewhere(accesses_T, exact=peers.exact)
        self._run_here(hidden_TD, accesses, [e for e in asked if e not in answered], y_ND, protect=False)

    def _able(self, accesses: Accesses, fetched: set[int]) -> Sequence[int]:
        """Which of the fetched experts a peer would answer sooner; where its bits may be others, none that a row wants
        which is exact, or recorded, for its replay is."""
        if self.peers is None or not fetched:
            return ()
        expert_TK, step = accesses.expert_TK, self._step
        if not self.peers.exact:
            exact_T = np.ones(len(expert_TK), np.bool_) if step.budgets is None else step.budgets.mode_T == EXACT
            exact_T[[*step.outcome.record]] = True
            fetched = fetched.difference(expert_TK[exact_T].ravel().tolist())
        return self.peers.able(self.layer, {e: int((expert_TK == e).sum()) for e in sorted(fetched)})

    def _run_here(
        self, hidden_TD: Tensor, accesses: Accesses, experts: Sequence[int], y_ND: Tensor, *, protect: bool
    ) -> None:
        """Run experts as the cache lends them."""
        if not experts:
            return
        rest, compute = dict.fromkeys(experts), self._prompts if protect else self._compute
        try:
            with closing(self._cache.stream(self.layer, experts, protect_residency=protect)) as waves:
                for leases in waves:
                    self._read_ahead()
                    compute(hidden_TD, accesses, leases, y_ND)
                    for lease in leases:
                        del rest[lease.key.expert]
        except CacheError as error:
            if self._step.failed is None:
                raise
            if error.expert not in rest and len(rest) > 1:  # nobody knows which one it is
                for expert in rest:
                    self._run_here(hidden_TD, accesses, [expert], y_ND, protect=protect)
                return
            lost = error.expert if error.expert in rest else next(iter(rest))
            rows_R, tokens_R = accesses.rows[lost]
            y_ND[rows_R] = 0
            self._step.failed |= dict.fromkeys(tokens_R.tolist(), str(error))
            self._run_here(hidden_TD, accesses, [e for e in rest if e != lost], y_ND, protect=protect)


def _as(rows: Tensor, dtype: torch.dtype, values: npt.NDArray[np.float32]) -> Tensor:
    """The values in that dtype, where `rows` are."""
    return upload(torch.from_numpy(values).to(dtype), rows.device)
