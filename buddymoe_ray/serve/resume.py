"""Streams that outlive their worker: the transcript of one call, and its continuation on another worker.

Kept where the call is made (the ingress, or a Python client's process): the tokens of every choice that has not ended.
When the worker dies, the others are asked for the rest; they compute prompt and tokens anew and go on. A worker that is
cut off dies for nobody, but falls silent: it says an empty batch when it has no tokens to tell. Invariant: the caller
sees every token once, in order, and one end per choice. Knows neither ray nor engines; `handles` makes attempts.
A worker whose engine died says so and ends, and its streams move like those of a killed one.
Not resumable: what runs through the ingress, the HTTP proxy or the head node when those die, and a request that records
or replays its stand-ins, once it has begun to answer.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace

from buddymoe_ray.serve.refusals import STOPPED, WORKER_LOST, failure, timed_out, unavailable
from buddymoe_ray.serve.work import Batch, Refusal, Reply, ResumedChoice, Work

__all__ = ["Attempt", "ResumeLimits", "Transcript", "WorkerLost", "resumable"]

log = logging.getLogger(__name__)

Attempt = Callable[[Work], AsyncGenerator[Reply, None]]
"""One worker's answer to some work. Raises WorkerLost when the worker goes away; closing it cancels the work."""

_SILENT = "the worker is silent"
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


async def resumable(
    work: Work, attempt: Attempt, limits: ResumeLimits, *, seconds: float = math.inf
) -> AsyncGenerator[Reply, None]:
    """Answer `work` by as many attempts as it takes, within `seconds` in all. Closing the generator closes the attempt
    that runs.

    Ends with a Refusal when the work cannot go on: it took too long, it was moved too often, no worker took it in time,
    or it must not move.
    """
    now = asyncio.get_running_loop().time
    deadline, search_end, quiet = now() + seconds, math.inf, math.inf  # until when another worker is looked for
    transcript, moves, pause = Transcript(work), limits.moves, FIRST_PAUSE
    source, searching = attempt(work), False
    try:
        while True:
            reply, lost = await _next(source, min(deadline, search_end, now() + quiet))
            if lost == _SILENT and now() >= deadline:
                yield timed_out(seconds)
                return
            if not lost and not (searching and _full(reply)):
                if not isinstance(reply, Batch):
                    if reply is not None or searching:
                        yield reply or failure()
                    return
                searching, search_end, quiet = False, math.inf, limits.silence_seconds
                if reply.deltas:
                    transcript.note(reply)
                    yield reply
                continue
            await source.aclose()
            if transcript.ended:
                return
            if not searching:
                log.warning("%s: %s after %d tokens", work.request_id, lost, transcript.tokens)
                search_end, pause, quiet = now() + limits.wait_seconds, FIRST_PAUSE, limits.silence_seconds
            else:
                await asyncio.sleep(max(0.0, min(pause, search_end - now(), deadline - now())))
                pause = min(2 * pause, LONGEST_PAUSE)
            counts = bool(lost) and not (searching and (lost == _SILENT or reply is not None))
            reason = transcript.obstacle() or _exhausted(limits, moves=moves, counts=counts, over=now() >= search_end)
            if reason is not None:
                yield unavailable(reason, retry_after_seconds=limits.retry_after_seconds)
                return
            moves, searching = moves - counts, True
            source = attempt(transcript.rest())
    finally:
        await source.aclose()


async def _next(source: AsyncGenerator[Reply, None], until: float) -> tuple[Reply | None, str]:
    """What a worker says next, None at its end; and why it is lost, if it is: dead, or silent until then."""
    try:
        async with asyncio.timeout_at(None if until == math.inf else until) as limit:
            reply = await anext(source, None)
    except TimeoutError:
        if not limit.expired():  # somebody else's
            raise
        return None, _SILENT
    except WorkerLost as error:
        return None, str(error)
    if isinstance(reply, Refusal) and reply.code == WORKER_LOST:
        return reply, reply.message
    return reply, ""


def _full(reply: Reply | None) -> bool:
    return isinstance(reply, Refusal) and reply.status == 503 and reply.code != STOPPED  # or not there yet


def _exhausted(limits: ResumeLimits, *, moves: int, counts: bool, over: bool) -> str | None:
    if counts and not moves:
        return f"the worker was lost and the request has moved {limits.moves} times"
    return f"the worker was lost and no other took the request in {limits.wait_seconds:g} s" if over else None
