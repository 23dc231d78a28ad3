"""Request bodies: what is accepted becomes Work with the right values; what is not is refused by name."""

from __future__ import annotations

import json
from typing import Any

import openai.types.chat.completion_create_params as chat_types
import openai.types.completion_create_params as completion_types
import pytest
from hypothesis import given
from hypothesis import strategies as st

from buddymoe_ray.errors import RequestError
from buddymoe_ray.serve.prompts import usable
from buddymoe_ray.serve.wire import MAX_CHOICES, parse_chat, parse_completion
from buddymoe_ray.serve.wire_parsing import NEUTRAL, NOTES
from buddymoe_ray.serve.work import ChatMessage, Terms, ToolUse, Work
from buddymoe_ray.types import SamplingParams

HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> Work:
    body = {"model": "m", "messages": HELLO} | fields
    return parse_chat(json.dumps(body).encode()).work("r", flush_seconds=0.5)


def completion(**fields: Any) -> Work:
    body = {"model": "m", "prompt": "hi"} | fields
    return parse_completion(json.dumps(body).encode()).work("r", flush_seconds=0.5)


def refusal_of_chat(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    return caught.value


def refusal_of_completion(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        completion(**fields)
    return caught.value


def test_a_bare_chat_keeps_every_default() -> None:
    assert chat() == Work(
        request_id="r",
        messages=(ChatMessage(role="user", content="hello"),),
        sampling=SamplingParams(),
        max_tokens=None,
        n=1,
        terms=Terms(),
        flush_seconds=None,
        reads_answer=True,
    )


def test_terms_reach_the_worker() -> None:
    asked = {"mode": "bounded", "budget": 0.01, "record": True}
    assert chat(buddymoe=asked).terms == completion(buddymoe=asked).terms == Terms(**asked)  # type: ignore[arg-type]
    assert completion(buddymoe={"replay": "abc"}).terms == Terms(replay="abc")
    assert chat(buddymoe={"budget": 1}).terms.budget == 1.0
    assert chat(buddymoe=None).terms == chat(buddymoe={}).terms == chat(buddymoe={"mode": None}).terms == Terms()


@pytest.mark.parametrize(("name", "options"), [("record", {"record": True}), ("replay", {"replay": "abc"})])
def test_a_record_is_of_one_answer(name: str, options: dict[str, Any]) -> None:
    for refused in (
        refusal_of_chat(n=2, buddymoe=options),
        refusal_of_completion(n=2, buddymoe=options),
        refusal_of_completion(prompt=["a", "b"], buddymoe=options),
        refusal_of_completion(prompt=[[1], [2]], buddymoe=options),
    ):
        assert refused.param == f"buddymoe.{name}"
        assert "is given for 2 answers, must be for one prompt with n 1" in str(refused)
    assert completion(prompt=["a"], n=1, buddymoe=options).terms == Terms(**options)


def test_a_bare_completion_keeps_every_default() -> None:
    work = completion()
    assert (work.prompts, work.messages, work.max_tokens) == (("hi",), (), SamplingParams.max_tokens)
    assert work.sampling == SamplingParams()


def test_null_is_not_given() -> None:
    names = ("temperature", "top_p", "n", "seed", "stop", "stream", "max_tokens", "logprobs", "frequency_penalty")
    assert chat(**dict.fromkeys(names)) == chat()
    assert completion(**dict.fromkeys(names)) == completion()


def test_every_sampling_field_arrives() -> None:
    given_fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "seed": -7,
        "presence_penalty": 1,
        "frequency_penalty": -1.5,
        "repetition_penalty": 1.25,
        "min_p": 0.25,
        "logit_bias": {"5": -100, "0": 2.5},
        "stop": ["x", "yz"],
        "stop_token_ids": [3, 4],
        "ignore_eos": True,
    }
    expected = SamplingParams(
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        seed=-7,
        presence_penalty=1.0,
        frequency_penalty=-1.5,
        repetition_penalty=1.25,
        min_p=0.25,
        logit_bias={5: -100.0, 0: 2.5},
        stop=("x", "yz"),
        stop_token_ids=(3, 4),
        ignore_eos=True,
    )
    assert chat(**given_fields).given == set(given_fields)
    assert chat(**given_fields).sampling == expected
    assert completion(**given_fields).sampling == expected


def test_one_stop_string_and_vllms_top_k() -> None:
    assert usable(chat(stop="x", top_k=-1)).sampling == SamplingParams(stop=("x",), top_k=0)


def test_stream_and_its_usage() -> None:
    body = {"model": "m", "messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
    request = parse_chat(json.dumps(body).encode())
    assert request.include_usage and request.work("r", flush_seconds=0.5).flush_seconds == 0.5
    assert refusal_of_chat(stream_options={"include_usage": True}).param == "stream_options"


@pytest.mark.parametrize(
    ("types", "parse", "body"),
    [
        (chat_types.CompletionCreateParamsBase, parse_chat, {"messages": HELLO}),
        (completion_types.CompletionCreateParamsBase, parse_completion, {"prompt": "hi"}),
    ],
    ids=["chat", "completions"],
)
def test_null_of_every_field_that_openai_documents_is_not_given(types: Any, parse: Any, body: dict[str, Any]) -> None:
    body = {"model": "m", **body}
    for name in set(types.__annotations__) - set(body):
        assert parse(json.dumps(body | {name: None}).encode()) == parse(json.dumps(body).encode()), name


@pytest.mark.parametrize(
    "fields",
    [
        {"stream_options": {"include_obfuscation": False, "include_usage": None, "continuous_usage_stats": None}},
        {"stream_options": {"include_usage": False}},
        {"stream_options": {}},
        {"logit_bias": {}},
        {"stop": []},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "functions": [], "function_call": "none"},
        {"response_format": {"type": "text"}, "modalities": ["text"], "verbosity": "medium", "service_tier": "auto"},
        {"top_logprobs": 0, "logprobs": False, "store": False, "n": 1},
        {"prompt_cache_options": {"mode": "implicit"}, "prompt_cache_retention": "24h", "prompt_cache_key": "k"},
        {"min_p": 0, "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1, "temperature": 1},
        {"chat_template_kwargs": {}},
        {"messages": [{**HELLO[0], "name": None, "tool_calls": [], "tool_call_id": None, "refusal": None}]},
    ],
)
def test_values_that_ask_for_nothing_are_accepted(fields: dict[str, Any]) -> None:
    work = chat(**fields)
    assert (work.sampling, work.messages, work.n) == (SamplingParams(), chat().messages, 1)


def test_usage_so_far_needs_usage_and_asks_for_the_prompts_length() -> None:
    so_far = {"include_usage": True, "continuous_usage_stats": True}
    assert chat(stream=True, stream_options=so_far).report_prompts
    refused = refusal_of_chat(stream=True, stream_options={"continuous_usage_stats": True})
    assert refused.param == "stream_options" and "include_usage true" in str(refused)


def test_template_options_arrive() -> None:
    assert chat(chat_template_kwargs={"enable_thinking": False}).template_options == {"enable_thinking": False}
    assert refusal_of_completion(chat_template_kwargs={}).param == "chat_template_kwargs"


def test_what_messages_cannot_carry_is_named() -> None:
    for name in ("function_call", "audio"):
        for content in ({}, {"content": None}, {"content": "x"}):
            refused = refusal_of_chat(messages=[*HELLO, {"role": "assistant", name: [{"id": "1"}], **content}])
            assert refused.param == f"messages[1].{name}"
            assert f"messages[1].{name} is not supported" in str(refused)
    refusal = {"type": "refusal", "refusal": "no"}
    for message in ({"role": "user", "content": [refusal]}, {"role": "system", "content": "x", "refusal": "no"}):
        refused = refusal_of_chat(messages=[message])
        assert refused.param is not None and refused.param.startswith("messages[0]") and "refusal" in str(refused)


def test_what_the_assistant_would_not_answer_is_text() -> None:
    part = {"type": "refusal", "refusal": "I cannot."}
    for fields, content in (
        ({"content": [part]}, ("I cannot.",)),
        ({"content": [{"type": "text", "text": "Well."}, part]}, ("Well.", "I cannot.")),
        ({"content": None, "refusal": "I cannot."}, "I cannot."),
        ({"content": "Well.", "refusal": "I cannot."}, ("Well.", "I cannot.")),
    ):
        assert chat(messages=[*HELLO, {"role": "assistant", **fields}]).messages[1].content == content


TOOL = {"type": "function", "function": {"name": "get-time", "description": "d", "parameters": {"type": "object"}}}
OTHER = {"type": "function", "function": {"name": "b", "strict": True}}


def test_tools_arrive_with_what_may_be_done_with_them() -> None:
    plain = (TOOL, {"type": "function", "function": {"name": "b"}})
    for fields, use in (
        ({}, ToolUse(tools=plain)),
        ({"tool_choice": "auto", "parallel_tool_calls": True}, ToolUse(tools=plain)),
        ({"parallel_tool_calls": False}, ToolUse(tools=plain, several=False)),
        ({"tool_choice": "required"}, ToolUse(tools=plain, required=True)),
        (
            {"tool_choice": {"type": "function", "function": {"name": "b"}}},
            ToolUse(tools=plain, required=True, only="b", several=False),
        ),
        ({"tool_choice": "none"}, None),
        ({"tool_choice": "none", "response_format": {"type": "json_object"}}, None),
    ):
        assert chat(tools=[TOOL, OTHER], **fields).tools == use
    assert chat(tools=[], tool_choice="auto").tools is None and chat().reads_answer


def test_calls_and_their_results_can_be_sent_back_as_they_came() -> None:
    call = {"id": "c1", "type": "function", "index": 0, "function": {"name": "f", "arguments": '{"x": [1]}'}}
    given = [
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "c1", "content": "7", "name": "f"},
    ]
    record = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": [1]}}}
    assert chat(messages=[*HELLO, *given]).messages[1:] == (
        ChatMessage(role="assistant", content=None, reasoning_content="hm", tool_calls=(record,)),
        ChatMessage(role="tool", content="7", tool_call_id="c1", name="f"),
    )
    for arguments in ("{", "[]", "3"):
        bad = {**call, "function": {"name": "f", "arguments": arguments}}
        refused = refusal_of_chat(messages=[*HELLO, {"role": "assistant", "tool_calls": [bad]}])
        assert refused.param == "messages[1].tool_calls[0].function.arguments"
        assert "must be a JSON object" in str(refused)


def test_token_limits_of_both_names() -> None:
    assert chat(max_tokens=5).max_tokens == chat(max_completion_tokens=5).max_tokens == 5
    assert chat(max_tokens=5, max_completion_tokens=5).max_tokens == 5
    assert "differ" in str(refusal_of_chat(max_tokens=5, max_completion_tokens=6))


def test_logprobs_of_both_endpoints() -> None:
    assert chat(logprobs=True).sampling.logprobs == 0
    assert chat(logprobs=True, top_logprobs=3).sampling.logprobs == 3
    assert chat(logprobs=False).sampling.logprobs is None
    assert completion(logprobs=0).sampling.logprobs == 0
    assert completion(logprobs=20).sampling.logprobs == 20
    assert refusal_of_chat(top_logprobs=3).param == "top_logprobs"
    assert refusal_of_chat(logprobs=2).param == "logprobs"
    assert refusal_of_completion(logprobs=21).param == "logprobs"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_four_forms_of_a_prompt(prompt: Any, expected: Any) -> None:
    assert completion(prompt=prompt).prompts == expected


@pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], [True], [-1], [[1], 2], 3, {"a": 1}, None, [1.5], [[1], []]])
def test_other_prompts_are_refused(prompt: Any) -> None:
    assert refusal_of_completion(prompt=prompt).param == "prompt"


