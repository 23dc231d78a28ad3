"""Prompts to token ids, the room they leave, and the request's terms: what is checked before an engine sees it.

Knows the tokenizer and the limits, not the engine. On the token path: `Work` → `encode` → engine
requests.
"""

from __future__ import annotations

from typing import Any, get_args

from buddymoe_ray.engine.chat import encode_chat, encode_prompt
from buddymoe_ray.errors import RequestError
from buddymoe_ray.serve.records import ChatMessage, Refusal, Terms, Work
from buddymoe_ray.serve.refusals import over_long
from buddymoe_ray.types import Mode

__all__ = ["check_terms", "encode", "output_limit", "resumed_choices"]


def check_terms(terms: Terms) -> None:
    """Raises RequestError for values that no engine knows.

    HTTP bodies are typed by `wire`; a Python client's keywords come here as they were given.
    """
    modes = get_args(Mode)
    if terms.mode is not None and terms.mode not in modes:
        raise _unusable("mode", terms.mode, " or ".join(modes), "leave it out for the service's own")
    budget = terms.budget
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 <= budget <= 1):
        raise _unusable("budget", budget, "a number from 0 to 1 (nats per token)", ".003 is about .3 % of perplexity")
    if not isinstance(terms.record, bool):
        raise _unusable("record", terms.record, "true or false", "leave it out for no record")
    if terms.replay is not None and not isinstance(terms.replay, str):
        raise _unusable("replay", terms.replay, "text", "send back usage.record unchanged")


def _unusable(name: str, value: object, must: str, hint: str) -> RequestError:
    return RequestError(f"{name} is {value!r:.80}, must be {must}. hint: {hint}", param=f"buddymoe.{name}")


def encode(tokenizer: Any | None, work: Work) -> tuple[tuple[int, ...], ...]:
    """Token ids of every prompt of a call; a conversation is one prompt.

    Raises:
        RequestError: text without a tokenizer, messages that no chat template takes, or a text of no tokens.
    """
    if work.messages:
        messages = [_template_fields(message) for message in work.messages]
        return (tuple(encode_chat(tokenizer, messages, work.template_options)),)
    return tuple(
        tuple(encode_prompt(tokenizer, prompt)) if isinstance(prompt, str) else prompt for prompt in work.prompts
    )


def _template_fields(message: ChatMessage) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    return fields if message.name is None else fields | {"name": message.name}


def output_limit(
    prompt_tokens: int, work: Work, *, max_model_len: int, kv_tokens: int, default_max_tokens: int
) -> int | Refusal:
    """How many tokens may follow a prompt, or why none or not so many can.

    Args:
        prompt_tokens: length of the prompt.
        work: its `max_tokens` is a demand; None takes what fits, at most `default_max_tokens`.
        max_model_len: most tokens of prompt and output of the model.
        kv_tokens: most tokens that the KV cache holds.
    """
    limit = min(max_model_len, kv_tokens)
    name = "the model's context" if max_model_len <= kv_tokens else "the KV cache"
    room = limit - prompt_tokens
    wanted = work.max_tokens
    if room < 1:
        return over_long(
            f"{work.prompt_field} is {prompt_tokens} tokens, must be at most {limit - 1} ({name} is {limit} tokens, "
            "the output included). hint: shorten it",
            param=work.prompt_field,
        )
    if wanted is not None and wanted > room:
        return over_long(
            f"{work.prompt_field} and {work.limit_field} are {prompt_tokens} + {wanted} tokens, must be at most "
            f"{limit} ({name}). hint: lower {work.limit_field} to {room}",
            param=work.prompt_field,
        )
    return min(room, default_max_tokens) if wanted is None else wanted


def resumed_choices(work: Work) -> dict[int, tuple[int, ...]]:
    """The choices to answer, each with the tokens its client has. Raises RequestError for unknown choices."""
    if not work.resume:
        return dict.fromkeys(range(work.choices), ())
    chosen = {resumed.choice: resumed.token_ids for resumed in work.resume}
    if len(chosen) < len(work.resume) or not chosen.keys() <= set(range(work.choices)):
        named = [resumed.choice for resumed in work.resume]
        raise RequestError(
            f"resume names choices {named}, must be different ones below {work.choices}. hint: ask again from the start"
        )
    return chosen
