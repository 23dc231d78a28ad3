"""Decode steps of a device apart, recorded once for a number of rows and replayed: no Python of the model runs.

Numbers of rows are powers of two. Rows of padding hold token 0 at position 0 of the block that is nobody's, their own
token is their whole context, states that layers carry are nobody's, and no expert runs for them. Where an expert may be
missing, the recording is cut in each MoE layer, behind its experts: the host launches pieces ahead, looks which layer
stalled, has the block bring what is missing there, and goes on behind it. What ran ahead of a stall ran in vain: two
lots of pieces at most, which read neither experts nor keys and values, but dense weights, as their products are
torch's: 84 MB a layer of Mixtral, 38 of Qwen3-30B, .04 and .02 ms of an H100 beside 6.8 and .18 for an expert over PCIe
5, and the last piece's head, 262 and 622 MB. So the more layers stalled lately, the fewer pieces a lot has: with 21
stalls in 5 steps of 8 layers 57 were in vain, not 105. Accounts are the host's, of layers that count, once each. Where
steps came through and the device can choose all tokens, the next one is begun behind them before the host knows any:
`in_flight`.

Legend: L MoE layers, T rows of a recording, B rows of a step, K slots, M columns of block tables, V vocabulary.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from collections.abc import Sequence as Rows
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from math import isqrt

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from buddymoe_ray.device import Device, Recording, download, upload
from buddymoe_ray.engine.attention import ChunkRows, PackedPass, PagedAttention
from buddymoe_ray.engine.in_flight import AHEAD, Chosen, StepInFlight, budgets_of, chooses_alone, rows_behind
from buddymoe_ray.engine.plain_forward import ForwardPass
from buddymoe_ray.engine.sequence import Sequence
from buddymoe_ray.engine.states import StatePool
from buddymoe_ray.kernels import RowTerms
from buddymoe_ray.kernels.sample import choose_sorted, settings_of
from buddymoe_ray.moe import DeviceTables, MoEBlock, Phase, RecordedLayer, StepState, StepTerms, Told, affordable
from buddymoe_ray.policy import RowBudgets

__all__ = ["PIECES", "REPLAYED", "RecordedDecode", "StepSizes"]

REPLAYED = Counter[int]()
"""Decode steps that were replayed in this process, by rows of the recording."""

PIECES = Counter[str]()
"""Pieces of steps that were not begun ahead: those that `ran`, and of them behind a stall, `in vain`."""

log = logging.getLogger(__name__)

_MOST_DOUBT, _ANY = 16, 1 << 30
_LOT = 4  # pieces that are launched at once, at most: a look costs the host about as much as one takes


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """K, of every layer; M, of the longest text; the block for rows of padding; bytes that recordings may take in all,
    where the device's memory is its own."""

    experts_per_token: int
    columns: int
    nobody: int
    most_bytes: int | None = None


