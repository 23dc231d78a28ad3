"""Tools over HTTP: `builtin:tiny` calls those it is given, the client's loop closes, a move changes nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from asgi import check_error, conforms, messages_of, openai_client, serving, talking_to
from fakes import FakeEngine, LocalWorkers, MortalWorkers, byte_tokenizer

from buddymoe_ray.batch.run import BatchRun
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.async_engine import AsyncEngine
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.errors import RequestError
from buddymoe_ray.serve.batches.lines import BatchInput
from buddymoe_ray.serve.calls import ModelNames
from buddymoe_ray.serve.prompts import in_form
from buddymoe_ray.serve.work import ChatMessage, ToolUse, Work
from buddymoe_ray.serve.worker import Worker
from buddymoe_ray.types import SamplingParams

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "description": "of a city", "parameters": PARAMETERS}}
    for name in ("get_weather", "find_hotel", "get_news")
]
ASKED: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
BODY: Any = {"model": "fake", "messages": ASKED, "temperature": 0, "max_tokens": 60, "tools": TOOLS}
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncEngine]:
    opened = AsyncEngine(Engine.from_config(EngineConfig(memory="50%", seed=1)), model_id="fake")
    yield opened
    opened.close()


async def answer(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    reply = await client.post(PATH, json=BODY | fields)
    assert reply.status_code == 200, reply.text
    choice: dict[str, Any] = reply.json()["choices"][0]
    return choice


async def test_a_call_and_what_is_made_of_its_result(engine: AsyncEngine) -> None:
    async with talking_to(LocalWorkers(Worker(engine))) as client:
        openai = openai_client(client)
        first = await openai.chat.completions.create(**BODY)
        choice = first.choices[0]
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        call = (choice.message.tool_calls or [])[0]
        assert call.type == "function" and call.function.name == "get_weather"
        assert json.loads(call.function.arguments) == {"city": "Paris"} and len(call.id) == 9
        told = [*ASKED, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny, 21 degrees"}]
        second = await openai.chat.completions.create(**BODY | {"messages": told})
        assert second.choices[0].message.role == "assistant"
        async with openai.chat.completions.stream(**BODY) as stream:
            names = [event.type async for event in stream]
            last = (await stream.get_final_completion()).choices[0]
        assert "tool_calls.function.arguments.done" in names and last.finish_reason == "tool_calls"
        assert [c.function.name for c in last.message.tool_calls or []] == ["get_weather"]


async def test_what_may_be_called_is_the_callers_choice(engine: AsyncEngine) -> None:
    async with talking_to(LocalWorkers(Worker(engine))) as client:
        none = await answer(client, tool_choice="none")
        assert none["finish_reason"] == "stop" and none["message"]["content"] and "tool_calls" not in none["message"]
        named = await answer(client, tool_choice={"type": "function", "function": {"name": "get_news"}})
        assert [call["function"]["name"] for call in named["message"]["tool_calls"]] == ["get_news"]
        for fields in ({"tool_choice": "required"}, {"tool_choice": "required", "parallel_tool_calls": False}):
            for seed in range(3):  # whatever it would rather say
                unwilling = {"messages": [{"role": "user", "content": "7 + 5"}], "temperature": 1.2, "seed": seed}
                must = await answer(client, **fields, **unwilling, max_tokens=200)
                calls = must["message"].get("tool_calls", [])
                assert must["finish_reason"] == "length" or calls
                assert all(set(json.loads(call["function"]["arguments"])) >= {"city"} for call in calls)
                assert len(calls) <= 1 or fields.get("parallel_tool_calls") is not False
        conforms((await client.post(PATH, json=BODY)).json(), PATH)
        cut = await answer(client, max_tokens=12)
        assert cut["finish_reason"] == "length" and cut["message"]["content"].startswith("<tool_call>")


@pytest.mark.parametrize("fields", [{}, {"tool_choice": "required", "temperature": 1.0, "seed": 3}])
async def test_a_stream_that_moves_tells_the_same(engine: AsyncEngine, fields: dict[str, Any]) -> None:
    worker = Worker(engine)
    async with talking_to(LocalWorkers(worker)) as client:
        whole = await answer(client, **fields)
    async with talking_to(MortalWorkers(worker)) as client:
        reply = await client.post(PATH, json=BODY | fields | {"stream": True})
    chunks = [json.loads(message)["choices"][0] for message in messages_of(reply.text)[:-1]]
    deltas = [call for chunk in chunks for call in chunk["delta"].get("tool_calls", [])]
    assert chunks[-1]["finish_reason"] == whole["finish_reason"]
    assert [(call["index"], call["function"]) for call in deltas] == [
        (at, call["function"]) for at, call in enumerate(whole["message"]["tool_calls"])
    ]
    assert all(chunk["delta"] or chunk["finish_reason"] for chunk in chunks), "a chunk says something"
    assert chunks[0]["delta"]["role"] == "assistant" and all(call["id"] for call in deltas)


async def test_what_cannot_be_is_refused_by_name(engine: AsyncEngine) -> None:
    strange = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "not": {}}}}
    async with talking_to(LocalWorkers(Worker(engine))) as client:
        bad = await client.post(PATH, json=BODY | {"tools": [strange], "tool_choice": "required"})
        assert "'not' at #" in check_error(bad, 400, "tools[0]")
        assert (await client.post(PATH, json=BODY | {"tools": [strange]})).status_code == 200, "it is not enforced"
    async with serving(FakeEngine()) as client:
        bad = await client.post(PATH, json=BODY)
        assert "no place for tools" in check_error(bad, 400, "tools")


def test_a_model_that_writes_calls_in_an_unknown_way_is_given_no_tools() -> None:
    tokenizer = copy.deepcopy(byte_tokenizer())
    tokenizer.chat_template = "{{ tools }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    asked = Work(
        request_id="r",
        messages=(ChatMessage(role="user", content="hi"),),
        tools=ToolUse(tools=tuple(TOOLS)),
        sampling=SamplingParams(),
        reads_answer=True,
    )
    with pytest.raises(RequestError, match="how this model writes calls is not known") as caught:
        in_form(tokenizer, asked)
    assert caught.value.param == "tools"
    plain, form = in_form(tokenizer, replace(asked, tools=None))
    assert form is None and plain.sampling == asked.sampling
    tokenizer.chat_template += "{# [TOOL_CALLS] #}"
    tokenizer.add_special_tokens({"extra_special_tokens": ["[TOOL_CALLS]"]})
    told, form = in_form(tokenizer, asked)
    assert form is not None and not told.sampling.skip_special_tokens, "the mark must be seen"


def test_a_batch_answers_with_calls(tmp_path: Path) -> None:
    line = {"custom_id": "a", "method": "POST", "url": PATH, "body": BODY}
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    engine = Engine.from_config(EngineConfig(memory="50%"))
    try:
        source = BatchInput(tmp_path / "in.jsonl")
        run = BatchRun(engine, source, ModelNames(model="fake"), default_max_tokens=60, rows=2)
        (entry,) = run.results([0], lambda ended: None)
        choice = json.loads(entry.data)["response"]["body"]["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
    finally:
        engine.close()
