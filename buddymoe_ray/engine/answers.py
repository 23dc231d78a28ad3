"""How a model writes reasoning and tool calls into its answer: which form, read back piece by piece, and forced.

The parser is transformers'; the forms are the checkpoint's own `response_template`, else known by what its chat
template writes. Knows tokenizers and texts, neither requests nor HTTP. Invariant: text that is no call, or a broken
one, comes back as content; only the marks around what was read, and white space beside them, are dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from buddymoe_ray.engine.answer_forms import AROUND, CALLS, HARMONY, THOUGHTS, Template
from buddymoe_ray.engine.chat import opening_of
from buddymoe_ray.errors import RequestError
from buddymoe_ray.types import StructuredOutput

__all__ = [
    "AnswerForm",
    "AnswerPiece",
    "AnswerReader",
    "answer_form",
    "call_output",
    "prepare_reading",
    "reasoned_output",
]


@dataclass(frozen=True, kw_only=True)
class AnswerForm:
    """How an answer is read.

    Args:
        template: transformers' `response_template`.
        calls: xgrammar's name of the form of calls, or the mark before a list of them; empty where none can be forced.
        specials: whether special tokens are among the marks, so that text must hold them.
        opening: what the chat template wrote of the answer, before the model's first token.
        tools: those offered, by which arguments are typed; without any, calls are text.
    """

    template: Template
    calls: str = ""
    specials: bool = False
    opening: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def thinks(self) -> bool:
        """Whether the model may begin with thoughts, or has begun."""
        return "reasoning_content" in self.template["fields"] and not self.opening.endswith("</think>")


@dataclass(frozen=True, kw_only=True)
class AnswerPiece:
    """Some of an answer: text, thoughts, or one whole call (`name` set) with its arguments as JSON."""

    text: str = ""
    reasoning: str = ""
    name: str = ""
    arguments: str = ""


def answer_form(
    tokenizer: Any, options: Mapping[str, Any], tools: Sequence[Mapping[str, Any]] = ()
) -> AnswerForm | None:
    """How answers to a conversation are read; None where they are text and nothing else.

    Args:
        tokenizer: with the model's chat template.
        options: further variables of the template.
        tools: OpenAI's, which the model may call.

    Raises RequestError where the checkpoint's own `response_template` is none.
    """
    written = _chat_template(tokenizer, tools)
    own: Any = getattr(tokenizer, "response_template", None)
    theirs = isinstance(own, dict)
    if theirs:
        _check_form(own)
    name = next((name for name, form in CALLS.items() if all(mark in written for mark in form.marks)), None)
    if not theirs:
        fields: dict[str, Any] = {"content": {"repeats": True, "join": ""}}
        if name == "harmony":
            fields = dict(HARMONY)
        elif "</think>" in written:
            fields["reasoning_content"] = THOUGHTS | {"repeats": True, "join": "\n"}
        if name is not None:
            fields |= {"tool_calls": {**CALLS[name].read, "repeats": True}, "around": AROUND}
        own = {"start_anchor_pattern": r"\A", "fields": fields}
    if not tools:
        own = {**own, "fields": {k: field for k, field in own["fields"].items() if k not in ("tool_calls", "around")}}
    if not own["fields"].keys() & {"tool_calls", "reasoning_content"}:
        return None
    opening = opening_of(tokenizer, options, tools).rstrip()
    if not theirs:
        opening = opening[opening.index("<think>") :] if "<think>" in opening else ""
    return AnswerForm(
        template=own,
        calls=CALLS[name].forced if name is not None else "",
        specials=any(_begins_mark(own, special) for special in tokenizer.all_special_tokens),
        opening=opening,
        tools=tuple(tools),
    )


def call_output(form: AnswerForm, tools: Sequence[Mapping[str, Any]], *, must: bool, several: bool) -> StructuredOutput:
    """What an answer must be that calls these tools: at least one of them if it `must`, else perhaps after some text;
    more than once where `several` calls may be; all that after the model's thoughts.

    Raises RequestError where that form of the model's calls cannot be forced.
    """
    from xgrammar import get_model_structural_tag

    if not form.calls or not (must or form.calls.isidentifier()):
        name = "tool_choice" if must else "parallel_tool_calls"
        raise RequestError(
            f"{name} is given, must be left out: calls can not be forced in the form that this model writes them in. "
            "hint: tool_choice auto",
            param=name,
        )
    functions = [
        {"name": tool["function"]["name"], "parameters": tool["function"].get("parameters") or {"type": "object"}}
        for tool in tools
    ]
    if form.calls.isidentifier():
        tag = get_model_structural_tag(
            form.calls,
            tools=[{"type": "function", "function": function} for function in functions],
            tool_choice="required" if must else "auto",
            reasoning=("enabled" if form.opening else "auto") if form.thinks else "disabled",
            max_whitespace_cnt=1,
            parallel_tool_calls=several,
        )
        return StructuredOutput(kind="structural_tag", source=tag.model_dump_json(), field="tool_choice")
    calls = [_call_schema(function) for function in functions]
    schema = {"type": "array", "items": {"anyOf": calls}, "minItems": 1} | ({} if several else {"maxItems": 1})
    return _after_thoughts(form, {"type": "sequence", "elements": [_text(form.calls), _json(schema)]}, "tool_choice")


def reasoned_output(form: AnswerForm, wanted: StructuredOutput) -> StructuredOutput:
    """The same for what follows a model's thoughts."""
    if not form.thinks or wanted.kind == "structural_tag":
        return wanted
    tags: dict[str, Any] = {
        "json": lambda: _json(json.loads(wanted.source)),
        "json_object": lambda: _json({"type": "object"}),
        "regex": lambda: {"type": "regex", "pattern": wanted.source},
        "grammar": lambda: {"type": "grammar", "grammar": wanted.source},
        "choice": lambda: {"type": "or", "elements": [_text(choice) for choice in json.loads(wanted.source)]},
    }
    return _after_thoughts(form, tags[wanted.kind](), wanted.field)


