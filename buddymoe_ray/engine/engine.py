"""The engine: one `step()` is schedule, run, choose, deliver. The same object serves, evaluates and benchmarks.

Knows sequences, a runner and a scheduler; not HTTP, Ray or threads (it is driven by one caller). `build` wires its
parts. Invariant: a request that was accepted by `add` ends in exactly one event with a finish_reason.

Legend: B sequences, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from typing import Any, Protocol

from torch import Tensor

from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.account import StepTotals, open_account
from buddymoe_ray.engine.build import build_parts
from buddymoe_ray.engine.chat import encode_chat, encode_prompt
from buddymoe_ray.engine.guard import GuardWork
from buddymoe_ray.engine.parts import EngineParts
from buddymoe_ray.engine.replay import open_replay
from buddymoe_ray.engine.sampler import Sampled, sample, validate
from buddymoe_ray.engine.scheduler import PrefillChunk
from buddymoe_ray.engine.sequence import Sequence
from buddymoe_ray.engine.terms import settle, terms_of
from buddymoe_ray.errors import CacheError
from buddymoe_ray.observe import EngineSnapshot, GuardSnapshot
from buddymoe_ray.residency.peers import Peering, open_peering
from buddymoe_ray.residency.sharing import Sharing
from buddymoe_ray.types import GenerationRequest, TokenEvent

__all__ = ["Chooser", "Engine"]

log = logging.getLogger(__name__)


class Chooser(Protocol):
    """Picks the next token of every sequence; the sampler, or a forced one that scores a text."""

    def choose(self, logits_BV: Tensor, sequences: Rows[Sequence]) -> list[Sampled]:
        """One choice per row."""


class SamplingChooser:
    """The chooser that serves: each sequence's own SamplingParams."""

    def choose(self, logits_BV: Tensor, sequences: Rows[Sequence]) -> list[Sampled]:
        return sample(logits_BV, [seq.sampling_state for seq in sequences])


