"""The HTTP app when things go wrong behind it: errors, silence, a full service, a client that leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import openai
import pytest
from asgi import TEXT, check_error, messages_of, openai_client, serving, talking_to
from fakes import FakeEngine, LocalWorkers
from ray.exceptions import TaskCancelledError

from buddymoe_ray.serve.http import HttpSettings, http_app
from buddymoe_ray.serve.ingress import Departures
from buddymoe_ray.serve.refusals import overloaded
from buddymoe_ray.serve.work import Batch, Delta, Refusal, Reply, Work
from buddymoe_ray.serve.worker import Worker
from buddymoe_ray.types import Usage


async def test_an_error_in_the_middle_of_a_stream_ends_it_with_an_error_message() -> None:
    async with serving() as client:
        response = await client.post("/v1/completions", json=TEXT | {"prompt": "\x02", "stream": True})
        whole = await client.post("/v1/completions", json=TEXT | {"prompt": "\x02"})
        with pytest.raises(openai.APIError, match="could not be read"):
            async for _ in await openai_client(client).completions.create(model="fake", prompt="\x02", stream=True):
                pass
    assert response.status_code == 200
    *chunks, last = messages_of(response.text)
    assert 1 <= len(chunks) <= 3, "what came before it"
    assert json.loads(last)["error"]["code"] == "internal_error"
    assert "could not be read" in check_error(whole, 500, None, "internal_error")


class ScriptedWorkers:
    """Says the replies it is given, then what `then` is: an error, or silence."""

    def __init__(self, *replies: Reply, then: BaseException | None = None, hang: bool = False) -> None:
        self.replies, self.then, self.hang = replies, then, hang
        self.closed = 0

    async def generate(self, work: Work) -> AsyncGenerator[Reply, None]:
        try:
            for reply in self.replies:
                yield reply
            if self.hang:
                await asyncio.Event().wait()
            if self.then is not None:
                raise self.then
        finally:
            self.closed += 1

    async def info(self) -> Any:
        raise RuntimeError("no worker answers")

    async def health(self) -> tuple[str | None, ...]:
        return ("no worker runs",)


SOME = Batch(deltas=(Delta(choice=0, token_ids=(1,), text="x"),))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_queue_is_503_with_retry_after(stream: bool) -> None:
    workers = ScriptedWorkers(overloaded(calls=9, retry_after_seconds=3))
    async with talking_to(workers) as client:
        response = await client.post("/v1/completions", json=TEXT | {"stream": stream})
    assert "9 requests run or wait" in check_error(response, 503, None, "overloaded")
    assert response.headers["retry-after"] == "3"
    assert workers.closed == 1


async def test_a_request_that_takes_too_long_ends() -> None:
    workers = ScriptedWorkers(SOME, hang=True)
    async with talking_to(workers, request_timeout_seconds=0.05) as client:
        whole = await client.post("/v1/completions", json=TEXT)
        stream = await client.post("/v1/completions", json=TEXT | {"stream": True})
    assert "0.05 s" in check_error(whole, 504, None, "timeout")
    assert stream.status_code == 200
    assert json.loads(messages_of(stream.text)[-1])["error"]["code"] == "timeout"
    assert workers.closed == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_what_nobody_foresaw_is_500_in_the_envelope(stream: bool) -> None:
    async with talking_to(ScriptedWorkers(then=ZeroDivisionError("secret"))) as client:
        response = await client.post("/v1/completions", json=TEXT | {"stream": stream})
        models = await client.get("/v1/models")
    for reply in (response, models):
        assert "secret" not in check_error(reply, 500, None, "internal_error")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stream_that_ends_too_early_is_no_success(stream: bool) -> None:
    workers = ScriptedWorkers(SOME)
    async with talking_to(workers) as client:
        response = await client.post("/v1/completions", json=TEXT | {"stream": stream})
    if stream:
        assert json.loads(messages_of(response.text)[-1])["error"]["code"] == "internal_error"
    else:
        check_error(response, 500, None, "internal_error")
    assert workers.closed == 1


async def test_a_stream_refused_later_ends_with_the_refusal() -> None:
    workers = ScriptedWorkers(SOME, Refusal(status=503, message="gone", kind="server_error", code="unavailable"))
    async with talking_to(workers) as client:
        response = await client.post("/v1/completions", json=TEXT | {"stream": True})
    assert json.loads(messages_of(response.text)[-1])["error"]["message"] == "gone"


async def test_what_came_in_one_batch_with_an_error_is_told_before_it() -> None:
    failed = Delta(choice=0, token_ids=(2,), text="b", finish_reason="error", error="lost")
    workers = ScriptedWorkers(SOME, Batch(deltas=(failed, Delta(choice=1, token_ids=(3,), text="c"))))
    async with talking_to(workers) as client:
        response = await client.post("/v1/completions", json=TEXT | {"stream": True, "n": 2})
    *chunks, last = [json.loads(message) for message in messages_of(response.text)]
    told = [(choice["index"], choice["text"], choice["finish_reason"]) for [choice] in (c["choices"] for c in chunks)]
    assert told[-2:] == [(0, "b", None), (1, "c", None)] and "lost" in last["error"]["message"]


async def test_one_choice_that_fails_ends_the_work_on_the_others() -> None:
    workers = ScriptedWorkers(SOME, Batch(deltas=(Delta(choice=1, finish_reason="error"),)), hang=True)
    async with asyncio.timeout(20), talking_to(workers) as client:
        response = await client.post("/v1/completions", json=TEXT | {"stream": True, "n": 2})
    assert json.loads(messages_of(response.text)[-1])["error"]["code"] == "internal_error"
    assert workers.closed == 1


async def test_leaving_a_stream_cancels_its_work() -> None:
    engine = FakeEngine(delay=0.001)
    workers = LocalWorkers(Worker(engine))
    app = http_app(workers, HttpSettings(model="fake", flush_seconds=0.0))
    body = json.dumps(TEXT | {"stream": True, "max_tokens": 100}).encode()
    sent: list[bytes] = []
    left = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if not sent and not receive_calls:
            receive_calls.append(1)
            return {"type": "http.request", "body": body, "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    receive_calls: list[int] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))
        if b"data:" in sent[-1]:
            left.set()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    await asyncio.wait_for(app(scope, receive, send), timeout=20)
    for _ in range(100):
        if not engine.running:
            break
        await asyncio.sleep(0.001)
    assert (engine.running, engine.cancelled) == (set(), 1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("body_came", [False, True])
async def test_a_client_that_leaves_under_serve_is_no_failure(
    stream: bool, body_came: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Serve raises TaskCancelledError where `receive` should say that the client left."""
    engine = FakeEngine(delay=0.005)
    app = http_app(LocalWorkers(Worker(engine)), HttpSettings(model="fake", flush_seconds=0.0))
    app.add_middleware(Departures)
    sent: list[Any] = []
    body = json.dumps(TEXT | {"stream": stream, "max_tokens": 100}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}] if body_came else []

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await asyncio.sleep(0.05)
        raise TaskCancelledError

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
    call = asyncio.create_task(app(scope, receive, send))
    await call
    assert not engine.running and caplog.text == "" and engine.cancelled == body_came


