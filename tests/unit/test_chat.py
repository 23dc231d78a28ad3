"""Prompts and conversations to ids with a real tokenizer and a small ChatML template; what does not fit is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from small_tokenizers import bpe

from buddymoe_ray.engine.chat import encode_chat, encode_prompt
from buddymoe_ray.errors import RequestError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
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


def test_messages_are_left_as_they_were() -> None:
    messages = [{"role": "user", "content": "x", "name": "ann"}]
    encode_chat(tokenizer_with(CHATML), messages)
    assert messages == [{"role": "user", "content": "x", "name": "ann"}]


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


def test_a_missing_content_is_a_request_error() -> None:
    with pytest.raises(RequestError, match="do not fit the chat template"):
        encode_chat(tokenizer_with(CHATML), [{"role": "user"}])


def test_a_template_cannot_reach_outside_its_sandbox() -> None:
    spy = tokenizer_with("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(RequestError, match="do not fit the chat template"):
        encode_chat(spy, [{"role": "user", "content": "x"}])


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