class Engine:
    """Serve one model. Use `Engine.from_config`; drive it with `add` and `step`."""

    def __init__(self, parts: EngineParts, chooser: Chooser | None = None) -> None:
        self.config, self.limits, self.tokenizer = parts.config, parts.limits, parts.tokenizer
        self.vocab_size = parts.vocab_size
        self._experts, self._sharing = parts.experts, parts.sharing
        self._peering: Peering | None = None
        self.cache, self.standin_bytes = parts.experts.cache, parts.experts.standin_bytes
        self._setup, self._guard = parts.experts.setup, parts.guard
        self._spent = StepTotals()
        self._runner, self._scheduler, self._step = parts.runner, parts.scheduler, parts.step
        self._eos = parts.eos_token_ids
        self._chooser = chooser or SamplingChooser()
        self._pending: list[TokenEvent] = []
        self._steps = 0
        self._closed = False

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
        validate(request, vocab_size=self.vocab_size)
        account = open_account(request, self.config, self._setup)
        self._scheduler.add(
            Sequence(
                request,
                tokenizer=self.tokenizer,
                eos_token_ids=self._eos,
                max_model_len=self.limits.max_model_len,
                default_seed=self.config.seed,
                account=account,
                replay=open_replay(request, self._setup),
                binding="" if self._setup is None else self._setup.binding,
            )
        )

    def cancel(self, request_id: str) -> None:
        """End a request; its blocks are free before the next step. Unknown or finished ids are ignored."""
        seq = self._scheduler.cancel(request_id)
        if seq is not None:
            self._end(seq, seq.finish("cancelled"))

    def has_work(self) -> bool:
        """Whether a step would do or deliver anything."""
        return bool(self._pending) or self._scheduler.has_work() or (self._guard is not None and self._guard.has_work())

    def step(self) -> list[TokenEvent]:
        """Advance every scheduled sequence and return what became of each."""
        plan = self._scheduler.schedule()
        self._steps += 1
        if plan.prefill:
            self._guarded([chunk.seq for chunk in plan.prefill], lambda: self._prefill(plan.prefill))
        if plan.decode:
            self._guarded(list(plan.decode), lambda: self._decode(plan.decode))
        if self._guard is not None:
            self._recompute(self._guard, idle=not (plan.prefill or plan.decode))
        events, self._pending = self._pending, []
        return events

    def drain(self) -> list[TokenEvent]:
        """Step until nothing is left; what every step returned, in order."""
        events = []
        while self.has_work():
            events += self.step()
        return events

    def snapshot(self) -> EngineSnapshot:
        """Counters, readable from any thread."""
        stats, counts = self.cache.stats(), self.cache.layout.experts_per_layer
        return EngineSnapshot(
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting,
            free_kv_blocks=self._scheduler.free_blocks,
            total_kv_blocks=self._scheduler.num_blocks,
            steps=self._steps,
            hits=stats.hits,
            misses=stats.misses,
            bytes_loaded_device=stats.bytes_loaded_device,
            bytes_read_disk=stats.bytes_read_disk,
            stall_seconds=stats.stall_seconds,
            use_hits=self._spent.hits,
            use_peer=self._spent.peer,
            use_fetched=self._spent.fetched,
            standins=self._spent.standins,
            expected_rise=self._spent.expected_rise,
            residency=sum(int(self.cache.resident_mask(layer).sum()) for layer in range(len(counts))) / sum(counts),
            guard=GuardSnapshot() if self._guard is None else self._guard.snapshot(),
        )

    @property
    def link_address(self) -> str:
        """Where other nodes' workers reach this engine's experts; empty while it is not linked."""
        return "" if self._peering is None else self._peering.address

    def link(self) -> None:
        """Open a door to other nodes' workers, where `sharing.linked` foresaw it; from now on `meet` has an effect.

        From any thread, while the engine runs; a second call does nothing. Raises LinkError, CacheError.
        """
        if self._peering is None and self._sharing is not None:
            self._peering = open_peering(self._experts, self._sharing)

    def link_seconds(self) -> dict[str, float]:
        """How long each peer takes to answer, by name."""
        return {} if self._peering is None else self._peering.seconds()

    def meet(self, peers: Mapping[str, str]) -> None:
        """From now on these other nodes' workers, name to address, may be asked for experts. From any thread."""
        if self._peering is not None:
            self._peering.meet(peers)

    def close(self) -> None:
        """Free the model's memory and close its files. Safe to call twice."""
        if not self._closed:
            self._closed = True
            if self._peering is not None:
                self._peering.close()
            self._experts.close()

    def _prefill(self, chunks: Rows[PrefillChunk]) -> None:
        logits_BV = self._runner.prefill(chunks)
        for chunk in chunks:
            chunk.seq.advance(chunk.end - chunk.start)
        done = [row for row, chunk in enumerate(chunks) if chunk.seq.prompt_computed]
        if done:
            self._deliver(logits_BV[done], [chunks[row].seq for row in done])

    def _decode(self, sequences: Rows[Sequence]) -> None:
        if self._guard is not None:
            for seq in sequences:
                seq.account.note_guard(self._guard.state)
        logits_BV, outcome = self._runner.decode(sequences, terms_of(sequences))
        for seq in sequences:
            seq.advance(1)
        settle(sequences, outcome)
        self._spent.add(outcome)
        if self._guard is not None:
            self._guard.watch(sequences, logits_BV, outcome)
        self._deliver(logits_BV, list(sequences))

    def _recompute(self, guard: GuardWork, *, idle: bool) -> None:
        """Let the guard work; a disk error costs it the sample, nobody else anything."""
        try:
            guard.advance(idle=idle)
        except CacheError as error:
            log.error("the guard lost a sample: %s", error)

    def _deliver(self, logits_BV: Tensor, sequences: list[Sequence]) -> None:
        for seq, chosen in zip(sequences, self._chooser.choose(logits_BV, sequences), strict=True):
            event = seq.append(chosen)
            if event.finish_reason is None:
                self._pending.append(event)
            else:
                self._end(seq, event)

    def _guarded(self, sequences: list[Sequence], work: Any) -> None:
        """A disk error ends the requests of the pass with a clear error; the engine and the others go on."""
        try:
            work()
        except CacheError as error:
            log.error("a pass failed: %s", error)
            for seq in sequences:
                if not seq.finished:
                    self._end(seq, seq.finish("error", error=str(error)))

    def _end(self, seq: Sequence, event: TokenEvent) -> None:
        self._scheduler.finish(seq)
        self._runner.release(seq)
        if self._guard is not None:
            self._guard.ended(seq)
        self._pending.append(event)
