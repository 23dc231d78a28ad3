"""Prompts to token ids: plain text, and conversations through the model's own chat template.

Uses the tokenizer alone, so an ingress without weights can call it. Does not know requests. Invariant: every text and
name of a conversation is in the prompt. A template reads content as a text, or as typed parts, or either, by role, and
does not say which; so it is tried on a twin of the conversation whose texts are marks that can be looked for.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from buddymoe_ray.errors import RequestError

__all__ = ["encode_chat", "encode_prompt"]

_ROLES = ("system", "developer", "user", "assistant", "tool")
_AS_DATA = r"""["']text["']\s*:\s*["']"""  # a part that a template wrote out whole: it does not read parts

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message]], str]


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text, with the special tokens the model's own tokenizer puts around a prompt. Raises RequestError."""
    if tokenizer is None:
        raise RequestError("prompt is text, must be token ids for a model without tokenizer", param="prompt")
    ids: list[int] = tokenizer.encode(text)
    if not ids:
        raise RequestError("prompt is empty, must have at least one token. hint: send some text", param="prompt")
    return ids


def encode_chat(tokenizer: Any, messages: Sequence[Message], options: Mapping[str, Any] | None = None) -> list[int]:
    """Ids of a conversation, ending where the assistant is to speak.

    Args:
        tokenizer: with the model's chat template.
        messages: `role`, `content` and perhaps `name`; content is a text, or a tuple with the texts of typed parts.
        options: further variables of the template.

    Raises:
        RequestError: there is no template, it refuses the conversation, it has no place for something in it, or it does
            not read one of `options`.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise RequestError(
            "model has no chat template, must have one for chat. hint: use completions", param="messages"
        )
    if not messages:
        raise RequestError("messages is empty, must have at least one. hint: send a user message", param="messages")
    for message in messages:
        if message.get("role") not in _ROLES:
            raise RequestError(f"role is {message.get('role')!r}, must be one of {', '.join(_ROLES)}", param="messages")
    _check_options(tokenizer, options or {})

    def render(shaped: Sequence[Message]) -> str:
        try:
            text: str = tokenizer.apply_chat_template(
                [dict(message) for message in shaped],
                tokenize=False,
                **{"add_generation_prompt": True, **(options or {})},
            )
        except Exception as error:  # a template is a program, and a conversation its input: whatever it raises
            raise RequestError(
                f"messages do not fit the chat template: {error or type(error).__name__}. hint: check roles",
                param="messages",
            ) from error
        return text

    ids: list[int] = tokenizer.encode(render(_as_read(messages, render)), add_special_tokens=False)
    if not ids:
        raise RequestError("messages come to no token, must be at least one. hint: send some text", param="messages")
    return ids


def _check_options(tokenizer: Any, options: Mapping[str, Any]) -> None:
    if not options:
        return
    from transformers.utils.chat_template_utils import _get_template_variables  # describing a service needs none of it

    known = _get_template_variables(tokenizer.get_chat_template()) - {"messages"}
    for name in options.keys() - known:
        raise RequestError(
            f"chat_template_kwargs.{name} is given, must be a variable that the model's chat template reads "
            f"({', '.join(sorted(known))}). hint: leave it out",
            param="chat_template_kwargs",
        )


def _as_read(messages: Sequence[Message], render: Render) -> list[Message]:
    """The messages in a form of which the template loses nothing. Raises the refusal of the form they came in."""
    refusal: RequestError | None = None
    tried: list[list[Message]] = []
    for forms in _forms(messages):
        shaped = [_shaped(message, forms.get(message["role"])) for message in messages]
        if shaped in tried:
            continue
        tried.append(shaped)
        try:
            _check_twin(messages, forms, render)
            return shaped
        except RequestError as error:
            refusal = refusal or error
    assert refusal is not None, "a conversation was tried in no form"
    raise refusal


def _forms(messages: Sequence[Message]) -> Iterator[dict[str, str]]:
    """How content is handed over, by role: first as it came, then all alike, then mixed."""
    yield {}
    roles = list(dict.fromkeys(message["role"] for message in messages))
    mixed = itertools.product(("text", "parts"), repeat=len(roles))
    yield from (dict(zip(roles, forms, strict=True)) for forms in sorted(mixed, key=lambda forms: len(set(forms))))


def _shaped(message: Message, form: str | None) -> Message:
    content = message.get("content")
    if not isinstance(content, str | tuple):
        return message
    texts = (content,) if isinstance(content, str) else content
    as_text = form == "text" or (form is None and isinstance(content, str))
    return {**message, "content": "".join(texts) if as_text else [{"type": "text", "text": text} for text in texts]}


def _check_twin(messages: Sequence[Message], forms: Mapping[str, str], render: Render) -> None:
    """Raises RequestError when the template refuses or loses something of a conversation like this one."""
    marks: dict[str, str] = {}

    def mark(field: str) -> str:
        text = f"70413{len(marks):09d}"  # digits: no filter that cuts or changes case touches them
        marks[text] = field
        return text

    twin: list[Message] = []
    for at, message in enumerate(messages):
        content, name = message.get("content"), message.get("name")
        if isinstance(content, str):
            content = mark(f"messages[{at}].content")
        elif isinstance(content, tuple):
            content = tuple(mark(f"messages[{at}].content[{part}]") for part in range(len(content)))
        marked = {**message, "content": content} if "content" in message else message
        if name is not None:
            marked = {**marked, "name": mark(f"messages[{at}].name")}
        twin.append(_shaped(marked, forms.get(message["role"])))
    text = render(twin)
    found = set(re.findall(r"70413\d{9}", re.sub(_AS_DATA + r"\d+", "", text)))
    lost = next((field for mark, field in marks.items() if mark not in found), None)
    if lost is not None:
        raise RequestError(
            f"{lost} is nowhere in what the model's chat template writes, must have a place there. hint: say it in the "
            "content of a user message",
            param="messages",
        )