class RecordedDecode:
    """Of an engine whose experts are computed on a device apart; what it is given is as the runner has it. `ahead`:
    steps may be begun ahead, for whoever asks for the `chosen` tokens."""

    def __init__(
        self,
        compute: ForwardPass,
        paged: PagedAttention,
        step: StepState,
        blocks: Rows[MoEBlock],
        *,
        device: Device,
        sizes: StepSizes,
        states: StatePool | None = None,
    ) -> None:
        self.compute, self.paged, self.step, self.blocks = compute, paged, step, tuple(blocks)
        self.device, self.sizes, self.states = device, sizes, states
        self._standins = blocks[0].standins
        self._steps = dict[int, _RecordedStep]()
        self.ahead, self._most = False, _ANY  # rows that can be recorded
        self._flight: StepInFlight | None = None
        self._chosen: Chosen = {}
        self._clean, self._doubt = 0, 1  # steps without a stall so far, and how many are wanted to begin one ahead

    def forget(self) -> None:
        """Whatever was begun ahead, and the tokens that were chosen."""
        self._flight, self._chosen = None, {}

    def chosen(self, sequences: Rows[Sequence]) -> list[int] | None:
        """The next tokens of these, where the device chose them in the latest step; only with `ahead` it does."""
        found = [self._chosen.get(seq, (-1, -1)) for seq in sequences]
        known = all(
            position == seq.sampling_state.position for (position, _), seq in zip(found, sequences, strict=True)
        )
        return [token for _, token in found] if known else None

    def decode(self, rows: Rows[ChunkRows], ids: list[int], terms: StepTerms) -> Tensor | None:
        """Float32 logits `[B, V]`, and the step's outcome; None, with nothing done, for a pass that is watched or
        repeats another, and where nothing can be recorded."""
        if self.blocks[0].standins is not self._standins:  # others stand in: what was made, or begun, knows them not
            self._steps, self._standins = {}, self.blocks[0].standins
            self.forget()
        step, states, flight, known = self.step, self.states, self._flight, self._chosen
        self.forget()
        if not self._most or step.observer is not None or step.answer is not None or terms.overlays:
            return None
        if states is not None and not all(row.start and row.owner is not None for row in rows):
            return None
        with torch.inference_mode():
            recorded = self._recorded(1 << (len(rows) - 1).bit_length())
            if recorded is None:
                return None
            step.begin(Phase.DECODE, len(rows), terms, isolate=True, tokens=ids)
            if flight is not None and (at := flight.find(rows, ids, terms.budgets, known)):
                if self._land(flight, at, rows, terms):
                    return flight.logits(at)
                self._flight, self._clean, self._doubt = None, 0, min(2 * self._doubt, _MOST_DOUBT)
                step.begin(Phase.DECODE, len(rows), terms, isolate=True, tokens=ids)
            with nullcontext() if states is None else states.passing(rows, decode=True):
                recorded.fill(rows, ids, terms.budgets)
                self._clean = self._clean + 1 if recorded.replay(len(rows)) else 0
            logits_BV = recorded.logits[: len(rows)].clone()  # what is kept of it outlives the next step
            sequences = chooses_alone(rows) if self.ahead else []
            if sequences:
                tokens_B = choose_sorted(logits_BV, settings_of([seq.sampling_state for seq in sequences]))
                arrive = download(tokens_B)
                if self._clean >= self._doubt:
                    self._begin_behind([*range(len(rows))], rows, tokens_B, terms.budgets)
                self._take(rows, arrive()[0].tolist())
            return logits_BV

    def _land(self, flight: StepInFlight, at: list[int], rows: Rows[ChunkRows], terms: StepTerms) -> bool:
        """Take a step that was begun as the one that is wanted, if it came through; the one behind it is begun first,
        so the device goes on meanwhile."""
        if sequences := chooses_alone(rows):
            self._begin_behind(at, rows, flight.tokens_B, terms.budgets, flight.stalled)
        tokens_B, *told = (part.numpy() for part in flight.arrive())
        K = self.sizes.experts_per_token
        if told:
            stalled, told_L3BK, weight_LBK = told[0], told[1][:, :, at], told[2][:, at]
            if int(stalled) != len(self.blocks) or not affordable(self.blocks, told_L3BK, weight_LBK, terms.budgets):
                return False
            for block, (ids_BK, _, own_BK), weight_BK in zip(self.blocks, told_L3BK, weight_LBK, strict=True):
                block.answered(ids_BK, own_BK, weight_BK)
        else:
            self.step.outcome.count_hits(len(self.blocks) * K)
        self._doubt = 1
        AHEAD["taken"] += 1
        if sequences:
            self._take(rows, tokens_B[at].tolist())
        return True

    def _begin_behind(
        self,
        at: list[int],
        rows: Rows[ChunkRows],
        tokens_B: Tensor,
        budgets: RowBudgets | None,
        stalled: Tensor | None = None,
    ) -> None:
        """Begin the step behind one of these rows, whose tokens are those of `tokens_B` `at` these places. What it may
        spend is what that one might: `affordable` says afterwards whether it could."""
        behind = rows_behind(rows, self.paged.block_size)
        recorded = self._steps.get(1 << (len(behind) - 1).bit_length()) if behind and self.states is None else None
        if recorded is None:
            return
        places, following = [*behind], [*behind.values()]
        states = [row.owner.sampling_state for row in following if isinstance(row.owner, Sequence)]
        ids_B = tokens_B.index_select(0, upload(torch.tensor([at[place] for place in places]), tokens_B.device))
        settings = settings_of(states, ahead=1)
        self._flight = recorded.begin(following, ids_B, budgets_of(budgets, places), settings, stalled)
        AHEAD["begun"] += 1

    def _take(self, rows: Rows[ChunkRows], tokens: list[int]) -> None:
        """The host knows the tokens of these rows."""
        AHEAD["waits"] += self._flight is None
        self._chosen = {
            row.owner: (row.end, token)
            for row, token in zip(rows, tokens, strict=True)
            if isinstance(row.owner, Sequence)
        }

    def _recorded(self, T: int) -> _RecordedStep | None:
        """For T rows; made at the first such step."""
        if T not in self._steps and self._most >= T:
            try:
                made = _RecordedStep(self, T)
            except RuntimeError as error:
                self._most = 0
                log.warning("decode steps are not recorded, every one asks Python and the host: %s", error)
                return None
            taken, most = made.nbytes + sum(step.nbytes for step in self._steps.values()), self.sizes.most_bytes
            if most is None or taken <= most:
                self._steps[T] = made
            else:
                self._most = T // 2
                log.warning("decode steps of %d rows and more are not recorded: that takes %d of %d", T, taken, most)
        return self._steps.get(T)


