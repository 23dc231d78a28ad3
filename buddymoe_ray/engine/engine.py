"""The engine: one `step()` is schedule, run, choose, deliver. The same object serves, evaluates and benchmarks.

Knows sequences, a runner and a scheduler; not HTTP, Ray or threads (it is driven by one caller). `build` wires its
parts. Invariants: a request that was accepted by `add` ends in exactly one event with a finish_reason; what goes wrong
with one sequence ends that one.

Legend: B sequences, V vocabulary.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Rows
from itertools import accumulate
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.account import StepTotals, open_account
from buddymoe_ray.engine.beside import PrefillBeside
from buddymoe_ray.engine.build import build_parts
from buddymoe_ray.engine.chat import encode_chat, encode_prompt
from buddymoe_ray.engine.guard import GuardWork
from buddymoe_ray.engine.parts import EngineParts
from buddymoe_ray.engine.replay import open_replay
from buddymoe_ray.engine.sampler import Sampled, prepare_sampling, sample
from buddymoe_ray.engine.scheduler import PrefillChunk
from buddymoe_ray.engine.sequence import Sequence
from buddymoe_ray.engine.snapshot import engine_snapshot
from buddymoe_ray.engine.terms import terms_of
from buddymoe_ray.engine.validate import validate
from buddymoe_ray.errors import BuddyMoEError, CacheError
from buddymoe_ray.moe import StepOutcome
from buddymoe_ray.observe import EngineSnapshot, GuardSnapshot
from buddymoe_ray.residency.peering import Peering, open_peering
from buddymoe_ray.residency.sharing import Sharing
from buddymoe_ray.types import GenerationRequest, TokenEvent

__all__ = ["Chooser", "Engine"]

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


class Chooser(Protocol):
    """Picks the next token of every sequence; the sampler, or a forced one that scores a text."""

    def choose(self, logits_BV: Tensor, sequences: Rows[Sequence]) -> list[Sampled]:
        """One choice per row."""


class SamplingChooser:
    """The chooser that serves: each sequence's own SamplingParams."""

    def __init__(self, device: torch.device) -> None:
        prepare_sampling(device)

    def choose(self, logits_BV: Tensor, sequences: Rows[Sequence]) -> list[Sampled]:
        return sample(logits_BV, [seq.sampling_state for seq in sequences])


