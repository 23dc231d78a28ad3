"""`Client`: a running service as Python, by ray handle: no HTTP, no JSON, and the same tokens.

Knows the worker deployment of an app, not the engine. Must run where ray reaches the cluster; the HTTP address does not
matter to it. On the token path it stands beside the ingress: prompt → `Work` → worker → events.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Generator, Iterable, Mapping, Sequence
from contextlib import aclosing, closing, suppress
from dataclasses import fields
from itertools import count
from typing import Any

from buddymoe_ray.engine.validate import plain_tokens
from buddymoe_ray.errors import BuddyMoEError, RequestError
from buddymoe_ray.observe import EngineSnapshot
from buddymoe_ray.serve.handles import APP_NAME, connect
from buddymoe_ray.serve.prompts import usable
from buddymoe_ray.serve.refusals import error_of, failure
from buddymoe_ray.serve.resume import ResumeLimits, resumable
from buddymoe_ray.serve.wire_parsing import checked
from buddymoe_ray.serve.wire_parts import Message
from buddymoe_ray.serve.work import Batch, ChatMessage, Delta, Refusal, Reply, Terms, Work, WorkerInfo, known_logprob
from buddymoe_ray.types import EngineResult, SamplingParams, TokenEvent, TokenLogprob, Usage

__all__ = ["Client"]

MessageDict = Mapping[str, Any]
FLUSH_SECONDS = 0.025


class Client:
    """Talks to a running app. No API key is asked: who reaches ray owns the cluster.

    >>> client = Client()
    >>> client.generate("def add(a, b):", max_tokens=16, temperature=0.0).text
    >>> for event in client.stream("import os", max_tokens=16): print(event.text, end="")
    >>> client.chat([{"role": "user", "content": "What is a list?"}]).text

    `await agenerate(...)`, `await achat(...)` and `async for event in astream(...)` are the same for asyncio. A prompt
    is text, a list of token ids, or (for the streams) a list of messages.
    Keywords are fields of SamplingParams, and `mode`, `budget`, `record`, `replay`, `cache_salt` of
    `types.GenerationRequest`.

    Args:
        app_name: the application's name in its YAML.
        address: ray's address, used when this process is not connected yet.

    Raises:
        ConfigError: no such service runs there.
    """

    def __init__(self, app_name: str = APP_NAME, *, address: str = "auto") -> None:
        self._workers = connect(app_name, address=address)

    def info(self) -> WorkerInfo:
        """What is served: model name and limits."""
        return self._workers.info_sync()

    def snapshots(self) -> tuple[EngineSnapshot, ...]:
        """The state of the engine of every worker that answers."""
        return self._workers.snapshots_sync()

    def generate(self, prompt: str | Sequence[int], **sampling: Any) -> EngineResult:
        """Continue `prompt`; the whole result.

        Raises:
            RequestError: the request is not usable.
            CapacityError: the service is full, or workers died and no other took the request; retry later.
        """
        work = usable(_work(prompt, sampling, flush_seconds=None))
        with closing(_in_a_loop(self._answer(work))) as replies:
            return _result(work, replies)

    def chat(self, messages: Sequence[MessageDict], **sampling: Any) -> EngineResult:
        """Answer a conversation: messages as chat completions take them, `{"role": ..., "content": ...}`."""
        work = usable(_work(_conversation(messages), sampling, flush_seconds=None))
        with closing(_in_a_loop(self._answer(work))) as replies:
            return _result(work, replies)

    def stream(
        self, prompt: str | Sequence[int] | Sequence[MessageDict], **sampling: Any
    ) -> Generator[TokenEvent, None, None]:
        """Continue a prompt or a conversation, event by event. Closing the generator cancels the request."""
        work = usable(_work(prompt, sampling, flush_seconds=FLUSH_SECONDS))
        with closing(_in_a_loop(self._answer(work))) as replies:
            for reply in replies:
                yield from _events(work, reply)

    async def agenerate(self, prompt: str | Sequence[int], **sampling: Any) -> EngineResult:
        """`generate` for asyncio; cancelling the task cancels the request."""
        return await self._collect(usable(_work(prompt, sampling, flush_seconds=None)))

    async def achat(self, messages: Sequence[MessageDict], **sampling: Any) -> EngineResult:
        """`chat` for asyncio."""
        return await self._collect(usable(_work(_conversation(messages), sampling, flush_seconds=None)))

    async def astream(
        self, prompt: str | Sequence[int] | Sequence[MessageDict], **sampling: Any
    ) -> AsyncGenerator[TokenEvent, None]:
        """`stream` for asyncio."""
        work = usable(_work(prompt, sampling, flush_seconds=FLUSH_SECONDS))
        async with aclosing(self._answer(work)) as replies:
            async for reply in replies:
                for event in _events(work, reply):
                    yield event

    def _answer(self, work: Work) -> AsyncGenerator[Reply, None]:
        return resumable(work, self._workers.generate, ResumeLimits())

    async def _collect(self, work: Work) -> EngineResult:
        async with aclosing(self._answer(work)) as replies:
            return _result(work, [reply async for reply in replies])


def _work(
    prompt: str | Sequence[int] | Sequence[MessageDict], options: Mapping[str, Any], *, flush_seconds: float | None
) -> Work:
    terms = {f.name for f in fields(Terms)}
    known = {f.name for f in fields(SamplingParams)} - {"prompt_logprobs"} | terms | {"cache_salt"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise RequestError(
            f"option is {unknown[0]!r}, must be one of {', '.join(sorted(known))}. hint: check spelling",
            param=unknown[0],
        )
    given = {name: value for name, value in options.items() if name not in terms | {"cache_salt"}}
    conversation = isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], Mapping)
    limit = options.get("max_tokens", None if conversation else SamplingParams.max_tokens)
    return Work(
        request_id=f"client-{uuid.uuid4().hex}",
        prompts=() if conversation else (prompt if isinstance(prompt, str) else plain_tokens("prompt", prompt),),
        messages=tuple(map(_message, count(), prompt)) if conversation else (),
        sampling=SamplingParams(**given),
        given=frozenset(given),
        terms=Terms(**{name: value for name, value in options.items() if name in terms}),
        max_tokens=limit,
        flush_seconds=flush_seconds,
        report_prompts=True,
        cache_salt=options.get("cache_salt", ""),
    )


def _in_a_loop(replies: AsyncGenerator[Reply, None]) -> Generator[Reply, None, None]:
    """The same for callers without an event loop: they are given one of their own, which runs while a reply is awaited.

    Raises RequestError where a loop runs already, as in a notebook: it would stand still.
    """
    with suppress(RuntimeError):
        asyncio.get_running_loop()
        raise RequestError("an event loop runs here, which must not stand still. hint: await agenerate() or achat()")
    with asyncio.Runner() as runner:

        async def following() -> Reply | None:
            return await anext(replies, None)

        async def close() -> None:
            await replies.aclose()

        try:
            while (reply := runner.run(following())) is not None:
                yield reply
        finally:
            runner.run(close())


def _conversation(messages: object) -> Sequence[MessageDict]:
    if not isinstance(messages, list | tuple) or not messages or not isinstance(messages[0], Mapping):
        raise RequestError(
            'messages must be a list of {"role": ..., "content": ...}, at least one. hint: generate() takes text',
            param="messages",
        )
    return messages


def _message(at: int, message: Any) -> ChatMessage:
    """As the body of a chat completion has it."""
    if not isinstance(message, Mapping):
        raise RequestError(f"messages[{at}] is {message!r:.80}, must be a mapping. hint: see chat()", param="messages")
    try:
        return checked(dict(message), Message).record()
    except RequestError as error:
        raise RequestError(f"messages[{at}].{error}", param="messages") from None


def _events(work: Work, reply: Reply) -> list[TokenEvent]:
    """A reply's deltas in the engine's own words; raises what the service refused or failed with."""
    if isinstance(reply, Refusal):
        raise error_of(reply)
    return [_event(work, delta) for delta in reply.deltas]


def _event(work: Work, delta: Delta) -> TokenEvent:
    if delta.finish_reason in ("error", "cancelled"):
        raise BuddyMoEError(failure(delta).message)
    return TokenEvent(
        request_id=work.request_id,
        token_ids=delta.token_ids,
        text=delta.text,
        logprobs=tuple(
            TokenLogprob(
                token_id=entry.token_id,
                logprob=known_logprob(entry),
                top=tuple((top.token_id, known_logprob(top)) for top in entry.top),
                standins=entry.standins,
            )
            for entry in delta.logprobs
        ),
        finish_reason=delta.finish_reason,
        usage=delta.usage,
    )


def _result(work: Work, replies: Iterable[Reply]) -> EngineResult:
    prompt_ids: tuple[int, ...] = ()
    events: list[TokenEvent] = []
    for reply in replies:
        events.extend(_events(work, reply))
        if isinstance(reply, Batch) and reply.prompt_token_ids:
            prompt_ids = reply.prompt_token_ids[0]
    if not events or events[-1].finish_reason is None:
        raise BuddyMoEError("the worker's stream ended before the request did. hint: see the service's log")
    return EngineResult(
        request_id=work.request_id,
        prompt_token_ids=prompt_ids,
        token_ids=tuple(token for event in events for token in event.token_ids),
        text="".join(event.text for event in events),
        finish_reason=events[-1].finish_reason,
        usage=events[-1].usage or Usage(),
        logprobs=tuple(logprob for event in events for logprob in event.logprobs),
    )
