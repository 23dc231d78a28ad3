"""What every renderer of a conversation's answer needs: its text, thoughts and calls read out of deltas, why it ended,
what it cost, and how a stream's messages are framed.

Knows neither endpoints nor HTTP. On the token path: delta → `ChatReading.read` → a renderer.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import asdict

from buddymoe_ray.engine.answers import AnswerForm, AnswerPiece, AnswerReader
from buddymoe_ray.serve.replies import (
    BuddyUsage,
    CalibrationBody,
    FunctionBody,
    PromptTokensBody,
    StandinsBody,
    ToolCallBody,
    UsageBody,
)
from buddymoe_ray.serve.work import Delta
from buddymoe_ray.types import Usage

__all__ = ["ChatReading", "server_event", "token_counts", "usage_body"]


class ChatReading:
    """Reads the choices of one reply, whose id is `reply_id`, delta by delta."""

    def __init__(self, reply_id: str) -> None:
        self._id = reply_id
        self._form: AnswerForm | None = None
        self._readers: dict[int, AnswerReader] = {}
        self._calls: dict[int, int] = defaultdict(int)  # by choice, how many were told

    def read_as(self, form: AnswerForm | None) -> None:
        """From now on texts are read so, if not None."""
        self._form = form or self._form

    @property
    def plain(self) -> bool:
        """Whether answers are text and nothing else."""
        return self._form is None

    def read(self, delta: Delta) -> tuple[str, str, list[ToolCallBody]]:
        """What a delta adds of text, of thoughts, and of calls, each with its place among the choice's."""
        if self._form is None:
            return delta.text, "", []
        if delta.choice not in self._readers:
            self._readers[delta.choice] = AnswerReader(self._form)
        pieces = self._readers[delta.choice].feed(delta.text, ended=delta.finish_reason is not None)
        calls = [self._call(delta.choice, piece) for piece in pieces if piece.name]
        return "".join(piece.text for piece in pieces), "".join(piece.reasoning for piece in pieces), calls

    def reason(self, delta: Delta) -> str | None:
        """Why the choice ended, as chat completions call it."""
        called = delta.finish_reason == "stop" and self._calls[delta.choice] > 0
        return "tool_calls" if called else delta.finish_reason

    def _call(self, choice: int, piece: AnswerPiece) -> ToolCallBody:
        """A call, named by nine letters and digits, which is what some chat templates insist on."""
        at = self._calls[choice]
        self._calls[choice] += 1
        return ToolCallBody(
            id=hashlib.sha256(f"{self._id}/{choice}/{at}".encode()).hexdigest()[:9],
            type="function",
            function=FunctionBody(name=piece.name, arguments=piece.arguments),
            index=at,
        )


def server_event(data: bytes, name: str = "") -> bytes:
    """A server-sent event, perhaps with a name; `data` is of one line."""
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + data + b"\n\n"


def token_counts(usage: Usage) -> UsageBody:
    """Tokens alone, as far as they are used."""
    return UsageBody(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
    )


def usage_body(usage: Usage) -> UsageBody:
    """What a call cost, with what the answer cost in quality."""
    spent = BuddyUsage(
        mode=usage.mode,
        requested_mode=usage.requested_mode,
        budget=usage.budget,
        hits=usage.hits,
        peer=usage.peer,
        host=usage.host,
        fetched=usage.fetched,
        standins=StandinsBody(**asdict(usage.standins)),
        expected_rise=usage.expected_rise,
        resumed=usage.resumed,
        guard=usage.guard,
        calibration=CalibrationBody(**asdict(usage.calibration)),
        **({} if usage.record is None else {"record": usage.record}),
    )
    details = PromptTokensBody(cached_tokens=usage.cached_tokens)
    return token_counts(usage).model_copy(update={"prompt_tokens_details": details, "buddymoe": spent})