class Engine:
    """Serve one model. Use `Engine.from_config`; drive it with `add` and `step`."""

    def __init__(self, parts: EngineParts, chooser: Chooser | None = None) -> None:
        self.config, self.limits, self.tokenizer = parts.config, parts.limits, parts.tokenizer
        self.vocab_size, self.sampling_defaults = parts.vocab_size, parts.sampling_defaults
        self._experts, self._sharing = parts.experts, parts.sharing
        self._spent, self._ahead = StepTotals(), parts.experts.ahead if parts.runner.packed else None
        self._peering: Peering | None = None
        self.cache, self.standin_bytes = parts.experts.cache, parts.experts.standin_bytes
        self._setup, self._guard = parts.experts.setup, parts.calibration.guard
        self.calibration = parts.calibration
        self.calibration.start()
        self._runner, self._scheduler, self._step = parts.runner, parts.scheduler, parts.step
        self._beside = PrefillBeside(parts.runner.parts if parts.config.prefill_chunk is None else None)
        self._chooser = chooser or SamplingChooser(parts.loaded.device)
        self._eos, self._pending = parts.eos_token_ids, list[TokenEvent]()
        self._steps, self._closed = 0, False

    @classmethod
    def from_config(
        cls,
        config: EngineConfig,
        *,
        chooser: Chooser | None = None,
        text: bool = True,
        sharing: Sharing | None = None,
    ) -> Engine:
        """Load the model and wire an engine. `text=False` skips the tokenizer and detokenisation.

        With `sharing` its experts are the node's: see `residency.sharing`.

        Raises:
            ConfigError, CheckpointError, BudgetError: nothing is served; the message says what to change.
        """
        return cls(build_parts(config, text=text, sharing=sharing), chooser)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text prompt. Raises RequestError without a tokenizer."""
        return encode_prompt(self.tokenizer, text)

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation through the model's chat template. Raises RequestError."""
        return encode_chat(self.tokenizer, messages)

    def add(self, request: GenerationRequest) -> None:
        """Accept a request. Raises RequestError when it can never be served; nothing is kept then."""
        self.admit(self.prepare(request))

    def prepare(self, request: GenerationRequest) -> Sequence:
        """What `admit` takes: the request checked, its record read, its resumed tokens taken in. From any thread: none
        of it should hold up a step. Raises RequestError."""
        request = validate(request, vocab_size=self.vocab_size)
        return Sequence(
            request,
            tokenizer=self.tokenizer,
            eos_token_ids=self._eos,
            max_model_len=self.limits.max_model_len,
            default_seed=self.config.seed,
            account=open_account(
                request, self.config, self._setup, self.limits.max_model_len, self.calibration.snapshot()
            ),
            replay=open_replay(request, self._setup),
        )

    def admit(self, seq: Sequence) -> None:
        """Queue a prepared request. Raises RequestError when it is too large, or its id is taken."""
        self._scheduler.add(seq)

    def cancel(self, request_id: str) -> None:
        """End a request; its blocks are free before the next step. Unknown or finished ids are ignored."""
        seq = self._scheduler.cancel(request_id)
        if seq is not None:
            try:
                self._tell(seq, seq.finish("cancelled"))
            except Exception as error:
                self._fail(seq, error)

    def has_work(self) -> bool:
        """Whether a step would do or deliver anything."""
        checks = self._guard is not None and self._guard.has_work()
        return bool(self._pending) or self._scheduler.has_work() or checks or self.calibration.due

    def step(self) -> list[TokenEvent]:
        """Advance every scheduled sequence and return what became of each."""
        if self.calibration.due and not self._beside.busy:
            self._take_over()
        plan = self._scheduler.schedule()
        self._steps += 1
        try:
            decodes = bool(plan.decode)
            if not self._beside.begin(plan.prefill, decodes=decodes):
                for chunks in self._passes(plan.prefill):
                    self._prefill(chunks)
            self._go_on(decodes)
            began = time.perf_counter()
            for sequences in self._passes(plan.decode):
                self._decode(sequences)
            if decodes:
                self._beside.decoded(time.perf_counter() - began)
        except BaseException:
            self.cache.settle_ahead()
            raise
        if self._ahead is not None:
            self._ahead.begin(self._scheduler.next_tokens)
        if self._guard is not None:
            self._recompute(self._guard, idle=not (plan.prefill or plan.decode or self._beside.busy))
        events, self._pending = self._pending, []
        return events

    def reset(self) -> None:
        """Forget every request and what is undelivered of it: for after an interrupt, wherever it struck."""
        self._beside.reset()
        self._scheduler.reset()
        self.cache.settle_ahead()
        self._runner.release(None)
        if self._guard is not None:
            self._guard.reset()
        self._pending = []

    def drain(self) -> list[TokenEvent]:
        """Step until nothing is left; what every step returned, in order."""
        events = []
        while self.has_work():
            events += self.step()
        return events

    def snapshot(self) -> EngineSnapshot:
        """Counters, readable from any thread."""
        return engine_snapshot(
            self._scheduler,
            self._experts,
            self._spent,
            steps=self._steps,
            guard=GuardSnapshot() if self._guard is None else self._guard.snapshot(),
            calibration=self.calibration.snapshot(),
        )

    @property
    def link_address(self) -> str:
        """Where other nodes' workers reach this engine's experts; empty while it is not linked."""
        return "" if self._peering is None else self._peering.address

    def link(self) -> None:
        """Listen for other nodes' workers, where `sharing.linked` foresaw it; from now on `set_peers` has an effect.

        From any thread, while the engine runs; a second call does nothing. Raises LinkError, CacheError.
        """
        if self._peering is None and self._sharing is not None:
            self._peering = open_peering(self._experts, self._sharing)

    def link_seconds(self) -> dict[str, float]:
        """How long each peer takes to answer, by name."""
        return {} if self._peering is None else self._peering.seconds()

    def set_peers(self, peers: Mapping[str, str]) -> None:
        """From now on these other nodes' workers, name to address, may be asked for experts. From any thread."""
        if self._peering is not None:
            self._peering.set_peers(peers)

    def close(self) -> None:
        """Free the model's memory and close its files. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self.calibration.close()
            self._beside.reset()
            if self._peering is not None:
                self._peering.close()
            self._experts.close()

    def _take_over(self) -> None:
        """Let stand-ins answer that were calibrated meanwhile, or experts have their memory."""
        experts = self.calibration.take_over()
        if experts is self._experts:
            return
        self._experts, self._setup, self.standin_bytes = experts, experts.setup, experts.standin_bytes
        self._guard, self._ahead = self.calibration.guard, None

    def _passes(self, planned: Rows[T]) -> list[list[T]]:
        if self._runner.packed:
            return [list(planned)] if planned else []
        return [[one] for one in planned]

    def _go_on(self, decodes: bool) -> None:
        """Compute prompts that were begun, for a while."""
        try:
            ended = self._beside.advance(decodes=decodes)
        except Exception:
            log.exception("a pass over prompts failed: they are computed one by one")
            self._prefill(self._beside.give_up())
            return
        for chunk, logits_V, lost in ended:
            logits_BV = torch.zeros(1, 1) if logits_V is None else logits_V[None]
            self._take([chunk.seq], [chunk.end - chunk.start], logits_BV, {0: lost} if lost else {})

    def _prefill(self, chunks: list[PrefillChunk]) -> None:
        began = time.perf_counter()

        def run(part: list[PrefillChunk]) -> tuple[Tensor, dict[int, str]]:
            return self._runner.prefill(part), self._step.failed or {}

        def probe(seq: Sequence) -> PrefillChunk:
            return PrefillChunk(seq=self._probe(seq), start=0, end=1)

        for part, (logits_BV, failed) in self._apart(chunks, run, owner=lambda chunk: chunk.seq, probe=probe):
            counts = [chunk.end - chunk.start for chunk in part]
            ends = list(accumulate(counts))
            lost = {bisect_right(ends, row): reason for row, reason in failed.items()}
            self._take([chunk.seq for chunk in part], counts, logits_BV, lost)
        if chunks:
            self._beside.computed(sum(chunk.end - chunk.start for chunk in chunks), time.perf_counter() - began)

    def _decode(self, sequences: list[Sequence]) -> None:
        def run(part: list[Sequence]) -> tuple[Tensor, StepOutcome, dict[int, str]]:
            return *self._runner.decode(part, terms_of(part)), self._step.failed or {}

        ready = []
        for seq in sequences:
            try:
                seq.account.begin("off" if self._guard is None else self._guard.state)
                ready.append(seq)
            except Exception as error:
                self._fail(seq, error)
        for part, (logits_BV, outcome, failed) in self._apart(ready, run, owner=lambda seq: seq, probe=self._probe):
            self._spent.add(outcome)
            self._take(part, [1] * len(part), logits_BV, failed, outcome)

    def _take(
        self,
        sequences: list[Sequence],
        counts: list[int],
        logits_BV: Tensor,
        lost: Mapping[int, str],
        outcome: StepOutcome | None = None,
    ) -> None:
        """Book a pass that computed `counts` tokens of each sequence, and choose where a prompt is computed. `lost`
        says by sequence which expert it could not have."""
        ready = []
        for row, seq in enumerate(sequences):
            try:
                if row in lost:
                    raise CacheError(lost[row])
                seq.advance(counts[row], exact=outcome is None or self._decodes_exactly(seq))
                self._scheduler.remember(seq)
                if outcome is not None:
                    seq.account.settle(outcome, row)
                    if self._guard is not None:
                        self._guard.watch(seq, logits_BV[row], float(outcome.loss_T[row]))
                if seq.prompt_computed:
                    ready.append(row)
            except Exception as error:
                self._fail(seq, error)

        def choose(rows: list[int]) -> list[Sampled]:
            chosen_BV = logits_BV if len(rows) == len(sequences) else logits_BV[rows]
            return self._chooser.choose(chosen_BV, [sequences[row] for row in rows])

        for rows, choices in self._apart(ready, choose, owner=sequences.__getitem__):
            for row, chosen in zip(rows, choices, strict=True):
                try:
                    self._tell(sequences[row], sequences[row].append(chosen))
                except Exception as error:
                    self._fail(sequences[row], error)

    def _decodes_exactly(self, seq: Sequence) -> bool:
        """Whether its decode steps leave the KV that a prompt would have."""
        return self._runner.repeatable and seq.account.mode == "exact" and not seq.replay

    def _recompute(self, guard: GuardWork, *, idle: bool) -> None:
        """Let the guard work; an error costs it the sample, nobody else anything."""
        try:
            guard.advance(idle=idle)
        except Exception as error:
            log.error("the guard lost a sample: %s", error, exc_info=not isinstance(error, CacheError))

    def _apart(
        self,
        items: list[T],
        work: Callable[[list[T]], R],
        *,
        owner: Callable[[T], Sequence],
        probe: Callable[[Sequence], T] | None = None,
    ) -> list[tuple[list[T], R]]:
        """`work` on all items; where it raises, on each half, down to those at fault, whose sequences end.

        What fails for one alone is tried on its `probe`, a token of our own: where that fails too, the engine is broken
        and not the request, and the error is raised.
        """
        if not items:
            return []
        try:
            return [(items, work(items))]
        except Exception as error:
            if len(items) > 1:
                halves = items[: len(items) // 2], items[len(items) // 2 :]
                return [done for half in halves for done in self._apart(half, work, owner=owner, probe=probe)]
            if probe is not None and not isinstance(error, CacheError):
                trial = probe(owner(items[0]))
                work([trial])
                self._runner.release(owner(trial))
            self._fail(owner(items[0]), error)
            return []

    def _probe(self, broken: Sequence) -> Sequence:
        """A sequence of one token, on the block that is nobody's."""
        request = GenerationRequest(request_id="probe", prompt_token_ids=(0,))
        seq = Sequence(request, max_model_len=self.limits.max_model_len)
        seq.blocks = [self._scheduler.num_blocks]
        return seq

    def _fail(self, seq: Sequence, error: Exception) -> None:
        """What was raised over one sequence ends it, and no other."""
        known = isinstance(error, BuddyMoEError)
        log.error("%s failed: %s", seq.request_id, error, exc_info=None if known else error)
        message = str(error) if known else f"internal error ({type(error).__name__}). hint: see the log"
        self._tell(seq, seq.fail(message))

    def _tell(self, seq: Sequence, event: TokenEvent) -> None:
        """Queue an event; with the last one everything the sequence held is free."""
        self._pending.append(event)
        if event.finish_reason is not None:
            self._scheduler.finish(seq)
            self._beside.leave()
            self._runner.release(seq)
            if not self._scheduler.has_work():
                self.cache.settle_ahead()  # others may wait for what nobody here goes on with
            if self._guard is not None:
                try:
                    self._guard.ended(seq)
                except Exception:
                    log.exception("the guard lost a sample")
