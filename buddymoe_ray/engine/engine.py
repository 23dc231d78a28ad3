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
from dataclasses import replace
from itertools import accumulate
from typing import TypeVar

from torch import Tensor

from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.account import StepTotals, open_account
from buddymoe_ray.engine.beside import PrefillBeside
from buddymoe_ray.engine.build import build_parts
from buddymoe_ray.engine.chat import encode_chat, encode_prompt
from buddymoe_ray.engine.chooser import Chooser, SamplingChooser
from buddymoe_ray.engine.halving import by_halves
from buddymoe_ray.engine.parts import EngineParts
from buddymoe_ray.engine.replay import open_replay
from buddymoe_ray.engine.request_times import RequestTimes
from buddymoe_ray.engine.runner import SCORED_CHUNK
from buddymoe_ray.engine.sampler import Sampled
from buddymoe_ray.engine.scheduler import PrefillChunk
from buddymoe_ray.engine.sequence import Sequence
from buddymoe_ray.engine.snapshot import engine_snapshot, expert_map
from buddymoe_ray.engine.structured import Grammars
from buddymoe_ray.engine.terms import terms_of
from buddymoe_ray.engine.validate import validate
from buddymoe_ray.errors import BuddyMoEError, CacheError
from buddymoe_ray.moe import StepOutcome
from buddymoe_ray.observe import EngineSnapshot, ExpertMap, GuardSnapshot
from buddymoe_ray.residency.peering import Peering, open_peering
from buddymoe_ray.residency.sharing import Sharing
from buddymoe_ray.types import GenerationRequest, StructuredOutput, TokenEvent

__all__ = ["Engine"]

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


