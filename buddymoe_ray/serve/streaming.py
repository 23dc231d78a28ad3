"""A worker's replies as one HTTP answer: either everything, or server-sent events as they come.

Knows renderers and refusals, neither routes nor ray. Invariant: the worker's stream is closed, and its work with it
cancelled, however the answer ends. An answer that is whole is sent before that stream has ended, which takes as long as
a message: nobody waits for it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace

from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from buddymoe_ray.serve.deltas import merge, total_usage
from buddymoe_ray.serve.reading_bodies import Departure
from buddymoe_ray.serve.refusals import failure
from buddymoe_ray.serve.render import Renderer
from buddymoe_ray.serve.work import Batch, Delta, Refusal, Reply
from buddymoe_ray.types import Usage

__all__ = ["Answer", "EventStream", "whole_reply"]


def whole_reply(deltas: Iterable[Delta], renderer: Renderer, *, n: int, choices: int) -> bytes | Refusal:
    """The body of a reply that does not stream, of all its deltas; a choice that failed fails the call."""
    merged = merge(deltas)
    failed = next((delta for delta in merged if _failed(delta)), None)
    if failed is not None:
        return failure(failed)
    if len(merged) != choices or any(delta.finish_reason is None for delta in merged):
        return failure()
    return renderer.whole(merged, total_usage(merged, n=n))


@dataclass(kw_only=True)
class Answer:
    """One call's answer in the making. `n` is the number of choices per prompt, `choices` of all together. Once it is
    made `drain` must be called.

    With `usage_so_far` every chunk tells the tokens used until then; the worker must be asked to report its prompts.
    """

    replies: AsyncGenerator[Reply, None]
    renderer: Renderer
    n: int
    choices: int
    usage_so_far: bool = False
    over: bool = False
    _ended: list[Delta] = field(default_factory=list)
    _prompt_tokens: int = 0
    _made: int = 0

    async def whole(self) -> bytes | Refusal:
        """The body of a reply that does not stream."""
        made = None
        try:
            made = await self._whole()
        finally:
            if not isinstance(made, bytes):
                await self.replies.aclose()
        return made

    async def drain(self) -> None:
        """See the worker's stream to its end: to close it before would cancel a call that is done."""
        async with aclosing(self.replies) as replies:
            async for _ in replies:
                pass

    async def events(self) -> AsyncGenerator[bytes, None] | Refusal:
        """Server-sent events, or a refusal when that is the first thing the worker says.

        The first reply is awaited here, before a status is sent: what fails at once fails with its own status.
        """
        try:
            first = await anext(self.replies, None)
        except BaseException:
            await self.replies.aclose()
            raise
        if first is None or isinstance(first, Refusal):
            await self.replies.aclose()
            return first or failure()
        failed = next((delta for delta in first.deltas if _failed(delta)), None)
        if failed is not None and not failed.token_ids:
            await self.replies.aclose()
            return failure(failed)
        return self._events(first)

    async def _events(self, first: Batch) -> AsyncGenerator[bytes, None]:
        """Chunks in one write per batch, with the last one the end. A stream that fails ends with an error message."""
        try:
            yield self._chunks(first)
            while not self.over:
                reply = await anext(self.replies, None)
                if told := self._chunks(reply or failure()):
                    yield told
        finally:
            if len(self._ended) < self.choices:  # nobody wants the others any more
                await self.replies.aclose()

    async def _whole(self) -> bytes | Refusal:
        deltas: list[Delta] = []
        while sum(delta.finish_reason is not None for delta in deltas) < self.choices:
            reply = await anext(self.replies, None)
            if reply is None or isinstance(reply, Refusal):
                return reply or failure()
            self.renderer.read_as(reply.answer)
            deltas.extend(reply.deltas)
        return whole_reply(deltas, self.renderer, n=self.n, choices=self.choices)

    def _chunks(self, reply: Reply) -> bytes:
        if isinstance(reply, Refusal):
            return self._broken(reply)
        messages: list[bytes] = []
        self.renderer.read_as(reply.answer)
        if reply.prompt_token_ids:
            self._prompt_tokens = sum(map(len, reply.prompt_token_ids))
        failed: list[Delta] = []
        for delta in reply.deltas:
            if _failed(delta):
                failed.append(delta)
                if not delta.token_ids:
                    continue
                delta = replace(delta, finish_reason=None, usage=None, error=None)  # what it said before it failed
            self._made += len(delta.token_ids)
            messages += self.renderer.chunks(delta, self._used() if self.usage_so_far else None)
            if delta.finish_reason is not None:
                self._ended.append(delta)
        if failed:
            messages.append(self._broken(failure(failed[0])))
        elif len(self._ended) == self.choices:
            self.over = True
            messages.append(self.renderer.closing(total_usage(self._ended, n=self.n)))
        return b"".join(messages)

    def _used(self) -> Usage:
        return Usage(prompt_tokens=self._prompt_tokens, completion_tokens=self._made)

    def _broken(self, refusal: Refusal) -> bytes:
        self.over = True
        return self.renderer.failed(refusal)


class EventStream(StreamingResponse):
    """The events of an answer, whose last one ends the body, for a client until its `departure`."""

    def __init__(
        self,
        answer: Answer,
        events: AsyncGenerator[bytes, None],
        headers: Mapping[str, str],
        departure: Departure,
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._answer, self._events, self._departure = answer, events, departure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them, then see the worker's stream to its end."""
        async with aclosing(self._events):
            with suppress(ClientDisconnect):
                await self._departure.awaited(self.stream_response(send))
        self._departure.over()
        await self._answer.drain()

    async def stream_response(self, send: Send) -> None:
        """A message of ASGI for each piece: each is one of Serve's, too, and costs 2 ms of CPU on its way."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for piece in self._events:
            if self._answer.over:  # the server says of an answer that is sent, too, that its client left
                self._departure.over()
            await send({"type": "http.response.body", "body": piece, "more_body": not self._answer.over})


def _failed(delta: Delta) -> bool:
    return delta.finish_reason in ("error", "cancelled")
