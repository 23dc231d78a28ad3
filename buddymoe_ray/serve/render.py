"""Deltas written as OpenAI's replies and stream messages; one renderer per endpoint and call.

Knows neither HTTP nor workers. Invariant: the texts of a choice's chunks joined are the text of the whole reply.
On the token path: batches → `Renderer.chunk` / `Renderer.whole` → JSON bytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from buddymoe_ray.engine.answers import AnswerForm
from buddymoe_ray.serve.reading import ChatReading, server_event, token_counts, usage_body
from buddymoe_ray.serve.refusals import envelope
from buddymoe_ray.serve.replies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatReplyMessage,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    TokenLogprobBody,
    ToolCallBody,
    TopLogprobBody,
    UsageBody,
)
from buddymoe_ray.serve.work import Delta, Refusal, TokenText, known_logprob
from buddymoe_ray.types import Usage

__all__ = ["ChatRenderer", "CompletionRenderer", "ReplyHead", "Renderer"]


@dataclass(frozen=True, kw_only=True)
class ReplyHead:
    """What every message of one reply repeats; `repeats` is what it does of its request."""

    id: str
    created: int
    model: str
    include_usage: bool = False
    logprobs: bool = False
    repeats: Mapping[str, Any] = field(default_factory=dict)


class Renderer(Protocol):
    """How one endpoint writes its answer."""

    def read_as(self, form: AnswerForm | None) -> None:
        """From now on texts are read so, if not None."""
        ...

    def chunks(self, delta: Delta, so_far: Usage | None = None) -> list[bytes]:
        """The server-sent events for one delta, perhaps with the tokens used so far."""
        ...

    def closing(self, usage: Usage) -> bytes:
        """The last events of a stream whose choices have all ended."""
        ...

    def failed(self, refusal: Refusal) -> bytes:
        """The last event of a stream that cannot go on."""
        ...

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> bytes:
        """The reply of a call that does not stream; one merged delta per choice."""
        ...


class ChatRenderer(ChatReading):
    """/v1/chat/completions."""

    def __init__(self, head: ReplyHead) -> None:
        super().__init__(head.id)
        self.head = head
        self._opened: set[int] = set()

    def chunks(self, delta: Delta, so_far: Usage | None = None) -> list[bytes]:
        """A chat.completion.chunk; a choice's first one carries the role. A call is told once it is whole, and the end
        after it: clients take a call for whole when something else comes. While one is written nothing is told, unless
        tokens are: clients take every chunk for tokens."""
        content, reasoning, calls = self.read(delta)
        added: dict[str, Any] = {} if delta.choice in self._opened else {"role": "assistant"}
        self._opened.add(delta.choice)
        if content or self.plain or added:
            added["content"] = content
        if reasoning:
            added["reasoning_content"] = reasoning
        if calls:
            added["tool_calls"] = calls
        reason, usage = self.reason(delta), None if so_far is None else token_counts(so_far)
        if not added and reason is None and usage is None and not self.head.logprobs:
            return []
        choice = ChatChunkChoice(
            index=delta.choice,
            delta=ChatDelta(**added),
            logprobs=self._logprobs(delta),
            finish_reason=None if calls else reason,
        )
        told = [server_event(self._message([choice], usage))]
        if calls and reason is not None:
            end = ChatChunkChoice(index=delta.choice, delta=ChatDelta(), logprobs=None, finish_reason=reason)
            told.append(server_event(self._message([end], usage)))
        return told

    def closing(self, usage: Usage) -> bytes:
        """A chunk without choices, if usage was asked for, and [DONE]."""
        return _closing(self._message([], usage_body(usage)) if self.head.include_usage else None)

    def failed(self, refusal: Refusal) -> bytes:
        """An error message; no [DONE] follows it."""
        return server_event(envelope(refusal))

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> bytes:
        """A chat.completion."""
        choices = [
            ChatChoice(
                index=delta.choice,
                message=self._whole_message(delta),
                logprobs=self._logprobs(delta),
                finish_reason=_told(self.reason(delta)),
            )
            for delta in sorted(deltas, key=lambda delta: delta.choice)
        ]
        return ChatCompletion(
            id=self.head.id,
            object="chat.completion",
            created=self.head.created,
            model=self.head.model,
            choices=choices,
            usage=usage_body(usage),
        ).to_json()

    def _whole_message(self, delta: Delta) -> ChatReplyMessage:
        content, reasoning, calls = self.read(delta)
        more: dict[str, Any] = {"reasoning_content": reasoning} if reasoning else {}
        if calls:
            more["tool_calls"] = [ToolCallBody(id=call.id, type=call.type, function=call.function) for call in calls]
        return ChatReplyMessage(
            role="assistant", content=content if content or not more else None, refusal=None, **more
        )

    def _message(self, choices: list[ChatChunkChoice], usage: UsageBody | None) -> bytes:
        head = self.head
        chunk = ChatChunk(
            id=head.id, object="chat.completion.chunk", created=head.created, model=head.model, choices=choices
        )
        if head.include_usage:
            chunk = chunk.model_copy(update={"usage": usage})
        return chunk.to_json()

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        if not self.head.logprobs:
            return None
        content = [
            TokenLogprobBody(
                token=_text(entry),
                logprob=known_logprob(entry),
                bytes=list(entry.data),
                top_logprobs=[
                    TopLogprobBody(token=_text(top), logprob=known_logprob(top), bytes=list(top.data))
                    for top in entry.top
                ],
                standins=entry.standins,
            )
            for entry in delta.logprobs
        ]
        return ChatLogprobs(content=content, refusal=None)


class CompletionRenderer:
    """/v1/completions."""

    def __init__(self, head: ReplyHead) -> None:
        self.head = head
        self._held: dict[int, list[TokenText]] = defaultdict(list)  # by choice: where they begin is not known yet

    def read_as(self, form: AnswerForm | None) -> None:
        """Texts of completions are texts."""
        assert form is None, "a completion was planned as a conversation's answer"

    def chunks(self, delta: Delta, so_far: Usage | None = None) -> list[bytes]:
        """A text_completion with what the delta adds."""
        usage = None if so_far is None else token_counts(so_far)
        return [server_event(self._message([self._choice(delta)], usage))]

    def closing(self, usage: Usage) -> bytes:
        """A chunk without choices, if usage was asked for, and [DONE]."""
        return _closing(self._message([], usage_body(usage)) if self.head.include_usage else None)

    def failed(self, refusal: Refusal) -> bytes:
        """An error message; no [DONE] follows it."""
        return server_event(envelope(refusal))

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> bytes:
        """A text_completion."""
        choices = [self._choice(delta) for delta in sorted(deltas, key=lambda delta: delta.choice)]
        assert all(choice.finish_reason for choice in choices), "a whole reply with a choice that has not ended"
        return self._message(choices, usage_body(usage))

    def _choice(self, delta: Delta) -> CompletionChoice:
        return CompletionChoice(
            index=delta.choice, text=delta.text, logprobs=self._logprobs(delta), finish_reason=delta.finish_reason
        )

    def _message(self, choices: list[CompletionChoice], usage: UsageBody | None) -> bytes:
        head = self.head
        completion = Completion(
            id=head.id, object="text_completion", created=head.created, model=head.model, choices=choices
        )
        if usage is not None or head.include_usage:
            completion = completion.model_copy(update={"usage": usage})
        return completion.to_json()

    def _logprobs(self, delta: Delta) -> CompletionLogprobs | None:
        if not self.head.logprobs:
            return None
        held, known = self._held[delta.choice] + list(delta.logprobs), len(delta.text_offsets)
        entries, self._held[delta.choice] = held[:known], held[known:]
        assert delta.finish_reason is None or len(entries) == len(held) == known, (
            f"{known} offsets of {len(held)} tokens"
        )
        return CompletionLogprobs(
            tokens=[_text(entry) for entry in entries],
            token_logprobs=[entry.logprob for entry in entries],
            top_logprobs=[_alternatives(entry) for entry in entries],
            text_offset=list(delta.text_offsets),
        )


def _alternatives(chosen: TokenText) -> dict[str, float] | None:
    """By text, the chosen token first; None for a prompt's first. Of two that read alike the later one is called
    `token_id:` and its id."""
    if chosen.logprob is None:
        return None
    found = {_text(chosen): chosen.logprob}
    for top in chosen.top:
        if top.token_id != chosen.token_id:
            text = _text(top)
            found[f"token_id:{top.token_id}" if text in found else text] = known_logprob(top)
    return found


def _text(entry: TokenText) -> str:
    """A token as text; half a character shows as U+FFFD, its bytes are beside it."""
    return entry.data.decode("utf-8", "replace")


def _told(reason: str | None) -> str:
    assert reason is not None, "a whole reply with a choice that has not ended"
    return reason


def _closing(usage: bytes | None) -> bytes:
    return b"".join(server_event(message) for message in (usage, b"[DONE]") if message is not None)
