"""What request bodies are made of: messages, formats, options; typed and checked like the bodies in `wire`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from buddymoe_ray.engine.json_schema import checked_output
from buddymoe_ray.serve.work import ChatMessage, Terms
from buddymoe_ray.types import Mode, StructuredOutput

__all__ = ["BuddyOptions", "Message", "ResponseFormat", "StreamOptions", "WireBody"]


class WireBody(BaseModel):
    """A JSON object whose fields are all known, and of the type that they are written as."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


def _unsupported(value: object) -> None:
    if value not in (None, [], False):
        raise PydanticCustomError("unsupported", "unsupported")


Unsupported = Annotated[None, BeforeValidator(_unsupported)]  # a standard field whose empty value alone is understood


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
    `usage.buddymoe.record`, and `replay` is such a record: the request is answered as it says.
    """

    mode: Mode | None = None
    budget: float | None = Field(default=None, ge=0, le=1)
    record: bool | None = None
    replay: str | None = None

    def terms(self) -> Terms:
        """For a worker."""
        return Terms(mode=self.mode, budget=self.budget, record=bool(self.record), replay=self.replay)


def _content(value: object) -> object:
    """Message content: a text, or typed parts as a tuple of their texts. Parts other than text are refused."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a text, or a list of content parts")
    texts = []
    for part in value:
        known = isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        if not known or any(part[name] is not None for name in part.keys() - {"type", "text"}):
            raise ValueError('content parts must be {"type": "text", "text": ...}; images and audio are not supported')
        texts.append(part["text"])
    return tuple(texts)


class Message(WireBody):
    """One chat message: text only. Clients send replies back as they came, with fields that are empty here."""

    role: str
    annotations: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None
    refusal: Unsupported = None
    tool_calls: Unsupported = None
    tool_call_id: Unsupported = None
    content: Annotated[str | tuple[str, ...], BeforeValidator(_content)]
    name: str | None = None

    @model_validator(mode="after")
    def _role_is_known(self) -> Message:
        if self.role not in ("system", "developer", "user", "assistant"):
            raise ValueError(f"role is {self.role!r}, must be system, developer, user or assistant")
        return self

    def record(self) -> ChatMessage:
        """As templates know it: `developer` is OpenAI's newer name of `system`."""
        role = "system" if self.role == "developer" else self.role
        return ChatMessage(role=role, content=self.content, name=self.name)


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