def prepare_reading() -> None:
    """Import what a reader needs, so that no answer waits for it (.5 CPU-seconds, 30 MB)."""
    import transformers.utils.chat_parsing  # noqa: F401


class AnswerReader:
    """Reads one answer as it comes."""

    def __init__(self, form: AnswerForm) -> None:
        self._parser = _parser(form)

    def feed(self, text: str, *, ended: bool) -> list[AnswerPiece]:
        """What the next text, the last if `ended`, lets be told."""
        events = self._parser.feed(text)
        if ended:
            try:
                events += self._parser.finalize()[1]
            except ValueError:  # a checkpoint's template asks for fields that the answer has not
                events += self._parser.left
        return [piece for event in events for piece in _pieces(event)]


def _pieces(event: Mapping[str, Any]) -> list[AnswerPiece]:
    kind, field = event["type"], event["field"]
    if kind == "region_close" and field == "tool_calls":
        value = event["value"]
        return [
            AnswerPiece(name=call["function"]["name"], arguments=_written(call["function"]["arguments"]))
            for call in (value if isinstance(value, list) else [value])
        ]
    if kind != "region_chunk" or field == "tool_calls" or not event["text"]:
        return []
    text = event["text"]
    return [AnswerPiece(reasoning=text) if field == "reasoning_content" else AnswerPiece(text=text)]


