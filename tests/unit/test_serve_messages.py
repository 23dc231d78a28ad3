"""Anthropic's /v1/messages over the app in process: `builtin:tiny` says what chat says, in blocks and in events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from asgi import CHAT, conforms, named_events_of, serving, talking_to
from fakes import Breaking, LocalWorkers, MortalWorkers, exact_usage

from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.answer_forms import THOUGHTS
from buddymoe_ray.engine.answers import AnswerForm
from buddymoe_ray.engine.async_engine import AsyncEngine
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.errors import RequestError
from buddymoe_ray.serve.calls import MESSAGES, ModelNames, open_call
from buddymoe_ray.serve.render import ReplyHead
from buddymoe_ray.serve.render_messages import MessagesRenderer
from buddymoe_ray.serve.work import Delta, Thinking, Work
from buddymoe_ray.serve.worker import Worker
from buddymoe_ray.types import Usage

PATH = "/v1/messages"
BODY: Any = CHAT
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
TOOLS = [{"name": name, "description": "of a city", "input_schema": SCHEMA} for name in ("get_weather", "get_news")]
ASKED: Any = {
    "model": "fake",
    "max_tokens": 60,
    "temperature": 0,
    "tools": TOOLS,
    "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
}


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncEngine]:
    opened = AsyncEngine(Engine.from_config(EngineConfig(memory="50%", seed=1)), model_id="fake")
    yield opened
    opened.close()


def joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream tells, put together as a client does."""
    assert [event["type"] for event in (*events[:2], *events[-2:])] == [
        *("message_start", "ping", "message_delta", "message_stop")
    ]
    message: dict[str, Any] = events[0]["message"]
    for event in events[2:-2]:
        at, blocks = event["index"], message["content"]
        if event["type"] == "content_block_start":
            assert at == len(blocks)
            blocks.append(event["content_block"])
        elif event["type"] == "content_block_delta":
            kind, value = (event["delta"][key] for key in event["delta"])
            if kind == "input_json_delta":
                blocks[at]["input"] = json.loads(value)
            else:
                blocks[at][kind.removesuffix("_delta")] += value
        else:
            assert event["type"] == "content_block_stop" and at == len(blocks) - 1
    return message | events[-2]["delta"] | {"usage": events[-2]["usage"]}


def error_in(response: httpx.Response, status: int, kind: str) -> str:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"type", "error"} and body["type"] == "error" and set(body["error"]) == {"type", "message"}
    assert body["error"]["type"] == kind, body
    message: str = body["error"]["message"]
    return message


async def test_a_message_in_full_and_as_a_stream() -> None:
    async with serving() as client:
        chat = (await client.post("/v1/chat/completions", json=CHAT)).json()
        body = (await client.post(PATH, json=BODY)).json()
        stream = await client.post(PATH, json=BODY | {"stream": True})
        count = (await client.post(f"{PATH}/count_tokens", json={k: BODY[k] for k in ("model", "messages")})).json()
    text = chat["choices"][0]["message"]["content"]
    name = body.pop("id")
    assert name.startswith("msg") and body == {
        "type": "message",
        "role": "assistant",
        "model": "fake",
        "content": [{"type": "text", "text": text}],
        "stop_reason": "max_tokens",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 7,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 6,
            "buddymoe": exact_usage(hits=18, fetched=6),
        },
    }
    events = named_events_of(stream.text)
    assert events[0]["message"]["usage"]["input_tokens"] == 7 == count["input_tokens"]
    whole = joined(events)
    assert whole.pop("id") != name and whole == body