def test_choices_are_bounded() -> None:
    assert completion(prompt=["a"] * 64, n=2).n == 2
    assert refusal_of_completion(prompt=["a"] * 65, n=2).param == "prompt"
    assert refusal_of_chat(n=MAX_CHOICES + 1).param == "n"
    assert refusal_of_chat(n=0).param == "n"


def test_best_of_only_as_n() -> None:
    assert completion(best_of=2, n=2) == completion(n=2)
    assert refusal_of_completion(best_of=3, n=2).param == "best_of"
    assert refusal_of_completion(best_of=2).param == "best_of"


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_unbuilt_fields_are_refused_by_name_unless_they_ask_for_nothing(name: str) -> None:
    for neutral in NEUTRAL[name]:
        assert chat(**{name: neutral}) == chat()
    refused = refusal_of_chat(**{name: {"anything": "else"}})
    assert refused.param == name and name in str(refused) and "hint:" in str(refused)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("echo", 1),
        ("store", True),
        ("tool_choice", "auto"),
        ("suffix", ""),
    ],
)
def test_what_would_have_changed_the_answer_is_refused(name: str, value: Any) -> None:
    assert refusal_of_completion(**{name: value}).param == name


def test_an_echo_with_log_probabilities_asks_for_the_prompts_own() -> None:
    work = completion(echo=True, logprobs=2, max_tokens=0)
    assert work.echo and work.max_tokens == 0 and work.sampling.prompt_logprobs == work.sampling.logprobs == 2
    assert completion(echo=True).sampling.prompt_logprobs is None, "the text alone costs nothing"
    assert completion(echo=True, max_tokens=0).sampling.prompt_logprobs == 0
    assert completion(echo=False, logprobs=2).sampling.prompt_logprobs is None
    assert refusal_of_completion(max_tokens=0).param == "max_tokens" and refusal_of_chat(echo=True).param == "echo"


