"""The words that cross between the ingress (or a Python client) and a worker: frozen records that pickle small.

Knows neither HTTP nor ray nor torch. On the token path: one `Work` goes to a worker, `Batch`es or one `Refusal` come
back.
Choices are numbered prompt by prompt: choice = prompt * n + k.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from buddymoe_ray.engine.answers import AnswerForm
from buddymoe_ray.observe import EngineSnapshot, ExpertMap, PlacementSnapshot
from buddymoe_ray.types import FinishReason, Mode, SamplingParams, Usage

__all__ = [
    "Batch",
    "ChatMessage",
    "Delta",
    "Prompt",
    "Refusal",
    "Reply",
    "ResumedChoice",
    "Spelling",
    "Terms",
    "Thinking",
    "TokenText",
    "ToolUse",
    "Work",
    "WorkerInfo",
    "WorkerReport",
    "Workers",
    "known_logprob",
]

Prompt = str | tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ChatMessage:
    """One message of a conversation. `content` is a text, the texts of typed parts, or None beside `tool_calls`, whose
    `function.arguments` are objects."""

    role: str
    content: str | tuple[str, ...] | None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """Tools that an answer may call, as OpenAI writes them. It must call one where `required`, of all of them or `only`
    that; at most once without `several`."""

    tools: tuple[Mapping[str, Any], ...]
    required: bool = False
    only: str | None = None
    several: bool = True


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """How much a model is to think before it answers; None leaves it to the model.

    Args:
        enabled: whether at all.
        effort: a word that chat templates know. `usual` is the one that asks for what a model does anyway.
        budget: most tokens of thoughts; then their end is written for it.
    """

    enabled: bool | None = None
    effort: str | None = None
    usual: str = "medium"
    budget: int | None = None


@dataclass(frozen=True, kw_only=True)
class Terms:
    """How a request's missing experts are answered; the fields are those of `types.GenerationRequest`."""

    mode: Mode | None = None
    budget: float | None = None
    record: bool = False
    replay: str | None = None


