"""Prompts to token ids, and the room they leave: what is checked before an engine sees a request.

Knows the tokenizer and the limits, not the engine. On the token path: `Work` → `encode` → engine
requests.
"""

from __future__ import annotations

from typing import Any

from buddymoe_ray.engine.chat import encode_chat, encode_prompt
from buddymoe_ray.serve.records import ChatMessage, Refusal, Work
from buddymoe_ray.serve.refusals import over_long

__all__ = ["encode", "output_limit"]


def encode(tokenizer: Any | None, work: Work) -> tuple[tuple[int, ...], ...]:
    """Token ids of every prompt of a call; a conversation is one prompt.

    Raises:
        RequestError: text without a tokenizer, messages that no chat template takes, or a text of no tokens.
    """
    if work.messages:
        return (tuple(encode_chat(tokenizer, [_template_fields(message) for message in work.messages])),)
    return tuple(
        tuple(encode_prompt(tokenizer, prompt)) if isinstance(prompt, str) else prompt for prompt in work.prompts
    )


def _template_fields(message: ChatMessage) -> dict[str, str]:
    fields = {"role": message.role, "content": message.content}
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
            f"{work.prompt_field} and max_tokens are {prompt_tokens} + {wanted} tokens, must be at most {limit} "
            f"({name}). hint: lower max_tokens to {room}",
            param=work.prompt_field,
        )
    return min(room, default_max_tokens) if wanted is None else wanted