class Engine:
    """Serve one model. Use `Engine.from_config`; drive it with `add` and `step`."""

    def __init__(self, parts: EngineParts, chooser: Chooser | None = None) -> None:
        self.config, self.limits, self.tokenizer = parts.config, parts.limits, parts.tokenizer
        self.vocab_size, self.sampling_defaults = parts.vocab_size, parts.sampling_defaults
        self._experts, self._sharing = parts.experts, parts.sharing
        self._spent, self._ahead = StepTotals(), parts.experts.ahead if parts.runner.packed else None
        self._peering: Peering | None = None
        self.cache, self.standin_bytes = parts.experts.cache, parts.experts.standin_bytes
        self._setup, self._guard, self.calibration = parts.experts.setup, parts.calibration.guard, parts.calibration
        self.calibration.start()
        self._runner, self._scheduler, self._step = parts.runner, parts.scheduler, parts.step
        self._beside = PrefillBeside(parts.runner.parts if parts.config.prefill_chunk is None else None)
        self._chooser = chooser or SamplingChooser(parts.loaded.device, parts.runner.recorded)
        self._eos, self._pending = parts.eos_token_ids, list[TokenEvent]()
        self._steps, self._closed, self._times = 0, False, RequestTimes()
        self._grammars = Grammars(parts.tokenizer, parts.vocab_size)

    @classmethod
    def from_config(
        cls, config: EngineConfig, *, chooser: Chooser | None = None, text: bool = True, sharing: Sharing | None = None
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
        """What `admit` takes: the request checked, its record read, its grammar compiled, its resumed tokens taken in.
        From any thread: none of it should hold up a step. Raises RequestError."""
        request = validate(request, vocab_size=self.vocab_size)
        seq = Sequence(
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
        wanted, specials = request.sampling.structured_outputs, not request.sampling.skip_special_tokens
        if isinstance(wanted, StructuredOutput):  # it is checked by now
            seq.follow(self._grammars.open(wanted, seq.ends, specials=specials))
        return seq

    def admit(self, seq: Sequence) -> None:
        """Queue a prepared request. Raises RequestError when it is too large, or its id is taken."""
        self._scheduler.add(seq)
        self._times.arrived(seq)

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
        return bool(self._pending) or self._scheduler.has_work() or checks or self.calibration.due or self.cache.errands

    def step(self) -> list[TokenEvent]:
        """Advance every scheduled sequence and return what became of each."""
        if self.calibration.due and not self._beside.busy:
            self._take_over()
        plan = self._scheduler.schedule()
        for seq in plan.preempted:
            self._runner.release(seq)
        self._steps += 1
        self._times.begun(chunk.seq for chunk in plan.prefill)
        try:
            decodes = bool(plan.decode)
            prefill = self._score(plan.prefill)
            if not self._beside.begin(prefill, decodes=decodes):
                for chunks in self._passes(prefill):
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
            self._guard.advance(idle=not (plan.prefill or plan.decode or self._beside.busy))
        self.cache.run_errands(idle=not self._scheduler.has_work())
        return self.take_events()

    def take_events(self) -> list[TokenEvent]:
        """What is to be told and was not yet; a step returns it, too."""
        events, self._pending = self._pending, []
        return events

    def reset(self) -> None:
        """Forget every request and what is undelivered of it: for after an interrupt, wherever it struck."""
        self._beside.reset()
        self._times.forget()
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
        found = engine_snapshot(
            self._scheduler,
            self._experts,
            self._spent,
            steps=self._steps,
            guard=GuardSnapshot() if self._guard is None else self._guard.snapshot(),
            calibration=self.calibration.snapshot(),
            requests=self._times.snapshot(),
        )
        return replace(found, link_bytes=0 if self._peering is None else self._peering.moved_bytes)

    def expert_map(self) -> ExpertMap:
        """Where the experts are and how much each is used, readable from any thread."""
        return expert_map(self._experts)

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
        if (experts := self.calibration.take_over()) is self._experts:
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
        for chunk, logits_nV, lost in ended:
            self._take([chunk.seq], [chunk.end - chunk.start], logits_nV, {0: lost} if lost else {})

    def _score(self, chunks: Rows[PrefillChunk]) -> list[PrefillChunk]:
        """Compute a piece of each prompt whose own log probabilities are wanted; the chunks of the others."""
        for chunk in (scored := [chunk for chunk in chunks if chunk.seq.scores]):
            end = min(chunk.end, chunk.start + SCORED_CHUNK) if self._runner.packed else chunk.end
            pieces = [replace(chunk, end=end)]
            for (piece,), logits_TV in self._apart(pieces, self._runner.prefill_whole, owner=lambda piece: piece.seq):
                lost = [*(self._step.failed or {}).values()]
                if not lost:
                    piece.seq.score(end - len(logits_TV), logits_TV)
                self._take([piece.seq], [end - piece.start], logits_TV[-1:], dict(enumerate(lost[:1])))
        return [chunk for chunk in chunks if chunk not in scored]

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
                exactly = self._runner.repeatable and seq.account.mode == "exact" and not seq.replay
                seq.advance(counts[row], exact=exactly or outcome is None)  # in decode: if it leaves a prompt's KV
                self._scheduler.remember(seq)
                if outcome is not None:
                    self._spent.expected_rise += seq.account.settle(outcome, row)
                    if self._guard is not None:
                        self._guard.watch(seq, logits_BV[row], float(outcome.loss_T[row]))
                if seq.prompt_computed and seq.max_tokens:
                    ready.append(row)
                elif seq.prompt_computed:
                    self._tell(seq, seq.finish("length"))
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

        def at_fault(item: T, error: Exception) -> None:
            if probe is not None and not isinstance(error, CacheError):
                trial = probe(owner(item))
                work([trial])
                self._runner.release(owner(trial))
            self._fail(owner(item), error)

        return by_halves(items, work, at_fault)

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
        self._times.told(seq, event)
        if event.finish_reason is not None:
            self._scheduler.finish(seq)
            self._beside.leave()
            self._runner.release(seq)
            if not self._scheduler.has_work():
                self.cache.settle_ahead()  # others may wait for what nobody here goes on with
            try:
                if self._guard is not None:
                    self._guard.ended(seq)
            except Exception:
                log.exception("the guard lost a sample")
