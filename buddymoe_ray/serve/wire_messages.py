"""Bodies of Anthropic's /v1/messages, put into the words of chat completions.

Types the fields; ranges, tools and texts are checked as `wire.ChatRequest`, which is what a body becomes. Invariant:
what has no counterpart there is refused by name. On the token path: body → `parse_messages` → `.work()`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from buddymoe_ray.errors import RequestError
from buddymoe_ray.serve.refusals import in_words
from buddymoe_ray.serve.wire import ChatRequest, StopText
from buddymoe_ray.serve.wire_messages_options import CustomTool, MessagesChoice, OutputConfig, ThinkingOptions
from buddymoe_ray.serve.wire_messages_parts import Note, Texts, Turn, joined
from buddymoe_ray.serve.wire_parsing import checked, parse_body
from buddymoe_ray.serve.wire_parts import BuddyOptions, MaxTokens, Temperature, TopP, WireBody
from buddymoe_ray.serve.work import Thinking

__all__ = ["MESSAGES_WORDS", "CountRequest", "MessagesRequest", "parse_count", "parse_messages"]

MESSAGES_WORDS = {
    "chat_template_kwargs.enable_thinking": "thinking",
    "chat_template_kwargs": "thinking",
    "function.parameters": "input_schema",
    "reasoning_effort": "output_config.effort",
    "response_format.json_schema.schema": "output_config.format.schema",
    "stop": "stop_sequences",
    "thinking_token_budget": "thinking.budget_tokens",
}
"""What fields of chat completions are called here, where it is another name."""

AS_THEY_ARE = {"model", "max_tokens", "temperature", "top_k", "top_p", "buddymoe"}


class CountRequest(WireBody):
    """Body of POST /v1/messages/count_tokens."""

    model: str
    messages: list[Turn] = Field(min_length=1)
    system: Texts | None = None
    tools: list[CustomTool] | None = None
    tool_choice: MessagesChoice | None = None
    thinking: ThinkingOptions | None = None
    output_config: OutputConfig | None = None
    cache_control: Note = None

    def fields(self) -> dict[str, Any]:
        """The same for chat completions."""
        if self.messages[-1].role == "assistant":
            raise RequestError(
                "messages ends with role assistant, must end with user: answers are not begun by the caller. "
                "hint: say in system how to begin",
                param="messages",
            )
        system = [] if self.system is None else [joined("system", self.system)]
        fields: dict[str, Any] = {"messages": [*system, *(each for turn in self.messages for each in turn.messages())]}
        fields |= self.model_dump(include=AS_THEY_ARE, exclude_none=True)
        if self.tools:
            fields["tools"] = [tool.tool() for tool in self.tools]
        if self.tool_choice is not None:
            fields |= self.tool_choice.fields()
        if self.thinking is not None:
            fields["thinks"] = {"adaptive": None, "disabled": False, "enabled": True}[self.thinking.type]
            fields["thinking_token_budget"] = self.thinking.budget_tokens
        if self.output_config is not None:
            fields["reasoning_effort"] = self.output_config.effort
        if self.output_config is not None and self.output_config.format is not None:
            schema = {"name": "output", "schema": self.output_config.format.schema_}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        return fields


class MessagesRequest(CountRequest):
    """Body of POST /v1/messages. `max_tokens` is a demand, as in chat completions."""

    max_tokens: MaxTokens
    stop_sequences: list[StopText] | None = None
    stream: bool | None = None
    temperature: Temperature | None = None
    top_k: int | None = Field(default=None, ge=-1)
    top_p: TopP | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    buddymoe: BuddyOptions | None = None

    def fields(self) -> dict[str, Any]:
        """The same for chat completions; a stream begins with the prompt's tokens, so these are asked for."""
        fields = super().fields()
        if self.stop_sequences is not None:
            fields["stop"] = self.stop_sequences
        if self.stream:
            fields |= {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        return fields


class _MessagesChat(ChatRequest):
    """A message's request as a chat's; `thinks` is whether it is to."""

    thinks: bool | None = None

    def _thinking(self) -> Thinking:
        return replace(super()._thinking(), enabled=self.thinks, usual="high")


def parse_messages(body: bytes) -> ChatRequest:
    """A request for a message, or RequestError naming the field."""
    return _for_chat(parse_body(body, MessagesRequest))


def parse_count(body: bytes) -> ChatRequest:
    """A request for a count, or RequestError naming the field."""
    return _for_chat(parse_body(body, CountRequest))


def _for_chat(asked: CountRequest) -> ChatRequest:
    with in_words(MESSAGES_WORDS):
        return checked(asked.fields(), _MessagesChat)
