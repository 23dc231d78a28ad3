"""Deltas written as Anthropic's messages: a reply, or a stream's events.

Knows neither HTTP nor workers. Invariant: a stream's blocks, joined, are those of the whole reply, but that text after
a call begins another block.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from buddymoe_ray.serve.reading import ChatReading, server_event, usage_body
from buddymoe_ray.serve.refusals import message_error
from buddymoe_ray.serve.render import ReplyHead
from buddymoe_ray.serve.replies import ToolCallBody
from buddymoe_ray.serve.work import Delta, Refusal
from buddymoe_ray.types import Usage

__all__ = ["MessagesRenderer"]

REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


class MessagesRenderer(ChatReading):
    """/v1/messages: one choice, told as blocks of thoughts, text and calls."""

    def __init__(self, head: ReplyHead) -> None:
        super().__init__(head.id)
        self.head = head
        self._blocks = 0  # that were begun
        self._open = ""  # the type of the one that goes on
        self._begun = False
        self._end: dict[str, Any] = {}

    def chunks(self, delta: Delta, so_far: Usage | None = None) -> list[bytes]:
        """message_start before all others; block by block what the delta adds. A call is told once it is whole."""
        text, reasoning, calls = self.read(delta)
        told: list[bytes] = []
        if not self._begun:
            self._begun = True
            counted = _counted(so_far or Usage())
            begin = self._message([], {"stop_reason": None, "stop_sequence": None}, counted)
            told += [_event("message_start", message=begin), _event("ping")]
        if reasoning:
            told += self._more("thinking", {"thinking": reasoning}, {"thinking": "", "signature": ""})
        if text:
            told += self._more("text", {"text": text}, {"text": ""})
        for call in calls:
            begin = _call(call) | {"input": {}}
            told += [*self._stop(), self._start(begin)]
            told.append(self._delta({"type": "input_json_delta", "partial_json": call.function.arguments}))
        if delta.finish_reason is not None:
            told += self._stop()
            self._end = self._reason(delta)
        return told

    def closing(self, usage: Usage) -> bytes:
        """Why it ended and what it cost, then message_stop."""
        return _event("message_delta", delta=self._end, usage=_usage(usage)) + _event("message_stop")

    def failed(self, refusal: Refusal) -> bytes:
        """An error event; no message_stop follows it."""
        return server_event(message_error(refusal), "error")

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> bytes:
        """A message."""
        (delta,) = deltas
        text, reasoning, calls = self.read(delta)
        blocks: list[dict[str, Any]] = []
        if reasoning:
            blocks.append({"type": "thinking", "thinking": reasoning, "signature": ""})
        if text:
            blocks.append({"type": "text", "text": text})
        return json.dumps(self._message([*blocks, *map(_call, calls)], self._reason(delta), _usage(usage))).encode()

    def _message(self, blocks: list[dict[str, Any]], end: dict[str, Any], usage: Any) -> dict[str, Any]:
        head = {"id": self.head.id, "type": "message", "role": "assistant", "model": self.head.model}
        return {**head, "content": blocks, **end, "usage": usage}

    def _reason(self, delta: Delta) -> dict[str, Any]:
        reason = REASONS.get(self.reason(delta) or "", "end_turn" if delta.stop is None else "stop_sequence")
        return {"stop_reason": reason, "stop_sequence": delta.stop if reason == "stop_sequence" else None}

    def _more(self, kind: str, added: dict[str, str], empty: dict[str, str]) -> list[bytes]:
        """Some of a block of that type, which is begun if the one that goes on is another."""
        begun = [] if self._open == kind else [*self._stop(), self._start({"type": kind, **empty})]
        return [*begun, self._delta({"type": f"{kind}_delta", **added})]

    def _start(self, block: dict[str, Any]) -> bytes:
        self._open, self._blocks = block["type"], self._blocks + 1
        return _event("content_block_start", index=self._blocks - 1, content_block=block)

    def _delta(self, delta: dict[str, str]) -> bytes:
        return _event("content_block_delta", index=self._blocks - 1, delta=delta)

    def _stop(self) -> list[bytes]:
        ends = self._open
        self._open = ""
        return [_event("content_block_stop", index=self._blocks - 1)] if ends else []


def _call(call: ToolCallBody) -> dict[str, Any]:
    given = json.loads(call.function.arguments)
    return {"type": "tool_use", "id": call.id, "name": call.function.name, "input": given}


def _event(kind: str, **fields: Any) -> bytes:
    return server_event(json.dumps({"type": kind, **fields}).encode(), kind)


def _usage(usage: Usage) -> dict[str, Any]:
    """With what stand-ins cost, which is known at the end."""
    return _counted(usage) | {"buddymoe": usage_body(usage).model_dump(exclude_unset=True)["buddymoe"]}


def _counted(usage: Usage) -> dict[str, Any]:
    """Anthropic counts tokens that were found in a cache apart."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
