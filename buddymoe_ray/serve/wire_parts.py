"""What request bodies are made of: messages, formats, options; typed and checked like the bodies in `wire`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from buddymoe_ray.engine.json_schema import checked_output
from buddymoe_ray.serve.work import ChatMessage, Terms
from buddymoe_ray.types import Mode, StructuredOutput

__all__ = [
    "Buddy",
    "BuddyOptions",
    "ChosenTool",
    "Effort",
    "MaxTokens",
    "Message",
    "Metadata",
    "RefusalPart",
    "NamedTool",
    "OutputForms",
    "ResponseFormat",
    "StreamOptions",
    "Temperature",
    "Tool",
    "ToolChoice",
    "ToolName",
    "TopP",
    "WireBody",
    "by_type",
    "called_with",
    "told",
    "written_as",
]


class WireBody(BaseModel):
    """A JSON object whose fields are all known, and of the type that they are written as."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())

    takes_notes: ClassVar[bool] = True
    """Whether a body of it may hold the standard fields that ask for nothing: `wire_parsing.NEUTRAL` and `NOTES`."""


def written_as(form: Any) -> BeforeValidator:
    """For a field that is checked later: the schema says that it is written as `form`."""
    return BeforeValidator(lambda value: value, json_schema_input_type=form)


def by_type(value: Any) -> str:
    """Which of several kinds an object is, by its `type`: the kind's Tag, which errors do not name."""
    return f"#{value.get('type') if isinstance(value, dict) else None}"


def _unsupported(value: object) -> None:
    if not (value is None or value is False or value == []):
        raise PydanticCustomError("unsupported", "unsupported")


Nothing = Annotated[list[Any], Field(max_length=0)] | Literal[False] | None
Unsupported = Annotated[None, BeforeValidator(_unsupported, json_schema_input_type=Nothing)]
"""A standard field whose empty value alone is understood."""

MaxTokens = Annotated[int, Field(ge=1)]
Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(gt=0, le=1)]
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
Metadata = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class StreamOptions(WireBody):
    """`stream_options`. `continuous_usage_stats` (vLLM's) puts what was used so far into every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Unsupported = None

    @model_validator(mode="after")
    def _usage_so_far_is_usage(self) -> StreamOptions:
        if self.continuous_usage_stats and not self.include_usage:
            raise ValueError("continuous_usage_stats is true, must come with include_usage true")
        return self


class BuddyOptions(WireBody):
    """The `buddymoe` block of a request; what is not given is the service's default.

    `budget` is in nats of expected extra loss per generated token and belongs to mode `bounded`. `record` asks for
    `usage.buddymoe.record`, and `replay` is such a record: the request is answered as it says. After `timeout` seconds
    it ends with an error, finished or not.
    """

    mode: Mode | None = None
    budget: float | None = Field(default=None, ge=0, le=1)
    record: bool | None = None
    replay: str | None = None
    timeout: float | None = Field(default=None, gt=0, le=86400)

    def terms(self) -> Terms:
        """For a worker."""
        return Terms(mode=self.mode, budget=self.budget, record=bool(self.record), replay=self.replay)


class ContentPart(BaseModel):
    """One part of a message's content, as it is written; `_content` reads it. Other fields must be null."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, None]

    type: Literal["text"]
    text: str


class RefusalPart(WireBody):
    """What the assistant said when it would not answer: a text like others."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """That."""
        return self.refusal


Buddy = Annotated[
    BuddyOptions,
    BeforeValidator(lambda value: {} if value is None else value, json_schema_input_type=BuddyOptions | None),
]


def _content(value: object, info: ValidationInfo) -> object:
    """Message content: a text, typed parts as a tuple of their texts, or None beside calls or a refusal. Parts other
    than text are refused."""
    if isinstance(value, str) or (value is None and (info.data.get("tool_calls") or info.data.get("refusal"))):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a text, or a list of content parts")
    names = ("text", "refusal") if info.data.get("role") == "assistant" else ("text",)
    texts = []
    for at, part in enumerate(value):
        name = part.get("type") if isinstance(part, dict) else None
        known = name in names and isinstance(part.get(name), str)
        if not known or any(part[key] is not None for key in part.keys() - {"type", name}):
            raise ValueError(
                f'part {at} is of type {name!r:.80}, must be {{"type": "text", "text": ...}}; images and audio are not '
                "supported"
            )
        texts.append(part[name])
    return tuple(texts)


def called_with(value: object) -> dict[str, Any]:
    """What a function was called with, of the JSON that clients send back as text. Raises ValueError."""
    try:
        given = json.loads(value or "{}") if isinstance(value, str) else None
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise ValueError(f"{value!r:.80} must be a JSON object in a text: send calls back as they came")
    return given


class CalledFunction(WireBody):
    """`function` of a call in a message."""

    name: str = Field(min_length=1)
    arguments: Annotated[dict[str, Any], BeforeValidator(called_with, json_schema_input_type=str)]


class ToolCall(WireBody):
    """A call that the assistant made before."""

    id: str
    type: Literal["function"] = "function"
    index: int | None = None
    function: CalledFunction

    def record(self) -> dict[str, Any]:
        """As templates know it."""
        return {"id": self.id, "type": "function", "function": self.function.model_dump()}


class OfferedFunction(WireBody):
    """`function` of a tool. `strict` changes nothing: arguments are enforced where calls are forced."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(WireBody):
    """What an answer may call."""

    type: Literal["function"]
    function: OfferedFunction

    def record(self) -> dict[str, Any]:
        """As templates know it."""
        return {"type": "function", "function": self.function.model_dump(exclude_none=True, exclude={"strict"})}


