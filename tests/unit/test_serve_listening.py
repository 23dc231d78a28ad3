"""The ingress's own HTTP server, over sockets: what Serve's proxy does for an app, without it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import httpx
import pytest
from asgi import TEXT, messages_of
from fakes import FakeEngine, LocalWorkers

from buddymoe_ray.errors import ConfigError
from buddymoe_ray.serve import launch
from buddymoe_ray.serve import listening as listening_module
from buddymoe_ray.serve.args import ServeArgs
from buddymoe_ray.serve.http import HttpSettings, http_app
from buddymoe_ray.serve.listening import Address, bind, keeping, listening
from buddymoe_ray.serve.worker import Worker

LONG = TEXT | {"max_tokens": 100}


@asynccontextmanager
async def answering(engine: FakeEngine, prefix: str = "/") -> AsyncGenerator[httpx.AsyncClient, None]:
    app = http_app(LocalWorkers(Worker(engine)), HttpSettings(model="fake", flush_seconds=0.0))
    bound = bind(Address(host="127.0.0.1", port=0))
    url = f"http://127.0.0.1:{bound.getsockname()[1]}{prefix.rstrip('/')}"
    async with httpx.AsyncClient(base_url=url, trust_env=False) as client, listening(bound, app, prefix=prefix):
        yield client


@asynccontextmanager
async def asked(
    engine: FakeEngine, client: httpx.AsyncClient, *, stream: bool
) -> AsyncGenerator[asyncio.Task[httpx.Response], None]:
    """A request that runs, and a limit to how long that may take."""
    async with asyncio.timeout(20):
        asking = asyncio.create_task(client.post("/v1/completions", json=LONG | {"stream": stream}))
        while not engine.running:
            await asyncio.sleep(0.001)
        yield asking


@pytest.mark.parametrize("prefix", ["/", "/tiny"])
async def test_requests_are_answered_under_the_prefix_with_their_ids(prefix: str) -> None:
    async with answering(FakeEngine(), prefix) as client:
        whole = await client.post("/v1/completions", json=TEXT, headers={"X-Request-ID": "mine"})
        stream = await client.post("/v1/completions", json=TEXT | {"stream": True})
        other = await client.get(client.base_url.join("/elsewhere"))
    assert whole.status_code == 200 and whole.headers["x-request-id"] == "mine"
    assert messages_of(stream.text)[-1] == "[DONE]" and len(stream.headers["x-request-id"]) > 20
    assert other.status_code == 404


@pytest.mark.parametrize(("stream", "delay"), [(False, 0.05), (True, 0.05), (True, 60.0)])
async def test_who_leaves_is_not_answered_to_the_end(stream: bool, delay: float) -> None:
    engine = FakeEngine(delay=delay)
    async with answering(engine) as client, asked(engine, client, stream=stream) as asking:
        asking.cancel()
        while engine.running:
            await asyncio.sleep(0.01)
    assert engine.cancelled == 1


async def test_a_stream_that_fails_is_ended_once(caplog: pytest.LogCaptureFixture) -> None:
    """The server says of an answer whose last byte is sent that its client left: nothing is to be cut off by that."""
    async with answering(FakeEngine(delay=0.002)) as client:
        for _ in range(3):
            stream = await client.post("/v1/completions", json=LONG | {"prompt": "\x02", "stream": True, "n": 4})
            assert "error" in messages_of(stream.text)[-1]
    assert not [record for record in caplog.records if "generator" in record.getMessage() + str(record.exc_info)]


async def test_requests_are_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(logging.getLogger("uvicorn.access"), "propagate", False)  # as Serve leaves it
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    caplog.set_level(logging.INFO, "ray.serve")
    async with answering(FakeEngine()) as client:
        await client.post("/v1/completions", json=TEXT)
    assert '"POST /v1/completions HTTP/1.1" 200' in caplog.text


async def test_what_runs_at_the_end_comes_to_its_own() -> None:
    engine = FakeEngine(delay=0.005)
    async with answering(engine) as client, asked(engine, client, stream=True) as asking:
        pass
    assert messages_of((await asking).text)[-1] == "[DONE]" and not engine.cancelled


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"", b""),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nA: ", b"HTTP/1.1 408 "),
        (b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\nGET /ping HTTP/1.1\r\nA: ", b"HTTP/1.1 200 "),
        (b"GET /ping HTTP/1.1\r\nA: ".ljust(1 << 16, b"a"), b"HTTP/1.1 431 "),
    ],
    ids=["nothing", "a head", "a second head", "a long head"],
)
async def test_a_head_that_does_not_come_whole_is_not_waited_for(
    sent: bytes, answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening_module, "HEAD_SECONDS", 20.0 if b"431" in answer else 0.3)
    async with answering(FakeEngine()) as client, asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
        writer.write(sent)

        async def trickle() -> None:
            while sent:  # a byte now and then gives no more time
                await asyncio.sleep(0.05)
                writer.write(b"a")

        trickling = asyncio.create_task(trickle())
        got = await reader.read()
        trickling.cancel()
        writer.close()
    assert got.startswith(answer) and (b" 408 " in got) == (b"A: " in sent and b"431" not in answer)


async def test_bodies_and_answers_may_take_longer_than_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening_module, "HEAD_SECONDS", 0.1)
    body = json.dumps(LONG | {"stream": True}).encode()

    async def slowly() -> AsyncGenerator[bytes, None]:
        for at in range(0, len(body), 8):
            await asyncio.sleep(0.02)
            yield body[at : at + 8]

    async with answering(FakeEngine(delay=0.005)) as client:
        for _ in range(2):
            asked = await client.post("/v1/completions", content=slowly())
            assert messages_of(asked.text)[-1] == "[DONE]"


def test_a_port_that_is_taken_is_said() -> None:
    with bind(Address(host="127.0.0.1", port=0)) as bound, pytest.raises(ConfigError, match=r"in use.*hint: another"):
        bind(Address(host="127.0.0.1", port=bound.getsockname()[1]))


@pytest.mark.parametrize("joined", [None, "192.0.2.1:6379"])
def test_memory_that_others_use_up_ends_no_service_on_a_ray_of_its_own(
    joined: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, object] = {}

    def init(**options: object) -> None:
        given.update(options)
        raise ConnectionError

    monkeypatch.setattr(launch.ray, "init", init)
    monkeypatch.setattr(launch.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(launch, "ray_address_from_environment", lambda: joined)
    with pytest.raises(ConnectionError):
        launch.start(ServeArgs(), name="x", route_prefix="/", http={"host": "127.0.0.1", "port": 0})
    # ray refuses it where a cluster is joined, whose monitor is its owner's
    assert given["_system_config"] == (None if joined else {"memory_monitor_refresh_ms": 0})


async def test_who_comes_when_an_ingress_has_died_waits_for_the_next_one() -> None:
    app = http_app(LocalWorkers(Worker(FakeEngine())), HttpSettings(model="fake"))
    with keeping(Address(host="127.0.0.1", port=0)) as address:
        async with listening(first := bind(address), app, prefix="/"):
            port = first.getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n")
        async with listening(bind(address), app, prefix="/"):
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            writer.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)
