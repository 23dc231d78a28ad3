"""What Anthropic's /v1/messages lets a caller choose beside the conversation, as chat completions write it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from buddymoe_ray.serve.wire_messages_parts import Note
from buddymoe_ray.serve.wire_parts import Effort, ToolName, WireBody

__all__ = ["CustomTool", "MessagesChoice", "OutputConfig", "ThinkingOptions"]


class CustomTool(WireBody):
    """What an answer may call."""

    type: Literal["custom"] | None = None
    name: ToolName
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


class ThinkingOptions(WireBody):
    """`thinking`: whether, and for how many tokens at most."""

    type: Literal["adaptive", "disabled", "enabled"]
    display: Literal["summarized"] | None = None
    budget_tokens: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _a_budget_is_of_thoughts(self) -> ThinkingOptions:
        if self.budget_tokens is not None and self.type != "enabled":
            raise ValueError(f"budget_tokens is given with type {self.type}, must be given with type enabled alone")
        return self


class SchemaFormat(WireBody):
    """`output_config.format`: what the whole text must be."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(WireBody):
    """`output_config`."""

    effort: Effort | None = None
    format: SchemaFormat | None = None
