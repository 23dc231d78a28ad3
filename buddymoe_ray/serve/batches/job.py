"""One batch, from whatever state it is in to its end: validated, answered line by line, written where it is looked for.

A line is answered by `Work` that gives way: a worker refuses it, or sends it away, while others need its place, and it
is tried again. Invariants: a line is in the journal once, whoever dies when; every state is on the disk before it is
told. Knows neither HTTP nor ray.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from buddymoe_ray.errors import ConfigError
from buddymoe_ray.serve.batches.entries import LineAnswers
from buddymoe_ray.serve.batches.journal import Journal, JournalEntry
from buddymoe_ray.serve.batches.lines import BatchInput, BatchLine, LineError
from buddymoe_ray.serve.batches.places import Places
from buddymoe_ray.serve.batches.records import BatchErrors, BatchObject, BatchProblem, Moment, RequestCounts
from buddymoe_ray.serve.batches.store import FileStore, Kept
from buddymoe_ray.serve.calls import Call, ModelNames
from buddymoe_ray.serve.reading_bodies import apart
from buddymoe_ray.serve.refusals import WORKER_LOST, failure
from buddymoe_ray.serve.resume import FIRST_PAUSE, ResumeLimits, WorkerLost, resumable
from buddymoe_ray.serve.streaming import Answer
from buddymoe_ray.serve.tenants import Foreseen, Tenants, Visit
from buddymoe_ray.serve.work import Refusal, Reply, Work, Workers

__all__ = ["BatchJob", "LineService"]

log = logging.getLogger(__name__)

LONGEST_PAUSE = 2.0  # seconds between two tries of a line
SYNC_SECONDS = 0.5
MOST_PROBLEMS = 50
ENDS: dict[str, tuple[Moment, str]] = {
    "batch_cancelled": ("cancelled", "the batch was cancelled before this line was answered"),
    "batch_expired": ("expired", "the batch's time was over before this line was answered"),
    "key_revoked": ("cancelled", "the API key of this batch was revoked before this line was answered"),
    "files_full": ("completed", "the disk's share for files was used up before this line was answered"),
}
"""What may end a batch before its last line: the state it is then in, and what its other lines say."""


@dataclass(frozen=True, kw_only=True)
class LineService:
    """Who answers lines: workers, whose places all batches share, within the limits of `tenants`. A line may take
    `seconds`, and is answered with the loss of its worker when it met with that more often than `limits` let it
    move."""

    workers: Workers
    tenants: Tenants
    names: ModelNames
    limits: ResumeLimits
    seconds: float
    default_max_tokens: int
    binding: str = ""
    places: Places = field(default_factory=Places)

    async def turn(self, call: Call, line: BatchLine, owner: str, *, again: bool = False) -> Visit:
        """Wait until its owner's limits allow a line. Where the service stops none begins."""
        while self.tenants.closed:
            await asyncio.sleep(LONGEST_PAUSE)
        tokens = Foreseen.of(call.work, line.body, default_max_tokens=self.default_max_tokens)
        return await self.tenants.named(owner).turn(tokens, again=again)

    async def answer(
        self, answers: LineAnswers, at: int, line: BatchLine, owner: str, call: Call, visit: Visit
    ) -> JournalEntry:
        """A line's reply to a call whose turn it is, or why it has none; however long it takes until there is room."""
        lost, pause = 0, FIRST_PAUSE

        async def attempt(work: Work) -> AsyncGenerator[Reply, None]:
            nonlocal lost
            try:
                async for reply in self.workers.generate(work):
                    lost += isinstance(reply, Refusal) and reply.code == WORKER_LOST
                    yield reply
            except WorkerLost:
                lost += 1
                raise

        while True:
            work = self.tenants.named(owner).own(replace(call.work, gives_way=True, binding=self.binding))
            replies = visit.metered(resumable(work, attempt, self.limits, seconds=self.seconds), work)
            answer = Answer(replies=replies, renderer=call.renderer, n=work.n, choices=work.choices)
            whole = await answer.whole()
            await answer.drain()
            if not isinstance(whole, Refusal) or whole.status not in (429, 503) or lost > self.limits.moves:
                return answers.replied(at, line, whole)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            opened = await apart(partial(answers.open, at, line), line.body)  # a renderer writes one reply
            assert isinstance(opened, Call), f"line {at} was a request before"
            call, visit = opened, await self.turn(opened, line, owner, again=True)