@dataclass(frozen=True, kw_only=True)
class ResumedChoice:
    """A choice to go on with elsewhere, after the tokens that the client already has (none: from its start)."""

    choice: int
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one API call asks of a worker: some prompts, or one conversation, each answered `n` times.

    Args:
        request_id: unique among all calls; sequences are called `<request_id>-<choice>`.
        prompts: text or token ids; empty when `messages` is given.
        messages: a conversation, rendered by the model's chat template.
        template_options: variables for the chat template, beside the messages.
        tools: what the answer may call.
        thinking: how much the model is to think about a conversation.
        reads_answer: the caller reads thoughts and calls out of the text, and wants to know how.
        sampling: how tokens are chosen. Choice k of a prompt uses `seed + k`. Its `max_tokens` is not read.
        given: fields of `sampling` that the caller named; the others are as the checkpoint says, where it does.
        terms: how missing experts are answered. A record to be replayed is of one prompt and one choice.
        max_tokens: most tokens per choice; None is as many as fit, at most the service's default. Errors call it
            `limit_field`, as the caller did.
        flush_seconds: tokens of this much time share a batch; None is one batch with everything at the end.
        report_prompts: send the prompts' token ids with the first batch.
        cache_salt: only calls with the same share what was computed of a common beginning.
        tenant: who asks, for workers to be fair; empty is nobody in particular. `weight` is how large a share it has
            beside those of others.
        timeout: seconds the caller wants to wait for the whole answer at most; whoever makes the call sees to it.
        begin_within: a worker that foresees that it could not begin within so many seconds refuses.
        echo: every choice's text begins with its prompt.
        add_special_tokens: the tokenizer may put its special tokens around prompts that are text.
        spells_only: what the prompts' tokens and texts are is all that is asked for: one batch without deltas.
        gives_way: a worker takes it where nobody else waits, and sends it away (503) when somebody does.
        binding: only a worker with the same may go on with it, where it is not empty: another's tokens may differ.
        resume: the choices to answer, when the work moved here from another worker; empty is all, from their start.
            The first batch is then empty and says that the worker has the work.
    """

    request_id: str
    prompts: tuple[Prompt, ...] = ()
    messages: tuple[ChatMessage, ...] = ()
    template_options: Mapping[str, Any] = field(default_factory=dict)
    tools: ToolUse | None = None
    thinking: Thinking = Thinking()
    reads_answer: bool = False
    sampling: SamplingParams
    given: frozenset[str] = frozenset()
    max_tokens: int | None = None
    limit_field: str = "max_tokens"
    n: int = 1
    terms: Terms = Terms()
    flush_seconds: float | None = None
    report_prompts: bool = False
    cache_salt: str = ""
    tenant: str = ""
    weight: float = 1.0
    timeout: float | None = None
    begin_within: float = math.inf
    echo: bool = False
    add_special_tokens: bool = True
    spells_only: bool = False
    gives_way: bool = False
    binding: str = ""
    resume: tuple[ResumedChoice, ...] = ()

    @property
    def choices(self) -> int:
        """Answers asked for in all."""
        return max(len(self.prompts), 1) * self.n

    @property
    def prompt_field(self) -> str:
        """The request field that errors about the prompt name."""
        return "messages" if self.messages else "prompt"


@dataclass(frozen=True, kw_only=True)
class TokenText:
    """One token with its log probability (nats; None for the first of a prompt) and its bytes, which may be a part of a
    character. `standins` is that of `types.TokenLogprob`."""

    token_id: int
    logprob: float | None
    data: bytes
    top: tuple[TokenText, ...] = ()
    standins: int = 0


def known_logprob(entry: TokenText) -> float:
    """The log probability of a token that follows others."""
    assert entry.logprob is not None, f"token {entry.token_id} follows nothing, must be generated"
    return entry.logprob


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What was added to one choice since its last delta. `usage` comes with the last one (`finish_reason` set).

    `text_offsets` are of the first tokens that have none yet, see `types.TokenEvent`.
    `stop` is the stop string that ended a choice, `error` says why one ended with `finish_reason` "error".
    """

    choice: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenText, ...] = ()
    text_offsets: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    stop: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """What a prompt is: its tokens, the vocabulary's names of them, and their text."""

    token_ids: tuple[int, ...]
    names: tuple[str, ...]
    text: str


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Deltas that travel together, at most one per choice. The first says how the answer is read, where it is more than
    text."""

    deltas: tuple[Delta, ...]
    prompt_token_ids: tuple[tuple[int, ...], ...] = ()
    answer: AnswerForm | None = None
    spelled: tuple[Spelling, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a call was not answered, in the terms of OpenAI's error envelope. The last item of its stream."""

    status: int
    message: str
    kind: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    retry_after_seconds: int | None = None


Reply = Batch | Refusal


@dataclass(frozen=True, kw_only=True)
class WorkerInfo:
    """What a worker serves, how much of it fits, how what requests leave open is sampled, and what is known of the
    tokenizer by the names of tokenizer_config.json."""

    model_id: str
    max_model_len: int
    max_running: int
    kv_tokens: int
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class WorkerReport:
    """One worker's counters. `replica` is its name among all workers that ever ran, `pid` its process on its node,
    `devices` the GPUs it was given, `links` how many seconds each peer takes to answer; `experts` is there for who
    asked for it, `placement` where experts are placed."""

    replica: str
    pid: int
    devices: tuple[str, ...] = ()
    links: Mapping[str, float] = field(default_factory=dict)
    snapshot: EngineSnapshot
    experts: ExpertMap | None = None
    placement: PlacementSnapshot | None = None


class Workers(Protocol):
    """All workers of a service, as the ingress sees them. `handles.ReplicaWorkers` is the real one."""

    def generate(self, work: Work) -> AsyncGenerator[Reply, None]:
        """Answer `work`; closing the generator cancels it."""
        ...

    async def info(self) -> WorkerInfo:
        """What is served (the same for all workers)."""
        ...

    async def reports(self, *, experts: bool = False) -> tuple[WorkerReport, ...]:
        """Those of all workers that answer, with where their `experts` are."""
        ...

    async def health(self) -> tuple[str | None, ...]:
        """One entry per worker: None when it is well, else what is wrong."""
        ...
