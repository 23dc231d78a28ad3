"""Bodies of OpenAI's /v1/responses, put into the words of chat completions. Nothing is kept between requests.

Types the fields; ranges, tools and texts are checked as `wire.ChatRequest`, which is what a body becomes. Invariant:
what has no counterpart there is refused by name. On the token path: body → `parse_response` → `.work()`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from buddymoe_ray.serve.refusals import in_words
from buddymoe_ray.serve.wire import ChatRequest
from buddymoe_ray.serve.wire_parsing import checked, parse_body
from buddymoe_ray.serve.wire_parts import (
    BuddyOptions,
    ChosenTool,
    MaxTokens,
    Message,
    Metadata,
    Temperature,
    TopP,
    Unsupported,
    WireBody,
    written_as,
)
from buddymoe_ray.serve.wire_responses_options import (
    ChosenFunction,
    FunctionTool,
    Reasoning,
    ResponseStreamOptions,
    Stateless,
    TextConfig,
    TextFormat,
)
from buddymoe_ray.serve.wire_responses_parts import Items

__all__ = ["RESPONSES_WORDS", "ResponseRequest", "parse_response"]

RESPONSES_WORDS = {
    "function.parameters": "parameters",
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
}
"""What fields of chat completions are called here, where it is another name."""

AS_THEY_ARE = {"model", "temperature", "top_p", "parallel_tool_calls", "stream", "buddymoe"}
REPEATED = ("instructions", "max_output_tokens", "temperature", "top_p")


class ResponseRequest(WireBody):
    """Body of POST /v1/responses."""

    model: str
    input: Items
    instructions: str | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Annotated[
        Any, written_as(Literal["none", "auto", "required"] | ChosenFunction | ChosenTool | None)
    ] = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    max_output_tokens: MaxTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    metadata: Metadata | None = None
    stream: bool | None = None
    buddymoe: BuddyOptions | None = None
    stream_options: ResponseStreamOptions | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["disabled"] | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    max_tool_calls: Unsupported = None
    prompt: Unsupported = None
    top_logprobs: Unsupported = None
    background: Stateless = None
    conversation: Stateless = None
    previous_response_id: Stateless = None
    store: Stateless = None

    def fields(self) -> dict[str, Any]:
        """The same for chat completions."""
        told: list[dict[str, Any]] = []
        if self.instructions is not None:
            told.append({"role": "system", "content": self.instructions})
        for item in self.input:
            item.tell(told)
        messages = [Message.model_construct(**message) for message in told]
        fields = self.model_dump(include=AS_THEY_ARE, exclude_none=True)
        fields |= {"messages": messages, "tool_choice": self._choice(), "max_completion_tokens": self.max_output_tokens}
        if self.reasoning is not None:
            fields["reasoning_effort"] = self.reasoning.effort
        if self.tools:
            own = [tool.model_dump(exclude={"type"}) for tool in self.tools]
            fields["tools"] = [{"type": "function", "function": function} for function in own]
        if self.text is not None and self.text.format is not None:
            form = self.text.format.model_dump(exclude={"type"}, exclude_none=True, by_alias=True)
            fields["response_format"] = {"type": self.text.format.type, **({"json_schema": form} if form else {})}
        return fields | {"told": self._told()}

    def _choice(self) -> Any:
        chosen = self.tool_choice
        named = isinstance(chosen, dict) and chosen.keys() == {"type", "name"}
        return {"type": chosen["type"], "function": {"name": chosen["name"]}} if named else chosen

    def _told(self) -> dict[str, Any]:
        """What the reply says of it."""
        form = None if self.text is None else self.text.format
        return {
            **{name: getattr(self, name) for name in REPEATED},
            "include": self.include or [],
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "reasoning": (self.reasoning or Reasoning()).model_dump(),
            "text": {"format": (form or TextFormat()).model_dump(exclude_none=True, by_alias=True)},
            "tool_choice": self.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in self.tools or ()],
        }


class _ResponseChat(ChatRequest):
    """A response's request as a chat's; `told` is what its reply says of it."""

    told: dict[str, Any]

    @property
    def repeats(self) -> Mapping[str, Any]:
        """What a reply says of its request."""
        return self.told


def parse_response(body: bytes) -> ChatRequest:
    """A request for a response, or RequestError naming the field."""
    asked = parse_body(body, ResponseRequest)
    with in_words(RESPONSES_WORDS):
        return checked(asked.fields(), _ResponseChat)