async def test_tools_in_a_loop(engine: AsyncEngine) -> None:
    async with talking_to(LocalWorkers(Worker(engine))) as client:
        first = (await client.post(PATH, json=ASKED)).json()
        told = joined(named_events_of((await client.post(PATH, json=ASKED | {"stream": True})).text))
        (call,) = first["content"]
        assert call["type"] == "tool_use" and (call["name"], call["input"]) == ("get_weather", {"city": "Paris"})
        assert first["stop_reason"] == told["stop_reason"] == "tool_use"
        assert [(block["name"], block["input"]) for block in told["content"]] == [(call["name"], call["input"])]
        result = {"type": "tool_result", "tool_use_id": call["id"], "content": "sunny, 21 degrees"}
        messages = [*ASKED["messages"], {"role": "assistant", "content": first["content"]}]
        messages.append({"role": "user", "content": [result]})
        second = (await client.post(PATH, json=ASKED | {"messages": messages})).json()
        for reply in (first, second):
            conforms(reply, PATH)
        assert second["stop_reason"] == "end_turn" and [b["type"] for b in second["content"]] == ["text"]
        assert second["usage"]["input_tokens"] + second["usage"]["cache_read_input_tokens"] > 60
        for choice, names in (({"type": "tool", "name": "get_news"}, {"get_news"}), ({"type": "any"}, {"get_weather"})):
            forced = (await client.post(PATH, json=ASKED | {"tool_choice": choice})).json()
            assert {block["name"] for block in forced["content"]} == names
        unasked = (await client.post(PATH, json=ASKED | {"tool_choice": {"type": "none"}})).json()
        assert unasked["stop_reason"] == "end_turn" and unasked["content"][0]["type"] == "text"
        stop = unasked["content"][0]["text"][2:4]
        cut = ASKED | {"tool_choice": {"type": "none"}, "stop_sequences": ["never said", stop]}
        for body in (cut, cut | {"stream": True}):
            reply = await client.post(PATH, json=body)
            ended = joined(named_events_of(reply.text)) if "stream" in body else reply.json()
            assert (ended["stop_reason"], ended["stop_sequence"]) == ("stop_sequence", stop)
            assert ended["content"][0]["text"] == unasked["content"][0]["text"].split(stop)[0]


async def test_a_stream_that_moves_tells_the_same(engine: AsyncEngine) -> None:
    body = ASKED | {"stream": True}
    async with talking_to(LocalWorkers(Worker(engine))) as client:
        whole = joined(named_events_of((await client.post(PATH, json=body)).text))
    async with talking_to(MortalWorkers(Worker(engine))) as client:
        events = named_events_of((await client.post(PATH, json=body)).text)
    moved = joined(events)
    prompt = whole["usage"]["input_tokens"] + whole["usage"]["cache_read_input_tokens"]
    assert moved["usage"]["buddymoe"]["resumed"] >= 10 and events[0]["message"]["usage"]["input_tokens"] == prompt
    assert moved["stop_reason"] == whole["stop_reason"] == "tool_use"
    assert [block["input"] for block in moved["content"]] == [block["input"] for block in whole["content"]]


