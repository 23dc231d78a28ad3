"""The deployed application with the real engine: `builtin:tiny` at a quarter of its experts, by the `openai` client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from serving import eventually, running

from buddymoe_ray import LLM
from buddymoe_ray.client import Client
from buddymoe_ray.errors import RequestError
from buddymoe_ray.types import EngineResult

PROMPTS = ["def add(a, b):\n    return", "import os\n", "class Stack:\n    def __init__(self", "for i in range("]
CHAT: Any = [{"role": "user", "content": "What does list.append do?"}]


@pytest.fixture(scope="module")
def url(tiny: str) -> str:
    return tiny


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0) as opened:
        yield opened


@pytest.fixture(scope="module")
def handle(url: str) -> Client:
    return Client("tiny")


@pytest.fixture(scope="module")
def resident() -> list[EngineResult]:
    """What the fully resident model generates, in process."""
    with LLM("builtin:tiny", memory="100%") as llm:
        return llm.generate(PROMPTS, max_tokens=24)


def complete(client: openai.OpenAI, prompt: Any, **options: Any) -> Any:
    return client.completions.create(
        model="builtin:tiny", prompt=prompt, **{"max_tokens": 24, "temperature": 0} | options
    )


def test_models_and_health(client: openai.OpenAI, url: str, handle: Client) -> None:
    [model] = client.models.list()
    assert model.id == "builtin:tiny"
    assert (model.model_extra or {})["max_model_len"] == handle.info().max_model_len
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "problems": []}


def test_completions_are_the_resident_models(client: openai.OpenAI, resident: list[EngineResult]) -> None:
    reply = complete(client, PROMPTS)
    assert [choice.text for choice in reply.choices] == [result.text for result in resident]
    assert reply.usage.completion_tokens == sum(result.usage.completion_tokens for result in resident)
    assert reply.usage.model_extra["buddymoe"]["fetched"] > 0


def test_streams_are_the_resident_models(client: openai.OpenAI, resident: list[EngineResult]) -> None:
    for prompt, result in zip(PROMPTS, resident, strict=True):
        *chunks, usage = complete(client, prompt, stream=True, stream_options={"include_usage": True})
        assert "".join(chunk.choices[0].text for chunk in chunks) == result.text
        assert chunks[-1].choices[0].finish_reason == result.finish_reason
        assert usage.usage.completion_tokens == len(result.token_ids)


def test_chat_stream_and_not(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "builtin:tiny", "messages": CHAT, "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0]
    parts = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    assert parts[0].delta.role == "assistant"
    assert "".join(part.delta.content for part in parts) == whole.message.content
    assert parts[-1].finish_reason == whole.finish_reason


def test_stop(client: openai.OpenAI, resident: list[EngineResult]) -> None:
    stop = resident[0].text[5:8]
    [choice] = complete(client, PROMPTS[0], stop=stop).choices
    assert (choice.text, choice.finish_reason) == (resident[0].text.split(stop)[0], "stop")


def test_seed_and_two_choices(client: openai.OpenAI) -> None:
    pairs = [[c.text for c in complete(client, "import ", seed=7, n=2, temperature=1).choices] for _ in range(2)]
    assert pairs[0] == pairs[1] and pairs[0][0] != pairs[0][1]
    assert complete(client, "import ", seed=8, temperature=1).choices[0].text == pairs[0][1]


def test_logprobs(client: openai.OpenAI) -> None:
    [choice] = complete(client, PROMPTS[0], logprobs=2, max_tokens=3).choices  # before the end, whose mark is no text
    assert "".join(choice.logprobs.tokens) == choice.text
    assert all(
        max(top.values()) == own
        for top, own in zip(choice.logprobs.top_logprobs, choice.logprobs.token_logprobs, strict=True)
    )
    chat = client.chat.completions.create(
        model="builtin:tiny", messages=CHAT, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None and [len(entry.top_logprobs) for entry in content] == [2] * len(content)


def test_a_cancelled_stream_frees_its_slot(client: openai.OpenAI, handle: Client) -> None:
    before = sum(snapshot.steps for snapshot in handle.snapshots())
    stream = complete(client, "x", max_tokens=1000, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    eventually(lambda: running(handle) == 0)
    after = handle.snapshots()
    assert sum(snapshot.steps for snapshot in after) - before < 1000  # it was ended, and did not come to its end
    assert all(snapshot.free_kv_blocks == snapshot.total_kv_blocks for snapshot in after)


async def test_sixteen_streams_at_once(url: str, client: openai.OpenAI) -> None:
    prompts = [f"x{at} = " for at in range(16)]
    expected = await asyncio.to_thread(lambda: [choice.text for choice in complete(client, prompts).choices])
    async with openai.AsyncOpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0) as aclient:

        async def text(prompt: str) -> str:
            stream = await aclient.completions.create(
                model="builtin:tiny", prompt=prompt, max_tokens=24, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        assert await asyncio.gather(*[text(prompt) for prompt in prompts]) == expected


def test_an_over_long_prompt_is_400_with_the_limit(client: openai.OpenAI, handle: Client) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            complete(client, "x " * 5000, stream=stream)
        assert caught.value.code == "context_length_exceeded"
        assert str(handle.info().max_model_len) in caught.value.message


def test_an_unknown_model_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="builtin:tiny"):
        client.completions.create(model="gpt-4", prompt="x")


def test_malformed_json_is_400(url: str) -> None:
    response = httpx.post(f"{url}/v1/completions", content=b'{"model": ')
    assert response.status_code == 400 and "not JSON" in response.json()["error"]["message"]


def test_what_is_not_built_is_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="modalities") as caught:
        client.chat.completions.create(model="builtin:tiny", messages=CHAT, modalities=["audio"])
    assert caught.value.param == "modalities"


def test_calls_formats_and_scores_cross_ray(client: openai.OpenAI, url: str) -> None:
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tools: Any = [
        {"type": "function", "function": {"name": name, "parameters": city}} for name in ("get_weather", "get_news")
    ]
    asked: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    settings: Any = {"model": "builtin:tiny", "messages": asked, "temperature": 0, "max_tokens": 60}
    with client.chat.completions.stream(**settings, tools=tools, tool_choice="required") as stream:
        choice = stream.get_final_completion().choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls
    extra = {"structured_outputs": {"choice": ["yes", "no"]}}
    told = client.chat.completions.create(**settings, extra_body=extra).choices[0].message.content
    assert told in ("yes", "no")
    scored = complete(client, PROMPTS[1], echo=True, max_tokens=0, logprobs=1).choices[0]
    counted = httpx.post(f"{url}/tokenize", json={"prompt": PROMPTS[1]}).json()
    assert scored.text == PROMPTS[1] and len(scored.logprobs.token_logprobs) == counted["count"]
    assert httpx.get(f"{url}/tokenizer_info").json()["eos_token"] == "<|im_end|>"


def test_the_python_client_gives_the_same_tokens(
    client: openai.OpenAI, handle: Client, resident: list[EngineResult]
) -> None:
    for prompt, expected in zip(PROMPTS, resident, strict=True):
        result = handle.generate(prompt, max_tokens=24, temperature=0.0)
        events = list(handle.stream(list(expected.prompt_token_ids), max_tokens=24, temperature=0.0))
        assert (result.token_ids, result.text) == (expected.token_ids, expected.text)
        assert result.prompt_token_ids == expected.prompt_token_ids
        assert tuple(id_ for event in events for id_ in event.token_ids) == expected.token_ids
        assert events[-1].usage is not None and events[-1].usage.completion_tokens == len(expected.token_ids)
    chat = client.chat.completions.create(model="builtin:tiny", messages=CHAT, max_tokens=16, temperature=0)
    assert handle.chat(CHAT, max_tokens=16, temperature=0.0).text == chat.choices[0].message.content


async def test_the_python_client_is_asynchronous_too(handle: Client, resident: list[EngineResult]) -> None:
    asked: dict[str, Any] = {"max_tokens": 24, "temperature": 0.0}
    results = await asyncio.gather(*[handle.agenerate(prompt, **asked) for prompt in PROMPTS])
    assert [result.token_ids for result in results] == [result.token_ids for result in resident]
    text = "".join([event.text async for event in handle.astream(PROMPTS[0], **asked)])
    assert text == resident[0].text
    with pytest.raises(RequestError, match="must be at most"):
        await handle.agenerate("x " * 5000)
