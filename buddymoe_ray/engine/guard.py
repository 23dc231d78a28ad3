"""Recomputes sampled requests exactly, off the critical path, and lets the policy compare what they cost.

A sampled request keeps the logits of some of its decode steps. When it has ended, its tokens are computed again from
the first one, exactly and on clean KV blocks, so drift that stand-ins left in the KV cache shows too. Samples that wait
are computed in one pass, which reads a missing expert once for all of them and is set aside after each slice, as
prompts beside decode steps are: at any time when the engine is idle, else in 2 % of it. Where stand-ins that the engine
calibrated by itself are not trusted yet, exact requests are sampled and computed again with stand-ins instead, a chunk
at a time. Samples live in memory alone. Decides nothing: `policy.guard` and `policy.calibration` do.

Legend: V vocabulary, n tokens of a chunk.
"""

from __future__ import annotations

import logging
import math
import time
import zlib
from collections import deque
from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from buddymoe_ray.engine.runner import Runner
from buddymoe_ray.engine.scheduler import PrefillChunk, Scheduler
from buddymoe_ray.engine.sequence import Sequence
from buddymoe_ray.engine.suspended import PassParts, SuspendedPass
from buddymoe_ray.engine.trial import Trial
from buddymoe_ray.errors import CacheError
from buddymoe_ray.observe import GuardSnapshot
from buddymoe_ray.policy import Guard, may_replay
from buddymoe_ray.types import GenerationRequest, GuardState

__all__ = ["GuardWork"]

log = logging.getLogger(__name__)

_MOST_KEPT = 64
_MOST_WAITING = 4
_ROWS, _SLICE_SECONDS, _IDLE_SLICE_SECONDS = 32, 5e-3, 0.1
"""Of a forward of the pass, and about how long it goes on at once."""


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
    """A sample being recomputed, `prompt` tokens of which were not generated, on borrowed blocks."""

    sample: _Sample
    ids: list[int]
    prompt: int
    blocks: list[int]
    losses: dict[int, float] = field(default_factory=dict)
    kl: list[float] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)

    def compare(self, position: int, logits_V: Tensor) -> None:
        """Take the logits that a position has now, if it was kept."""
        kept_V = self.sample.logprobs.pop(position, None)
        if kept_V is None:
            return
        now_V = logits_V.log_softmax(dim=-1)
        exact_V, ours_V = (kept_V, now_V) if self.sample.exact else (now_V, kept_V)
        # 0 log 0 = 0: a token that exact rules out counts nothing; NaN logits stay NaN, which trips
        gap_V = torch.where(exact_V == -math.inf, 0.0, exact_V.exp() * (exact_V - ours_V))
        kl = float(gap_V.double().sum())
        self.kl.append(kl if math.isnan(kl) else max(0.0, kl))
        self.predicted.append(self.losses[position] if self.sample.exact else self.sample.predicted[position])


