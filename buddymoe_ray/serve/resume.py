"""Streams that outlive their worker: the transcript of one call, and its continuation on another worker.

Kept where the call is made (the ingress, or a Python client's process): the tokens of every choice that has not ended.
When the worker dies, the others are asked for the rest; they compute prompt and tokens anew and go on. A worker that is
cut off dies for nobody, but falls silent: it says an empty batch when it has no tokens to tell. Invariant: the caller
sees every token once, in order, and one end per choice. Knows neither ray nor engines; `handles` makes attempts.
Not resumable: what runs through the ingress, the HTTP proxy or the head node when those die; a request that records or
replays its uses, once it has begun to answer; and requests of a worker whose engine broke but whose process lives: it
says so, and the next engine might break by them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

from buddymoe_ray.serve.records import Batch, Refusal, Reply, ResumedChoice, Work
from buddymoe_ray.serve.refusals import failure, unavailable

__all__ = ["ResumeLimits", "Transcript", "WorkerLost", "resumable"]

log = logging.getLogger(__name__)

Attempt = Callable[[Work], AsyncGenerator[Reply, None]]
"""One worker's answer to some work. Raises WorkerLost when the worker goes away; closing it cancels the work."""

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0  # seconds between two tries to find a worker


class WorkerLost(Exception):
    """The worker that answered is gone."""


@dataclass(frozen=True, kw_only=True)
class ResumeLimits:
    """How far a call is followed.

    Args:
        moves: how often it may move to another worker; 0 ends it with the first lost one. The bound also protects a
            service from a request that its workers die of.
        wait_seconds: how long one move may wait for a worker that has room, a new one that still loads included.
        silence_seconds: how long a worker that has begun to answer may say nothing, and how long a worker may take to
            begin with what moves to it. Several of a worker's beats: one that only has much to do must not lose it.
        retry_after_seconds: what a call that cannot go on is told.
    """

    moves: int = 3
    wait_seconds: float = 120.0
    silence_seconds: float = 20.0
    retry_after_seconds: int = 2


class Transcript:
    """What a call's caller has so far: the tokens of each choice that has not ended."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._heard = False
        self._tokens: dict[int, list[int]] = {choice: [] for choice in range(work.choices)}

    @property
    def ended(self) -> bool:
        """Whether every choice has ended."""
        return not self._tokens

    @property
    def tokens(self) -> int:
        """Tokens of the choices that have not ended."""
        return sum(map(len, self._tokens.values()))

    def note(self, batch: Batch) -> None:
        """Take in what is about to be delivered."""
        self._heard = True
        for delta in batch.deltas:
            self._tokens[delta.choice] += delta.token_ids
            if delta.finish_reason is not None:
                del self._tokens[delta.choice]

    def rest(self) -> Work:
        """What is left to do, for another worker."""
        return replace(
            self._work,
            resume=tuple(ResumedChoice(choice=at, token_ids=tuple(ids)) for at, ids in self._tokens.items()),
            report_prompts=self._work.report_prompts and not self._heard,
        )

    def obstacle(self) -> str | None:
        """Why the rest cannot be done elsewhere, if it cannot."""
        terms = self._work.terms
        if self.tokens and (terms.record or terms.replay is not None):
            kind = "record" if terms.record else "replay"
            return f"the worker was lost after {self.tokens} tokens, and a request with buddymoe.{kind} cannot move"
        return None


async def resumable(work: Work, attempt: Attempt, limits: ResumeLimits) -> AsyncGenerator[Reply, None]:
    """Answer `work` by as many attempts as it takes. Closing the generator closes the attempt that runs.

    Ends with a Refusal when the work cannot go on: it was moved too often, no worker took it in time, or it must not
    move. Deadlines are the caller's: see `streaming.within`.
    """
    moves = _Moves(Transcript(work), attempt, limits)
    source: AsyncGenerator[Reply, None] | Refusal = attempt(work)
    begun = False
    while not isinstance(source, Refusal):
        try:
            async with aclosing(source), aclosing(_told(source, begun, limits.silence_seconds)) as replies:
                async for reply in replies:
                    if isinstance(reply, Batch):
                        moves.transcript.note(reply)
                    yield reply
            return
        except WorkerLost as error:
            if moves.transcript.ended:
                return
            log.warning("%s: %s after %d tokens", work.request_id, error, moves.transcript.tokens)
        source, begun = await moves.next(), True
    yield source


async def _told(replies: AsyncGenerator[Reply, None], begun: bool, silence: float) -> AsyncGenerator[Reply, None]:
    """What a worker says, without its beats. Raises WorkerLost when it falls silent (seconds) once it has begun."""
    while True:
        try:
            async with asyncio.timeout(silence if begun else None) as limit:
                reply = await anext(replies)
        except StopAsyncIteration:
            return
        except TimeoutError:
            if not limit.expired():  # somebody else's
                raise
            raise WorkerLost(f"the worker has been silent for {silence:g} s") from None
        begun = True
        if not isinstance(reply, Batch) or reply.deltas:
            yield reply


class _Moves:
    """Finds the next worker, within the limits."""

    def __init__(self, transcript: Transcript, attempt: Attempt, limits: ResumeLimits) -> None:
        self.transcript = transcript
        self._attempt, self._limits, self._left = attempt, limits, limits.moves

    async def next(self) -> AsyncGenerator[Reply, None] | Refusal:
        """A worker that has taken the rest of the work, or why there is none."""
        obstacle = self.transcript.obstacle()
        if obstacle is not None:
            return self._refused(obstacle)
        now = asyncio.get_running_loop().time
        begin, pause = now(), FIRST_PAUSE
        end, lost = begin + self._limits.wait_seconds, True
        while now() < end:
            if lost and self._left == 0:
                return self._refused(f"the worker was lost and the request has moved {self._limits.moves} times")
            self._left -= lost
            found, lost = await self._try(end)
            if found is not None:
                log.info("%s moved in %.0f ms", self.transcript.rest().request_id, 1e3 * (now() - begin))
                return found
            await asyncio.sleep(max(0.0, min(pause, end - now())))
            pause = min(2 * pause, LONGEST_PAUSE)
        return self._refused(f"the worker was lost and no other took the request in {self._limits.wait_seconds:g} s")

    async def _try(self, end: float) -> tuple[AsyncGenerator[Reply, None] | Refusal | None, bool]:
        """An attempt that was taken or refused for good, or None; and whether its worker was lost."""
        replies = self._attempt(self.transcript.rest())
        try:
            async with asyncio.timeout_at(min(end, asyncio.get_running_loop().time() + self._limits.silence_seconds)):
                first = await anext(replies, None)
        except TimeoutError:
            await replies.aclose()
            return None, False
        except WorkerLost:
            return None, True
        if isinstance(first, Batch):
            assert not first.deltas, "the first batch of resumed work says nothing, must be empty"
            return replies, False
        await replies.aclose()
        if first is not None and first.status == 503:  # full, or not there yet
            return None, False
        return first or failure(), False

    def _refused(self, reason: str) -> Refusal:
        return unavailable(reason, retry_after_seconds=self._limits.retry_after_seconds)