class NamedTool(WireBody):
    """`tool_choice` of one tool, by its name."""

    name: str


class ChosenTool(WireBody):
    """The same as it is written; `chosen_tool` reads it."""

    type: Literal["function"]
    function: NamedTool


def chosen_tool(value: Any) -> Literal["none", "auto", "required"] | NamedTool | None:
    """`tool_choice` in any of its forms. Raises ValueError."""
    if value is None or value in ("none", "auto", "required"):
        return value  # type: ignore[no-any-return]
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or len(function) + len(value) > 3:
        raise ValueError('must be none, auto, required or {"type": "function", "function": {"name": ...}}')
    return NamedTool(name=function["name"])


ToolChoice = Annotated[
    Any, BeforeValidator(chosen_tool, json_schema_input_type=Literal["none", "auto", "required"] | ChosenTool | None)
]
ROLES = ("system", "developer", "user", "assistant", "tool")


class Message(WireBody):
    """One chat message: text only. Clients send replies back as they came, with fields that are empty here."""

    role: str = Field(json_schema_extra={"enum": list(ROLES)})
    annotations: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    content: Annotated[
        str | tuple[str, ...] | None,
        BeforeValidator(_content, json_schema_input_type=str | list[ContentPart | RefusalPart] | None),
    ] = Field(None, validate_default=True)
    name: str | None = None

    @model_validator(mode="after")
    def _role_is_known(self) -> Message:
        if self.role not in ROLES:
            raise ValueError(f"role is {self.role!r}, must be system, developer, user, assistant or tool")
        return self

    @model_validator(mode="after")
    def _fields_are_the_roles(self) -> Message:
        if (self.tool_calls or self.reasoning_content or self.refusal) and self.role != "assistant":
            raise ValueError(
                f"tool_calls, reasoning_content or refusal is given, must be of role assistant, not {self.role}"
            )
        if (self.tool_call_id is None) == (self.role == "tool"):
            raise ValueError("tool_call_id must be given with role tool, and with no other")
        return self

    def record(self) -> ChatMessage:
        """As templates know it: `developer` is OpenAI's newer name of `system`, and a refusal is what was said."""
        role = "system" if self.role == "developer" else self.role
        texts = (self.content,) if isinstance(self.content, str) else self.content or ()
        return ChatMessage(
            role=role,
            content=told((*texts, self.refusal)) if self.refusal else self.content,
            name=self.name,
            reasoning_content=self.reasoning_content,
            tool_calls=tuple(call.record() for call in self.tool_calls or ()),
            tool_call_id=self.tool_call_id,
        )


def told(texts: Sequence[str]) -> str | tuple[str, ...]:
    """The content of a message of these texts."""
    return texts[0] if len(texts) == 1 else tuple(texts)


class OutputForms(WireBody):
    """`structured_outputs` as it is written: one of its fields; `checked_output` reads it."""

    json_: dict[str, Any] | bool | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class JsonSchema(WireBody):
    """`response_format.json_schema`. `strict` changes nothing: what is asked for is enforced."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(WireBody):
    """`response_format`: what the whole text must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_goes_with_type(self) -> ResponseFormat:
        if (self.json_schema is None) == (self.type == "json_schema"):
            raise ValueError("json_schema and type must go together: type json_schema has a json_schema, no other one")
        return self

    def output(self) -> StructuredOutput | None:
        """The same for an engine. Raises RequestError for a schema that cannot be enforced."""
        if self.json_schema is not None:
            return checked_output({"json": self.json_schema.schema_}, "response_format.json_schema.schema")
        return checked_output({"json_object": True}, "response_format") if self.type == "json_object" else None