async def test_errors_have_anthropics_shape() -> None:
    refused: dict[str, Any] = {
        "max_tokens": {"max_tokens": 0},
        "temperature": {"temperature": 3},
        "stop_sequences": {"stop_sequences": [""]},
        "thinking": {"thinking": {"type": "enabled", "budget_tokens": 1024}},  # this model has no thoughts
        "thinking.budget_tokens": {"thinking": {"type": "enabled", "budget_tokens": -1}},
        "budget_tokens": {"thinking": {"type": "disabled", "budget_tokens": 1024}},
        "output_config.effort": {"output_config": {"effort": "max"}},
        "container": {"container": "c"},
        "tools is given": {"tools": TOOLS},
        "tools[0].type": {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        "messages[0].content[0].type is 'image', which is not supported": {
            "messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]
        },
        "ends with role assistant": {"messages": [*BODY["messages"], {"role": "assistant", "content": "I"}]},
        "user holds a thinking": {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": ""}]}]},
    }
    async with serving(api_key="k") as client:
        assert "API key" in error_in(await client.post(PATH, json=BODY), 401, "authentication_error")
        client.headers["x-api-key"] = "k"
        for word, fields in refused.items():
            assert word in error_in(await client.post(PATH, json=BODY | fields), 400, "invalid_request_error")
        unknown = await client.post(f"{PATH}/count_tokens", json={"model": "gpt", "messages": BODY["messages"]})
        assert "model is 'gpt'" in error_in(unknown, 404, "not_found_error")
        error_in(await client.post(f"{PATH}/batches", json={}), 404, "not_found_error")
    async with serving(Breaking()) as client:
        error_in(await client.post(PATH, json=BODY), 500, "api_error")
        *events, last = named_events_of((await client.post(PATH, json=BODY | {"stream": True})).text)
        assert last["type"] == "error" and last["error"]["type"] == "api_error"
        assert "message_stop" not in [event["type"] for event in events]


def opened(body: dict[str, Any]) -> Work:
    names = ModelNames(model="fake")
    return open_call(MESSAGES, json.dumps(body).encode(), names, unique="1", created=0).work


def test_a_conversation_is_put_into_the_words_of_chat() -> None:
    blocks = [
        {"type": "thinking", "thinking": "Hm.", "signature": ""},
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "id": "c1", "name": "get_news", "input": {"city": "Rome"}},
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "none"}], "is_error": True},
        {"type": "text", "text": "And?", "cache_control": {"type": "ephemeral"}},
    ]
    turns = [{"role": "assistant", "content": blocks}, {"role": "user", "content": results}]
    system = [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]
    asked = ASKED | {
        "messages": [*ASKED["messages"], *turns],
        "system": system,
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "thinking": {"type": "adaptive"},
        "metadata": {"user_id": "u"},
    }
    work = opened(asked)
    assert [(m.role, m.content) for m in work.messages] == [
        ("system", ("Be brief.", "Be kind.")),
        ("user", "What is the weather in Paris?"),
        ("assistant", "Let me see."),
        ("tool", "Error: none"),
        ("user", "And?"),
    ]
    assert work.messages[2].reasoning_content == "Hm." and work.messages[3].tool_call_id == "c1"
    assert work.messages[2].tool_calls[0]["function"] == {"name": "get_news", "arguments": {"city": "Rome"}}
    assert work.tools is not None and not work.tools.several and work.max_tokens == 60
    assert work.thinking == Thinking(usual="high")
    thinks = {"thinking": {"type": "enabled", "budget_tokens": 1024}, "output_config": {"effort": "low"}}
    assert opened(asked | thinks).thinking == Thinking(enabled=True, effort="low", usual="high", budget=1024)
    assert opened(asked | {"thinking": {"type": "disabled"}}).thinking.enabled is False
    form = {"format": {"type": "json_schema", "schema": {"type": "object", "not": {}}}}
    with pytest.raises(RequestError, match=r"output_config\.format\.schema"):
        opened(BODY | {"output_config": form})
    wrong = TOOLS[0] | {"input_schema": {"type": "object", "not": {}}}
    with pytest.raises(RequestError, match=r"^tools\[0\]\.input_schema"):
        opened(ASKED | {"tools": [wrong], "tool_choice": {"type": "any"}})
    named = {"type": "tool", "name": "stop"}
    with pytest.raises(RequestError, match=r"^tool_choice names 'stop', must be"):
        opened(ASKED | {"tool_choice": named})
    turns[0]["content"] = [*blocks[:2], blocks[2] | {"name": ""}]
    with pytest.raises(RequestError) as refused:
        opened(asked)
    assert refused.value.param == "messages[1].content[2].name", "as the caller counts, system and results apart"


def test_blocks_follow_each_other() -> None:
    fields = {"content": {"repeats": True, "join": ""}, "reasoning_content": THOUGHTS}
    renderer = MessagesRenderer(ReplyHead(id="msg-1", created=0, model="m"))
    renderer.read_as(AnswerForm(template={"start_anchor_pattern": r"\A", "fields": fields}))
    told = b"".join(
        event
        for text in ("<think>I ", "think</think>", "Hel", "lo")
        for event in renderer.chunks(Delta(choice=0, text=text, finish_reason="stop" if text == "lo" else None))
    )
    message = joined(named_events_of((told + renderer.closing(Usage(completion_tokens=4))).decode()))
    assert message["content"] == [
        {"type": "thinking", "thinking": "I think", "signature": ""},
        {"type": "text", "text": "Hello"},
    ]
    assert message["stop_reason"] == "end_turn" and message["usage"]["output_tokens"] == 4
