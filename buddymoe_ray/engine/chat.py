"""Prompts to token ids: plain text, and conversations through the model's own chat template.

Uses the tokenizer alone, so an ingress without weights can call it. Does not know requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from buddymoe_ray.errors import RequestError

__all__ = ["encode_chat", "encode_prompt"]

_ROLES = ("system", "developer", "user", "assistant", "tool")


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text, with the special tokens the model's own tokenizer puts around a prompt. Raises RequestError."""
    if tokenizer is None:
        raise RequestError("prompt is text, must be token ids for a model without tokenizer", param="prompt")
    ids: list[int] = tokenizer.encode(text)
    if not ids:
        raise RequestError("prompt is empty, must have at least one token. hint: send some text", param="prompt")
    return ids


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Ids of a conversation, ending where the assistant is to speak. Raises RequestError."""
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise RequestError(
            "model has no chat template, must have one for chat. hint: use completions", param="messages"
        )
    if not messages:
        raise RequestError("messages is empty, must have at least one. hint: send a user message", param="messages")
    for message in messages:
        if message.get("role") not in _ROLES:
            raise RequestError(f"role is {message.get('role')!r}, must be one of {', '.join(_ROLES)}", param="messages")
    try:
        ids = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except (TemplateError, TypeError, ValueError) as error:  # a content that is null or a list, say
        raise RequestError(
            f"messages do not fit the chat template: {error}. hint: check roles", param="messages"
        ) from error
    return list(ids)
