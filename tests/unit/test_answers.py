"""Thoughts and calls read out of text in every form, cut anywhere, broken anyhow; forced, they are read back."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
import torch
from fakes import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from buddymoe_ray.engine.answer_forms import CALLS
from buddymoe_ray.engine.answers import (
    AnswerForm,
    AnswerPiece,
    AnswerReader,
    answer_form,
    call_output,
    reasoned_output,
)
from buddymoe_ray.engine.json_schema import checked_output
from buddymoe_ray.engine.structured import Grammars, mask_logits
from buddymoe_ray.errors import RequestError

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "pattern": "^[a-z]{1,9}$"}, "days": {"type": "integer", "maximum": 99}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("get-weather", "b_2")]
ARGUMENTS = {"city": "Ulm", "days": 3}
JSON = json.dumps(ARGUMENTS)
CALL = json.dumps({"name": "get-weather", "arguments": ARGUMENTS})
SEP = "<｜tool▁sep｜>"

# what a template of the form writes, and two calls in it
FORMS: dict[str, tuple[str, str]] = {
    "hermes": ("<think></think><tool_call>", f"<tool_call>\n{CALL}\n</tool_call>\n" * 2),
    "qwen_xml": (
        "<tool_call><function=",
        "<tool_call>\n<function=get-weather>\n<parameter=city>\nUlm\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>\n" * 2,
    ),
    "glm": (
        "</think><tool_call><arg_key>",
        "<tool_call>get-weather\n<arg_key>city</arg_key>\n<arg_value>Ulm</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>3</arg_value>\n</tool_call>" * 2,
    ),
    "minimax": (
        "</think><minimax:tool_call><invoke name=",
        "<minimax:tool_call>\n"
        + '<invoke name="get-weather">\n<parameter name="city">Ulm</parameter>\n<parameter name="days">3</parameter>\n'
        "</invoke>\n" * 2 + "</minimax:tool_call>",
    ),
    "deepseek_v3_1": (
        "</think><｜tool▁call▁begin｜>",
        "<｜tool▁calls▁begin｜>"
        + f"<｜tool▁call▁begin｜>get-weather{SEP}{JSON}<｜tool▁call▁end｜>" * 2
        + "<｜tool▁calls▁end｜>",
    ),
    "deepseek_r1": (
        "</think><｜tool▁call▁begin｜>```json",
        "<｜tool▁calls▁begin｜>"
        + f"<｜tool▁call▁begin｜>function{SEP}get-weather\n```json\n{JSON}\n```<｜tool▁call▁end｜>" * 2
        + "<｜tool▁calls▁end｜>",
    ),
    "mistral": ("[TOOL_CALLS]", f"[TOOL_CALLS] [{CALL}, {CALL}]"),
    "mistral_named": ("[TOOL_CALLS][ARGS]", f"[TOOL_CALLS]get-weather[ARGS]{JSON}" * 2),
    "granite": ("<|tool_call|>", f"<|tool_call|>[{CALL}, {CALL}]"),
    "harmony": (
        "<|channel|>to=functions",
        "<|start|>assistant".join(
            [f"<|channel|>commentary to=functions.get-weather <|constrain|>json<|message|>{JSON}<|call|>"] * 2
        ),
    ),
}


def tokenizer_with(marks: str, *, opening: str = "") -> PreTrainedTokenizerFast:
    """One whose template holds the marks and begins the answer so."""
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer, eos_token="<|user|>")
    tokenizer.chat_template = (
        "{# " + marks + " tools #}{{ messages[0]['content'] }}{{ '" + opening + "' if add_generation_prompt else '' }}"
    )
    return tokenizer  # type: ignore[no-any-return]


def form_of(name: str, *, opening: str = "") -> AnswerForm:
    form = answer_form(tokenizer_with(FORMS[name][0], opening=opening), {}, TOOLS)
    assert form is not None
    return form


def read(form: AnswerForm, text: str, cuts: int = 0) -> AnswerPiece:
    """Everything told, joined; calls are names and arguments."""
    reader, pieces = AnswerReader(form), []
    step = max(1, len(text) // (cuts or 1))
    for at in range(0, len(text), step):
        pieces += reader.feed(text[at : at + step], ended=False)
    pieces += reader.feed("", ended=True)
    joined = {field: "".join(getattr(piece, field) for piece in pieces) for field in ("text", "reasoning")}
    calls = [piece for piece in pieces if piece.name]
    return AnswerPiece(
        **joined, name=" ".join(piece.name for piece in calls), arguments=" ".join(piece.arguments for piece in calls)
    )


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("cuts", [1, 7, 10_000])
def test_every_form_is_read_however_it_is_cut(name: str, cuts: int) -> None:
    form, twice = form_of(name), AnswerPiece(name="get-weather get-weather", arguments=f"{JSON} {JSON}")
    assert read(form, FORMS[name][1], cuts) == twice
    final = "<|channel|>final<|message|>" * (name == "harmony")
    assert read(form, final + "No call < here [.", cuts) == AnswerPiece(text="No call < here [.")
    if name != "harmony":
        assert read(form, "Well. \n" + FORMS[name][1], cuts) == AnswerPiece(
            text="Well.", name=twice.name, arguments=twice.arguments
        )


@pytest.mark.parametrize("cuts", [1, 10_000])
def test_thoughts_are_told_apart(cuts: int) -> None:
    calls = FORMS["hermes"][1]
    for opening, text in (
        ("", "<think>\nHm, so.\n</think>\n\nIt is."),
        ("<think>\\n", "Hm, so.\n</think>\n\nIt is."),
    ):
        told = read(form_of("hermes", opening=opening), text + calls, cuts)
        assert (told.reasoning, told.text, told.name) == ("Hm, so.", "It is.", "get-weather get-weather")
    closed = form_of("hermes", opening="<think>\\n\\n</think>\\n\\n")
    assert read(closed, "It is.", cuts) == AnswerPiece(text="It is.") and not closed.thinks
    assert read(form_of("hermes"), "<think>Hm, <tool_call>", cuts) == AnswerPiece(reasoning="Hm, <tool_call>")
    harmony = (
        "<|channel|>analysis<|message|>Hm, so.<|end|><|start|>assistant<|channel|>final<|message|>It is.<|return|>"
    )
    assert read(form_of("harmony"), harmony, cuts) == AnswerPiece(reasoning="Hm, so.", text="It is.")


def test_without_tools_calls_are_text_and_plain_models_need_no_reading() -> None:
    form = answer_form(tokenizer_with(FORMS["hermes"][0]), {})
    assert form is not None and read(form, FORMS["hermes"][1]).text == FORMS["hermes"][1]
    assert answer_form(tokenizer_with("nothing"), {}, TOOLS) is None
    assert answer_form(tokenizer_with("[TOOL_CALLS]"), {}) is None


def test_a_checkpoints_own_template_comes_first() -> None:
    tokenizer: Any = tokenizer_with(FORMS["hermes"][0])
    call = {"open": "CALL ", "close": ";", "content": "json", "repeats": True, "transform": {"function": "{content}"}}
    needed = {"open": "NOTE", "close": "!", "optional": False}
    fields = {"content": {}, "tool_calls": call, "needed": needed}
    tokenizer.response_template = {"start_anchor": "<x>", "fields": fields}
    form = answer_form(tokenizer, {}, TOOLS)
    assert form is not None
    assert read(form, f"a CALL {CALL}; b") == AnswerPiece(text="a  b", name="get-weather", arguments=JSON)


@pytest.mark.parametrize("fields", [{}, [], {"content": {"bad": 1}}, {"reasoning_content": {"open_pattern": "("}}])
def test_a_checkpoints_own_template_that_is_none_is_said(fields: Any) -> None:
    tokenizer: Any = tokenizer_with("")
    tokenizer.response_template = {"start_anchor_pattern": "", "fields": fields}
    with pytest.raises(RequestError, match="response_template cannot be used"):
        answer_form(tokenizer, {})


@pytest.mark.parametrize("name", FORMS)
def test_special_tokens_among_the_marks_are_text(name: str) -> None:
    tokenizer: Any = tokenizer_with(FORMS[name][0])
    mark = FORMS[name][1].split(">")[0] + ">" if name not in ("mistral", "mistral_named") else "[TOOL_CALLS]"
    mark = mark if "name=" not in mark else "<minimax:tool_call>"
    assert not answer_form(tokenizer, {}, TOOLS).specials  # type: ignore[union-attr]
    tokenizer.add_special_tokens({"extra_special_tokens": [mark]})
    assert answer_form(tokenizer, {}, TOOLS).specials  # type: ignore[union-attr]


@settings(max_examples=150)
@given(st.sampled_from(sorted(FORMS)), st.integers(0, 2**32))
def test_what_is_broken_comes_back_as_text_and_no_word_is_lost(name: str, seed: int) -> None:
    """Words between pieces of the form's own marks: each is in the text, the thoughts, a name or arguments."""
    rng = random.Random(seed)
    pieces = [part for part in _pieces(FORMS[name][1] + "<think></think>") if part.strip()]
    words, text = [f"w{at}x" for at in range(6)], ""
    for word in words:
        text += rng.choice(pieces) * rng.randint(0, 1) + word + rng.choice(pieces)
    told = read(form_of(name), text, rng.choice((1, 5, 10_000)))
    everywhere = " ".join((told.text, told.reasoning, told.name, told.arguments))
    assert all(word in everywhere for word in words), (text, told)