class BatchJob:
    """A batch that runs in this process, whose `owner` kept it in `store`."""

    def __init__(self, batch: BatchObject, owner: str, store: FileStore, service: LineService) -> None:
        self._batch, self._owner, self._store, self._service = batch, owner, store, service
        self._journal: Journal | None = None
        self._saving = asyncio.Lock()
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        if batch.status == "cancelling":
            self._end("batch_cancelled")

    @property
    def batch(self) -> BatchObject:
        """The batch as of now."""
        if self._journal is None:
            return self._batch
        done, ok = self._journal.finished, self._journal.succeeded
        counts = {"completed": ok, "failed": done - ok}
        return self._batch.model_copy(update={"request_counts": self._batch.request_counts.model_copy(update=counts)})

    async def cancel(self) -> None:
        """Answer no more lines; what is answered is kept."""
        await self._come("cancelling")
        self._end("batch_cancelled")

    async def run(self) -> None:
        """To the end. Raises BuddyMoEError when another process runs it, or the disk fails: then another time."""
        try:
            source = await asyncio.to_thread(BatchInput, self._store.data(self._batch.input_file_id))
        except ConfigError as error:
            return await self._fail([BatchProblem(code="invalid_file", message=str(error))])
        with closing(source):
            if self._batch.status == "validating":
                problems = await asyncio.to_thread(_problems, source, self._batch.endpoint)
                if problems:
                    return await self._fail(problems)
            path, binding = self._store.data(self._batch.id), {"input": source.digest, "batch": self._batch.id}
            opened = await asyncio.to_thread(partial(Journal.open, path, binding, count=len(source)))
            with closing(opened) as self._journal:
                if self._store.find(BatchObject, self._batch.id, None).finished:  # who had the journal finished it
                    return self._journal.remove()
                self._batch = self._batch.model_copy(update={"request_counts": RequestCounts(total=len(source))})
                if self._batch.status == "validating":
                    await self._come("in_progress")
                moment = await self._answer(source, self._journal)
                await self._finish(self._journal, moment)

    async def _answer(self, source: BatchInput, journal: Journal) -> Moment:
        """Until every line has its entry; why some were not answered, if so."""
        answers = LineAnswers(source, self._service.names)
        lines = asyncio.create_task(self._lines(source, answers, journal))
        sync = asyncio.create_task(self._sync(journal))
        try:
            left = max(0.0, self._batch.expires_at - time.time())
            waited: set[asyncio.Future[Any]] = {lines, sync, self._ended}
            await asyncio.wait(waited, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            lines.cancel()
            sync.cancel()
            ends = await asyncio.gather(lines, sync, return_exceptions=True)
            await asyncio.to_thread(journal.sync)
        for error in ends:
            if isinstance(error, ExceptionGroup):
                raise error.exceptions[0]
            if isinstance(error, Exception):
                raise error
        if journal.finished == len(source):
            return "completed"
        code = self._ended.result() if self._ended.done() else "batch_expired"
        moment, said = ENDS[code]
        for at in range(len(source)):
            if not journal.has(at):
                unanswered = LineError(custom_id=source.read(at).custom_id, code=code, message=said)
                journal.append(answers.failed(at, unanswered))
        return moment

    async def _lines(self, source: BatchInput, answers: LineAnswers, journal: Journal) -> None:
        """Answer what the journal has not, each line when its owner's limits allow it and in a place of its own."""

        async def one(at: int, line: BatchLine, call: Call, visit: Visit) -> None:
            try:
                entry = await self._service.answer(answers, at, line, self._owner, call, visit)
            except Exception:  # whatever is wrong with one line, the others go on
                log.exception("line %d of %s failed", source.number(at), self._batch.id)
                entry = answers.replied(at, line, failure())
            finally:
                self._service.places.leave()
            journal.append(entry)

        async with asyncio.TaskGroup() as group:
            for at in range(len(source)):
                if journal.has(at):
                    continue
                line = source.read(at)
                if isinstance(line, LineError):
                    journal.append(answers.failed(at, line))
                    continue
                call = await apart(partial(answers.open, at, line), line.body)
                if isinstance(call, Refusal):
                    journal.append(answers.replied(at, line, call))
                    continue
                visit = await self._service.turn(call, line, self._owner)
                try:
                    await self._service.places.take()
                except BaseException:
                    visit.end()
                    raise
                group.create_task(one(at, line, call, visit))

    async def _sync(self, journal: Journal) -> None:
        """Make entries durable now and then, as long as there is room to write all of them once more at the end, and
        its key is good."""
        while True:
            if self._service.tenants.revoked(self._owner):
                self._end("key_revoked")
            await asyncio.sleep(SYNC_SECONDS)
            await asyncio.to_thread(journal.sync)
            if await asyncio.to_thread(self._store.room) < journal.size:
                self._end("files_full")

    async def _finish(self, journal: Journal, moment: Moment) -> None:
        """Put the answers where they are looked for, under names that are the same if it is done again."""
        await asyncio.to_thread(journal.sync)
        if moment == "completed":
            await self._come("finalizing")
        kept, ids = self._batch.output_expires_after, dict[str, str | None]()
        for name, good in (("output_file_id", True), ("error_file_id", False)):
            file = f"file-{hashlib.sha256(f'{self._batch.id}/{name}'.encode()).hexdigest()[:32]}"
            lines = (entry.data for entry in journal.entries() if (entry.status == 200) == good)
            add = partial(self._store.add_output, file, lines, owner=self._owner, expiry=kept)
            made = await asyncio.to_thread(add)
            ids[name] = None if made is None else made.id
        self._batch = self.batch
        await self._come(moment, **ids)
        journal.remove()

    async def _fail(self, problems: list[BatchProblem]) -> None:
        await self._come("failed", errors=BatchErrors(data=problems))

    async def _come(self, moment: Moment, **more: Any) -> None:
        self._batch = self._batch.at(moment, time.time(), **more)
        async with self._saving:
            await asyncio.to_thread(self._store.save, self._batch.id, Kept(owner=self._owner, record=self._batch))

    def _end(self, code: str) -> None:
        if not self._ended.done():
            self._ended.set_result(code)


def _problems(source: BatchInput, endpoint: str) -> list[BatchProblem]:
    """Lines that are no request to the endpoint; the first ones."""
    found: list[BatchProblem] = []
    for at in range(len(source)):
        line = source.read(at)
        if isinstance(line, LineError):
            found.append(BatchProblem(code=line.code, message=line.message, line=source.number(at)))
        elif line.endpoint.path != endpoint:
            message = f"url is {line.endpoint.path}, must be the batch's endpoint, {endpoint}. hint: one batch for each"
            found.append(BatchProblem(code="mismatched_url", message=message, line=source.number(at), param="url"))
        if len(found) == MOST_PROBLEMS:
            break
    return found
