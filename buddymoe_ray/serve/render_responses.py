"""Deltas written as OpenAI's responses: a reply, or a stream's events.

Knows neither HTTP nor workers. Invariant: a stream's last event holds what the whole reply would, item by item; text
after a call is an item of its own in a stream.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from buddymoe_ray.serve.reading import ChatReading, server_event, usage_body
from buddymoe_ray.serve.render import ReplyHead
from buddymoe_ray.serve.replies import ToolCallBody
from buddymoe_ray.serve.wire_responses_parts import ENCRYPTED, packed_thoughts
from buddymoe_ray.serve.work import Delta, Refusal
from buddymoe_ray.types import Usage

__all__ = ["ResponsesRenderer"]

PARTS: dict[str, dict[str, Any]] = {
    "output_text": {"type": "output_text", "text": "", "annotations": [], "logprobs": []},
    "reasoning_text": {"type": "reasoning_text", "text": ""},
}


class ResponsesRenderer(ChatReading):
    """/v1/responses: one choice, told as items of thoughts, text and calls."""

    def __init__(self, head: ReplyHead) -> None:
        super().__init__(head.id)
        self.head = head
        self._items: list[dict[str, Any]] = []
        self._open = ""  # the type of the part that goes on
        self._events = 0
        self._cut = False

    def chunks(self, delta: Delta, so_far: Usage | None = None) -> list[bytes]:
        """response.created before all others; item by item what the delta adds. A call is told once it is whole."""
        text, reasoning, calls = self.read(delta)
        told: list[bytes] = []
        if not self._events:
            begun = self._response("in_progress", None)
            told += [self._event(f"response.{name}", response=begun) for name in ("created", "in_progress")]
        self._cut = delta.finish_reason == "length"
        if reasoning:
            told += self._more("reasoning_text", reasoning, {"type": "reasoning", "summary": []})
        if text:
            told += self._more("output_text", text, {"type": "message", "role": "assistant"})
        for call in calls:
            told += [*self._ended(), *self._called(call)]
        if delta.finish_reason is not None:
            told += self._ended("incomplete" if self._cut else "completed")
        return told

    def closing(self, usage: Usage) -> bytes:
        """The response, completed, or incomplete where the tokens were too few."""
        status = "incomplete" if self._cut else "completed"
        return self._event(f"response.{status}", response=self._response(status, usage))

    def failed(self, refusal: Refusal) -> bytes:
        """The response, failed."""
        error = {"code": "server_error", "message": refusal.message}
        return self._event("response.failed", response=self._response("failed", None) | {"error": error})

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> bytes:
        """The response."""
        (delta,) = deltas
        self.chunks(delta)
        return json.dumps(self._response("incomplete" if self._cut else "completed", usage)).encode()

    def _response(self, status: str, usage: Usage | None) -> dict[str, Any]:
        return {
            "id": self.head.id,
            "object": "response",
            "created_at": self.head.created,
            "model": self.head.model,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": self._items,
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            **self.head.repeats,
            "usage": None if usage is None else _usage(usage),
        }

    def _more(self, part: str, text: str, item: dict[str, Any]) -> list[bytes]:
        """Some of a part of that type, which an item is begun with if the one that goes on is another."""
        told = []
        if self._open != part:
            told = [*self._ended(), self._begin(item | {"content": []})]
            self._open = part
            self._items[-1]["content"].append(dict(PARTS[part]))
            told.append(self._event("response.content_part.added", **self._place(), part=PARTS[part]))
        self._items[-1]["content"][0]["text"] += text
        more: dict[str, Any] = {"logprobs": []} if part == "output_text" else {}
        return [*told, self._event(f"response.{part}.delta", **self._place(), delta=text, **more)]

    def _ended(self, status: str = "completed") -> list[bytes]:
        """The end of the part that goes on, and of its item."""
        if not self._open:
            return []
        name, self._open = self._open, ""
        part = self._items[-1]["content"][0]
        if name == "reasoning_text" and ENCRYPTED in self.head.repeats.get("include", ()):
            self._items[-1]["encrypted_content"] = packed_thoughts(part["text"])
        more: dict[str, Any] = {"logprobs": []} if name == "output_text" else {}
        return [
            self._event(f"response.{name}.done", **self._place(), text=part["text"], **more),
            self._event("response.content_part.done", **self._place(), part=part),
            self._finish(status),
        ]

    def _called(self, call: ToolCallBody) -> list[bytes]:
        made = call.function
        begun = self._begin({"type": "function_call", "call_id": call.id, "name": made.name, "arguments": ""})
        self._items[-1]["arguments"] = made.arguments
        place, name = self._place(), "response.function_call_arguments"
        del place["content_index"]
        told = [begun, self._event(f"{name}.delta", **place, delta=made.arguments)]
        return [*told, self._event(f"{name}.done", **place, name=made.name, arguments=made.arguments), self._finish()]

    def _begin(self, item: dict[str, Any]) -> bytes:
        self._items.append({"id": f"{item['type']}-{len(self._items)}-{self.head.id}", "status": "in_progress", **item})
        return self._event("response.output_item.added", output_index=len(self._items) - 1, item=self._items[-1])

    def _finish(self, status: str = "completed") -> bytes:
        item = self._items[-1]
        item["status"] = status
        return self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._events += 1
        return server_event(json.dumps({"type": kind, "sequence_number": self._events - 1, **fields}).encode(), kind)


def _usage(usage: Usage) -> dict[str, Any]:
    """Tokens of thoughts are not counted apart."""
    spent = usage_body(usage).model_dump(exclude_unset=True)
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "buddymoe": spent["buddymoe"],
    }
