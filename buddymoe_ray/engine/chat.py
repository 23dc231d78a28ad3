"""Prompts to token ids: plain text, and conversations through the model's own chat template.

Uses the tokenizer alone, so an ingress without weights can call it. Does not know requests. Invariant: every text and
call of a conversation is in the prompt; names of speakers are where the template writes them (few do: elsewhere they
say nothing, as in vLLM). A template reads content as a text, or as typed parts, or either, by role, and does not say
which; so it is tried on a twin of the conversation whose texts are marks that can be looked for.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from buddymoe_ray.errors import RequestError

__all__ = ["encode_chat", "encode_prompt", "opening_of", "template_variables"]

_ROLES = ("system", "developer", "user", "assistant", "tool")
# a part, or arguments, that a template wrote out as Python does: it reads them in another form
_AS_DATA = r"""(?:["']text["']\s*:\s*["']|'x': ')"""

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message]], str]


def encode_prompt(tokenizer: Any, text: str, *, specials: bool = True) -> list[int]:
    """Ids of a text, with the special tokens the model's own tokenizer puts around a prompt, if `specials`. Raises
    RequestError."""
    if tokenizer is None:
        raise RequestError("prompt is text, must be token ids for a model without tokenizer", param="prompt")
    ids: list[int] = tokenizer.encode(text, add_special_tokens=specials)
    if not ids:
        raise RequestError("prompt is empty, must have at least one token. hint: send some text", param="prompt")
    return ids


def encode_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    options: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """Ids of a conversation, ending where the assistant is to speak.

    Args:
        tokenizer: with the model's chat template.
        messages: `role`, `content` and perhaps `name`, `tool_calls`, `tool_call_id`, `reasoning_content`; content is a
            text, a tuple with the texts of typed parts, or None beside calls.
        options: further variables of the template.
        tools: what may be called, as OpenAI writes it.

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
    _check_options(tokenizer, options or {}, tools)
    _check_tools(tokenizer, tools)

    def render(shaped: Sequence[Message]) -> str:
        with _refusing():
            return _rendered(tokenizer, shaped, options or {}, tools)

    ids: list[int] = tokenizer.encode(render(_as_read(messages, render)), add_special_tokens=False)
    if not ids:
        raise RequestError("messages come to no token, must be at least one. hint: send some text", param="messages")
    return ids


@contextmanager
def _refusing() -> Iterator[None]:
    """A template is a program, and a conversation its input: whatever it raises is a RequestError."""
    try:
        yield
    except Exception as error:
        raise RequestError(
            f"messages do not fit the chat template: {error or type(error).__name__}. hint: check roles",
            param="messages",
        ) from error


def opening_of(tokenizer: Any, options: Mapping[str, Any], tools: Sequence[Mapping[str, Any]] = ()) -> str:
    """What the template writes of the assistant's answer itself, before the model's first token."""
    asked: list[Message] = [{"role": "user", "content": "x"}]
    try:
        without = _rendered(tokenizer, asked, {**options, "add_generation_prompt": False}, tools)
        whole = _rendered(tokenizer, asked, options, tools)
    except Exception:  # whatever the template raises; who renders the conversation says so
        return ""
    return whole[len(without) :] if whole.startswith(without) else ""


def template_variables(tokenizer: Any, tools: Sequence[Mapping[str, Any]] = ()) -> frozenset[str]:
    """What the chat template, of several that for these tools, reads beside messages and tools; nothing where there is
    none. Raises RequestError."""
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return frozenset()
    from transformers.utils.chat_template_utils import _get_template_variables  # describing a service needs none of it

    with _refusing():
        written = tokenizer.get_chat_template(tools=list(tools) or None)
        return frozenset(_get_template_variables(written) - {"messages", "tools"})


def _rendered(
    tokenizer: Any, messages: Sequence[Message], options: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]
) -> str:
    text: str = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tools=[dict(tool) for tool in tools] or None,
        tokenize=False,
        **{"add_generation_prompt": True, **options},
    )
    return text


def _check_tools(tokenizer: Any, tools: Sequence[Mapping[str, Any]]) -> None:
    """Raises RequestError where the model's template has no place for tools."""
    with _refusing():
        known = not tools or "tools" in tokenizer.get_chat_template(tools=list(tools))
    if not known:
        raise RequestError(
            "tools is given, must be left out: the model's chat template has no place for tools. hint: say them in the "
            "content of a system message",
            param="tools",
        )


def _check_options(tokenizer: Any, options: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> None:
    known = template_variables(tokenizer, tools) if options else frozenset()
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
        shaped = [_shaped(message, forms) for message in messages]
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
    """How content is handed over, by role: first as it came, then all alike, then mixed; and the same again with the
    arguments of calls as JSON, which templates join to text, or write as JSON themselves."""
    roles = list(dict.fromkeys(message["role"] for message in messages))
    mixed = sorted(itertools.product(("text", "parts"), repeat=len(roles)), key=lambda forms: len(set(forms)))
    for arguments in ("", "text") if any("tool_calls" in message for message in messages) else ("",):
        yield {"arguments": arguments}
        yield from ({"arguments": arguments, **dict(zip(roles, forms, strict=True))} for forms in mixed)


def _shaped(message: Message, forms: Mapping[str, str]) -> Message:
    content, form = message.get("content"), forms.get(message["role"])
    if "tool_calls" in message and forms["arguments"] == "text":
        functions = [call["function"] for call in message["tool_calls"]]
        written = [{**made, "arguments": json.dumps(made["arguments"], ensure_ascii=False)} for made in functions]
        calls = [{**call, "function": made} for call, made in zip(message["tool_calls"], written, strict=True)]
        message = {**message, "tool_calls": calls}
    if content is None and "tool_calls" in message:  # some templates join it to other text, some look for none
        return message if form is None else {**message, "content": ""}
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
        content = message.get("content")
        if isinstance(content, str):
            content = mark(f"messages[{at}].content")
        elif isinstance(content, tuple):
            content = tuple(mark(f"messages[{at}].content[{part}]") for part in range(len(content)))
        marked = {**message, "content": content} if "content" in message else {**message}
        if "tool_calls" in message:
            calls = [(call, mark(f"messages[{at}].tool_calls[{of}]")) for of, call in enumerate(message["tool_calls"])]
            marked["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": {"x": text}}} for call, text in calls
            ]
        twin.append(_shaped(marked, forms))
    text = render(twin)
    found = set(re.findall(r"70413\d{9}", re.sub(_AS_DATA + r"\d+", "", text)))
    lost = next((field for mark, field in marks.items() if mark not in found), None)
    if lost is not None:
        raise RequestError(
            f"{lost} is nowhere in what the model's chat template writes, must have a place there. hint: say it in the "
            "content of a user message",
            param="messages",
        )
