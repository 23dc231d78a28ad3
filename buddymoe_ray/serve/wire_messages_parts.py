"""What bodies of Anthropic's /v1/messages are made of, and each part as chat completions write it.

Types the shapes alone: what they hold is checked as a part of `wire.ChatRequest`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from buddymoe_ray.serve.wire_parts import Unsupported, WireBody

__all__ = ["CustomTool", "MessagesChoice", "Note", "OutputConfig", "Texts", "Thinking", "Turn", "joined"]

BLOCKS = {"user": ("text", "tool_result"), "assistant": ("text", "thinking", "tool_use"), "system": ("text",)}

Note = dict[str, Any] | None  # how long a cache may keep something at most: changes nothing in an answer


def _blocks(value: object) -> object:
    """Content as a list of blocks of the types that are understood."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    for block in value if isinstance(value, list) else ():
        kind = block.get("type") if isinstance(block, dict) else None
        if kind not in ("text", "thinking", "tool_use", "tool_result"):
            raise ValueError(f"blocks of type {kind!r} are not supported, must be text, thinking or of tools")
    return value


class TextBlock(WireBody):
    """Some text."""

    type: Literal["text"]
    text: str
    cache_control: Note = None
    citations: Unsupported = None


class ThinkingBlock(WireBody):
    """Thoughts of an earlier answer. `signature` changes nothing: they are the model's as they stand."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class ToolUseBlock(WireBody):
    """A call that the assistant made before."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: Note = None
    caller: Unsupported = None

    def call(self) -> dict[str, Any]:
        """As chat completions write it."""
        return {"id": self.id, "function": {"name": self.name, "arguments": json.dumps(self.input)}}


Texts = Annotated[list[TextBlock], BeforeValidator(_blocks)]


class ToolResultBlock(WireBody):
    """What a call came to. The model is told of an error by a word before it."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts = Field(default_factory=list)
    is_error: bool | None = None
    cache_control: Note = None

    def message(self) -> dict[str, Any]:
        """As chat completions write it."""
        text = ("Error: " if self.is_error else "") + "".join(block.text for block in self.content)
        return {"role": "tool", "tool_call_id": self.tool_use_id, "content": text}


Block = Annotated[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]


class Turn(WireBody):
    """One message."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Block], BeforeValidator(_blocks)]

    @model_validator(mode="after")
    def _blocks_are_the_roles(self) -> Turn:
        wrong = next((block.type for block in self.content if block.type not in BLOCKS[self.role]), None)
        if wrong is not None:
            raise ValueError(f"content of role {self.role} holds a {wrong}, must be of {', '.join(BLOCKS[self.role])}")
        return self

    def messages(self) -> list[dict[str, Any]]:
        """As chat completions write it: each result is a message of its own."""
        texts = [block for block in self.content if isinstance(block, TextBlock)]
        if self.role == "assistant":
            return [{"role": "assistant", "content": joined(texts)} | self._thoughts_and_calls()]
        told = [block.message() for block in self.content if isinstance(block, ToolResultBlock)]
        return [*told, {"role": self.role, "content": joined(texts)}] if texts or not told else told

    def _thoughts_and_calls(self) -> dict[str, Any]:
        thoughts = "".join(block.thinking for block in self.content if isinstance(block, ThinkingBlock))
        calls = [block.call() for block in self.content if isinstance(block, ToolUseBlock)]
        return ({"reasoning_content": thoughts} if thoughts else {}) | ({"tool_calls": calls} if calls else {})


def joined(texts: list[TextBlock]) -> str | list[dict[str, str]]:
    """The content of a message."""
    if len(texts) < 2:
        return "".join(block.text for block in texts)
    return [{"type": "text", "text": block.text} for block in texts]


class CustomTool(WireBody):
    """What an answer may call."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: Note = None

    def tool(self) -> dict[str, Any]:
        """As chat completions write it."""
        function = {"name": self.name, "description": self.description, "parameters": self.input_schema}
        return {"type": "function", "function": function | {"strict": self.strict}}


class MessagesChoice(WireBody):
    """`tool_choice`."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _a_tool_is_named(self) -> MessagesChoice:
        if (self.name is None) == (self.type == "tool"):
            raise ValueError("name must be given with type tool, and with no other")
        return self

    def fields(self) -> dict[str, Any]:
        """As chat completions write it."""
        named = {"type": "function", "function": {"name": self.name}}
        choice = {"any": "required", "tool": named}.get(self.type, self.type)
        return {"tool_choice": choice, "parallel_tool_calls": not self.disable_parallel_tool_use}


class Thinking(WireBody):
    """`thinking`. How long a model thinks cannot be set, only whether, where its chat template has a switch."""

    type: Literal["adaptive", "disabled", "enabled"]
    display: Literal["summarized"] | None = None
    budget_tokens: Unsupported = None


class SchemaFormat(WireBody):
    """`output_config.format`: what the whole text must be."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(WireBody):
    """`output_config`."""

    effort: Unsupported = None
    format: SchemaFormat | None = None
