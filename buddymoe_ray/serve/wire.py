"""OpenAI request bodies: typed, checked, turned into `Work`. What is not understood is refused by name, never dropped.

Knows neither HTTP nor workers. Invariant: every field of an accepted body is honoured, or is in one of the two tables
of fields whose given value asks for nothing (`wire_parsing`). On the token path: body → `parse_*` → `.work()`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from buddymoe_ray.engine.json_schema import checked_output, checked_schema
from buddymoe_ray.serve.wire_parsing import parse_body
from buddymoe_ray.serve.wire_parts import (
    Buddy,
    BuddyOptions,
    Effort,
    MaxTokens,
    Message,
    NamedTool,
    OutputForms,
    ResponseFormat,
    StreamOptions,
    Temperature,
    Tool,
    ToolChoice,
    TopP,
    WireBody,
    written_as,
)
from buddymoe_ray.serve.work import Prompt, Thinking, ToolUse, Work
from buddymoe_ray.types import SamplingParams, StructuredOutput

__all__ = ["ChatRequest", "CompletionRequest", "StopText", "parse_chat", "parse_completion"]

MAX_CHOICES = 128

# Sampling fields that go into SamplingParams under their own name.
SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "seed"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)

Item = TypeVar("Item")
Many = Annotated[list[Item], Field(min_length=1)]
Ids = Many[Annotated[int, Field(ge=0)]]
StopText = Annotated[str, Field(min_length=1)]


def _stop_list(value: object) -> object:
    if isinstance(value, str):
        return [value]
    return value


def _stops_are_text(value: list[str] | None) -> list[str] | None:
    if value is not None and not all(value):
        raise ValueError("an empty string is no stop string")
    return value


def _prompts(value: Any) -> tuple[Prompt, ...]:
    """`prompt` in any of its four forms, as a tuple of prompts."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, a list of strings, a list of token ids or a list of lists of token ids")
    if all(isinstance(item, str) for item in value):
        return tuple(value)
    if all(isinstance(item, list) for item in value):
        return tuple(_ids(item) for item in value)
    return (_ids(value),)


def _ids(value: list[Any]) -> tuple[int, ...]:
    if not value or not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value):
        raise ValueError("a list of token ids must hold integers of at least 0, and at least one")
    return tuple(value)


def _bias_by_id(value: dict[str, float] | None) -> dict[int, float] | None:
    if value is None:
        return None
    for key in value:
        if not (key.isascii() and key.isdigit() and str(int(key)) == key):
            raise ValueError(f'the key {key!r} is no token id, must be digits such as "42"')
    return {int(key): bias for key, bias in value.items()}


class _SamplingFields(WireBody):
    """What both endpoints share. None is "not given": the default is SamplingParams' own."""

    model: str
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]] | None, AfterValidator(_bias_by_id)] = (
        Field(default=None, json_schema_extra={"propertyNames": {"pattern": "^(0|[1-9][0-9]*)$"}})
    )
    max_tokens: MaxTokens | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: Annotated[
        list[str] | None,
        BeforeValidator(_stop_list, json_schema_input_type=StopText | list[StopText] | None),
        AfterValidator(_stops_are_text),
    ] = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_k: int | None = Field(default=None, ge=-1)
    top_p: TopP | None = None
    min_p: float | None = Field(default=None, ge=0, le=1)
    response_format: ResponseFormat | None = None
    structured_outputs: Annotated[dict[str, Any] | None, written_as(OutputForms | None)] = None
    cache_salt: str | None = Field(default=None, min_length=1, max_length=1024)
    buddymoe: Buddy = BuddyOptions()

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> _SamplingFields:
        if self.include_usage and not self.stream:
            raise ValueError("stream_options is given without stream, must come with stream true")
        return self

    @property
    def choices(self) -> int:
        """Answers asked for in all."""
        return self.n or 1

    @model_validator(mode="after")
    def _a_record_is_of_one_answer(self) -> _SamplingFields:
        asked = "record" if self.buddymoe.record else "replay" if self.buddymoe.replay is not None else None
        if asked is not None and self.choices > 1:
            raise ValueError(f"buddymoe.{asked} is given for {self.choices} answers, must be for one prompt with n 1")
        return self

    @model_validator(mode="after")
    def _one_thing_says_what_the_text_is(self) -> _SamplingFields:
        if self.structured_outputs is not None and self.response_format is not None:
            raise ValueError("structured_outputs and response_format are given, must be one of them")
        return self

    @property
    def repeats(self) -> Mapping[str, Any]:
        """What a reply says of its request."""
        return {}

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def usage_so_far(self) -> bool:
        """Whether every chunk of a stream says what was used so far."""
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    def _work(self, *, flush_seconds: float, logprobs: int | None, **own: Any) -> Work:
        """What both endpoints ask of a worker, and an endpoint's `own`."""
        given = self._given()
        return Work(
            sampling=SamplingParams(logprobs=logprobs, **given),
            given=frozenset(given),
            n=self.n or 1,
            terms=self.buddymoe.terms(),
            flush_seconds=flush_seconds if self.stream else None,
            report_prompts=self.usage_so_far,
            cache_salt=self.cache_salt or "",
            timeout=self.buddymoe.timeout,
            **own,
        )

    def _given(self) -> dict[str, Any]:
        """The sampling fields that the request names, as SamplingParams calls them."""
        values: dict[str, Any] = {name: getattr(self, name) for name in (*SAMPLING, "ignore_eos", "logit_bias")}
        values["stop"] = None if self.stop is None else tuple(self.stop)
        values["stop_token_ids"] = None if self.stop_token_ids is None else tuple(self.stop_token_ids)
        values["structured_outputs"] = self._output()
        return {name: value for name, value in values.items() if value is not None}

    def _output(self) -> StructuredOutput | None:
        """What the whole text must be. Raises RequestError."""
        if self.structured_outputs is not None:
            return checked_output(self.structured_outputs)
        return None if self.response_format is None else self.response_format.output()


