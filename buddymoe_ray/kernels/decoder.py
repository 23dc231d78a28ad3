"""Decoder layers on a CPU in one call: attention, residuals, norms, routers, and experts, up to the first layer whose
experts are neither all resident nor answered by records that the rows can pay.

It is made of the kernels that the layers' modules call one by one, and answers the same bits. What was counted and
charged of the accesses is written by the call too. Knows addresses, neither modules nor the cache.

Legend: N layers of a call, T rows of a pass, D hidden, Q query heads, H key-value heads, d key size, dv value size, E
experts, K experts per token, A columns of what is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, c_char
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from buddymoe_ray.kernels.cpu import CpuLinear, Kernel, combine_kernel, experts_kernel, linear_kernel
from buddymoe_ray.kernels.decoder_calls import DecoderCall, DecoderPlan, StandinPlan
from buddymoe_ray.kernels.expert_layer import ExpertLayer
from buddymoe_ray.kernels.norm import CpuNorm, norm_kernel
from buddymoe_ray.kernels.paged_attention import PagedLayer, attention_kernel
from buddymoe_ray.kernels.router import CpuRouter, router_kernel
from buddymoe_ray.kernels.slot_words import words_kernel

__all__ = ["DecoderLayer", "DecoderLayers", "DecoderParts", "Routed", "StandinRecords", "Tallies"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

_CALL_BYTES = 1 << 20
_MOST_CHOICES = 128  # of which numpy adds float32s in one go


@dataclass(frozen=True)
class StandinRecords:
    """Who answers for a missing expert of a layer.

    `kind_E` int64 is the index in `computes` of the arithmetic of each expert's record (-1: none that is known here),
    `at_E` int64 where the record begins, `loss_E` float32 the expected loss of an access per squared router weight,
    `column_E` int64 what an access counts as. Records stay where they are.
    """

    computes: tuple[ExpertLayer, ...]
    kind_E: Ints
    at_E: Ints
    loss_E: Floats
    column_E: Ints

    def plan(self) -> tuple[npt.NDArray[np.int64], tuple[Any, ...]]:
        """The kernel's view, and what must outlive it."""
        computes = np.array([compute.plan_at for compute in self.computes], np.int64)
        tables = (self.kind_E, self.at_E, self.loss_E, self.column_E, computes)
        assert all(table.flags.c_contiguous for table in tables), "tables must be contiguous"
        plan = StandinPlan(
            kinds=self.kind_E.ctypes.data,
            records=self.at_E.ctypes.data,
            losses=self.loss_E.ctypes.data,
            columns=self.column_E.ctypes.data,
            computes=computes.ctypes.data,
            kind_count=len(computes),
        )
        return np.array(plan, np.int64), tables


@dataclass(frozen=True)
class DecoderParts:
    """What a layer computes with. Norms of queries and keys are over each head or over all of them; `experts` are
    computed here only behind a `router`, and `standins` answer for them. `next_router` is the next layer's."""

    norm_before: CpuNorm
    norm_after: CpuNorm
    q_norm: CpuNorm | None
    k_norm: CpuNorm | None
    q: CpuLinear
    k: CpuLinear
    v: CpuLinear
    o: CpuLinear
    attention: PagedLayer
    router: CpuRouter | None = None
    experts: ExpertLayer | None = None
    standins: StandinRecords | None = None
    next_router: CpuRouter | None = None


@dataclass(frozen=True, slots=True)
class Tallies:
    """Running totals of a pass, from those before the first layer of a call to those after its last.

    `accesses` int64 [N + 1, T, A] of what answered an access: column 0 is the expert, a record has its own. Where rows
    may spend on records, `losses` float32 [N + 1, T] are of expected loss (nats) and `allowances` what is left;
    `mode_T` int8 and `price_T` float32 are as in `policy.RowBudgets`, None where no record may answer.
    The caller writes the first, the call the others, up to the layers that it says to have done.
    """

    accesses: Ints
    losses: Floats
    allowances: Floats
    mode_T: npt.NDArray[np.int8] | None
    price_T: Floats | None

    def addresses(self) -> tuple[int, ...]:
        """As the end of a `DecoderCall`."""
        accesses, mode_T, price_T = self.accesses, self.mode_T, self.price_T
        assert accesses.dtype == np.int64, f"accesses are {accesses.dtype}, must be int64"
        at = (address_of(accesses), accesses.shape[2])
        if mode_T is None or price_T is None:
            return (*at, 0, 0, 0, 0)
        floats = (price_T, self.losses, self.allowances)
        assert mode_T.dtype == np.int8, f"modes are {mode_T.dtype}, must be int8"
        assert all(a.dtype == np.float32 for a in floats), f"{[a.dtype for a in floats]} must be float32"
        assert self.losses.shape == self.allowances.shape == accesses.shape[:2], f"{self.losses.shape}"
        assert mode_T.shape == price_T.shape == accesses.shape[1:2], f"{mode_T.shape} of {accesses.shape[1]} rows"
        return (*at, address_of(mode_T), *(address_of(a) for a in floats))