def _parser(form: AnswerForm) -> Any:
    """transformers' parser, which here gives a broken call back as it was written instead of raising."""
    from transformers.utils.chat_parsing import ResponseParser

    class Parser(ResponseParser):
        left: list[dict[str, Any]]
        _began = 0

        def _process(self, events: list[dict[str, Any]], eos: bool) -> None:
            self.left = events
            super()._process(events, eos)

        def _open_explicit(self, events: list[dict[str, Any]], field: Any, m: Any) -> None:
            self._began = m.start()
            super()._open_explicit(events, field, m)

        def _close_current(self, events: list[dict[str, Any]]) -> None:
            if self._current != "tool_calls":
                return super()._close_current(events)
            before, field, body = len(events), self._spec.fields["tool_calls"], self._body
            try:
                super()._close_current(events)
                whole = _are_calls(events[-1]["value"]) and not _beside_tags(field, body)
            except Exception:  # whatever a broken call makes it raise
                whole = False
            if not whole:
                self._reset_to_implicit()
                text = self._buffer[self._began : self._pos]
                events[before:] = [{"type": "region_chunk", "field": "content", "text": text}]

    return Parser(form.template, prefix=form.opening, tools=[dict(tool) for tool in form.tools])


def _written(arguments: Mapping[str, Any]) -> str:
    """As JSON, U+FFFD for half a character, which is no text. Raises ValueError for NaN and infinity."""
    return re.sub("[\ud800-\udfff]", "\ufffd", json.dumps(arguments, ensure_ascii=False, allow_nan=False))


def _are_calls(value: Any) -> bool:
    """Whether it is a call, or some: each with a name, and arguments that are an object. Raises ValueError for what
    cannot be told."""
    calls = value if isinstance(value, list) else [value]
    functions = [call.get("function") if isinstance(call, dict) else None for call in calls]
    return bool(functions) and all(
        isinstance(found, dict)
        and isinstance(name := found.get("name"), str)
        and name.encode()
        and isinstance(found.get("arguments"), dict)
        and _written(found["arguments"])
        for found in functions
    )


def _beside_tags(field: Any, body: str) -> str:
    """Text of a call that no tag holds."""
    tag = field.content_args.get("tag_pattern")
    return "" if tag is None else re.sub(tag, "", body, flags=re.DOTALL).strip()


def _check_form(template: Template) -> None:
    from transformers.utils.chat_parsing.response_templates import load_response_template

    try:
        load_response_template(template)
    except Exception as error:  # whatever a broken one makes it raise
        raise RequestError(
            f"messages are for a model whose response_template cannot be used ({error}), must be one that transformers "
            "reads. hint: mend the checkpoint's tokenizer_config.json",
            param="messages",
        ) from error


def _begins_mark(template: Template, special: str) -> bool:
    """Whether a special token is a mark of the form, or what one begins with."""
    from transformers.utils.chat_parsing.response_templates import load_response_template

    fields = load_response_template(template).fields.values()
    found = [mark.match(special, partial=True) for f in fields for mark in (f.open_re, f.close_re) if mark is not None]
    return any(match is not None and match.end() == len(special) for match in found)


def _after_thoughts(form: AnswerForm, tag: Mapping[str, Any], field: str) -> StructuredOutput:
    elements: list[Any] = [tag]
    if form.thinks:
        opened = "<think>" in form.opening
        thoughts: dict[str, Any] = {
            "type": "tag",
            "begin": "" if opened else "<think>",
            "content": {"type": "any_text"},
        }
        thoughts = {
            "type": "sequence",
            "elements": [{**thoughts, "end": "</think>"}, {"type": "regex", "pattern": "\\n{0,2}"}],
        }
        elements = [thoughts if opened else {"type": "optional", "content": thoughts}, tag]
    whole = {"type": "structural_tag", "format": {"type": "sequence", "elements": elements}}
    return StructuredOutput(kind="structural_tag", source=json.dumps(whole), field=field)


def _call_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    properties = {"name": {"const": function["name"]}, "arguments": function["parameters"]}
    return {
        "type": "object",
        "properties": properties,
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _json(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": 1}


def _text(text: str) -> dict[str, Any]:
    return {"type": "const_string", "value": text}


def _chat_template(tokenizer: Any, tools: Sequence[Mapping[str, Any]]) -> str:
    try:
        return str(tokenizer.get_chat_template(tools=list(tools) or None))
    except ValueError:  # it has none: who renders says so
        return ""
