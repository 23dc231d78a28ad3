"""Deltas written as OpenAI's replies and stream messages; one renderer per endpoint and call.

Knows neither HTTP nor workers. Invariant: the texts of a choice's chunks joined are the text of the whole reply.
On the token path: batches → `Renderer.chunk` / `Renderer.whole` → JSON bytes.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from buddymoe_ray.engine.answers import AnswerForm, AnswerPiece, AnswerReader
from buddymoe_ray.serve.replies import (
    BuddyUsage,
    CalibrationBody,
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
    FunctionBody,
    PromptTokensBody,
    StandinsBody,
    TokenLogprobBody,
    ToolCallBody,
    TopLogprobBody,
    UsageBody,
)
from buddymoe_ray.serve.work import Delta, TokenText, known_logprob
from buddymoe_ray.types import Usage

__all__ = ["ChatRenderer", "CompletionRenderer", "ReplyHead", "Renderer"]


@dataclass(frozen=True, kw_only=True)
class ReplyHead:
    """What every message of one reply repeats."""

    id: str
    created: int
    model: str
    include_usage: bool = False
    logprobs: bool = False


class Renderer(Protocol):
    """How one endpoint writes its answer."""

    def read_as(self, form: AnswerForm | None) -> None:
        """From now on texts are read so, if not None."""
        ...

    def chunks(self, delta: Delta, so_far: Usage | None = None) -> list[bytes]:
        """The stream messages for one delta, perhaps with the tokens used so far."""
        ...

    def usage_chunk(self, usage: Usage) -> bytes:
        """The last message of a stream that asked for usage."""
        ...

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> bytes:
        """The reply of a call that does not stream; one merged delta per choice."""
        ...


class ChatRenderer:
    """/v1/chat/completions."""

    def __init__(self, head: ReplyHead) -> None:
        self.head = head
        self._opened: set[int] = set()
        self._form: AnswerForm | None = None
        self._readers: dict[int, AnswerReader] = {}
        self._calls: dict[int, int] = defaultdict(int)  # by choice, how many were told

    def read_as(self, form: AnswerForm | None) -> None:
        """From now on texts are read so, if not None."""
        self._form = form or self._form

    def chunks(self, delta: Delta, so_far: Usage | None = None) -> list[bytes]:
        """A chat.completion.chunk; a choice's first one carries the role. A call is told once it is whole, and the end
        after it: clients take a call for whole when something else comes."""
        first = self._calls[delta.choice]
        content, reasoning, calls = self._read(delta)
        added: dict[str, Any] = {} if delta.choice in self._opened else {"role": "assistant"}
        self._opened.add(delta.choice)
        if content or self._form is None or added:
            added["content"] = content
        if reasoning:
            added["reasoning_content"] = reasoning
        if calls:
            added["tool_calls"] = [call.model_copy(update={"index": at}) for at, call in enumerate(calls, start=first)]
        reason, usage = self._reason(delta), None if so_far is None else _tokens(so_far)
        choice = ChatChunkChoice(
            index=delta.choice,
            delta=ChatDelta(**added),
            logprobs=self._logprobs(delta),
            finish_reason=None if calls else reason,
        )
        told = [self._message([choice], usage)]
        if calls and reason is not None:
            end = ChatChunkChoice(index=delta.choice, delta=ChatDelta(), logprobs=None, finish_reason=reason)
            told.append(self._message([end], usage))
        return told

    def usage_chunk(self, usage: Usage) -> bytes:
        """A chunk without choices."""
        return self._message([], _usage(usage))

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> bytes:
        """A chat.completion."""
        choices = [
            ChatChoice(
                index=delta.choice,
                message=self._whole_message(delta),
                logprobs=self._logprobs(delta),
                finish_reason=_told(self._reason(delta)),
            )
            for delta in sorted(deltas, key=lambda delta: delta.choice)
        ]
        return ChatCompletion(
            id=self.head.id,
            object="chat.completion",
            created=self.head.created,
            model=self.head.model,
            choices=choices,
            usage=_usage(usage),
        ).to_json()

    def _whole_message(self, delta: Delta) -> ChatReplyMessage:
        content, reasoning, calls = self._read(delta)
        more: dict[str, Any] = {"reasoning_content": reasoning} if reasoning else {}
        if calls:
            more["tool_calls"] = calls
        return ChatReplyMessage(
            role="assistant", content=content if content or not more else None, refusal=None, **more
        )

    def _read(self, delta: Delta) -> tuple[str, str, list[ToolCallBody]]:
        """What a delta adds of text, of thoughts, and of calls."""
        if self._form is None:
            return delta.text, "", []
        if delta.choice not in self._readers:
            self._readers[delta.choice] = AnswerReader(self._form)
        pieces = self._readers[delta.choice].feed(delta.text, ended=delta.finish_reason is not None)
        calls = [self._call(delta.choice, piece) for piece in pieces if piece.name]
        return "".join(piece.text for piece in pieces), "".join(piece.reasoning for piece in pieces), calls

    def _call(self, choice: int, piece: AnswerPiece) -> ToolCallBody:
        """A call, named by nine letters and digits, which is what some chat templates insist on."""
        named = f"{self.head.id}/{choice}/{self._calls[choice]}"
        self._calls[choice] += 1
        return ToolCallBody(
            id=hashlib.sha256(named.encode()).hexdigest()[:9],
            type="function",
            function=FunctionBody(name=piece.name, arguments=piece.arguments),
        )

    def _reason(self, delta: Delta) -> str | None:
        called = delta.finish_reason == "stop" and self._calls[delta.choice] > 0
        return "tool_calls" if called else delta.finish_reason

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
        return [self._message([self._choice(delta)], None if so_far is None else _tokens(so_far))]

    def usage_chunk(self, usage: Usage) -> bytes:
        """A text_completion without choices."""
        return self._message([], _usage(usage))

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> bytes:
        """A text_completion."""
        choices = [self._choice(delta) for delta in sorted(deltas, key=lambda delta: delta.choice)]
        assert all(choice.finish_reason for choice in choices), "a whole reply with a choice that has not ended"
        return self._message(choices, _usage(usage))

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


def _tokens(usage: Usage) -> UsageBody:
    return UsageBody(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
    )


def _usage(usage: Usage) -> UsageBody:
    spent = BuddyUsage(
        mode=usage.mode,
        requested_mode=usage.requested_mode,
        budget=usage.budget,
        hits=usage.hits,
        peer=usage.peer,
        fetched=usage.fetched,
        standins=StandinsBody(**asdict(usage.standins)),
        expected_rise=usage.expected_rise,
        resumed=usage.resumed,
        guard=usage.guard,
        calibration=CalibrationBody(**asdict(usage.calibration)),
        **({} if usage.record is None else {"record": usage.record}),
    )
    details = PromptTokensBody(cached_tokens=usage.cached_tokens)
    return _tokens(usage).model_copy(update={"prompt_tokens_details": details, "buddymoe": spent})
