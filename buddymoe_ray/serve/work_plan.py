"""`Work` to the engine's requests: prompts encoded, limits and defaults put in, one request per choice.

Knows an engine's tokenizer and limits, not the engine itself, and neither HTTP nor ray. On the token path: `Work` →
`Intake.plan` → engine requests. Used by the worker, and by `buddymoe batch`, which has no worker.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from buddymoe_ray.engine.answers import AnswerForm
from buddymoe_ray.engine.thoughts import thought_budget
from buddymoe_ray.errors import RequestError
from buddymoe_ray.models.token_bytes import TokenBytes
from buddymoe_ray.serve.deltas import Echo, delta_of
from buddymoe_ray.serve.prompts import (
    echo_of,
    encode,
    hopeless,
    in_form,
    longest_token,
    output_limit,
    resumed_choices,
    sampling_of,
    spelling_of,
)
from buddymoe_ray.serve.refusals import failure, refusal_of
from buddymoe_ray.serve.thinking import in_template
from buddymoe_ray.serve.work import Delta, Refusal, Spelling, Work
from buddymoe_ray.types import GenerationRequest, TokenEvent

__all__ = ["Intake", "Limits", "ServingEngine", "WorkPlan"]

log = logging.getLogger(__name__)


class Limits(Protocol):
    """How much of a model fits an engine."""

    @property
    def max_model_len(self) -> int: ...
    @property
    def max_running(self) -> int: ...
    @property
    def kv_tokens(self) -> int: ...


class ServingEngine(Protocol):
    """What an intake asks of an engine, whoever drives it."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def limits(self) -> Limits: ...
    @property
    def sampling_defaults(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class WorkPlan:
    """Engine requests by choice, the token ids of every prompt, how answers are read that are more than text, and by
    choice what is told before them."""

    requests: dict[int, GenerationRequest]
    prompts: tuple[tuple[int, ...], ...]
    answer: AnswerForm | None = None
    echoes: dict[int, Echo] = field(default_factory=dict)
    spelled: tuple[Spelling, ...] = ()

    def delta_of(self, choice: int, event: TokenEvent, token_bytes: TokenBytes) -> Delta:
        """What an event adds to a choice; its prompt is told once."""
        delta, echo = delta_of(choice, event, token_bytes), self.echoes.get(choice)
        if echo is None:
            return delta
        self.echoes[choice] = replace(echo, told=True)
        return echo.before(delta, event, token_bytes)


_SPELLED = 16
"""So many times the model's length may be spelled: more took seconds of everybody's, and gigabytes."""


class Intake:
    """Says what an engine is to do for some work. `default_max_tokens` is the output limit of work that names none."""

    def __init__(self, engine: ServingEngine, *, default_max_tokens: int) -> None:
        self._engine, self._default_max_tokens = engine, default_max_tokens
        self._token_characters = longest_token(engine.tokenizer)

    def hopeless(self, work: Work) -> Refusal | None:
        """Why a text cannot fit, whatever its tokens are; quick. What is only spelled may be longer."""
        limits = self._engine.limits
        most = _SPELLED * limits.max_model_len if work.spells_only else min(limits.max_model_len, limits.kv_tokens)
        return hopeless(work, most_tokens=most, token_characters=self._token_characters)

    def plan(self, work: Work) -> WorkPlan | Refusal:
        """One engine request per choice to answer, or why there is none. Takes its time over a long text."""
        try:
            chosen, tokenizer = resumed_choices(work), self._engine.tokenizer
            work = in_template(tokenizer, work)
            prompts = encode(tokenizer, work)
            if work.spells_only:
                spelled = tuple(spelling_of(tokenizer, prompt) for prompt in prompts)
                return WorkPlan(requests={}, prompts=prompts, spelled=spelled)
            work, answer = in_form(tokenizer, work)
            thoughts = thought_budget(tokenizer, answer, work.thinking.budget)
        except RequestError as error:
            return refusal_of(error)
        except Exception:
            log.exception("call %s could not be read", work.request_id)
            return failure()
        requests: dict[int, GenerationRequest] = {}
        echoes: dict[int, Echo] = {}
        for at, prompt in enumerate(prompts):
            choices = sorted(chosen.keys() & range(at * work.n, (at + 1) * work.n))
            limit = self._output_limit(len(prompt), work)
            if isinstance(limit, Refusal):
                return limit
            for choice in choices:
                request = self._request(work, prompt, choice, limit, chosen[choice])
                requests[choice] = replace(request, thoughts=thoughts)
            if work.echo:
                told = echo_of(self._engine.tokenizer, work.prompts[at], prompt)
                echoes |= {choice: replace(told, told=bool(chosen[choice])) for choice in choices}
        return WorkPlan(requests=requests, prompts=prompts, answer=answer, echoes=echoes)

    def _output_limit(self, prompt_tokens: int, work: Work) -> int | Refusal:
        limits = self._engine.limits
        return output_limit(
            prompt_tokens,
            work,
            max_model_len=limits.max_model_len,
            kv_tokens=limits.kv_tokens,
            default_max_tokens=self._engine.sampling_defaults.get("max_tokens", self._default_max_tokens),
        )

    def _request(
        self, work: Work, prompt: tuple[int, ...], choice: int, limit: int, resumed: tuple[int, ...]
    ) -> GenerationRequest:
        sampling = sampling_of(work, self._engine.sampling_defaults)
        seed = None if sampling.seed is None else sampling.seed + choice % work.n
        return GenerationRequest(
            request_id=f"{work.request_id}-{choice}",
            prompt_token_ids=prompt,
            sampling=replace(sampling, max_tokens=limit, seed=seed),
            mode=work.terms.mode,
            budget=work.terms.budget,
            record=work.terms.record,
            replay=work.terms.replay,
            resumed_token_ids=resumed,
            cache_salt=work.cache_salt,
            tenant=work.tenant,
            weight=work.weight,
        )
