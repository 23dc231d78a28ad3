"""The HTTP app in process, driven by httpx and by the `openai` client: what is answered, and what is refused."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from asgi import CHAT, TEXT, check_error, messages_of, openai_client, serving, talking_to
from fakes import FakeEngine, FakeLimits, LocalWorkers, exact_usage

import buddymoe_ray
from buddymoe_ray.serve import http, reading_bodies
from buddymoe_ray.serve.batches import file_routes
from buddymoe_ray.serve.calls import MAX_BODY_BYTES, Call, Endpoint
from buddymoe_ray.serve.http import HttpSettings
from buddymoe_ray.serve.worker import Worker
from buddymoe_ray.types import GenerationRequest, TokenEvent, TokenLogprob


async def test_chat_reply_in_full() -> None:
    async with serving() as client:
        response = await client.post("/v1/chat/completions", json=CHAT)
    body = response.json()
    assert body.pop("id").startswith("chatcmpl-") and body.pop("created") > 0
    text = body["choices"][0]["message"]["content"]
    assert len(text) == 6
    assert body == {
        "object": "chat.completion",
        "model": "fake",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": {
            "prompt_tokens": 7,  # <|user|>, five bytes, <|assistant|>
            "completion_tokens": 6,
            "total_tokens": 13,
            "prompt_tokens_details": {"cached_tokens": 0},
            "buddymoe": exact_usage(hits=18, fetched=6),
        },
    }


async def test_completion_reply_in_full() -> None:
    async with serving() as client:
        body = (await client.post("/v1/completions", json=TEXT)).json()
    assert body.pop("id").startswith("cmpl-") and body.pop("created") > 0
    text = body["choices"][0]["text"]
    assert body == {
        "object": "text_completion",
        "model": "fake",
        "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 6,
            "total_tokens": 11,
            "prompt_tokens_details": {"cached_tokens": 0},
            "buddymoe": exact_usage(hits=18, fetched=6),
        },
    }


async def test_chat_stream_message_by_message() -> None:
    async with serving() as client:
        whole = (await client.post("/v1/chat/completions", json=CHAT)).json()["choices"][0]["message"]["content"]
        response = await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *messages, done = messages_of(response.text)
    assert done == "[DONE]"
    chunks = [json.loads(message) for message in messages]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"]["role"] == "assistant" and all("role" not in c["delta"] for c in choices[1:])
    assert "".join(choice["delta"]["content"] for choice in choices) == whole
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert all("usage" not in chunk for chunk in chunks)


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
async def test_stream_usage_comes_last_and_is_null_before(path: str, body: dict[str, Any]) -> None:
    async with serving() as client:
        whole = (await client.post(path, json=body | {"n": 2})).json()
        asked = body | {"n": 2, "stream": True, "stream_options": {"include_usage": True}}
        *messages, done = messages_of((await client.post(path, json=asked)).text)
    chunks = [json.loads(message) for message in messages]
    assert done == "[DONE]"
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_usage_says_what_a_mode_cost(path: str) -> None:
    body = (CHAT if "chat" in path else TEXT) | {"buddymoe": {"mode": "bounded", "budget": 0.01}}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async with serving() as client:
        whole = (await client.post(path, json=body)).json()["usage"]["buddymoe"]
        *_, last, _ = messages_of((await client.post(path, json=body | options)).text)
    assert json.loads(last)["usage"]["buddymoe"] == whole
    assert whole == {
        "mode": "bounded",
        "requested_mode": "bounded",
        "budget": 0.01,
        "hits": 18,
        "peer": 0,
        "host": 0,
        "fetched": 6,
        "standins": {"lowbit": 12, "lowrank": 0, "buddy": 0, "mean": 0, "drop": 1},
        "expected_rise": 0.006,
        "resumed": 0,
        "guard": "ok",
        "calibration": {"state": "none", "tokens": 0},
    }


async def test_a_record_comes_when_it_is_asked_for_and_only_then() -> None:
    async with serving() as client:
        for asked in (TEXT, TEXT | {"stream": True, "stream_options": {"include_usage": True}}):
            for mode, record in (("fast", True), ("exact", True), ("fast", False)):
                response = await client.post(
                    "/v1/completions", json=asked | {"buddymoe": {"mode": mode, "record": record}}
                )
                body = json.loads(messages_of(response.text)[-2]) if "stream" in asked else response.json()
                spent = body["usage"]["buddymoe"]
                assert ("record" in spent) == record and spent["mode"] == mode
                assert spent.get("record", "record of ").startswith("record of ")


async def test_openai_client_reads_all_of_it() -> None:
    async with serving() as http:
        client = openai_client(http)
        chat = await client.chat.completions.create(
            model="fake",
            messages=[{"role": "user", "content": "hello"}],
            logprobs=True,
            top_logprobs=2,
            n=2,
            seed=3,
            max_completion_tokens=4,
            extra_body={"buddymoe": {"mode": "exact"}},
        )
        assert [choice.index for choice in chat.choices] == [0, 1]
        assert chat.choices[0].message.content != chat.choices[1].message.content
        assert chat.usage is not None and chat.usage.model_extra == {"buddymoe": exact_usage(hits=24, fetched=8)}
        logprobs = chat.choices[0].logprobs
        assert logprobs is not None and logprobs.content is not None
        assert "".join(entry.token for entry in logprobs.content) == chat.choices[0].message.content
        assert [(top.token, top.logprob, top.bytes) for top in logprobs.content[0].top_logprobs] == [
            ("a", -1.0, [97]),
            ("b", -2.0, [98]),
        ]
        again = await client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "hello"}], seed=4, max_tokens=4
        )
        assert again.choices[0].message.content == chat.choices[1].message.content  # choice k uses seed + k


async def test_completion_logprobs_and_prompts() -> None:
    async with serving() as http:
        client = openai_client(http)
        reply = await client.completions.create(model="fake", prompt=["ab", "c"], n=2, logprobs=1, max_tokens=3, seed=1)
        ids = await client.completions.create(model="fake", prompt=[list(b"ab"), list(b"c")], n=2, max_tokens=3, seed=1)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in reply.choices] == [choice.text for choice in ids.choices]
    assert reply.usage is not None and reply.usage.prompt_tokens == 3
    for choice in reply.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.tokens == list(choice.text)
        assert choice.logprobs.text_offset == [0, 1, 2]
        assert choice.logprobs.token_logprobs == [-0.5] * 3
        tops = choice.logprobs.top_logprobs or []
        assert [set(top) for top in tops] == [{token, "a"} for token in choice.text]


async def test_streamed_logprobs_join_to_the_whole() -> None:
    body = TEXT | {"logprobs": 2, "n": 2, "seed": 5}
    async with serving() as client:
        whole = (await client.post("/v1/completions", json=body)).json()["choices"]
        *messages, _ = messages_of((await client.post("/v1/completions", json=body | {"stream": True})).text)
    for choice in whole:
        parts = [c for m in messages for c in json.loads(m)["choices"] if c["index"] == choice["index"]]
        for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [item for part in parts for item in part["logprobs"][key]] == choice["logprobs"][key]


async def test_stop_ends_before_the_stop_string() -> None:
    async with serving() as client:
        text = (await client.post("/v1/completions", json=TEXT)).json()["choices"][0]["text"]
        choice = (await client.post("/v1/completions", json=TEXT | {"stop": text[3]})).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text[: text.index(text[3])], "stop")


async def test_models_lists_the_served_name_and_its_limit() -> None:
    async with serving(FakeEngine(limits=FakeLimits(max_model_len=77)), model="org/name") as client:
        listed = (await client.get("/v1/models")).json()
        one = (await client.get("/v1/models/org/name")).json()
        other = await client.get("/v1/models/else")
    [card] = listed["data"]
    assert (card["id"], card["max_model_len"], card["object"], card["owned_by"]) == (
        "org/name",
        77,
        "model",
        "buddymoe",
    )
    assert one == card and listed["object"] == "list"
    check_error(other, 404, "model", "model_not_found")


@pytest.mark.parametrize("stream", [False, True])
async def test_refusals_have_their_status_stream_or_not(stream: bool) -> None:
    async with serving(FakeEngine(limits=FakeLimits(max_model_len=16))) as client:

        async def post(path: str, body: Any) -> httpx.Response:
            return await client.post(path, json=body | {"stream": stream})

        long = await post("/v1/completions", TEXT | {"prompt": "x" * 16})
        assert "must be at most 15" in check_error(long, 400, "prompt", "context_length_exceeded")
        chat = await post("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": "x" * 99}]})
        check_error(chat, 400, "messages", "context_length_exceeded")
        unknown = await post("/v1/chat/completions", CHAT | {"model": "gpt-4"})
        assert "'fake'" in check_error(unknown, 404, "model", "model_not_found")
        check_error(await post("/v1/completions", TEXT | {"prompt": "\x01"}), 400, "prompt")
        check_error(await post("/v1/chat/completions", CHAT | {"tools": [{}]}), 400, "tools[0].type")


async def test_malformed_bodies_and_paths() -> None:
    async with serving() as client:
        for body in (b"{", b"", b"[]", b"\xff"):
            check_error(await client.post("/v1/chat/completions", content=body), 400)
        check_error(await client.get("/v1/nothing"), 404)
        wrong_method = await client.get("/v1/completions")
        check_error(wrong_method, 405)
        assert wrong_method.headers["allow"] == "POST"
        too_long = await client.post("/v1/completions", content=b" " * (MAX_BODY_BYTES + 1))
        check_error(too_long, 413)
        for path in ("/v1/completions", "/tokenize"):  # this one could be read, and is not what it says it is
            packed = await client.post(path, json=TEXT, headers={"Content-Encoding": "gzip"})
            assert "Content-Encoding is 'gzip'" in check_error(packed, 415)
        assert (await client.post("/v1/completions", json=TEXT, headers={"Content-Encoding": "Identity"})).is_success


async def test_a_body_that_never_comes_whole_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reading_bodies, "BODY_SECONDS", 0.05)
    monkeypatch.setattr(file_routes, "UPLOAD_SECONDS", 0.05)

    async def drops() -> AsyncIterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n'
        while True:
            yield b" "
            await asyncio.sleep(0.02)

    async with asyncio.timeout(10), serving(files_folder=tmp_path) as client:
        slow = await client.post("/v1/messages", content=drops())
        form = {"Content-Type": "multipart/form-data; boundary=x"}
        uploads = [client.post("/v1/files", content=drops(), headers=form) for _ in range(file_routes.MOST_UPLOADS + 1)]
        for upload in await asyncio.gather(*uploads):
            check_error(upload, 408)
        check_error(await client.post("/v1/files", headers=form | {"Content-Encoding": "br"}), 415)
    assert (slow.status_code, slow.json()["error"]["type"]) == (408, "timeout_error")
    assert slow.headers["connection"] == "close"


async def test_health_fails_when_an_engine_died() -> None:
    engines = (FakeEngine(), FakeEngine())
    async with serving(*engines, health_seconds=0.0) as client:
        well = await client.get("/health")
        assert (well.status_code, well.json()) == (200, {"status": "ok", "problems": []})
        assert (await client.get("/version")).json() == {"version": buddymoe_ray.__version__}
        engines[1].die()
        ill, ping = await client.get("/health"), await client.get("/ping")
    assert (ping.status_code, ping.json()) == (503, ill.json())
    assert (ill.status_code, ill.json()["status"]) == (503, "unhealthy")
    assert "engine is stopped" in ill.json()["problems"][0]


async def test_health_asks_the_workers_once_however_often_it_is_asked() -> None:
    class Counting(LocalWorkers):
        asked = 0

        async def health(self) -> tuple[str | None, ...]:
            self.asked += 1
            await asyncio.sleep(0.02)
            return await super().health()

    workers = Counting(Worker(FakeEngine()))
    async with talking_to(workers) as client:
        replies = await asyncio.gather(*(client.get("/health") for _ in range(20)))
        replies += [await client.get("/health") for _ in range(20)]
    assert {reply.status_code for reply in replies} == {200} and workers.asked == 1


async def test_key_guards_the_api_and_not_health(caplog: pytest.LogCaptureFixture) -> None:
    key = "sk-\u00e9-secret"
    async with serving(api_key=key) as client:
        wrongs = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": key.encode()}, {"Authorization": b"\xff"}]
        for headers in wrongs:
            response = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
            check_error(response, 401, None, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
        check_error(await client.post("/v1/chat/completions", content=b"{"), 401, None, "invalid_api_key")
        check_error(await client.get("/v1/models"), 401, None, "invalid_api_key")
        check_error(await client.get("/metrics"), 401, None, "invalid_api_key")
        right = {"Authorization": f"Bearer {key}".encode()}
        assert (await client.get("/health")).json() == {"status": "ok"}, "strangers are told no more"
        assert (await client.get("/health", headers=right)).json() == {"status": "ok", "problems": []}
        assert (await client.get("/v1/models", headers=right)).status_code == 200
        assert (await client.get("/metrics", headers=right)).status_code == 200
    assert key not in caplog.text
    assert key not in repr(HttpSettings(model="m", api_key=key))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "bearer sk-k"}, 200),
        ({"Authorization": "BEARER   sk-k"}, 200),
        ({"X-Api-Key": "sk-k"}, 200),
        ({"x-api-key": "sk-k", "Authorization": "Bearer none"}, 200),
        ({"Authorization": "Bearer sk-K"}, 401),
        ({"Authorization": "Bearersk-k"}, 401),
        ({"Authorization": "Basic sk-k"}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"x-api-key": ""}, 401),
        ({"x-api-key": "Bearer sk-k"}, 401),
    ],
)
async def test_where_the_key_is_looked_for(headers: dict[str, str], status: int) -> None:
    async with serving(api_key="sk-k") as client:
        assert (await client.get("/v1/models", headers=headers)).status_code == status
        assert (await client.post("/v1/completions", json=TEXT, headers=headers)).status_code == status


async def test_head_is_answered_where_get_is() -> None:
    async with serving(api_key="k") as client:
        for path in ("/health", "/metrics", "/v1/models", "/v1/models/fake"):
            got, head = [await client.request(method, path, headers={"x-api-key": "k"}) for method in ("GET", "HEAD")]
            assert (head.status_code, head.headers["content-type"]) == (200, got.headers["content-type"])
        assert (await client.head("/v1/models")).status_code == 401
        assert (await client.head("/v1/models/else", headers={"x-api-key": "k"})).status_code == 404


async def test_browsers_may_call_when_their_origin_is_listed() -> None:
    origin = {"Origin": "https://chat.example"}
    preflight = origin | {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    async with serving(api_key="k", cors_origins=("https://chat.example",)) as client:
        asked = await client.options("/v1/chat/completions", headers=preflight)
        assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == "https://chat.example"
        assert "authorization" in asked.headers["access-control-allow-headers"]
        refused = await client.post("/v1/completions", json=TEXT, headers=origin)
        check_error(refused, 401, None, "invalid_api_key")
        assert refused.headers["access-control-allow-origin"] == "https://chat.example"  # the page may read why
        stream = await client.post(
            "/v1/completions", json=TEXT | {"stream": True}, headers={**origin, "x-api-key": "k"}
        )
        assert stream.headers["access-control-allow-origin"] == "https://chat.example"
        other = await client.get("/health", headers={"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers
    async with serving() as client:
        asked = await client.options("/v1/chat/completions", headers=preflight)
        assert asked.status_code == 405 and "access-control-allow-origin" not in asked.headers


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_usage_so_far_grows_to_the_whole(path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = (CHAT if "chat" in path else TEXT | {"prompt": ["hello", "you"]}) | {"n": 2, "stream": True}
    async with serving(FakeEngine(delay=0.001)) as client:
        response = await client.post(path, json=body | {"stream_options": options})
    *messages, done = messages_of(response.text)
    used = [json.loads(message)["usage"] for message in messages]
    assert done == "[DONE]" and len(used) > 4
    assert {tokens["prompt_tokens"] for tokens in used} == {7 if "chat" in path else 8}
    made = [tokens["completion_tokens"] for tokens in used]
    assert made == sorted(made) and made[0] == 1 and made[-2] == made[-1] == (12 if "chat" in path else 24)
    assert all(tokens["total_tokens"] == tokens["prompt_tokens"] + tokens["completion_tokens"] for tokens in used)
    assert ["buddymoe" in tokens for tokens in used] == [False] * (len(used) - 1) + [True]


async def test_what_an_engine_says_of_a_prompt_is_said_of_the_callers_field() -> None:
    async with serving(FakeEngine(limits=FakeLimits(max_model_len=16))) as client:
        talk = CHAT | {"messages": [{"role": "user", "content": "\x01"}]}
        refused = await client.post("/v1/chat/completions", json=talk)
        assert check_error(refused, 400, "messages").startswith("messages holds byte 1")
        for name in ("max_tokens", "max_completion_tokens"):
            asked = {key: value for key, value in CHAT.items() if key != "max_tokens"} | {name: 99}
            message = check_error(
                await client.post("/v1/chat/completions", json=asked), 400, "messages", "context_length_exceeded"
            )
            assert f"messages and {name} are" in message and f"lower {name} to" in message


async def test_a_long_body_is_read_beside_what_runs() -> None:
    long = {"model": "fake", "messages": [{"role": "user", "content": "x"}] * 4000, "max_tokens": 1}
    seen: dict[str, int] = {}
    parsed = http.open_call

    def watched(endpoint: Endpoint, body: bytes, *rest: Any, **more: Any) -> Call:
        seen["long" if len(body) > 1000 else "short"] = threading.get_ident()
        return parsed(endpoint, body, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http, "open_call", watched)
        async with serving() as client:
            check_error(
                await client.post("/v1/chat/completions", json=long), 400, "messages", "context_length_exceeded"
            )
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
    assert seen["short"] == threading.get_ident() != seen["long"], "others' streams go on meanwhile"


async def test_sixteen_streams_at_once_are_each_their_own() -> None:
    async with serving(FakeEngine(delay=0.001)) as http:
        client = openai_client(http)

        async def text(prompt: str) -> str:
            stream: AsyncIterator[Any] = await client.completions.create(
                model="fake", prompt=prompt, stream=True, max_tokens=20, temperature=0
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        alone = [await text(f"prompt {i}") for i in range(16)]
        together = await asyncio.gather(*[text(f"prompt {i}") for i in range(16)])
    assert alone == together and len(set(alone)) == 16


async def test_alternatives_that_read_alike_stay_apart() -> None:
    """Half characters all read as U+FFFD; the chosen one keeps its own value, another is called by its id."""

    class Halves(FakeEngine):
        def _event(self, request: GenerationRequest, position: int, text: str) -> TokenEvent:
            event = super()._event(request, position, text)
            top = ((0xC4, -0.25), (0xC3, -1.5), (0x61, -2.0), (0xE2, -3.0))
            return replace(event, logprobs=(TokenLogprob(token_id=0xC3, logprob=-1.5, top=top),))

    async with serving(Halves()) as client:
        text = (await client.post("/v1/completions", json=TEXT | {"logprobs": 4, "max_tokens": 1})).json()
        asked = CHAT | {"logprobs": True, "top_logprobs": 4, "max_tokens": 1}
        chat = (await client.post("/v1/chat/completions", json=asked)).json()
    logprobs = text["choices"][0]["logprobs"]
    assert (logprobs["tokens"], logprobs["token_logprobs"]) == (["\ufffd"], [-1.5])
    assert logprobs["top_logprobs"] == [{"\ufffd": -1.5, "token_id:196": -0.25, "a": -2.0, "token_id:226": -3.0}]
    [entry] = chat["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["logprob"], entry["bytes"]) == ("\ufffd", -1.5, [0xC3])
    assert [(top["bytes"], top["logprob"]) for top in entry["top_logprobs"]] == [
        ([0xC4], -0.25),
        ([0xC3], -1.5),
        ([0x61], -2.0),
        ([0xE2], -3.0),
    ]