@dataclass(frozen=True, slots=True)
class Routed:
    """How far a call came: `done` layers have their `out` [N, T, D]. Of the next one, if any, the feed-forward is the
    caller's: it reads `normed` [N, T, D] and is to be added to `attended` [N, T, D], `ids` [N, T, K] int64 and
    `weights` are the choice of its router, if it has one, and `guess` [T, K] int64 what the router behind that would
    choose, where experts of that were missing."""

    done: int
    attended: Tensor
    normed: Tensor
    out: Tensor
    ids: Ints
    weights: Tensor
    guess: Ints | None


class DecoderLayer:
    """One layer over rows of `dtype`, float32 or bfloat16, with one thread. `runs_experts` and `guesses` say whether it
    can."""

    def __init__(self, parts: DecoderParts, dtype: torch.dtype) -> None:
        assert dtype in (torch.float32, torch.bfloat16), f"dtype is {dtype}, must be float32 or bfloat16"
        self.parts, self.dtype = parts, dtype
        (Q, H, d, dv), router = parts.attention.heads, parts.router
        self.D = parts.norm_before.n
        plan = DecoderPlan(
            D=self.D,
            item_bytes=dtype.itemsize,
            Q=Q,
            H=H,
            d=d,
            dv=dv,
            norm=norm_kernel().args[0],
            linear=linear_kernel().args[0],
            attention=attention_kernel().args[0],
            choose=router_kernel().args[0],
            experts=experts_kernel().args[0],
            combine=combine_kernel().args[0],
            unchanged=words_kernel().args[0],
            norm_before=parts.norm_before.plan_at,
            norm_after=parts.norm_after.plan_at,
            q_norm=0 if parts.q_norm is None else parts.q_norm.plan_at,
            q_norm_n=1 if parts.q_norm is None else parts.q_norm.n,
            k_norm=0 if parts.k_norm is None else parts.k_norm.plan_at,
            k_norm_n=1 if parts.k_norm is None else parts.k_norm.n,
            q=parts.q.plan_at,
            k=parts.k.plan_at,
            v=parts.v.plan_at,
            o=parts.o.plan_at,
            attends=parts.attention.plan_at,
        )
        self.runs_experts = router is not None and parts.experts is not None
        self.K, self.weight_dtype = 0, dtype
        if router is not None:
            assert router.K <= _MOST_CHOICES, f"a token has {router.K} experts, must have at most {_MOST_CHOICES}"
            self.K, self.weight_dtype = router.K, router.weight_dtype
            plan = plan._replace(
                router=router.linear.plan_at,
                chooses=router.plan_at,
                computes=0 if parts.experts is None else parts.experts.plan_at,
                E=router.E,
                K=router.K,
                weight_bytes=router.weight_dtype.itemsize,
            )
        if parts.standins is not None:
            self._standins, self._tables = parts.standins.plan()
            plan = plan._replace(standins=self._standins.ctypes.data)
        guessed = parts.next_router
        self.guesses = router is not None and guessed is not None and guessed.K == router.K
        if guessed is not None and self.guesses:
            plan = plan._replace(next_router=guessed.linear.plan_at, next_chooses=guessed.plan_at, next_E=guessed.E)
        self._plan = np.array(plan, dtype=np.int64)
        self.plan_at = self._plan.ctypes.data
        rows = (self.D, dtype, Q, H, d, dv)
        self.shape = (*rows, self.K, self.weight_dtype, max(plan.E, plan.next_E), self.runs_experts)