@pytest.mark.parametrize("wrong", ["NaN", "-1e999"])
@pytest.mark.parametrize("name", ["hermes", "deepseek_v3_1", "mistral", "mistral_named", "granite"])
def test_a_call_that_no_client_could_read_is_text(name: str, wrong: str) -> None:
    text = FORMS[name][1].replace("3", wrong)
    told = read(form_of(name), text)
    assert told.name == "" and told.text.count(wrong) == 2


@pytest.mark.parametrize("called", ['""', '"\\ud83d"'])
@pytest.mark.parametrize("name", ["hermes", "mistral", "granite"])
def test_a_call_of_nothing_is_text(name: str, called: str) -> None:
    told = read(form_of(name), FORMS[name][1].replace('"get-weather"', called))
    assert told.name == "" and told.text.count(f'"name": {called}') == 2


def test_half_a_character_in_a_call_does_not_end_the_reply() -> None:
    told = read(form_of("hermes"), FORMS["hermes"][1].replace("Ulm", r"a\ud83db \ud83d\ude00"))
    assert told.arguments.split("} ")[0] == '{"city": "a\ufffdb 😀", "days": 3'


def _pieces(text: str) -> list[str]:
    """Marks, JSON signs and words of a form."""
    import re

    return re.findall(r"<[^>]*>|\[[A-Z_]+\]|```json|[{}\[\],:]|\"\w+\"|[\w.=-]+|\n", text)