@pytest.mark.parametrize("stream", [False, True])
async def test_the_last_event_ends_the_body_whatever_the_workers_stream_still_does(stream: bool) -> None:
    """A worker's stream ends a message later than its answer: nobody waits for it, and nobody cuts it off."""
    last = Delta(choice=0, token_ids=(2,), text="y", finish_reason="length", usage=Usage(completion_tokens=2))
    workers = ScriptedWorkers(SOME, Batch(deltas=(last,)))
    ending, cut = asyncio.Event(), False

    async def generate(work: Work) -> AsyncGenerator[Reply, None]:
        nonlocal cut
        cut = True
        for reply in workers.replies:
            yield reply
        await ending.wait()
        cut = False

    workers.generate = generate  # type: ignore[method-assign]
    app = http_app(workers, HttpSettings(model="fake"))
    messages: list[Any] = [{"type": "http.request", "body": json.dumps(TEXT | {"stream": stream}).encode()}]
    sent: list[Any] = []

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await ending.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            assert cut and not app.state.tenants.running, "the client may come again at once"
            ending.set()

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
    async with asyncio.timeout(10):
        await app(scope, receive, send)
    assert not cut and len(sent) == 2 + stream
    assert not stream or [data[:1] for data in messages_of((sent[1]["body"] + sent[2]["body"]).decode())] == [*"{{["]
