"""OpenAI response bodies as models. Only fields that were set are written, so `null` is said where OpenAI says it.

Knows neither HTTP nor workers; `render` fills them in.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from buddymoe_ray.types import CalibrationState, GuardState, Mode

__all__ = [
    "BuddyUsage",
    "ChatChoice",
    "ChatChunk",
    "ChatChunkChoice",
    "ChatCompletion",
    "ChatDelta",
    "ChatLogprobs",
    "ChatReplyMessage",
    "Completion",
    "CompletionChoice",
    "CompletionLogprobs",
    "ErrorBody",
    "ErrorEnvelope",
    "FunctionBody",
    "ModelCard",
    "ModelList",
    "StandinsBody",
    "TokenLogprobBody",
    "ToolCallBody",
    "TopLogprobBody",
    "UsageBody",
]


class _JsonBody(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())

    def to_json(self) -> bytes:
        """Compact JSON of the fields that were set."""
        return self.model_dump_json(exclude_unset=True).encode()


class ErrorBody(_JsonBody):
    """`error` of an error reply."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(_JsonBody):
    """The body of every reply that is not 2xx, and the last message of a stream that failed."""

    error: ErrorBody


class StandinsBody(_JsonBody):
    """Expert accesses that a stand-in answered, by its kind."""

    lowbit: int
    lowrank: int
    buddy: int
    mean: int
    drop: int


class CalibrationBody(_JsonBody):
    """How far the service's own calibration was when the request came, and on how many tokens it measured stand-ins;
    `none` where there is nothing to calibrate."""

    state: CalibrationState
    tokens: int


class BuddyUsage(_JsonBody):
    """`usage.buddymoe`: what the answer cost, in expert accesses (token, slot) of its decode steps.

    `mode` is what the request got: not `requested_mode` once `guard` is `tripped`, before `calibration` is ready, or
    where no stand-in is within any budget. `budget` (nats per generated token) is null but for a `bounded` request.
    `hits` found their expert resident, `peer` were computed exactly by another worker, `host` by a GPU's host (a CPU's
    last bits), `fetched` waited for the expert, `standins` were answered by something else. `expected_rise` is what
    they were charged: nats of loss, summed over the completion, in mode `bounded` at most `budget` times its tokens.
    `resumed` tokens were made before the answer last moved to another worker; their uses and charges are not counted.
    `record` is there for a request that asked for it; it goes into `buddymoe.replay`.
    """

    mode: Mode
    requested_mode: Mode
    budget: float | None
    hits: int
    peer: int
    host: int
    fetched: int
    standins: StandinsBody
    expected_rise: float
    resumed: int
    guard: GuardState
    calibration: CalibrationBody = CalibrationBody(state="none", tokens=0)
    record: str | None = None


class PromptTokensBody(_JsonBody):
    """`prompt_tokens_details`: how many tokens of the prompt were not computed, an earlier request having had them."""

    cached_tokens: int


class UsageBody(_JsonBody):
    """`usage`: tokens as OpenAI counts them (a prompt counts once, however many choices it has).

    `buddymoe` is not in what a stream's chunks say of the tokens so far.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensBody | None = None
    buddymoe: BuddyUsage | None = None


class TopLogprobBody(_JsonBody):
    """One alternative at one position."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobBody(_JsonBody):
    """The chosen token at one position, with its alternatives. Of the expert accesses of the step that chose it,
    stand-ins answered `standins`."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprobBody]
    standins: int = 0


class ChatLogprobs(_JsonBody):
    """`logprobs` of a chat choice."""

    content: list[TokenLogprobBody]
    refusal: None


class FunctionBody(_JsonBody):
    """`function` of a call; `arguments` are JSON as text."""

    name: str
    arguments: str


class ToolCallBody(_JsonBody):
    """One call of a tool, in a stream with its place among the choice's."""

    id: str
    type: Literal["function"]
    function: FunctionBody
    index: int = 0


class ChatReplyMessage(_JsonBody):
    """`message` of a chat choice; `content` is null beside calls or thoughts without text."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str = ""
    tool_calls: list[ToolCallBody] = []


class ChatChoice(_JsonBody):
    """One answer of a chat completion."""

    index: int
    message: ChatReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatCompletion(_JsonBody):
    """Reply of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody


class ChatDelta(_JsonBody):
    """What a chunk adds; `role` comes once per choice."""

    role: Literal["assistant"] = "assistant"
    content: str = ""
    reasoning_content: str = ""
    tool_calls: list[ToolCallBody] = []


class ChatChunkChoice(_JsonBody):
    """One choice of a chunk."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatChunk(_JsonBody):
    """One message of a chat stream. `usage` is there only when it was asked for, and null before the last chunk."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: UsageBody | None = None


class CompletionLogprobs(_JsonBody):
    """`logprobs` of a completion choice: four lists of one entry per token.

    `text_offset` is the character of the choice's text at which the token begins: of a token that continues a
    character, where that one begins; of one that a stop string cut off, the text's end. A stream tells a token once its
    place is settled. `top_logprobs` go by text, the chosen token's first; another that reads like one before it is
    called `token_id:N`.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_JsonBody):
    """One answer of a completion, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class Completion(_JsonBody):
    """Reply of /v1/completions, and each message of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageBody | None = None


class ModelCard(_JsonBody):
    """One entry of /v1/models. `sampling_defaults` are the checkpoint's, for what requests leave open."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    sampling_defaults: dict[str, float]


class ModelList(_JsonBody):
    """Reply of /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]