class _RecordedStep:
    """For T rows: the buffers that a replay reads, and what it writes."""

    def __init__(self, owner: RecordedDecode, T: int) -> None:
        where, K = owner.device.torch, owner.sizes.experts_per_token
        self._step, self._paged, self._owner = owner.step, owner.paged, owner
        self._T, self._L = T, len(owner.blocks)
        self._head = torch.zeros(7 * T + 1, dtype=torch.int64, device=where)
        self._ids, self._positions, slots_T, self._lengths_T, mode_T, *self._places = self._head[: 7 * T].view(7, T)
        self._lengths_LT = self._head.new_zeros(self._L + 1, T)
        self._left_LT, self._price_T = torch.zeros(self._L + 1, T, device=where), torch.zeros(T, device=where)
        self._stalled_L = torch.full((self._L + 1,), self._L, device=where)
        self._blocks_TM = torch.full((T, owner.sizes.columns), owner.sizes.nobody, device=where)
        self._told = Told(
            rows=RowTerms(
                stalled_L=self._stalled_L,
                count=self._head[7 * T :],
                mode_T=mode_T,
                price_T=self._price_T,
                left_LT=self._left_LT,
                lengths_LT=self._lengths_LT,
            ),
            told_L3TK=torch.zeros(self._L, 3, T, K, dtype=torch.int64, device=where),
            weight_LTK=torch.zeros(self._L, T, K, device=where),
        )
        self._pass = PackedPass.fixed(slots_T, self._blocks_TM, self._lengths_T)
        self._step.begin(Phase.DECODE, T)
        tables = [DeviceTables.of(block, where) for block in owner.blocks]
        self._tables = [table for table in tables if table is not None]
        if len(self._tables) < self._L:
            raise RuntimeError("no kernels know what its experts compute")
        self._complete, self._lot = all(table.compute.complete for table in self._tables), _LOT
        self._layers = list[RecordedLayer]()
        self.fill((), [], None)
        self.logits, self._recording = self._record()
        told = self._told
        static = (
            self._head,
            self._left_LT,
            self._lengths_LT,
            self._blocks_TM,
            told.told_L3TK,
            told.weight_LTK,
            *told.outputs.values(),
        )
        self.nbytes = self._recording.nbytes + sum(part.nbytes for part in static)
        log.info("decode steps of %d rows are recorded, in %d bytes", T, self.nbytes)

    def fill(self, rows: Rows[ChunkRows], ids: list[int] | Tensor, budgets: RowBudgets | None) -> None:
        """Write what the step is about."""
        B, T, size, where = len(rows), self._T, self._paged.block_size, self._head.device
        nobody, states = self._owner.sizes.nobody, self._owner.states
        head = np.zeros((7, T), np.int64)
        head[2], head[3] = nobody * size, 1
        head[1:4, :B] = (
            [row.start for row in rows],
            [row.blocks[row.start // size] * size + row.start % size for row in rows],
            [row.end for row in rows],
        )
        if isinstance(ids, list):
            head[0, :B] = ids
        if budgets is not None:
            head[4, :B] = budgets.mode_T
        if states is not None:
            head[5:] = states.places(rows, T)
        self._head.copy_(upload(torch.from_numpy(np.append(head, B)), where))
        blocks = np.full((T, max((len(row.blocks) for row in rows), default=1)), nobody)
        for row, chunk in enumerate(rows):
            blocks[row, : len(chunk.blocks)] = chunk.blocks
        self._blocks_TM[:, : blocks.shape[1]].copy_(upload(torch.from_numpy(blocks), where))
        self._begin_at(0, budgets)
        if isinstance(ids, Tensor):
            self._ids[:B].copy_(ids)

    def begin(
        self,
        rows: Rows[ChunkRows],
        ids_B: Tensor,
        budgets: RowBudgets | None,
        settings_5B: npt.NDArray[np.float64] | None,
        behind: Tensor | None,
    ) -> StepInFlight:
        """Launch a step of tokens that are on the device, and the choice of the next ones. No expert runs where the
        step stalled that it is `behind`: a number of a layer; None is known not to have."""
        REPLAYED[self._T] += 1
        B, L, told = len(rows), self._L, self._told
        self.fill(rows, ids_B, budgets)
        if behind is not None:
            self._stalled_L[0].copy_(torch.where(behind < L, -1, L))
        for table in self._tables:
            table.renew()
        self._recording.replay(0, 1 if self._complete else L + 1)
        logits_BV, stalled = self.logits[:B].clone(), self._stalled_L[L].clone()  # the next step writes them again
        tokens_B = choose_sorted(logits_BV, settings_5B)
        kept = () if self._complete else (stalled, told.told_L3TK.clone(), told.weight_LTK.clone())
        return StepInFlight(
            rows=tuple(rows),
            budgets=budgets,
            logits_BV=logits_BV,
            tokens_B=tokens_B,
            stalled=stalled,
            arrive=download(tokens_B, *kept),
        )

    def replay(self, B: int) -> bool:
        """Compute the step of the first B rows, and book it; whether nothing stalled."""
        REPLAYED[self._T] += 1
        if self._complete:
            self._recording.replay(0, 1)
            self._step.outcome.count_hits(self._L * self._owner.sizes.experts_per_token)
            return True
        at = stop = stalls = 0
        while at < self._L:
            stop = self._launch(at)
            known = slice(at, min(stop + 1, self._L))
            AHEAD["waits"] += 1
            told_n3TK, weight_nTK = (
                part.numpy() for part in download(self._told.told_L3TK[known], self._told.weight_LTK[known])()
            )
            for n in range(stop - at):
                ids_TK, _, own_TK = told_n3TK[n, :, :B]
                self._layers[at + n].block.answered(ids_TK, own_TK, weight_nTK[n, :B])
            clean, at = stop - at == self._L, stop + 1
            if stop < self._L:
                stalls += 1
                self._layers[stop].bring(told_n3TK[-1, 0, :B], self._step.scores)
                self._begin_at(at, self._step.budgets)
        if stop < self._L:
            self._recording.replay(self._L, self._L + 1)
        self._lot = min(_LOT, isqrt(self._L // max(1, stalls)))  # so that looks and what is in vain cost least in all
        return clean

    def _launch(self, at: int) -> int:
        """Launch the pieces from a layer on, the last one with them, and tell the first layer that stalled, L for none.
        While the device computes a lot of them the host looks how the one before it ended: behind a stall no more than
        two lots run."""
        L, stalled, end, looks = self._L, self._L, at, deque[Callable[[], list[Tensor]]]()
        while end < L and stalled == L:
            begin, end = end, min(L, end + self._lot)
            for table in self._tables[begin:end]:
                table.renew()
            self._recording.replay(begin, end + (end == L))
            looks.append(download(self._stalled_L[end]))
            if len(looks) == 2 and end < L:
                stalled = int(looks.popleft()()[0])
        stalled = min(stalled, int(looks[-1]()[0]))
        PIECES["ran"] += end + (end == L) - at
        PIECES["in vain"] += max(0, end + (end == L) - stalled - 1)
        return stalled

    def _begin_at(self, layer: int, budgets: RowBudgets | None) -> None:
        """Nothing stalled before it, and rows may spend what the host's accounts leave them."""
        self._stalled_L[layer].fill_(self._L)
        self._lengths_LT[layer].copy_(self._lengths_T)
        if budgets is not None:
            for values, target_T in ((budgets.allowance_T, self._left_LT[layer]), (budgets.price_T, self._price_T)):
                target_T[: len(values)].copy_(upload(torch.from_numpy(values), target_T.device))

    def _record(self) -> tuple[Tensor, Recording]:
        """The logits `[T, V]` that a replay writes. Raises RuntimeError where something cannot be recorded."""
        found, states = list[Tensor](), self._owner.states

        def compute(cut: Callable[[], None]) -> None:
            self._layers.clear()
            self._paged.current, self._step.answer = self._pass, partial(self._layer, cut)
            self._pass.lengths_B = self._lengths_LT[0]
            found[:] = [self._owner.compute(self._ids[None], self._positions[None], 0).float()]

        try:
            with nullcontext() if states is None else states.fixed(*self._places):
                recording = self._owner.device.record(compute)
        finally:
            self._paged.current = self._step.answer = None
        return found[0], recording

    def _layer(
        self, cut: Callable[[], None], block: MoEBlock, hidden_TD: Tensor, ids_TK: Tensor, weight_TK: Tensor
    ) -> Tensor:
        """A layer's part of the recording."""
        layer, K = block.layer, self._owner.sizes.experts_per_token
        if layer != len(self._layers) or ids_TK.shape != (self._T, K):
            raise RuntimeError(f"layer {layer} has experts {tuple(ids_TK.shape)}, must have {(self._T, K)}, in order")
        scores = self._step.scores.get(layer)
        self._layers.append(RecordedLayer(self._tables[layer], self._told, hidden_TD, ids_TK, weight_TK, scores))
        self._pass.lengths_B = self._lengths_LT[layer + 1]
        if not self._complete:
            cut()
        return self._layers[layer].combined()
