"""What `input` of OpenAI's /v1/responses is made of, and each item as chat completions write it.

Types the shapes alone: what they hold is checked as a part of `wire.ChatRequest`.
"""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from buddymoe_ray.serve.wire_parts import (
    CalledFunction,
    RefusalPart,
    ToolCall,
    Unsupported,
    WireBody,
    by_type,
    called_with,
    told,
)

__all__ = ["ENCRYPTED", "Items", "packed_thoughts"]

ENCRYPTED = "reasoning.encrypted_content"
"""What clients `include` that keep conversations to themselves."""


def _parts(value: object) -> object:
    """Content as a list of parts."""
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


def _items(value: object) -> object:
    """`input` as a list of items with a type."""
    given = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(given, list):
        return given
    return [{"type": "message", **item} if isinstance(item, dict) and "role" in item else item for item in given]


THOUGHTFUL = {"role", "content", "reasoning_content"}  # a message whose text or calls may still come


class TextPart(WireBody):
    """Some text."""

    type: Literal["input_text", "output_text", "reasoning_text", "summary_text"]
    text: str
    annotations: Unsupported = None
    logprobs: Unsupported = None


Parts = Annotated[list[TextPart], BeforeValidator(_parts, json_schema_input_type=str | list[TextPart])]
Said = Annotated[
    Annotated[TextPart, Tag("#text")] | Annotated[RefusalPart, Tag("#refusal")],
    Discriminator(lambda value: "#refusal" if by_type(value) == "#refusal" else "#text"),
]


class _Item(WireBody):
    """`id` and `status` are those of an earlier reply: nothing is looked up by them."""

    id: str | None = None
    status: str | None = None


class MessageItem(_Item):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[list[Said], BeforeValidator(_parts, json_schema_input_type=str | list[Said])]
    phase: Unsupported = None

    @model_validator(mode="after")
    def _the_assistant_refuses(self) -> MessageItem:
        if self.role != "assistant" and any(isinstance(part, RefusalPart) for part in self.content):
            raise ValueError(f"content of role {self.role} holds a refusal, which is the assistant's")
        return self

    def tell(self, messages: list[dict[str, Any]]) -> None:
        """Add it; an assistant's goes with the thoughts before it."""
        content = told([part.text for part in self.content])
        if self.role == "assistant" and messages and messages[-1].keys() == THOUGHTFUL:
            messages[-1]["content"] = content
        else:
            messages.append({"role": self.role, "content": content})


class CallItem(_Item):
    """A call that the assistant made before."""

    type: Literal["function_call"]
    call_id: str
    name: str = Field(min_length=1)
    arguments: Annotated[dict[str, Any], BeforeValidator(called_with, json_schema_input_type=str)]

    def tell(self, messages: list[dict[str, Any]]) -> None:
        """Add it to what the assistant said."""
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        function = CalledFunction.model_construct(name=self.name, arguments=self.arguments)
        call = ToolCall.model_construct(id=self.call_id, function=function)
        messages[-1].setdefault("tool_calls", []).append(call)


class OutputItem(_Item):
    """What a call came to."""

    type: Literal["function_call_output"]
    call_id: str
    output: Parts

    def tell(self, messages: list[dict[str, Any]]) -> None:
        """Add it."""
        text = "".join(part.text for part in self.output)
        messages.append({"role": "tool", "tool_call_id": self.call_id, "content": text})


def packed_thoughts(text: str) -> str:
    """Thoughts as `encrypted_content`: they are no secret of ours, so it is base64."""
    return base64.b64encode(text.encode(errors="replace")).decode()


def _unpacked(value: object) -> object:
    try:
        return base64.b64decode(value, validate=True).decode() if isinstance(value, str) else value
    except ValueError:
        raise ValueError("must be sent as it came from this service") from None


class ReasoningItem(_Item):
    """Thoughts of an earlier answer; where it says no more, what its `encrypted_content` holds, or their summary."""

    type: Literal["reasoning"]
    summary: Parts = Field(default_factory=list)
    content: Parts | None = None
    encrypted_content: Annotated[str | None, BeforeValidator(_unpacked)] = None

    def tell(self, messages: list[dict[str, Any]]) -> None:
        """Add them to those just before; what the assistant said comes next."""
        told = [part.text for part in self.content or ()] or [self.encrypted_content or ""]
        thoughts = "".join(told) or "".join(part.text for part in self.summary)
        if thoughts and messages and messages[-1].keys() == THOUGHTFUL and not messages[-1]["content"]:
            messages[-1]["reasoning_content"] += f"\n{thoughts}"
        elif thoughts:
            messages.append({"role": "assistant", "content": "", "reasoning_content": thoughts})


Item = Annotated[
    Annotated[MessageItem, Tag("#message")]
    | Annotated[CallItem, Tag("#function_call")]
    | Annotated[OutputItem, Tag("#function_call_output")]
    | Annotated[ReasoningItem, Tag("#reasoning")],
    Discriminator(by_type),
]
Items = Annotated[list[Item], BeforeValidator(_items, json_schema_input_type=str | list[Item])]
