"""A decoder layer on a CPU in one call: attention, residuals, norms, router, and its experts where all are resident or
answered by records that the rows can pay.

It is made of the kernels that the layer's modules call one by one, and answers the same bits. Knows addresses, neither
modules nor the cache.

Legend: T rows of a pass, D hidden, Q query heads, H key-value heads, d key size, dv value size, E experts, K experts
per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from buddymoe_ray.kernels.cpu import CpuLinear, Kernel, combine_kernel, experts_kernel, linear_kernel
from buddymoe_ray.kernels.decoder_calls import DONE, STOOD_IN, DecoderCall, DecoderPlan, StandinPlan
from buddymoe_ray.kernels.expert_layer import ExpertLayer
from buddymoe_ray.kernels.norm import CpuNorm, norm_kernel
from buddymoe_ray.kernels.paged_attention import PagedLayer, attention_kernel
from buddymoe_ray.kernels.router import CpuRouter, router_kernel

__all__ = ["Allowances", "DecoderLayer", "DecoderParts", "Routed", "StandinRecords", "StoodIn"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Allowances(Protocol):
    """What each row may spend on stand-ins: see `policy.RowBudgets`."""

    @property
    def mode_T(self) -> npt.NDArray[np.int8]: ...

    @property
    def allowance_T(self) -> Floats: ...

    @property
    def price_T(self) -> Floats: ...


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
class StoodIn:
    """What answered the accesses of a layer `[T, K]`: 0 where the expert did, else the column of its record; and the
    expected loss (nats) of each."""

    answer_TK: Ints
    loss_TK: Floats


@dataclass(frozen=True, slots=True)
class Routed:
    """How far a call came: `out` [T, D] is the layer's output, None where the feed-forward is the caller's. Then that
    is what reads `normed` [T, D], to be added to `attended` [T, D]. `ids` [T, K] int64 and `weights` are the router's
    choice, of a layer with a router. `stood_in` says who answered, where it was not the experts alone; `guess` [T, K]
    int64 what the next layer's router would choose, where experts of that were missing."""

    attended: Tensor
    normed: Tensor
    ids: Tensor
    weights: Tensor
    out: Tensor | None
    stood_in: StoodIn | None = None
    guess: Tensor | None = None


class DecoderLayer:
    """One layer over rows of `dtype`, float32 or bfloat16, with one thread. `runs_experts`, `stands_in` and `guesses`
    say whether it can."""

    def __init__(self, parts: DecoderParts, dtype: torch.dtype) -> None:
        assert dtype in (torch.float32, torch.bfloat16), f"dtype is {dtype}, must be float32 or bfloat16"
        self._parts, self._dtype, self._kernel = parts, dtype, decoder_kernel()
        (Q, H, d, dv), router = parts.attention.heads, parts.router
        self._D = parts.norm_before.n
        plan = DecoderPlan(
            D=self._D,
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
        self._K, self._weight_dtype = 0, dtype
        if router is not None:
            self._K, self._weight_dtype = router.K, router.weight_dtype
            plan = plan._replace(
                router=router.linear.plan_at,
                chooses=router.plan_at,
                computes=0 if parts.experts is None else parts.experts.plan_at,
                E=router.E,
                K=router.K,
                weight_bytes=router.weight_dtype.itemsize,
            )
        self.stands_in = self.runs_experts and parts.standins is not None
        if parts.standins is not None:
            self._standins, self._tables = parts.standins.plan()
            plan = plan._replace(standins=self._standins.ctypes.data)
        guessed = parts.next_router
        self.guesses = router is not None and guessed is not None and guessed.K == router.K
        if guessed is not None and self.guesses:
            plan = plan._replace(next_router=guessed.linear.plan_at, next_chooses=guessed.plan_at, next_E=guessed.E)
        self._plan = np.array(plan, dtype=np.int64)
        self._plan_at = self._plan.ctypes.data

    def __call__(
        self,
        hidden_TD: Tensor,
        turn: tuple[Tensor, Tensor],
        spans_S4: Tensor,
        blocks: Tensor,
        at_E: npt.NDArray[np.int64] | None,
        allowed: Allowances | None = None,
        next_at_E: npt.NDArray[np.int64] | None = None,
    ) -> Routed:
        """Store the rows' keys and values, and compute as far as can be.

        `turn` are cosines and sines `[T, rotated]` of the rotary embedding in the dtype of the rows; `spans_S4` and
        `blocks` are as in `PagedLayer`. `at_E` int64 are addresses of experts, negative where one is not resident;
        None leaves the experts to the caller. `allowed` is what rows may spend on stand-ins; None: none may answer.
        `next_at_E` are those of the next layer, where its experts are to be guessed: if one of them is missing, the
        experts are left to the caller.
        """
        T, cos, sin = len(hidden_TD), turn[0].contiguous(), turn[1].contiguous()
        hidden = hidden_TD.contiguous()
        assert hidden.dtype is cos.dtype is sin.dtype is self._dtype, f"rows are {hidden.dtype}, must be {self._dtype}"
        assert hidden.shape[1] == self._D and len(cos) == len(sin) == T, f"{hidden.shape}, {cos.shape}, {sin.shape}"
        attended, normed, out = torch.empty((3, T, self._D), dtype=self._dtype)
        ids = torch.empty((T, self._K), dtype=torch.int64)
        weights = torch.empty((T, self._K), dtype=self._weight_dtype)
        call = (
            *(hidden.data_ptr(), attended.data_ptr(), normed.data_ptr()),
            *(ids.data_ptr(), weights.data_ptr(), out.data_ptr()),
            *(cos.data_ptr(), sin.data_ptr(), cos.shape[1], T),
            *(spans_S4.data_ptr(), blocks.data_ptr(), len(spans_S4)),
            0 if at_E is None else at_E.ctypes.data,
        )
        guess, guessing = None, (0, 0)
        if next_at_E is not None and self.guesses:
            guess = torch.empty((T, self._K), dtype=torch.int64)
            guessing = (guess.data_ptr(), next_at_E.ctypes.data)
        if allowed is None or not self.stands_in:
            status = self._kernel((*call, 0, 0, 0, 0, 0, *guessing), self._plan_at)
            return Routed(attended, normed, ids, weights, *((out,) if status == DONE else (None, None, guess)))
        stood_in = StoodIn(np.empty((T, self._K), np.int64), np.empty((T, self._K), np.float32))
        spend = (allowed.mode_T, allowed.allowance_T, allowed.price_T, stood_in.answer_TK, stood_in.loss_TK)
        dtypes = [array.dtype.name for array in spend[:3]]
        assert len(allowed.mode_T) == T and dtypes == ["int8", "float32", "float32"], f"{allowed} of {T} rows"
        status = self._kernel((*call, *(array.ctypes.data for array in spend), *guessing), self._plan_at)
        if status == STOOD_IN:
            return Routed(attended, normed, ids, weights, out, stood_in)
        return Routed(attended, normed, ids, weights, *((out,) if status == DONE else (None, None, guess)))


@cache
def decoder_kernel() -> Kernel:
    """A decoder layer; made, or loaded, by the first call."""
    from buddymoe_ray.kernels.decoder_numba import compile_decoder
    from buddymoe_ray.kernels.numba_calls import kernel

    return kernel(compile_decoder, len(DecoderCall._fields))