class DecoderLayers:
    """Consecutive layers whose rows look alike, as their `shape` says."""

    def __init__(self, layers: Sequence[DecoderLayer]) -> None:
        first = layers[0]
        assert all(layer.shape == first.shape for layer in layers), "layers must be of one shape"
        self.layers, self.runs_experts = tuple(layers), first.runs_experts
        self._kernel, self._dtype, self._weight_dtype = decoder_kernel(), first.dtype, first.weight_dtype
        self._D, self._K = first.D, first.K
        self._plans = np.array([layer.plan_at for layer in layers], np.int64)
        self._plans_at = self._plans.ctypes.data

    def most(self, rows: int) -> int:
        """How many layers of so many rows are worth one call: what it leaves behind it should stay in the cache."""
        return max(1, _CALL_BYTES // (3 * rows * self._D * self._dtype.itemsize))

    def __call__(
        self,
        first: int,
        hidden_1TD: Tensor,
        turn: tuple[Tensor, Tensor],
        paged: tuple[Tensor, Tensor],
        places: tuple[Sequence[int], Sequence[int], Sequence[int]] = ((), (), ()),
        tallies: Tallies | None = None,
    ) -> Routed:
        """From the `first` layer on store the rows' keys and values, and compute as far as can be.

        `turn` are cosines and sines `[1, T, rotated]` of the rotary embedding in the dtype of the rows; `paged` are
        spans and blocks as in `PagedLayer`. `places` are, for each layer that is to be computed, where the addresses of
        its experts are (int64 [E], negative where one is not resident), and those of the experts of the layer behind
        it, 0 where these are not to be guessed, and the words of its slots as `unchanged` has them, 0 where nobody else
        writes to them: a layer is done only if they stayed. `tallies` say what rows may spend, and are written. Without
        either it is one layer, whose experts are the caller's.
        """
        hidden, cos, sin = hidden_1TD.contiguous(), turn[0].contiguous(), turn[1].contiguous()
        (B, T, D), rotated, (spans_S4, blocks), N = hidden.shape, cos.shape[2], paged, len(places[0]) or 1
        assert hidden.dtype is cos.dtype is sin.dtype is self._dtype, f"rows are {hidden.dtype}, must be {self._dtype}"
        assert (B, D) == (1, self._D) and cos.shape == sin.shape == (1, T, rotated), f"{hidden.shape}, {cos.shape}"
        assert 0 <= first <= len(self.layers) - N, f"layers are {first} and {N - 1} more, must be of {len(self.layers)}"
        attended, normed, out = torch.empty((3, N, T, D), dtype=self._dtype).unbind()
        ids, weights = np.empty((2, N, T, self._K), np.int64), torch.empty((N, T, self._K), dtype=self._weight_dtype)
        ids_at = address_of(ids)
        call = (
            *(hidden.data_ptr(), attended.data_ptr(), normed.data_ptr(), ids_at, weights.data_ptr(), out.data_ptr()),
            *(cos.data_ptr(), sin.data_ptr(), rotated, T, spans_S4.data_ptr(), blocks.data_ptr(), len(spans_S4), N),
        )
        if tallies is None:
            done = self._kernel((*call, *[0] * 10), self._plans_at + 8 * first) - 1
            return Routed(done, attended, normed, out, ids[0], weights, None)
        assert tallies.accesses.shape[:2] == (N + 1, T), f"{tallies.accesses.shape} of {N} layers and {T} rows"
        at_3N = np.array(places, np.int64)
        at = address_of(at_3N)
        more = (at, at + 8 * N, ids_at + 8 * N * T * self._K, at + 16 * N, *tallies.addresses())
        done = self._kernel((*call, *more), self._plans_at + 8 * first) - 1
        guessed = done < N and places[1][done] and self.layers[first + done].guesses
        return Routed(done, attended, normed, out, ids[0], weights, ids[1, done] if guessed else None)


def address_of(array: npt.NDArray[Any]) -> int:
    """Of a contiguous array; a third of what `array.ctypes` takes, of which a call needs a dozen."""
    return addressof(c_char.from_buffer(array)) if array.size else 0  # type: ignore[arg-type]


@cache
def decoder_kernel() -> Kernel:
    """Decoder layers; made, or loaded, by the first call."""
    from buddymoe_ray.kernels.decoder_numba import compile_decoder
    from buddymoe_ray.kernels.numba_calls import kernel

    return kernel(compile_decoder, len(DecoderCall._fields))
