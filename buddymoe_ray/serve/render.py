"""Deltas written as OpenAI's replies and stream messages; one renderer per endpoint and call.

Knows neither HTTP nor workers. Invariant: the texts of a choice's chunks joined are the text of the whole reply.
On the token path: batches → `Renderer.chunk` / `Renderer.whole` → JSON bytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

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
    PromptTokensBody,
    StandinsBody,
    TokenLogprobBody,
    TopLogprobBody,
    UsageBody,
)
from buddymoe_ray.serve.work import Delta, TokenText
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

    def chunk(self, delta: Delta, so_far: Usage | None = None) -> bytes:
        """The stream message for one delta, perhaps with the tokens used so far."""
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

    def chunk(self, delta: Delta, so_far: Usage | None = None) -> bytes:
        """A chat.completion.chunk; a choice's first one carries the role."""
        opened = delta.choice in self._opened
        self._opened.add(delta.choice)
        choice = ChatChunkChoice(
            index=delta.choice,
            delta=ChatDelta(content=delta.text) if opened else ChatDelta(role="assistant", content=delta.text),
            logprobs=self._logprobs(delta),
            finish_reason=delta.finish_reason,
        )
        return self._message([choice], None if so_far is None else _tokens(so_far))

    def usage_chunk(self, usage: Usage) -> bytes:
        """A chunk without choices."""
        return self._message([], _usage(usage))

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> bytes:
        """A chat.completion."""
        choices = [
            ChatChoice(
                index=delta.choice,
                message=ChatReplyMessage(role="assistant", content=delta.text, refusal=None),
                logprobs=self._logprobs(delta),
                finish_reason=_reason(delta),
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
                logprob=entry.logprob,
                bytes=list(entry.data),
                top_logprobs=[
                    TopLogprobBody(token=_text(top), logprob=top.logprob, bytes=list(top.data)) for top in entry.top
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

    def chunk(self, delta: Delta, so_far: Usage | None = None) -> bytes:
        """A text_completion with what the delta adds."""
        return self._message([self._choice(delta)], None if so_far is None else _tokens(so_far))

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


def _alternatives(chosen: TokenText) -> dict[str, float]:
    """By text, the chosen token first. Of two that read alike the later one is called `token_id:` and its id."""
    found = {_text(chosen): chosen.logprob}
    for top in chosen.top:
        if top.token_id != chosen.token_id:
            text = _text(top)
            found[f"token_id:{top.token_id}" if text in found else text] = top.logprob
    return found


def _text(entry: TokenText) -> str:
    """A token as text; half a character shows as U+FFFD, its bytes are beside it."""
    return entry.data.decode("utf-8", "replace")


def _reason(delta: Delta) -> str:
    assert delta.finish_reason is not None, f"choice {delta.choice} has not ended"
    return delta.finish_reason


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
