"""A worker's replies as one HTTP answer: either everything, or server-sent events as they come.

Knows renderers and refusals, neither routes nor ray. Invariant: the worker's stream is closed, and its work with it
cancelled, however the answer ends.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from buddymoe_ray.serve.deltas import merge, total_usage
from buddymoe_ray.serve.refusals import failure
from buddymoe_ray.serve.render import Renderer
from buddymoe_ray.serve.work import Batch, Delta, Refusal, Reply
from buddymoe_ray.types import Usage

__all__ = ["Answer", "whole_reply"]


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
    """One call's answer in the making. `n` is the number of choices per prompt, `choices` of all together.

    With `usage_so_far` every chunk tells the tokens used until then; the worker must be asked to report its prompts.
    """

    replies: AsyncGenerator[Reply, None]
    renderer: Renderer
    n: int
    choices: int
    usage_so_far: bool = False
    _ended: list[Delta] = field(default_factory=list)
    _used: Usage = field(default_factory=Usage)

    async def whole(self) -> bytes | Refusal:
        """The body of a reply that does not stream."""
        deltas: list[Delta] = []
        async with aclosing(self.replies) as replies:
            async for reply in replies:
                if isinstance(reply, Refusal):
                    return reply
                self.renderer.read_as(reply.answer)
                deltas.extend(reply.deltas)
        return whole_reply(deltas, self.renderer, n=self.n, choices=self.choices)

    async def events(self) -> AsyncIterator[bytes] | Refusal:
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
        """Chunks in one write per batch. A stream that fails ends with an error message."""
        async with aclosing(self.replies) as replies:
            refusal, chunks = self._chunks(first)
            yield chunks
            if refusal is None:
                async for reply in replies:
                    refusal, chunks = self._chunks(reply)
                    yield chunks
                    if refusal is not None:
                        break
            if refusal is None:
                yield self._closing()

    def _chunks(self, reply: Reply) -> tuple[Refusal | None, bytes]:
        if isinstance(reply, Refusal):
            return reply, self.renderer.failed(reply)
        messages: list[bytes] = []
        self.renderer.read_as(reply.answer)
        if reply.prompt_token_ids:
            self._used = replace(self._used, prompt_tokens=sum(map(len, reply.prompt_token_ids)))
        for delta in reply.deltas:
            if _failed(delta):
                return (refusal := failure(delta)), b"".join([*messages, self.renderer.failed(refusal)])
            made = self._used.completion_tokens + len(delta.token_ids)
            self._used = replace(self._used, completion_tokens=made)
            messages += self.renderer.chunks(delta, self._used if self.usage_so_far else None)
            if delta.finish_reason is not None:
                self._ended.append(delta)
        return None, b"".join(messages)

    def _closing(self) -> bytes:
        if len(self._ended) != self.choices:
            return self.renderer.failed(failure())
        return self.renderer.closing(total_usage(self._ended, n=self.n))


def _failed(delta: Delta) -> bool:
    return delta.finish_reason in ("error", "cancelled")