class GuardWork:
    """Samples a `share` of the requests that stand-ins may answer, and recomputes them; with a `trial` all requests,
    until it is over."""

    def __init__(
        self, *, guard: Guard, runner: Runner, scheduler: Scheduler, share: float, trial: Trial | None = None
    ) -> None:
        self._guard, self._runner, self._scheduler, self._share = guard, runner, scheduler, share
        self._trial, self._spent, self._began = trial, 0.0, time.perf_counter()
        self._work: Generator[None] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget all samples, but not what they have told so far; the scheduler is reset too."""
        if self._work is not None:
            self._work.close()
        self._samples: dict[str, _Sample] = {}
        self._waiting: deque[tuple[list[int], int, _Sample]] = deque()
        self._jobs, self._work = list[_Job](), None

    @property
    def state(self) -> GuardState:
        """`ok` or `tripped`."""
        return self._guard.state

    @property
    def factor(self) -> float:
        """What expected losses are multiplied with before they are charged; those on trial have their own."""
        return self._guard.factor if self._trial is None else 1.0

    def snapshot(self) -> GuardSnapshot:
        """What it has measured."""
        seen = self._guard.snapshot()
        return GuardSnapshot(
            state=seen.state,
            measured_kl=seen.measured,
            measured_se=seen.standard_error,
            predicted=seen.predicted,
            factor=self.factor,
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
        return bool(self._jobs or self._waiting)

    def advance(self, *, idle: bool) -> None:
        """Go on for a slice, if the engine is idle or the work has not taken its share of the time yet. An error costs
        the samples, nobody else anything."""
        began = time.perf_counter()
        if idle:
            self._spent, self._began = 0.0, began  # what nobody waited for counts nothing
        try:
            if self.has_work() and may_replay(self._spent, began - self._began, idle=idle):
                self._go_on(began + (_IDLE_SLICE_SECONDS if idle else _SLICE_SECONDS))
        except Exception as error:
            self._drop()
            log.error("the guard lost a sample: %s", error, exc_info=not isinstance(error, CacheError))
        except BaseException:
            self._drop()
            raise
        finally:
            if not idle:
                self._spent += time.perf_counter() - began

    def _go_on(self, until: float) -> None:
        self._until = until
        if self._work is None and not self._begin():
            return
        assert self._work is not None, "work was begun"
        if next(self._work, self) is self:  # at its end
            self._end()

    def _chosen(self, seq: Sequence) -> bool:
        if seq.replay or seq.account.guard == "tripped":
            return False
        if self._trial is not None and self._trial.wants(seq.account.mode):
            return len(self._samples) + len(self._waiting) < _MOST_WAITING  # a sample is a few dozen rows of logits
        if seq.account.mode == "exact":
            return False
        return zlib.crc32(seq.request_id.encode()) / 2**32 < self._share

    def _begin(self) -> bool:
        """Take on what waits: all that one pass may compute and there are blocks for, else one sample."""
        parts = self._runner.parts
        while self._waiting and (not self._jobs or self._sweeps(self._waiting[0][2])):
            ids, prompt, sample = self._waiting[0]
            blocks = self._scheduler.borrow(len(ids))
            if blocks is None:
                break
            self._waiting.popleft()
            self._jobs.append(_Job(sample=sample, ids=ids, prompt=prompt, blocks=blocks))
            if not self._sweeps(sample):
                break
        if self._jobs:
            sweeps = parts is not None and self._sweeps(self._jobs[0].sample)
            self._work = self._sweep(parts) if parts is not None and sweeps else self._score(self._jobs[0])
        return bool(self._jobs)

    def _sweeps(self, sample: _Sample) -> bool:
        return self._runner.parts is not None and not sample.exact

    def _sweep(self, parts: PassParts) -> Generator[None]:
        """All jobs in one pass."""
        chunks = list[PrefillChunk]()
        for job in self._jobs:
            request = GenerationRequest(request_id="guard", prompt_token_ids=tuple(job.ids))
            seq = Sequence(request, max_model_len=len(job.ids) + 1)
            seq.blocks = job.blocks
            chunks.append(PrefillChunk(seq=seq, start=0, end=len(job.ids), also=tuple(job.sample.logprobs)))
        running = SuspendedPass(parts, chunks, rows=lambda _: _ROWS)
        try:
            while not running.done:
                running.advance(self._until)
                yield
            for job, (chunk, logits_nV, lost) in zip(self._jobs, running.take(), strict=True):
                if lost:
                    log.error("the guard lost a sample: %s", lost)
                    continue
                for position, logits_V in zip(sorted(chunk.also), logits_nV, strict=True):
                    job.compare(position, logits_V)
        finally:
            running.close()

    def _score(self, job: _Job) -> Generator[None]:
        """One job, a chunk at a time."""
        chunks, start = self._runner.score(job.ids, job.blocks, prompt=job.prompt), 0
        while True:
            with self._standing_in(job, start):
                found = next(chunks, None)
            if found is None:
                return
            begin, logits_nV = found
            for n, logits_V in enumerate(logits_nV):
                job.compare(begin + n, logits_V)
            start = begin + len(logits_nV)
            yield

    def _standing_in(self, job: _Job, start: int) -> AbstractContextManager[None]:
        if not job.sample.exact:
            return nullcontext()
        assert self._trial is not None, "an exact request was sampled for a trial"
        return self._trial.standing_in(job.prompt, start, job.losses)

    def _end(self) -> None:
        jobs = self._drop()
        for job in jobs:
            if self._trial is not None:
                self._trial.observe(job.kl, job.predicted)
            if job.sample.exact:
                continue
            before = self._guard.state
            self._guard.observe(job.kl, job.predicted)
            if self._guard.state != before:
                log.warning("guard is %s: %s", self._guard.state, self._guard.snapshot().reason)

    def _drop(self) -> list[_Job]:
        """Return the blocks of all jobs; what they were."""
        jobs, self._jobs, self._work = self._jobs, [], None
        for job in jobs:
            self._scheduler.give_back(job.blocks)
        return jobs
