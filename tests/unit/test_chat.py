"""Prompts and conversations to ids with a real tokenizer and a small ChatML template; what does not fit is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from small_tokenizers import bpe

from buddymoe_ray.engine.chat import encode_chat, encode_prompt, opening_of, template_variables
from buddymoe_ray.errors import RequestError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMES = CHATML.replace("{{ m['role'] }}", "{{ m['role'] }}{% if m.name %} {{ m.name }}{% endif %}")
TYPED = CHATML.replace(
    "m['content'] + '<|im_end|>\n'",
    "m['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('/') + '<|im_end|>\n'",
)
EITHER = CHATML.replace(
    "{{ m['content'] + '<|im_end|>\n' }}",
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}({{ c.text }}){% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}",
)
SYSTEM_TEXT = (  # the system message is text, others are parts
    "{% for m in messages %}{% if m.role == 'system' %}{{ 'S ' + m.content }}"
    "{% else %}{{ m.role + ' ' + m.content[0]['text'] }}{% endif %}{% endfor %}"
)
WRITES_ALL = "{% for m in messages %}{{ m.content }}{% endfor %}"
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the first must be user') }}{% endif %}" + CHATML


def tokenizer_with(template: Any) -> Any:
    tokenizer = copy.deepcopy(bpe())
    tokenizer.chat_template = template
    return tokenizer


def test_a_conversation_is_rendered_and_ends_where_the_assistant_speaks() -> None:
    tokenizer = tokenizer_with(CHATML)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "你好 🙂"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "more"},
    ]
    ids = encode_chat(tokenizer, messages)
    assert type(ids) is list
    assert all(type(i) is int for i in ids)
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n你好 🙂<|im_end|>\n"
        "<|im_start|>assistant\nhi<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
    )
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert ids[0] == start, "a role mark is one special token, not spelt text"
    assert ids.count(start) == 5


@pytest.mark.parametrize(("template", "written"), [(NAMES, "user annx"), (CHATML, "user\nx")])
def test_who_speaks_is_said_where_the_template_has_a_place_for_it(template: str, written: str) -> None:
    tokenizer = tokenizer_with(template)
    messages = [{"role": "user", "content": "x", "name": "ann"}]
    assert tokenizer.decode(encode_chat(tokenizer, messages)).startswith(f"<|im_start|>{written}<|im_end|>")
    assert messages == [{"role": "user", "content": "x", "name": "ann"}], "they are left as they were"


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
def test_the_roles_of_the_api_are_known(role: str) -> None:
    assert encode_chat(tokenizer_with(CHATML), [{"role": role, "content": "x"}])


@pytest.mark.parametrize("role", ["User", "", None, "bot", ["user"]])
def test_other_roles_are_refused(role: Any) -> None:
    with pytest.raises(RequestError, match="must be one of system, developer, user, assistant, tool") as caught:
        encode_chat(tokenizer_with(CHATML), [{"role": role, "content": "x"}])
    assert caught.value.param == "messages"
    assert repr(role) in str(caught.value)


def test_a_message_without_role_is_refused() -> None:
    with pytest.raises(RequestError, match="role is None"):
        encode_chat(tokenizer_with(CHATML), [{"content": "x"}])


def test_an_empty_conversation_is_refused() -> None:
    with pytest.raises(RequestError, match="messages is empty, must have at least one"):
        encode_chat(tokenizer_with(CHATML), [])


@pytest.mark.parametrize("tokenizer", [None, bpe()], ids=["no tokenizer", "no template"])
def test_a_model_without_template_is_refused(tokenizer: Any) -> None:
    with pytest.raises(RequestError, match=r"no chat template.*hint: use completions") as caught:
        encode_chat(tokenizer, [{"role": "user", "content": "x"}])
    assert caught.value.param == "messages"


def test_the_templates_own_refusal_is_passed_on() -> None:
    with pytest.raises(RequestError, match="the first must be user"):
        encode_chat(tokenizer_with(STRICT), [{"role": "system", "content": "x"}])


@pytest.mark.parametrize("content", [None, [{"type": "text", "text": "x"}], 3])
def test_content_the_template_cannot_render_is_a_request_error(content: Any) -> None:
    with pytest.raises(RequestError, match="do not fit the chat template"):
        encode_chat(tokenizer_with(CHATML), [{"role": "user", "content": content}])


def test_a_template_that_is_none_is_said_also_where_its_variables_are_asked_for() -> None:
    with pytest.raises(RequestError, match="do not fit the chat template"):
        encode_chat(tokenizer_with("{% for m"), [{"role": "user", "content": "x"}], {"enable_thinking": True})


def test_a_missing_content_is_a_request_error() -> None:
    with pytest.raises(RequestError, match="do not fit the chat template"):
        encode_chat(tokenizer_with(CHATML), [{"role": "user"}])


def test_a_template_cannot_reach_outside_its_sandbox() -> None:
    spy = tokenizer_with("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(RequestError, match="do not fit the chat template"):
        encode_chat(spy, [{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("template", "content", "written"),
    [
        (CHATML, "ab", "ab"),
        (CHATML, ("a", "b"), "ab"),
        (TYPED, "ab", "ab"),
        (TYPED, ("a", "b"), "a/b"),
        (EITHER, "ab", "ab"),
        (EITHER, ("a", "b"), "(a)(b)"),
    ],
    ids=["text", "parts to text", "text to parts", "parts", "either: text", "either: parts"],
)
def test_content_is_handed_over_in_the_form_the_template_reads(template: str, content: Any, written: str) -> None:
    tokenizer = tokenizer_with(template)
    text = tokenizer.decode(encode_chat(tokenizer, [{"role": "user", "content": content}]))
    assert text == f"<|im_start|>user\n{written}<|im_end|>\n<|im_start|>assistant\n"


def test_the_form_is_found_for_each_role() -> None:
    tokenizer = tokenizer_with(SYSTEM_TEXT)
    messages = [{"role": "system", "content": ("be ", "brief")}, {"role": "user", "content": "hello"}]
    assert tokenizer.decode(encode_chat(tokenizer, messages)) == "S be briefuser hello"


def test_parts_are_not_written_out_as_data() -> None:
    tokenizer = tokenizer_with(WRITES_ALL)
    assert tokenizer.decode(encode_chat(tokenizer, [{"role": "user", "content": ("a", "b")}])) == "ab"


def test_typed_parts_are_rendered_as_transformers_does() -> None:
    for template in (TYPED, EITHER):
        tokenizer = tokenizer_with(template)
        parts = [{"type": "text", "text": "你好"}, {"type": "text", "text": " 'text': 'x'"}]
        asked = [{"role": "user", "content": tuple(part["text"] for part in parts)}]
        expected = tokenizer.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, return_dict=False
        )
        assert encode_chat(tokenizer, asked) == expected


@pytest.mark.parametrize(
    ("template", "messages", "lost"),
    [
        ("{{ '' }}", [{"role": "user", "content": "x"}], "messages[0].content"),
        (
            "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
            [{"role": "system", "content": "user"}, {"role": "user", "content": "system user"}],
            "messages[0].content",
        ),
        ("{{ messages[-1].content }}", [{"role": "user", "content": "x"}] * 2, "messages[0].content"),
        ("{{ messages[0].content[0].text }}", [{"role": "user", "content": ("a", "a")}], "messages[0].content[1]"),
    ],
    ids=["all", "a role", "all but the last", "later parts"],
)
def test_what_a_template_would_lose_is_refused_by_name(template: str, messages: Any, lost: str) -> None:
    if lost.endswith("[1]"):  # as one text it would have been read: no text has parts
        template = template.replace("messages[0]", "(messages[0].content is string and messages[1] or messages[0])")
    with pytest.raises(RequestError) as caught:
        encode_chat(tokenizer_with(template), messages)
    assert str(caught.value).startswith(f"{lost} is nowhere in what the model's chat template writes")
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "trouble",
    [
        "raise_exception('no')",
        "undefined_thing.x",
        "1 // 0",
        "'a' + 1",
        "messages[0].pop('x')",
        "[].index(3)",
        "'a' * 10 ** 20",
    ],
)
def test_whatever_a_template_raises_is_the_requests_error(trouble: str) -> None:
    with pytest.raises(RequestError, match="do not fit the chat template") as caught:
        encode_chat(tokenizer_with("{{ " + trouble + " }}" + CHATML), [{"role": "user", "content": "x"}])
    assert caught.value.param == "messages"


def test_template_options_have_their_effect_or_are_refused() -> None:
    tokenizer = tokenizer_with(CHATML + "{% if think %}<think {{ think }}>{% endif %}")
    hello = [{"role": "user", "content": "x"}]
    assert tokenizer.decode(encode_chat(tokenizer, hello, {"think": "hard"})).endswith("assistant\n<think hard>")
    assert tokenizer.decode(encode_chat(tokenizer, hello, {"add_generation_prompt": False})).endswith("<|im_end|>\n")
    tokenizer = tokenizer_with("{% if tools %}{{ tools }}{% endif %}" + tokenizer.chat_template)
    for name in ("thnk", "messages", "tools", "tokenize", "chat_template", "self"):
        with pytest.raises(RequestError, match=rf"chat_template_kwargs\.{name} is given.*think") as caught:
            encode_chat(tokenizer, hello, {name: 1})
        assert caught.value.param == "chat_template_kwargs"


def test_text_prompts() -> None:
    ids = encode_prompt(bpe(), "The quick 世界")
    assert bpe().decode(ids) == "The quick 世界"


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="prompt is empty, must have at least one token") as caught:
        encode_prompt(bpe(), "")
    assert caught.value.param == "prompt"


def test_text_without_tokenizer_is_refused() -> None:
    with pytest.raises(RequestError, match="must be token ids for a model without tokenizer"):
        encode_prompt(None, "hi")


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"city": "Köln"}}}
CALLED = [
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "sunny", "name": "f"},
]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
EACH = "{% for m in messages %}{{ m['role'] + ':' }}"
ENDED = "{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "written"),
    [
        # arguments as an object, content that may be missing
        (
            EACH
            + "{{ m['content'] or '' }}{% for c in m['tool_calls'] or [] %}{{ c['function']['arguments'] | tojson }}"
            "{% endfor %}" + ENDED,
            'weather?assistant:{"city": "Köln"}tool:sunny',
        ),
        # arguments joined to text as JSON, content that must not be there
        (
            EACH + "{% if m['content'] is not defined %}{% for c in m['tool_calls'] %}"
            "{{ '>' + c['function']['arguments'] }}{% endfor %}{% else %}{{ m['content'] }}{% endif %}" + ENDED,
            'weather?assistant:>{"city": "Köln"}tool:sunny',
        ),
        # arguments written as they are, content that must be text
        (
            EACH + "{{ m['content'] + '' }}{% for c in m['tool_calls'] or [] %}{{ c['function']['arguments'] }}"
            "{% endfor %}" + ENDED,
            'weather?assistant:{"city": "Köln"}tool:sunny',
        ),
    ],
)
def test_calls_are_handed_over_as_the_template_reads_them(template: str, written: str) -> None:
    tokenizer = tokenizer_with(template)
    assert tokenizer.decode(encode_chat(tokenizer, CALLED)).endswith(written)
    assert '"name": "f"' in tokenizer.decode(encode_chat(tokenizer, CALLED, None, [TOOL]))


def test_a_call_or_a_tool_that_a_template_has_no_place_for_is_refused() -> None:
    with pytest.raises(RequestError, match=r"messages\[1\].tool_calls\[0\] is nowhere"):
        encode_chat(tokenizer_with(EACH + "{{ m['content'] or '' }}{% endfor %}"), CALLED)
    with pytest.raises(RequestError, match="no place for tools") as caught:
        encode_chat(tokenizer_with(CHATML), [{"role": "user", "content": "x"}], None, [TOOL])
    assert caught.value.param == "tools"


def test_what_a_template_begins_the_answer_with() -> None:
    thinks = "{{ messages[0]['content'] }}{% if add_generation_prompt %}<a>{{ '<think>' if think else '' }}{% endif %}"
    tokenizer = tokenizer_with(thinks)
    assert (opening_of(tokenizer, {}), opening_of(tokenizer, {"think": True})) == ("<a>", "<a><think>")
    assert opening_of(tokenizer_with("{{ raise_exception('no') }}"), {}) == ""


def test_of_several_templates_that_for_tools_counts_where_there_are_tools() -> None:
    hello, tools = [{"role": "user", "content": "x"}], [{"type": "function", "function": {"name": "f"}}]
    with_tools = "{{ tools }}" + CHATML + "{% if add_generation_prompt %}{{ how }}<think>{% endif %}"
    tokenizer = tokenizer_with({"tool_use": with_tools, "rag": CHATML})
    assert tokenizer.decode(encode_chat(tokenizer, hello, {"how": "well"}, tools)).endswith("well<think>")
    assert opening_of(tokenizer, {}, tools).endswith("<think>")
    for asked in (lambda: encode_chat(tokenizer, hello), lambda: template_variables(tokenizer)):
        with pytest.raises(RequestError, match="no default specified"):
            asked()
    with pytest.raises(RequestError, match="no default specified"):
        encode_chat(tokenizer_with({"rag": CHATML}), hello, {}, tools)
