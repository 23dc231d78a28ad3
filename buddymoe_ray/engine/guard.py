"""Recomputes sampled requests exactly, off the critical path, and lets the policy compare what they cost.

A sampled request keeps the logits of some of its decode steps. When it has ended, its tokens are computed again from
the first one, exactly and on clean KV blocks, so drift that stand-ins left in the KV cache shows too. Runs when the
engine is idle, or a chunk at a time when it has waited too long. Where stand-ins that the engine calibrated by itself
are not trusted yet, exact requests are sampled and computed again with stand-ins instead, as often as 2 % of the time
allow. Samples live in memory alone. Decides nothing: `policy.guard` and `policy.calibration` do.

Legend: V vocabulary, n tokens of a chunk, T rows of a pass, K slots, D hidden.
"""

from __future__ import annotations

import logging
import math
import time
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from buddymoe_ray.engine.runner import Runner
from buddymoe_ray.engine.scheduler import Scheduler
from buddymoe_ray.engine.sequence import Sequence
from buddymoe_ray.engine.trial import Trial
from buddymoe_ray.observe import GuardSnapshot
from buddymoe_ray.policy import Guard, may_replay
from buddymoe_ray.types import GuardState

__all__ = ["GuardWork"]

log = logging.getLogger(__name__)

_MOST_KEPT = 64
_MOST_WAITING = 4
_PATIENCE = 256


@dataclass(kw_only=True)
class _Sample:
    """Decode steps kept of one request: by position of the token whose KV was computed, log probabilities and expected
    loss. `exact` ones are to be computed again with stand-ins."""

    stride: int
    exact: bool = False
    logprobs: dict[int, Tensor] = field(default_factory=dict)
    predicted: dict[int, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class _Job:
    """A sample being recomputed."""

    sample: _Sample
    chunks: Iterator[tuple[int, Tensor]]
    blocks: list[int]
    prompt: int
    start: int = 0
    losses: dict[int, float] = field(default_factory=dict)
    kl: list[float] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)


class GuardWork:
    """Samples a `share` of the requests that stand-ins may answer, and recomputes them; with a `trial` all requests,
    until it is over."""

    def __init__(
        self, *, guard: Guard, runner: Runner, scheduler: Scheduler, share: float, trial: Trial | None = None
    ) -> None:
        self._guard, self._runner, self._scheduler, self._share = guard, runner, scheduler, share
        self._trial, self._spent, self._began = trial, 0.0, time.perf_counter()
        self.reset()

    def reset(self) -> None:
        """Forget all samples, but not what they have told so far."""
        self._samples: dict[str, _Sample] = {}
        self._waiting: deque[tuple[list[int], int, _Sample]] = deque()
        self._job: _Job | None = None
        self._waited = 0

    @property
    def state(self) -> GuardState:
        """`ok` or `tripped`."""
        return self._guard.state

    def snapshot(self) -> GuardSnapshot:
        """What it has measured."""
        seen = self._guard.snapshot()
        return GuardSnapshot(
            state=seen.state,
            measured_kl=seen.measured,
            measured_se=seen.standard_error,
            predicted=seen.predicted,
            sampled_tokens=seen.tokens,
            reason=seen.reason,
        )

    def watch(self, seq: Sequence, logits_V: Tensor, predicted: float) -> None:
        """Keep a decode step of a sampled request, with what it was charged; counts its token towards re-arming."""
        self._guard.generated(1)
        if seq.account.steps == 1 and self._chosen(seq):
            stride = max(1, -(-seq.max_tokens // _MOST_KEPT))
            self._samples[seq.request_id] = _Sample(stride=stride, exact=seq.account.mode == "exact")
        sample = self._samples.get(seq.request_id)
        if sample is not None and (seq.account.steps - 1) % sample.stride == 0:
            position = seq.num_computed - 1
            sample.logprobs[position] = logits_V.log_softmax(dim=-1).clone()
            sample.predicted[position] = predicted

    def ended(self, seq: Sequence) -> None:
        """A request ended: queue its sample, if it has one and there is room."""
        sample = self._samples.pop(seq.request_id, None)
        if sample is not None and sample.logprobs and len(self._waiting) < _MOST_WAITING:
            self._waiting.append((seq.token_ids(0, max(sample.logprobs) + 1), seq.prompt_length, sample))

    def has_work(self) -> bool:
        """Whether there is something to recompute."""
        return self._job is not None or bool(self._waiting)

    def advance(self, *, idle: bool) -> None:
        """Compute a chunk, if the engine is idle or the work has waited long enough."""
        if not self.has_work():
            return
        self._waited += 1
        began = time.perf_counter()
        if self._trial is not None:
            timely = may_replay(self._spent, began - self._began, idle=idle)
        else:
            timely = idle or self._waited >= _PATIENCE
        if not timely:
            return
        self._waited = 0
        if self._job is None and not self._begin():
            return
        assert self._job is not None, "a job was begun"
        job = self._job
        try:
            start, logits_nV = self._next(job)
            self._compare(job, start, logits_nV)
            job.start = start + len(logits_nV)
        except StopIteration:
            self._finish(job)
        except BaseException:
            self._drop(job)
            raise
        finally:
            self._spent += time.perf_counter() - began

    def _chosen(self, seq: Sequence) -> bool:
        if seq.replay or seq.account.guard == "tripped":
            return False
        if self._trial is not None and self._trial.wants(seq.account.mode):
            return len(self._samples) + len(self._waiting) < _MOST_WAITING  # a sample is a few dozen rows of logits
        if seq.account.mode == "exact":
            return False
        return zlib.crc32(seq.request_id.encode()) / 2**32 < self._share

    def _begin(self) -> bool:
        ids, prompt, sample = self._waiting[0]
        blocks = self._scheduler.borrow(len(ids))
        if blocks is None:
            return False
        self._waiting.popleft()
        chunks = self._runner.score(ids, blocks, prompt=prompt)
        self._job = _Job(sample=sample, chunks=chunks, blocks=blocks, prompt=prompt)
        return True

    def _next(self, job: _Job) -> tuple[int, Tensor]:
        if not job.sample.exact:
            return next(job.chunks)
        assert self._trial is not None, "an exact request was sampled for a trial"
        with self._trial.standing_in(job.prompt, job.start, job.losses):
            return next(job.chunks)

    def _compare(self, job: _Job, start: int, logits_nV: Tensor) -> None:
        for position in range(start, start + len(logits_nV)):
            kept_V = job.sample.logprobs.pop(position, None)
            if kept_V is not None:
                now_V = logits_nV[position - start].log_softmax(dim=-1)
                exact_V, ours_V = (kept_V, now_V) if job.sample.exact else (now_V, kept_V)
                # 0 log 0 = 0: a token that exact rules out counts nothing; NaN logits stay NaN, which trips
                gap_V = torch.where(exact_V == -math.inf, 0.0, exact_V.exp() * (exact_V - ours_V))
                kl = float(gap_V.double().sum())
                job.kl.append(kl if math.isnan(kl) else max(0.0, kl))
                job.predicted.append(job.losses[position] if job.sample.exact else job.sample.predicted[position])

    def _finish(self, job: _Job) -> None:
        self._drop(job)
        if self._trial is not None:
            self._trial.observe(job.kl, job.predicted)
        if job.sample.exact:
            return
        before = self._guard.state
        self._guard.observe(job.kl, job.predicted)
        if self._guard.state != before:
            log.warning("guard is %s: %s", self._guard.state, self._guard.snapshot().reason)

    def _drop(self, job: _Job) -> None:
        self._scheduler.give_back(job.blocks)
        self._job = None
