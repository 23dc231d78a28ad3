"""What OpenAI's /v1/responses lets a caller choose beside the conversation, and what it cannot be asked for here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from buddymoe_ray.serve.wire_parts import Effort, ToolName, Unsupported, WireBody

__all__ = [
    "ChosenFunction",
    "FunctionTool",
    "Reasoning",
    "ResponseStreamOptions",
    "Stateless",
    "TextConfig",
    "TextFormat",
]


def _stateless(value: object) -> None:
    if value is not None and value is not False:
        raise ValueError("nothing is kept between requests, must be left out: send the whole conversation as input")


Stateless = Annotated[None, BeforeValidator(_stateless, json_schema_input_type=Literal[False] | None)]


class FunctionTool(WireBody):
    """What an answer may call."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChosenFunction(WireBody):
    """`tool_choice` of one tool."""

    type: Literal["function"]
    name: str


class TextFormat(WireBody):
    """`text.format`: what the whole text must be."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema_goes_with_type(self) -> TextFormat:
        wanted = self.type == "json_schema"
        if (self.name is not None, self.schema_ is not None) != (wanted, wanted):
            raise ValueError("name and schema must be given with type json_schema, and with no other")
        return self


class TextConfig(WireBody):
    """`text`."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(WireBody):
    """`reasoning`. Of summaries the most detailed that there is, `auto`, is none."""

    effort: Effort | None = None
    summary: Literal["auto"] | None = None


class ResponseStreamOptions(WireBody):
    """`stream_options`."""

    include_obfuscation: Unsupported = None