def test_labels_are_accepted() -> None:
    assert chat(**dict.fromkeys(NOTES, "x")) == chat()
    assert chat(user="u", metadata={"a": "b"}, store=False) == chat()


@pytest.mark.parametrize("name", ["tempreature", "min_P", "guided_json", "messages2", "best_of", "prompt"])
def test_unknown_fields_are_refused_by_name(name: str) -> None:
    refused = refusal_of_chat(**{name: 1})
    assert refused.param == name and name in str(refused)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"min_p": 1.5}, "min_p"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"07": 1}}, "logit_bias"),
        ({"logit_bias": {"1": "1"}}, "logit_bias.1"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"buddymoe": {"mode": "quick"}}, "buddymoe.mode"),
        ({"buddymoe": {"budget": -0.1}}, "buddymoe.budget"),
        ({"buddymoe": {"budget": 1.1}}, "buddymoe.budget"),
        ({"buddymoe": {"budget": "0.1"}}, "buddymoe.budget"),
        ({"buddymoe": {"budget": True}}, "buddymoe.budget"),
        ({"buddymoe": {"budget": float("inf")}}, "buddymoe.budget"),
        ({"buddymoe": {"budget": float("nan")}}, "buddymoe.budget"),
        ({"buddymoe": {"mode": "Exact"}}, "buddymoe.mode"),
        ({"buddymoe": {"mode": 1}}, "buddymoe.mode"),
        ({"buddymoe": "fast"}, "buddymoe"),
        ({"buddymoe": []}, "buddymoe"),
        ({"buddymoe": False}, "buddymoe"),
        ({"buddymoe": {"record": "yes"}}, "buddymoe.record"),
        ({"buddymoe": {"replay": 3}}, "buddymoe.replay"),
        ({"buddymoe": {"speed": 3}}, "buddymoe.speed"),
        ({"stream": True, "stream_options": {"include": 1}}, "stream_options.include"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].id"),
        ({"messages": [{"role": "user", "content": "", "tool_call_id": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "", "reasoning_content": "x"}]}, "messages[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "b"}}}, "tool_choice"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        ({"model": None}, "model"),
    ],
)
def test_unusable_values_name_their_path(fields: dict[str, Any], param: str) -> None:
    refused = refusal_of_chat(**fields)
    assert refused.param == param
    assert param in str(refused)


