"""The lines of a batch through an engine: as many side by side as there are rows, each answered as over HTTP.

One caller drives it, step by step; what ended in a step is handed over before an interrupt comes through. Knows
endpoints and engines, not files of results. Invariants: every position asked for is handed over once, as a reply, a
refusal or a LineError; not more lines are open than have a row, but for the last one's further choices.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from buddymoe_ray.batch.rows import refill_at
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.engine.interrupts import interrupts_wait
from buddymoe_ray.engine.sequence import Sequence
from buddymoe_ray.errors import RequestError
from buddymoe_ray.models.token_bytes import TokenBytes
from buddymoe_ray.serve.batches.entries import LineAnswers
from buddymoe_ray.serve.batches.journal import JournalEntry
from buddymoe_ray.serve.batches.lines import BatchInput, BatchLine, LineError
from buddymoe_ray.serve.calls import Call, ModelNames
from buddymoe_ray.serve.deltas import merge, total_usage
from buddymoe_ray.serve.refusals import failure, in_terms_of, refusal_of
from buddymoe_ray.serve.streaming import whole_reply
from buddymoe_ray.serve.work import Delta, Refusal, Work
from buddymoe_ray.serve.work_plan import Intake, WorkPlan
from buddymoe_ray.types import TokenEvent, Usage

__all__ = ["BatchRun", "Spent"]

log = logging.getLogger(__name__)

_MANY_DELTAS = 256

Keep = Callable[[list[JournalEntry]], None]


@dataclass(kw_only=True)
class Spent:
    """What the requests of a run came to. `expected_rise` is in nats, summed over all tokens."""

    answered: int = 0
    choices: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    expected_rise: float = 0.0

    def add(self, usage: Usage, choices: int) -> None:
        """Take in a request that was answered."""
        self.answered += 1
        self.choices += choices
        self.prompt_tokens += usage.prompt_tokens
        self.completion_tokens += usage.completion_tokens
        self.expected_rise += usage.expected_rise

    @property
    def mean_output(self) -> float:
        """Tokens of an answer so far; as many as a request has by default before there is one."""
        return self.completion_tokens / self.choices if self.choices else 16.0


@dataclass(kw_only=True)
class _OpenLine:
    """A line whose choices are being answered."""

    at: int
    line: BatchLine
    call: Call
    running: int
    planned: WorkPlan = field(default_factory=lambda: WorkPlan(requests={}, prompts=()))
    deltas: list[Delta] = field(default_factory=list)

    def take(self, delta: Delta) -> None:
        self.deltas.append(delta)
        self.running -= delta.finish_reason is not None
        if len(self.deltas) >= _MANY_DELTAS:
            self.deltas = list(merge(self.deltas))


class BatchRun:
    """Lines of `source` through `engine`, `rows` sequences side by side.

    Args:
        names: what bodies may call the model.
        default_max_tokens: output limit of chat requests that name none.
    """

    def __init__(
        self, engine: Engine, source: BatchInput, names: ModelNames, *, default_max_tokens: int, rows: int
    ) -> None:
        self._engine, self._source, self._rows = engine, source, rows
        self._answers = LineAnswers(source, names)
        self._intake = Intake(engine, default_max_tokens=default_max_tokens)
        self._bytes = TokenBytes(engine.tokenizer)
        self._owners: dict[str, tuple[_OpenLine, int]] = {}  # by the engine's request id
        self.spent = Spent()

    @property
    def running(self) -> int:
        """Sequences in the engine."""
        return len(self._owners)

    def results(self, positions: Iterable[int], keep: Keep) -> Iterator[JournalEntry]:
        """Answer the lines at these positions, in any order, and yield what `keep` was given.

        `keep` is called after every step with what ended in it, perhaps nothing; not within a step, nor by a first
        Ctrl-C without what the step made. Errors of the engine itself are raised, and leave nothing half kept.
        """
        left = iter(positions)
        exhausted = False
        while self._owners or not exhausted:
            with interrupts_wait():
                ended, exhausted = self._refill(left, exhausted)
                if self._owners:
                    ended += self._step()
                keep(ended)
            yield from ended

    def _refill(self, left: Iterator[int], exhausted: bool) -> tuple[list[JournalEntry], bool]:
        """Begin lines where rows are free; those refused at once, and whether none is left."""
        resident = self._engine.cache.plan.fully_resident
        group = refill_at(self._rows, mean_output=self.spent.mean_output, fully_resident=resident)
        ended: list[JournalEntry] = []
        if exhausted or (self._owners and self._rows - self.running < group):
            return ended, exhausted
        while self.running < self._rows and len(ended) < self._rows:  # a file of bad lines goes in rounds too
            at = next(left, None)
            if at is None:
                return ended, True
            refused = self._begin(at)
            if refused is not None:
                ended.append(refused)
        return ended, False

    def _begin(self, at: int) -> JournalEntry | None:
        line = self._source.read(at)
        if isinstance(line, LineError):
            return self._answers.failed(at, line)
        call = self._answers.open(at, line)
        if isinstance(call, Refusal):
            return self._answers.replied(at, line, call)
        refusal = self._admit(_OpenLine(at=at, line=line, call=call, running=call.work.choices), call.work)
        return None if refusal is None else self._answers.replied(at, line, refusal)

    def _admit(self, opened: _OpenLine, work: Work) -> Refusal | None:
        """Hand all choices of a line to the engine, or none and say why."""
        planned = self._intake.hopeless(work) or self._intake.plan(work)
        if isinstance(planned, Refusal):
            return planned
        admitted: dict[int, Sequence] = {}
        try:
            prepared = {choice: self._engine.prepare(request) for choice, request in planned.requests.items()}
            for choice, seq in prepared.items():
                self._engine.admit(seq)
                admitted[choice] = seq
        except Exception as error:  # whatever is wrong with one request, the others go on
            for seq in admitted.values():
                self._engine.cancel(seq.request_id)
            if isinstance(error, RequestError):
                return in_terms_of(refusal_of(error), work)
            log.exception("line %d could not be begun", self._source.number(opened.at))
            return failure()
        opened.call.renderer.read_as(planned.answer)
        opened.planned = planned
        self._owners |= {seq.request_id: (opened, choice) for choice, seq in admitted.items()}
        return None

    def _step(self) -> list[JournalEntry]:
        return [ended for event in self._engine.step() if (ended := self._take(event)) is not None]

    def _take(self, event: TokenEvent) -> JournalEntry | None:
        """Note what became of a sequence; the line's reply when it was the last one."""
        if event.request_id not in self._owners:  # a choice of a line that was refused
            return None
        opened, choice = self._owners[event.request_id]
        opened.take(opened.planned.delta_of(choice, event, self._bytes))
        if event.finish_reason is not None:
            del self._owners[event.request_id]
        return None if opened.running else self._replied(opened)

    def _replied(self, opened: _OpenLine) -> JournalEntry:
        work = opened.call.work
        whole = whole_reply(opened.deltas, opened.call.renderer, n=work.n, choices=work.choices)
        if not isinstance(whole, Refusal):
            self.spent.add(total_usage(merge(opened.deltas), n=work.n), work.choices)
        return self._answers.replied(opened.at, opened.line, whole)