class ChatRequest(_SamplingFields):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    reasoning_effort: Effort | None = None
    thinking_token_budget: int | None = Field(default=None, ge=0)
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is given without logprobs, must come with logprobs true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ, must be equal or only one be given")
        return self

    @model_validator(mode="after")
    def _tools_are_there_to_be_chosen(self) -> ChatRequest:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("tools holds a name twice, must be different ones")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.name!r}, must be one of tools")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice asks for a call, must come with tools")
        if names and self.tool_choice != "none" and self._output() is not None:
            raise ValueError("tools and a format of the whole text are given, must be one of them")
        return self

    def _tool_use(self) -> ToolUse | None:
        """What may be called. Raises RequestError for arguments that cannot be enforced where they must be."""
        if not self.tools or self.tool_choice == "none":
            return None
        only = self.tool_choice.name if isinstance(self.tool_choice, NamedTool) else None
        use = ToolUse(
            tools=tuple(tool.record() for tool in self.tools),
            required=self.tool_choice == "required" or only is not None,
            only=only,
            several=self.parallel_tool_calls is not False and only is None,
        )
        if use.required or not use.several:
            for at, tool in enumerate(self.tools):
                checked_schema(tool.function.parameters or {}, f"tools[{at}].function.parameters")
        return use

    def _thinking(self) -> Thinking:
        return Thinking(effort=self.reasoning_effort, budget=self.thinking_token_budget)

    @property
    def wants_logprobs(self) -> bool:
        """Whether the reply tells log probabilities."""
        return bool(self.logprobs)

    def work(self, request_id: str, *, flush_seconds: float) -> Work:
        """What a worker is asked."""
        return self._work(
            request_id=request_id,
            messages=tuple(message.record() for message in self.messages),
            template_options=self.chat_template_kwargs or {},
            tools=self._tool_use(),
            thinking=self._thinking(),
            reads_answer=True,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            max_tokens=self.max_completion_tokens or self.max_tokens,
            limit_field="max_tokens" if self.max_completion_tokens is None else "max_completion_tokens",
            flush_seconds=flush_seconds,
        )


class CompletionRequest(_SamplingFields):
    """Body of POST /v1/completions."""

    prompt: Annotated[Any, BeforeValidator(_prompts, json_schema_input_type=str | Many[str] | Ids | Many[Ids])]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    max_tokens: int | None = Field(default=None, ge=0)
    echo: bool | None = None
    add_special_tokens: bool | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _choices_are_bounded(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError(f"best_of is {self.best_of}, must be n ({self.n or 1}): no choice is computed and dropped")
        if self.choices > MAX_CHOICES:
            raise ValueError(f"prompt asks for {self.choices} choices, must be at most {MAX_CHOICES}")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0, must be at least 1 without echo")
        return self

    @property
    def choices(self) -> int:
        """Answers asked for in all: `n` for each prompt."""
        return len(self.prompt) * (self.n or 1)

    @property
    def wants_logprobs(self) -> bool:
        """Whether the reply tells log probabilities; `logprobs: 0` does, without alternatives."""
        return self.logprobs is not None

    def work(self, request_id: str, *, flush_seconds: float) -> Work:
        """What a worker is asked."""
        return self._work(
            request_id=request_id,
            prompts=self.prompt,
            logprobs=self.logprobs,
            max_tokens=SamplingParams.max_tokens if self.max_tokens is None else self.max_tokens,
            echo=bool(self.echo),
            add_special_tokens=self.add_special_tokens is not False,
            flush_seconds=flush_seconds,
        )

    def _given(self) -> dict[str, Any]:
        scored = 0 if self.max_tokens == 0 and self.logprobs is None else self.logprobs
        return super()._given() | ({"prompt_logprobs": scored} if self.echo and scored is not None else {})


def parse_chat(body: bytes) -> ChatRequest:
    """A chat request, or RequestError naming the field."""
    return parse_body(body, ChatRequest)


def parse_completion(body: bytes) -> CompletionRequest:
    """A completion request, or RequestError naming the field."""
    return parse_body(body, CompletionRequest)