def test_missing_fields_are_named() -> None:
    for body, param in (({"messages": HELLO}, "model"), ({"model": "m"}, "messages")):
        with pytest.raises(RequestError, match="missing") as caught:
            parse_chat(json.dumps(body).encode())
        assert caught.value.param == param
    with pytest.raises(RequestError) as caught:
        parse_completion(b'{"model": "m"}')
    assert caught.value.param == "prompt"


def test_text_parts_stay_parts_and_developer_is_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": parts}, {"role": "user", "content": "c", "name": "Ann"}]
    assert chat(messages=messages).messages == (
        ChatMessage(role="system", content=("a", "b")),
        ChatMessage(role="user", content="c", name="Ann"),
    )


def test_a_reply_can_be_sent_back_as_it_came() -> None:
    reply = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "annotations": [], "audio": None}
    assert chat(messages=[*HELLO, reply]).messages[1] == ChatMessage(role="assistant", content="x")


DEEP = b'{"model": "m", "messages": [], "chat_template_kwargs": {"a": ' + b"[" * 900 + b"]" * 900 + b"}}"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"3", b'"x"', b"\xff\xfe", b"{'a': 1}", b"[" * 100_000, DEEP, b'{"model": "m"']
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError, match="body") as caught:
        parse_chat(body)
    assert caught.value.param is None


def test_numbers_that_json_does_not_have_are_refused() -> None:
    with pytest.raises(RequestError) as caught:
        parse_chat(b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}')
    assert caught.value.param == "temperature"


def test_a_number_that_is_too_large_is_not_told_to_be_larger() -> None:
    with pytest.raises(RequestError, match=r"must be in \[1, "):
        usable(chat(max_tokens=10**30))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
field_names = st.sampled_from(
    ["messages", "model", "n", "stop", "stream", "logprobs", "prompt", "tools", "buddymoe", "x"]
)


@given(st.dictionaries(field_names, json_values, max_size=5))
def test_any_object_is_parsed_or_refused_and_nothing_else(fields: dict[str, Any]) -> None:
    body = json.dumps({"model": "m"} | fields).encode()
    for parse in (parse_chat, parse_completion):
        try:
            request = parse(body)
        except RequestError as error:
            assert "hint:" in str(error)
        else:
            assert request.work("r", flush_seconds=0.1).n >= 1


@pytest.mark.parametrize("field", ["prompt", "stop", "model"])
def test_half_characters_are_refused_by_field(field: str) -> None:
    body = {"model": "m", "prompt": "a"} | {field: "x\ud800y"}
    with pytest.raises(RequestError, match="must be whole characters") as caught:
        parse_completion(json.dumps(body).encode())
    assert caught.value.param == field
    assert parse_completion(json.dumps({"model": "m", "prompt": "\U0001f600"}).encode()).prompt == ("\U0001f600",)