@pytest.mark.parametrize("name", [name for name in FORMS if name not in ("harmony", "mistral_named")])
@pytest.mark.parametrize("several", [True, False])
def test_forced_calls_are_read_back(name: str, several: bool) -> None:
    tokenizer = tokenizer_with(FORMS[name][0])
    begun = name == "minimax"  # its template always begins with thoughts
    form = form_of(name, opening="<think>\\n" if begun else "<think></think>")
    wanted = checked_output(call_output(form, TOOLS, must=True, several=several))
    grammars, end = Grammars(tokenizer, 300), 257
    for seed in range(3):
        state, text = grammars.open(wanted, frozenset({end})), b"Hm.</think>" * begun
        for byte in text:
            state.accept(byte)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(4000):
            logits_RV = torch.randn(1, 300, generator=generator)
            logits_RV[0, end] = 50.0  # whoever wants to end and may not
            mask_logits(logits_RV, [state])
            token = int(logits_RV.argmax())
            if token == end:
                break
            state.accept(token)
            text += bytes([token])
            if state.ended:
                break
        pieces = AnswerReader(form).feed(text.decode(), ended=True)
        calls = [piece for piece in pieces if not piece.reasoning]
        assert calls and all(piece.name in ("get-weather", "b_2") for piece in calls), text
        assert len(calls) == 1 or several
        for piece in calls:
            arguments = json.loads(piece.arguments)
            assert set(arguments) == {"city", "days"} and arguments["days"] <= 99, pieces


def test_a_form_that_cannot_be_forced_says_so() -> None:
    for name in ("harmony", "mistral_named"):
        with pytest.raises(RequestError, match="tool_choice is given"):
            call_output(form_of(name), TOOLS, must=True, several=True)
    with pytest.raises(RequestError, match="parallel_tool_calls is given"):
        call_output(form_of("mistral"), TOOLS, must=False, several=False)


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ({"json": {"type": "integer"}}, "12"),
        ({"json_object": True}, '{"a": 1}'),
        ({"regex": "[a-c]+"}, "abc"),
        ({"grammar": 'root ::= "x" "y"'}, "xy"),
        ({"choice": ["on", "off"]}, "off"),
    ],
)
def test_what_the_text_must_be_begins_after_thoughts(wanted: dict[str, Any], text: str) -> None:
    grammars = Grammars(byte_tokenizer(), 259)

    def accepts(form: AnswerForm, answer: str) -> bool:
        state = grammars.open(checked_output(reasoned_output(form, checked_output(wanted))), frozenset({257}))
        return bool(state._matcher.accept_string(answer) and state._matcher.is_completed())

    free, begun, closed = (form_of("hermes", opening=opening) for opening in ("", "<think>\\n", "<think></think>"))
    assert accepts(free, text) and accepts(free, f"<think>Hm, <x>.</think>\n\n{text}")
    assert accepts(begun, f"Hm.</think>{text}") and not accepts(begun, text)
    assert accepts(closed, text) and not accepts(closed, f"<think></think>{text}")
    assert not accepts(free, "Hm.")


@pytest.mark.parametrize("form", ["qwen_xml", "minimax", "glm"])
def test_a_call_that_is_lost_in_white_space_is_given_up_in_one_walk(form: str) -> None:
    """By what it takes of the patterns: a walk that tries each space twice would not end within a test's time."""
    tag, run = CALLS[form].read["content_args"]["tag_pattern"], " " * 20_000
    begun = {
        "qwen_xml": f"<parameter=a>{run}x{run}y",
        "minimax": f'<parameter name="a">{run}x{run}y',
        "glm": f"<arg_key>{run}k{run}</arg_key>{run}<arg_value>{run}y",
    }[form]
    assert re.search(tag, begun, re.DOTALL) is None
    end = "</arg_value>" if form == "glm" else "</parameter>"
    found = re.search(tag, begun + run + end, re.DOTALL)
    assert found is not None and found["value"].endswith("y") and found["value"] == found["value"].strip()
