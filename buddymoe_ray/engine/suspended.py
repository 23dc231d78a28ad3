"""A forward pass over prompts that can be set aside between any two of its pieces.

Some rows, of a long prompt or of several short ones, are a forward of the model in a greenlet of its own, suspended
where a MoE layer would run its experts. Once all are there, the layer's experts run over the rows of all, each of them
read once, some at a time; then the forwards go on to the next layer. Before, resident experts fill what is left of a
slice, where the next forward does not fit. What is set aside holds no lease and no lock, only its rows, so that other
passes may run meanwhile: their context is put back before each piece. Rows do not see each other, so cutting changes no
bit. Does not know the scheduler; one thread.

Legend: T rows, D hidden, K experts per token, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from greenlet import error as GreenletError
from greenlet import getcurrent, greenlet
from torch import Tensor

from buddymoe_ray.engine.attention import PagedAttention
from buddymoe_ray.engine.forward_seconds import ForwardSeconds
from buddymoe_ray.engine.pieces import Member, Piece, RowsAt, cut_pieces
from buddymoe_ray.engine.plain_forward import ForwardPass
from buddymoe_ray.engine.scheduler import PrefillChunk
from buddymoe_ray.moe import Accesses, MoEBlock, Phase, ReadAhead, StepState
from buddymoe_ray.observe import smoothed

__all__ = ["PassParts", "SuspendedPass"]

_SMOOTHING, _FEWEST, _BETWEEN_ARRIVALS = 0.3, 64, 128
_FILLING = 16
"""Rows that an expert must have to run before all of its rows are there: of fewer reading takes most of the time."""


@dataclass(frozen=True, kw_only=True)
class PassParts:
    """What computes passes. `last` is the block behind which only rows are needed whose logits are wanted, None where
    other layers follow. `ahead` begins to read what layers will want, if it can be. `forwards` knows how long they
    take."""

    compute: ForwardPass
    paged: PagedAttention
    step: StepState
    block_size: int
    device: torch.device
    last: MoEBlock | None
    ahead: ReadAhead | None
    forwards: ForwardSeconds = field(default_factory=ForwardSeconds)


@dataclass(kw_only=True)
class _Layer:
    """A MoE layer in progress, with room for the rows of all pieces: those that have come to it, the accesses that are
    left, by expert, which experts were resident before any was read for it and, once that was guessed, what the next
    layer will want. `ids_TK` is -1 where nothing is wanted or nothing came; rows before `sorted` are in `rest`."""

    block: MoEBlock
    hidden_TD: Tensor
    ids_TK: npt.NDArray[np.int64]
    y_ND: Tensor
    resident_E: npt.NDArray[np.bool_]
    pieces: list[Piece] = field(default_factory=list)
    rest: dict[int, npt.NDArray[np.int64]] = field(default_factory=dict)
    end: int = 0
    sorted: int = 0
    coming: list[int] | None = None

    def join(self, piece: Piece, *, all_rows: bool) -> None:
        """Take in a piece that comes behind the others."""
        assert piece.block is self.block, "pieces are at one layer"
        assert piece.hidden_TD is not None and piece.ids_TK is not None
        K, end = self.ids_TK.shape[1], piece.first + len(piece.ids)
        self.hidden_TD[piece.first : end] = piece.hidden_TD
        rows = slice(None) if all_rows else piece.wanted
        self.ids_TK[piece.first : end][rows] = piece.ids_TK[rows]
        piece.hidden_TD, piece.ids_TK, piece.y_ND = None, None, self.y_ND[piece.first * K : end * K]
        self.pieces.append(piece)
        self.end = end

    def sort(self) -> None:
        """By expert, what came since."""
        first, self.sorted = self.sorted, self.end
        for expert, (rows_R, _) in Accesses(self.ids_TK[first : self.end], torch.device("cpu")).rows.items():
            rows = rows_R.numpy() + first * self.ids_TK.shape[1]
            self.rest[expert] = np.concatenate([self.rest[expert], rows]) if expert in self.rest else rows


class SuspendedPass:
    """`chunks` of prompts, cut into forwards of at most so many `rows` behind so many tokens. Call `advance` until it
    is `done`, then `take`."""

    def __init__(self, parts: PassParts, chunks: Sequence[PrefillChunk], *, rows: RowsAt) -> None:
        self._parts = parts
        self._members = [Member(chunk, chunk.seq.blocks) for chunk in chunks]
        self._ready = deque(cut_pieces(self._members, rows, parts.block_size, parts.device))
        self._rows = sum(len(piece.ids) for piece in self._ready)
        self._y_ND: Tensor | None = None  # of all layers, one after the other
        self._layer: _Layer | None = None
        self._resident_E: npt.NDArray[np.bool_] | None = None  # of the next layer, before any was read for it
        self._current: Piece | None = None
        self._access_seconds = self._filled_seconds = 0.0  # of an access
        self.seconds = 0.0
        for member in self._members:
            member.chunk.seq.computing = member.chunk.end - member.chunk.start

    @property
    def done(self) -> bool:
        """Whether nothing is left to compute."""
        return not (self._ready or self._layer)

    @property
    def rows(self) -> int:
        """Rows of the prompts that are still there."""
        return sum(member.chunk.end - member.chunk.start for member in self._members if not member.gone)

    def advance(self, until: float) -> None:
        """Compute pieces until about the time that `time.perf_counter` calls `until`, at least one. Raises what a
        forward raises: the pass is to be closed then."""
        began = now = time.perf_counter()
        with torch.inference_mode():
            while not self.done and self._one(until - now, must=now == began):
                now = time.perf_counter()
        self.seconds += time.perf_counter() - began

    def leave(self) -> None:
        """Let go of prompts that ended, or whose blocks were taken from them, since."""
        for member in self._members:
            if not member.gone and not member.there:
                self._drop(member)

    def take(self) -> list[tuple[PrefillChunk, Tensor, str]]:
        """Of a pass that is done: each prompt's chunk, the float32 logits `[n, V]` that are wanted (`[1, 1]` if none
        are) and, if not empty, why they are worth nothing."""
        assert self.done, "the pass is in progress, must be done"
        members = [member for member in self._members if member.there and (not member.gone or member.lost)]
        for member in members:
            member.chunk.seq.computing = 0
        none = [torch.zeros(1, 1)]
        return [(member.chunk, torch.cat(member.logits_nV or none), member.lost) for member in members]

    def close(self) -> list[PrefillChunk]:
        """Give the pass up; returns the chunks of prompts that still wait for it, also of those that lost an expert."""
        left = [member for member in self._members if member.there]
        for member in self._members:
            self._drop(member)
        for member in left:
            member.chunk.seq.computing = 0
        self._layer = None
        return [member.chunk for member in left]

    def _one(self, seconds: float, *, must: bool) -> bool:
        """Compute the next forward if it takes no longer, or else experts; False where neither fits, unless it must."""
        layer = self._layer
        if not self._ready:
            assert layer is not None, "the pass is done"
            if not must and seconds < _FEWEST * self._access_seconds:
                return False
            self._run_experts(layer, seconds)
            return True
        if self._parts.forwards.of(self._ready[0]) > seconds:
            if layer is not None and self._fill(layer, seconds):
                return True
            if not must:
                return False
        piece, began = self._ready.popleft(), time.perf_counter()
        self._resume(piece)
        if piece.thread is not None and not piece.thread.dead:  # behind the last MoE layer little is left
            self._parts.forwards.measured(piece, time.perf_counter() - began)
        return True

    def _resume(self, piece: Piece) -> None:
        """Let a forward go on to its next MoE layer, or to its end."""
        step, paged = self._parts.step, self._parts.paged
        if piece.thread is None:
            piece.thread = greenlet(self._forward)
            send: Any = piece
        else:
            assert piece.block is not None and piece.y_ND is not None and piece.weight_TK is not None
            send, piece.y_ND = piece.block.combined(piece.y_ND, piece.weight_TK), None
        piece.thread.parent = getcurrent()
        with self._context(piece):
            found = piece.thread.switch(send)
        assert step.suspend is None and paged.current is None
        if not piece.thread.dead:
            self._join(piece)
        elif piece.wanted:
            for share, logits_nV in zip(piece.shares, found.split([len(s.wanted) for s in piece.shares]), strict=True):
                share.member.logits_nV.append(logits_nV)

    @contextmanager
    def _context(self, piece: Piece) -> Iterator[None]:
        """What the forward of the piece finds around it."""
        step, paged = self._parts.step, self._parts.paged
        step.begin(Phase.PREFILL, len(piece.ids), isolate=True, tokens=piece.ids)
        step.suspend, paged.current, self._current = self._suspend, piece.packed, piece
        try:
            yield
        finally:
            step.suspend = paged.current = self._current = None

    def _forward(self, piece: Piece) -> Tensor:
        parts = self._parts
        ids_1T, positions_1T = (torch.tensor([row], device=parts.device) for row in (piece.ids, piece.positions))
        keep = torch.tensor(piece.wanted, device=parts.device) if piece.wanted else 1
        return parts.compute(ids_1T, positions_1T, keep).float()

    def _suspend(self, block: MoEBlock, hidden_TD: Tensor, ids_TK: npt.NDArray[np.int64], weight_TK: Tensor) -> Tensor:
        """Called by a block inside a forward: what its experts come to, once they were run."""
        piece = self._current
        assert piece is not None and piece.thread is not None and piece.thread.parent is not None
        piece.block, piece.hidden_TD, piece.ids_TK, piece.weight_TK = block, hidden_TD, ids_TK, weight_TK
        with _no_modes():
            answer: Tensor = piece.thread.parent.switch()
        return answer

    def _join(self, piece: Piece) -> None:
        """Take a piece into the layer that it waits for; not one of which nothing more is needed."""
        block, hidden_TD, ids_TK = piece.block, piece.hidden_TD, piece.ids_TK
        assert block is not None and hidden_TD is not None and ids_TK is not None
        if block is self._parts.last and not piece.wanted:
            _end(piece)
            return
        if self._layer is None:
            shape = self._rows * ids_TK.shape[1], hidden_TD.shape[1]
            if self._y_ND is None or self._y_ND.shape != shape:
                self._y_ND = hidden_TD.new_zeros(shape)
            before_E, self._resident_E = self._resident_E, None
            self._layer = _Layer(
                block=block,
                hidden_TD=hidden_TD.new_zeros(self._rows, shape[1]),
                ids_TK=np.full((self._rows, ids_TK.shape[1]), -1),
                y_ND=self._y_ND,
                resident_E=block.resident_mask.copy() if before_E is None else before_E,
            )
        self._layer.join(piece, all_rows=block is not self._parts.last)

    def _next_experts(self, layer: _Layer) -> tuple[list[int], int]:
        """Experts of the layer that are to run next, and over how many accesses at most.

        What is missing is read meanwhile, and what the next layer will want behind it. Of what has arrived only half
        runs: into its slots others are read while the other half does. Nothing of it is there: then some rows of what
        was resident all along, and not longer than a slot may lie idle for. Where nothing can be read meanwhile what is
        resident runs first: it may be evicted by the time that others are done.
        """
        block, ahead = layer.block, self._parts.ahead
        if ahead is None:
            resident_E = block.resident_mask
            return sorted(layer.rest, key=lambda expert: not resident_E[expert]), layer.ids_TK.size
        if ahead.expect(block.layer, list(layer.rest)) and layer.coming is None:
            layer.coming = ahead.coming(block.layer + 1, self._next_rows(layer))
            self._resident_E = ahead.resident(block.layer + 1)
        if layer.coming:
            ahead.expect(block.layer + 1, layer.coming)
        resident_E = block.resident_mask  # now: something may have arrived
        there = [expert for expert in layer.rest if resident_E[expert]]
        arrived = [expert for expert in there if not layer.resident_E[expert]]
        if arrived or not there:
            return arrived[: (len(arrived) + 1) // 2] or list(layer.rest)[:1], layer.ids_TK.size
        return there, layer.ids_TK.size if len(there) == len(layer.rest) else _BETWEEN_ARRIVALS

    def _next_rows(self, layer: _Layer) -> Tensor:
        """Those whose experts the next layer runs."""
        last = self._parts.last
        if last is None or layer.block.layer + 1 < last.layer:
            return layer.hidden_TD
        return layer.hidden_TD[[piece.first + row for piece in layer.pieces for row in piece.wanted]]

    def _fill(self, layer: _Layer, seconds: float) -> bool:
        """Run experts that were resident all along, over rows that are there already; False if that is not worth it."""
        if seconds < _FEWEST * self._filled_seconds:
            return False
        layer.sort()
        resident_E = layer.resident_E & layer.block.resident_mask
        there = {e: len(rows_R) for e, rows_R in layer.rest.items() if resident_E[e] and len(rows_R) >= _FILLING}
        if there:
            experts, most = sorted(there, key=lambda expert: -there[expert]), sum(there.values())
            self._filled_seconds = self._run(layer, experts, most, seconds, self._filled_seconds)
        return bool(there)

    def _run_experts(self, layer: _Layer, seconds: float) -> None:
        """Some of the accesses of a layer that all pieces have come to."""
        layer.sort()
        if layer.rest:
            self._access_seconds = self._run(layer, *self._next_experts(layer), seconds, self._access_seconds)
        else:
            self._answer(layer)

    def _run(self, layer: _Layer, experts: list[int], most: int, seconds: float, each: float) -> float:
        """At most so many accesses of these experts, as many as the time allows; the seconds that each takes, before
        and after."""
        expert_N = np.full(layer.ids_TK.size, -1)
        fewest = min(_FEWEST, max(map(len, layer.rest.values())))
        left = max(fewest, int(seconds / each)) if each else fewest
        left = count = min(left, most)
        for expert in experts:
            rows_R = layer.rest.pop(expert)
            if len(rows_R) > left:
                layer.rest[expert] = rows_R[left:]
            expert_N[rows_R[:left]] = expert
            left -= len(rows_R)
            if left <= 0:
                break
        step, began = self._parts.step, time.perf_counter()
        step.begin(Phase.PREFILL, len(layer.hidden_TD), isolate=True)
        accesses = Accesses(expert_N.reshape(layer.ids_TK.shape), layer.hidden_TD.device)
        layer.block.run(layer.hidden_TD, accesses, accesses.experts, layer.y_ND)
        taken = (time.perf_counter() - began) / (count - max(0, left))
        if step.failed:
            self._lose(layer, step.failed)
        return smoothed(each, taken, _SMOOTHING)

    def _lose(self, layer: _Layer, failed: dict[int, str]) -> None:
        """Rows whose expert could not be had end their prompts."""
        for piece in layer.pieces:
            row = piece.first
            for share in piece.shares:
                reasons = [failed[at] for at in range(row, row + share.count) if at in failed]
                row += share.count
                if reasons and not share.member.gone:
                    share.member.lost = reasons[0]
                    self._drop(share.member)

    def _answer(self, layer: _Layer) -> None:
        """Let every piece go on with its rows' outputs."""
        self._layer = None
        self._ready.extend(piece for piece in layer.pieces if not piece.gone)

    def _drop(self, member: Member) -> None:
        """Let go of a prompt, and of those in its forward, which would write where its blocks were: they begin anew."""
        if member.gone:
            return
        member.gone = True
        for piece in [*self._ready, *(self._layer.pieces if self._layer else ())]:
            if piece.gone:
                _end(piece)
                for other in (share.member for share in piece.shares if not share.member.gone):
                    other.chunk.seq.computing, other.blocks = 0, []  # another pass may have it
                    self._drop(other)
        self._ready = deque(piece for piece in self._ready if not piece.gone)


@contextmanager
def _no_modes() -> Iterator[None]:
    """Without what a module has put around torch's functions: the stack of that is the thread's, not the greenlet's."""
    modes = []
    while torch._C._len_torch_function_stack():
        modes.append(torch._C._pop_torch_function_stack())
    try:
        yield
    finally:
        for mode in reversed(modes):
            torch._C._push_on_torch_function_stack(mode)


def _end(piece: Piece) -> None:
    """Unwind a forward where it is; from another thread that cannot be, and it goes with its own."""
    if piece.thread is not None and not piece.thread.dead:
        with suppress(GreenletError, ValueError):
            piece.thread.parent = getcurrent()
            piece.thread.throw()
    piece.y_ND = None
