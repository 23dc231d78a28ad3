"""The forms in which models write tool calls and thoughts, as transformers' `response_template` has them: for
checkpoints that bring none. Tables only; `answers` chooses among them and reads by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["AROUND", "CALLS", "HARMONY", "THOUGHTS", "CallForm", "Template"]

Template = Mapping[str, Any]


class CallForm(NamedTuple):
    """A way of writing calls.

    `marks`: what a chat template that writes calls so holds, all of it. `read`: the field of a response template.
    `forced`: xgrammar's name of the form, or the mark before a list of calls; empty where none can be forced.
    """

    marks: tuple[str, ...]
    read: Template
    forced: str


_FUNCTION = {"name": "{name}", "arguments": "{content}"}


def _held(name: str, end: str) -> str:
    """What stands before an end tag, without white space around it. Nothing is tried twice: `\\s*.*?\\s*` takes seconds
    over some hundred spaces that a call was lost in."""
    return rf"\s*+(?P<{name}>(?:(?!{end})\S|\s++(?!{end}))*+)\s*+{end}"


def _tags(open_: str, close: str, tag: str) -> Template:
    """Calls whose arguments are tags of a key and a value."""
    return {
        "open_pattern": open_,
        "close_pattern": close,
        "content": "xml-inline",
        "content_args": {"tag_pattern": tag},
        "transform": {"function": _FUNCTION},
    }


def _named(open_: str, close: str) -> Template:
    """Calls whose name is before the JSON of their arguments."""
    return {"open_pattern": open_, "close_pattern": close, "content": "json", "transform": {"function": _FUNCTION}}


def _listed(mark: str, close: str) -> Template:
    """All calls in one JSON list."""
    each = {"function": {"name": "{name}", "arguments": "{arguments}"}}
    form = {"open_pattern": rf"\s*{mark}\s*(?=\[)", "content": "json", "transform": each, "transform_each": True}
    return form | ({"close_pattern": close} if close else {})


CALLS: dict[str, CallForm] = {
    "harmony": CallForm(
        ("<|channel|>", "to=functions"),
        _named(
            r"(?:<\|start\|>assistant)?(?:<\|channel\|>commentary)? to=functions\.(?P<name>[\w.-]+)"
            r"(?:<\|channel\|>commentary)?\s*(?:<\|constrain\|>)?(?:json)?\s*<\|message\|>",
            r"<\|call\|>|<\|end\|>",
        ),
        "",  # its calls end with what ends the answer, which no grammar can hold
    ),
    "minimax": CallForm(
        ("<minimax:tool_call>", "<invoke name="),
        _tags(
            r'\s*<invoke name="(?P<name>[^"]+)">\s*',
            r"\s*</invoke>\s*",
            r'<parameter name="(?P<key>[^"]+)">' + _held("value", "</parameter>"),
        ),
        "minimax",
    ),
    "deepseek_r1": CallForm(
        ("<｜tool▁call▁begin｜>", "```json"),
        _named(
            r"\s*<｜tool▁call▁begin｜>function<｜tool▁sep｜>(?P<name>[^\n]+)\n```json\n",
            r"\s*```<｜tool▁call▁end｜>\s*",
        ),
        "deepseek_r1",
    ),
    "deepseek_v3_1": CallForm(
        ("<｜tool▁call▁begin｜>",),
        _named(r"\s*<｜tool▁call▁begin｜>(?P<name>[^<]+?)<｜tool▁sep｜>", r"\s*<｜tool▁call▁end｜>\s*"),
        "deepseek_v3_1",
    ),
    "mistral_named": CallForm(
        ("[TOOL_CALLS]", "[ARGS]"),
        _named(r"\s*\[TOOL_CALLS\](?P<name>[\w.-]+)\[ARGS\]\s*", r"\s*(?=\[TOOL_CALLS\])"),
        "",
    ),
    "mistral": CallForm(("[TOOL_CALLS]",), _listed(r"\[TOOL_CALLS\]", ""), "[TOOL_CALLS] "),
    "granite": CallForm(("<|tool_call|>",), _listed(r"<\|tool_call\|>", r"\s*<\|/tool_call\|>\s*"), "<|tool_call|>"),
    "qwen_xml": CallForm(
        ("<tool_call>", "<function="),
        _tags(
            r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>\s*",
            r"\s*</function>\s*</tool_call>\s*",
            r"<parameter=(?P<key>[^>\n]+)>" + _held("value", "</parameter>"),
        ),
        "qwen_3_coder",
    ),
    "glm": CallForm(
        ("<tool_call>", "<arg_key>"),
        _tags(
            r"\s*<tool_call>(?P<name>[^\s<{]+)\s*",
            r"\s*</tool_call>\s*",
            "<arg_key>" + _held("key", "</arg_key>") + r"\s*+<arg_value>" + _held("value", "</arg_value>"),
        ),
        "glm_4_7",
    ),
    "hermes": CallForm(
        ("<tool_call>",),
        {
            "open_pattern": r"\s*<tool_call>\s*",
            "close_pattern": r"\s*</tool_call>\s*",
            "content": "json",
            "transform": {"function": "{content}"},
        },
        "qwen_3",
    ),
}
# Marks around all calls together, which tell nothing.
AROUND = {
    "open_pattern": r"\s*(?:</?minimax:tool_call>|<｜tool▁calls▁(?:begin|end)｜>)\s*",
    "close_pattern": r"(?=[\s\S])",
    "repeats": True,
}
THOUGHTS = {"open_pattern": r"\s*<think>\s*", "close_pattern": r"\s*</think>\s*"}
HARMONY = {
    "reasoning_content": {
        "open_pattern": r"(?:<\|start\|>assistant)?<\|channel\|>analysis<\|message\|>",
        "close_pattern": r"<\|end\|>",
        "repeats": True,
        "join": "\n",
    },
    "content": {
        "open_pattern": r"(?:<\|start\|>assistant)?<\|channel\|>(?:final|commentary)<\|message\|>",
        "close_pattern": r"<\|end\|>|<\|return\|>",
        "repeats": True,
        "join": "",
    },
    "rest": {"repeats": True, "join": ""},
}
