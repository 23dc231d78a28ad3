"""OpenAI's /v1/responses over the app in process: `builtin:tiny` says what chat says, in items and in events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from asgi import check_error, conforms, named_events_of, openai_client, serving, talking_to
from fakes import Breaking, LocalWorkers, exact_usage
from openai.types.responses import Response
from pydantic import BaseModel

from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.answer_forms import THOUGHTS
from buddymoe_ray.engine.answers import AnswerForm
from buddymoe_ray.engine.async_engine import AsyncEngine
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.errors import RequestError
from buddymoe_ray.serve.calls import RESPONSES, ModelNames, open_call
from buddymoe_ray.serve.render import ReplyHead
from buddymoe_ray.serve.render_responses import ResponsesRenderer
from buddymoe_ray.serve.wire_responses_parts import packed_thoughts
from buddymoe_ray.serve.work import Delta
from buddymoe_ray.serve.worker import Worker
from buddymoe_ray.types import Usage

PATH = "/v1/responses"
BODY: Any = {"model": "fake", "input": "hello", "max_output_tokens": 6}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
TOOLS: Any = [
    {"type": "function", "name": name, "parameters": PARAMETERS, "strict": True} for name in ("get_weather", "get_news")
]
QUESTION: Any = {"role": "user", "content": "What is the weather in Paris?"}
ASKED: Any = {"model": "fake", "max_output_tokens": 60, "temperature": 0, "tools": TOOLS}


class Person(BaseModel):
    name: str
    age: int
    city: str


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncEngine]:
    opened = AsyncEngine(Engine.from_config(EngineConfig(memory="50%", seed=1)), model_id="fake")
    yield opened
    opened.close()


def events_of(body: str) -> list[dict[str, Any]]:
    """The data of every event, which are numbered."""
    told = named_events_of(body)
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    return told


async def test_a_response_in_full_and_as_a_stream() -> None:
    chat = {"model": "fake", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 6}
    async with serving() as client:
        text = (await client.post("/v1/chat/completions", json=chat)).json()["choices"][0]["message"]["content"]
        body = (await client.post(PATH, json=BODY)).json()
        events = events_of((await client.post(PATH, json=BODY | {"stream": True})).text)
    Response.model_validate(body, strict=True)
    (item,) = body["output"]
    assert item["content"] == [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    assert (body["status"], item["status"]) == ("incomplete", "incomplete")
    assert body["incomplete_details"] == {"reason": "max_output_tokens"} and body["max_output_tokens"] == 6
    assert body["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 6,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 13,
        "buddymoe": exact_usage(hits=18, fetched=6),
    }
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [event["type"].removeprefix("response.") for event in events] == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *(["output_text.delta"] * len(deltas)),
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    assert "".join(delta["delta"] for delta in deltas) == events[-4]["text"] == text
    assert events[0]["response"]["output"] == [] and events[0]["response"]["status"] == "in_progress"
    assert events[2]["item"]["content"] == [] and events[2]["item"]["status"] == "in_progress"
    last = events[-1]["response"]
    assert last["output"] == [events[-2]["item"]] and last["usage"] == body["usage"]
    own = {"id", "created_at", "output"}
    assert {key: last[key] for key in last.keys() - own} == {key: body[key] for key in body.keys() - own}


async def test_tools_in_a_loop(engine: AsyncEngine) -> None:
    async with talking_to(LocalWorkers(Worker(engine))) as client:
        responses = openai_client(client).responses
        first = await responses.create(input=[QUESTION], **ASKED)
        (call,) = first.output
        assert first.status == "completed" and call.type == "function_call" and call.name == "get_weather"
        assert json.loads(call.arguments) == {"city": "Paris"}
        async with responses.stream(input=[QUESTION], **ASKED) as stream:
            names = [event.type async for event in stream]
            told = await stream.get_final_response()
        assert names[2:-1] == [
            *("response.output_item.added", "response.function_call_arguments.delta"),
            *("response.function_call_arguments.done", "response.output_item.done"),
        ]
        (streamed,) = told.output
        assert streamed.type == "function_call" and streamed.arguments == call.arguments
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny, 21 degrees"}
        second = await responses.create(input=[QUESTION, call, result], instructions="Be brief.", **ASKED)
        assert second.status == "completed" and second.output_text and second.instructions == "Be brief."
        for reply in (first, second):
            conforms(reply.model_dump(mode="json", exclude_unset=True, warnings=False), PATH)
        named: Any = {"type": "function", "name": "get_news"}
        forced = await responses.create(input=[QUESTION], tool_choice=named, **ASKED)
        assert [item.name for item in forced.output if item.type == "function_call"] == ["get_news"]
        asked = "Extract JSON: Anna is 34 and lives in Paris."
        parsed = await responses.parse(model="fake", input=asked, text_format=Person, temperature=0)
        assert parsed.output_parsed == Person(name="Anna", age=34, city="Paris")


async def test_what_cannot_be_is_refused_by_name() -> None:
    image = [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x/y.png"}]}]
    refused: dict[str, Any] = {
        **{name: {name: "resp_1"} for name in ("previous_response_id", "conversation")},
        **{name: {name: True} for name in ("store", "background")},
        "tools[0].type": {"tools": [{"type": "web_search"}]},
        "input[0].content[0].type": {"input": image},
        "input[0].type": {"input": [{"type": "item_reference", "id": "i"}]},
        "input[1].arguments": {
            "input": [QUESTION, {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}]
        },
        "input[0]": {"input": [QUESTION | {"content": [{"type": "refusal", "refusal": "no"}]}]},
        "metadata": {"metadata": {f"{at}": "x" for at in range(17)}},
        "max_output_tokens": {"max_output_tokens": 0},
        "temperature": {"temperature": 3},
        "include[0]": {"include": ["message.output_text.logprobs"]},
        "reasoning.effort": {"reasoning": {"effort": "high"}},
        "text.format": {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"not": {}}}}},
        "tools": {"tools": TOOLS},
        "messages": {"messages": []},
    }
    async with serving() as client:
        for param, fields in refused.items():
            told = check_error(await client.post(PATH, json=BODY | fields), 400, param)
            assert told.startswith(param) and "hint: " in told
        unnamed = {"text": {"format": {"type": "json_schema", "schema": {}}}}
        assert "name and schema" in check_error(await client.post(PATH, json=BODY | unnamed), 400, "text.format")
        long = await client.post(PATH, json=BODY | {"max_output_tokens": 1000})
        told = check_error(long, 400, "input", "context_length_exceeded")
        assert told.startswith("input and max_output_tokens are 7 + 1000 tokens")
        with pytest.raises(openai.BadRequestError, match="send the whole conversation as input"):
            await openai_client(client).responses.create(model="fake", input="x", previous_response_id="resp_1")
        neutral = {"store": False, "background": False, "include": [], "metadata": {}}
        neutral |= {"reasoning": {"effort": "medium", "summary": "auto"}}
        assert (await client.post(PATH, json=BODY | neutral)).json()["metadata"] == {}
        told = events_of((await client.post(PATH, json=BODY | {"metadata": {"who": "me"}, "stream": True})).text)
        assert [told[at]["response"]["metadata"] for at in (0, -1)] == [{"who": "me"}] * 2


async def test_a_stream_that_breaks_says_so() -> None:
    async with serving(Breaking()) as client:
        assert "it broke" in check_error(await client.post(PATH, json=BODY), 500, code="internal_error")
        last = events_of((await client.post(PATH, json=BODY | {"stream": True})).text)[-1]
    assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "it broke"}


def test_a_conversation_is_put_into_the_words_of_chat() -> None:
    items = [
        QUESTION,
        {"type": "reasoning", "id": "r1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "reasoning", "id": "r2", "summary": [], "encrypted_content": packed_thoughts("So: ☃")},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "Let me see."}]},
        {"type": "function_call", "call_id": "c1", "name": "get_news", "arguments": '{"city": "Rome"}'},
        {"type": "function_call", "call_id": "c2", "name": "get_news", "arguments": '{"city": "Oslo"}'},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "none"}]},
        {"type": "function_call_output", "call_id": "c2", "output": "rain"},
        {"type": "function_call", "call_id": "c3", "name": "get_weather", "arguments": "{}"},
    ]
    asked = ASKED | {"input": items, "instructions": "Be brief.", "parallel_tool_calls": False}
    body = json.dumps(asked | {"reasoning": {"effort": "low"}})
    work = open_call(RESPONSES, body.encode(), ModelNames(model="fake"), unique="1", created=0).work
    assert [(m.role, m.content, len(m.tool_calls)) for m in work.messages] == [
        ("system", "Be brief.", 0),
        ("user", QUESTION["content"], 0),
        ("assistant", "Let me see.", 2),
        ("tool", "none", 0),
        ("tool", "rain", 0),
        ("assistant", None, 1),
    ]
    assert work.messages[2].reasoning_content == "Hm.\nSo: ☃" and work.messages[4].tool_call_id == "c2"
    assert work.tools is not None and not work.tools.several and work.limit_field == "max_completion_tokens"
    assert work.thinking.effort == "low"
    for thoughts in ("not base64", "/w=="):
        wrong = json.dumps(ASKED | {"input": [items[0], items[2] | {"encrypted_content": thoughts}]})
        with pytest.raises(RequestError, match="must be sent as it came from this service"):
            open_call(RESPONSES, wrong.encode(), ModelNames(model="fake"), unique="1", created=0)


def test_items_follow_each_other() -> None:
    fields = {"content": {"repeats": True, "join": ""}, "reasoning_content": THOUGHTS}
    form = AnswerForm(template={"start_anchor_pattern": r"\A", "fields": fields})
    head = ReplyHead(id="resp-1", created=0, model="m", repeats={"include": ["reasoning.encrypted_content"]})
    whole, stream = ResponsesRenderer(head), ResponsesRenderer(head)
    for renderer in (whole, stream):
        renderer.read_as(form)
    texts = ("<think>I ", "think</think>", "Hel", "lo")
    told = b"".join(
        event
        for text in texts
        for event in stream.chunks(Delta(choice=0, text=text, finish_reason="length" if text == "lo" else None))
    )
    used = Usage(completion_tokens=4)
    *events, last = events_of((told + stream.closing(used)).decode())
    body = json.loads(whole.whole([Delta(choice=0, text="".join(texts), finish_reason="length")], used))
    assert last["type"] == "response.incomplete" and last["response"] == body
    assert [(item["type"], item["content"][0]["text"], item["status"]) for item in body["output"]] == [
        ("reasoning", "I think", "completed"),
        ("message", "Hello", "incomplete"),
    ]
    assert body["output"][0]["encrypted_content"] == packed_thoughts("I think")
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[2:5] == ["output_item.added", "content_part.added", "reasoning_text.delta"]
    assert kinds.index("reasoning_text.done") < kinds.index("output_text.delta")
