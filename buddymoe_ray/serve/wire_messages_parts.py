"""The conversation of Anthropic's /v1/messages, turn by turn, and each as chat completions write it.

Types the shapes alone: what they hold is checked as a part of `wire.ChatRequest`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from buddymoe_ray.serve.wire_parts import CalledFunction, Message, ToolCall, Unsupported, WireBody, by_type, told

__all__ = ["Note", "Texts", "Turn", "joined"]

BLOCKS = {"user": ("text", "tool_result"), "assistant": ("text", "thinking", "tool_use"), "system": ("text",)}

Note = dict[str, Any] | None  # how long a cache may keep something at most: changes nothing in an answer


def _blocks(value: object) -> object:
    """Content as a list of blocks."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


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
    name: str = Field(min_length=1)
    input: dict[str, Any]
    cache_control: Note = None
    caller: Unsupported = None

    def call(self) -> ToolCall:
        """As chat completions have it."""
        function = CalledFunction.model_construct(name=self.name, arguments=self.input)
        return ToolCall.model_construct(id=self.id, function=function)


Texts = Annotated[list[TextBlock], BeforeValidator(_blocks, json_schema_input_type=str | list[TextBlock])]


class ToolResultBlock(WireBody):
    """What a call came to. The model is told of an error by a word before it."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts = Field(default_factory=list)
    is_error: bool | None = None
    cache_control: Note = None

    def message(self) -> Message:
        """As chat completions have it."""
        text = ("Error: " if self.is_error else "") + "".join(block.text for block in self.content)
        return Message.model_construct(role="tool", tool_call_id=self.tool_use_id, content=text)


Block = Annotated[
    Annotated[TextBlock, Tag("#text")]
    | Annotated[ThinkingBlock, Tag("#thinking")]
    | Annotated[ToolUseBlock, Tag("#tool_use")]
    | Annotated[ToolResultBlock, Tag("#tool_result")],
    Discriminator(by_type),
]


class Turn(WireBody):
    """One message."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Block], BeforeValidator(_blocks, json_schema_input_type=str | list[Block])]

    @model_validator(mode="after")
    def _blocks_are_the_roles(self) -> Turn:
        wrong = next((block.type for block in self.content if block.type not in BLOCKS[self.role]), None)
        if wrong is not None:
            raise ValueError(f"content of role {self.role} holds a {wrong}, must be of {', '.join(BLOCKS[self.role])}")
        return self

    def messages(self) -> list[Message]:
        """As chat completions have it: each result is a message of its own."""
        texts = [block for block in self.content if isinstance(block, TextBlock)]
        if self.role == "assistant":
            thoughts = "".join(block.thinking for block in self.content if isinstance(block, ThinkingBlock))
            calls = [block.call() for block in self.content if isinstance(block, ToolUseBlock)]
            return [joined("assistant", texts, reasoning_content=thoughts, tool_calls=calls)]
        results = [block.message() for block in self.content if isinstance(block, ToolResultBlock)]
        return [*results, joined(self.role, texts)] if texts or not results else results


def joined(role: str, texts: list[TextBlock], **more: Any) -> Message:
    """A message of these texts, which were checked with the turn that they are of."""
    content = told([block.text for block in texts] or [""])
    return Message.model_construct(role=role, content=content, **more)
