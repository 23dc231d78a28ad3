"""Forms of the replies that are written without a model, for the schema; a test holds real replies against them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from buddymoe_ray.serve.replies import BuddyUsage

__all__ = [
    "CountForm",
    "DetokenizeForm",
    "HealthForm",
    "MessageErrorForm",
    "MessageEvent",
    "MessageForm",
    "ResponseEvent",
    "ResponseForm",
    "TokenizeForm",
    "VersionForm",
]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class MessageTextForm(_Form):
    """A block of text."""

    type: Literal["text"]
    text: str


class MessageThinkingForm(_Form):
    """A block of thoughts, unsigned."""

    type: Literal["thinking"]
    thinking: str
    signature: Literal[""]


class MessageCallForm(_Form):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessageUsageForm(_Form):
    """Tokens as Anthropic counts them, and what the answer cost."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    buddymoe: BuddyUsage


class MessageForm(_Form):
    """Reply of /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[MessageTextForm | MessageThinkingForm | MessageCallForm]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsageForm


class MessageEvent(BaseModel):
    """One event of a stream of /v1/messages, named by its type."""

    type: Literal[
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "error",
    ]


class MessageErrorBody(_Form):
    """`error` of such a reply."""

    type: str
    message: str


class MessageErrorForm(_Form):
    """The body of replies of /v1/messages that are not 2xx."""

    type: Literal["error"]
    error: MessageErrorBody


class CountForm(_Form):
    """Reply of /v1/messages/count_tokens."""

    input_tokens: int


class ResponseTextForm(_Form):
    """The text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class ResponseThoughtForm(_Form):
    """The text of thoughts."""

    type: Literal["reasoning_text"]
    text: str


class _ItemForm(_Form):
    id: str
    status: Literal["in_progress", "completed", "incomplete"]


class ResponseMessageForm(_ItemForm):
    """An item of text."""

    type: Literal["message"]
    role: Literal["assistant"]
    content: list[ResponseTextForm]


class ResponseReasoningForm(_ItemForm):
    """An item of thoughts."""

    type: Literal["reasoning"]
    summary: list[Any]
    content: list[ResponseThoughtForm]
    encrypted_content: str = ""


class ResponseCallForm(_ItemForm):
    """An item that calls a tool."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class ResponseUsageForm(_Form):
    """Tokens as /v1/responses counts them, and what the answer cost."""

    input_tokens: int
    input_tokens_details: dict[Literal["cached_tokens", "cache_write_tokens"], int]
    output_tokens: int
    output_tokens_details: dict[Literal["reasoning_tokens"], int]
    total_tokens: int
    buddymoe: BuddyUsage


class ResponseForm(_Form):
    """Reply of /v1/responses; what was asked is repeated."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["completed", "incomplete"]
    error: None
    incomplete_details: dict[Literal["reason"], str] | None
    output: list[ResponseMessageForm | ResponseReasoningForm | ResponseCallForm]
    previous_response_id: None
    store: Literal[False]
    truncation: Literal["disabled"]
    include: list[str]
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    temperature: float | None
    top_p: float | None
    parallel_tool_calls: bool
    reasoning: dict[Literal["effort", "summary"], str | None]
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    usage: ResponseUsageForm


class ResponseEvent(BaseModel):
    """One event of a stream of /v1/responses, named by its type."""

    type: str = Field(pattern=r"^response\.")
    sequence_number: int


class TokenizeForm(_Form):
    """Reply of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeForm(_Form):
    """Reply of /detokenize."""

    prompt: str


class CalibrationForm(_Form):
    """How far a service's own calibration is."""

    state: str
    tokens: int
    percent: float
    record_bytes: int
    reason: str


class HealthForm(_Form):
    """Reply of /health; who may use the service is told what is wrong."""

    status: Literal["ok", "unhealthy"]
    problems: list[str] = []
    calibration: CalibrationForm | None = None


class VersionForm(_Form):
    """Reply of /version."""

    version: str
