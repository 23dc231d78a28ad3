"""The deployed application over an engine without a model: overload, death, drain, cancellation, keys, Python client.

What needs the engine to be slow, dead or broken at the right moment; test_openai_* have the real engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fakes import open_broken_engine, open_fake_engine
from ray import serve
from serving import TEST_KEY, TEST_KEY_VARIABLE, Deploy, eventually, running

from buddymoe_ray.client import Client
from buddymoe_ray.errors import BuddyMoEError, CapacityError, ConfigError, RequestError
from buddymoe_ray.serve.app import application
from buddymoe_ray.serve.args import ServeArgs
from buddymoe_ray.serve.handles import ReplicaWorkers
from buddymoe_ray.serve.listening import Address, bind, keeping
from buddymoe_ray.serve.resume import ResumeLimits, resumable
from buddymoe_ray.serve.work import Refusal, Reply, Work
from buddymoe_ray.types import SamplingParams

TEXT = {"model": "fake", "prompt": "hello", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def url(deploy: Deploy) -> str:
    return deploy("fake", open_engine=open_fake_engine, model_name="fake", num_cpus=0, max_running=4)


@pytest.fixture(scope="module")
def client(url: str) -> Client:
    return Client("fake")


def test_both_endpoints_answer(url: str) -> None:
    completion = httpx.post(f"{url}/v1/completions", json=TEXT).json()
    assert len(completion["choices"][0]["text"]) == 8
    chat = {"model": "fake", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
    assert len(httpx.post(f"{url}/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"]) == 8


def test_a_stream_whose_prompt_no_grpc_message_holds_is_answered_all_the_same(url: str) -> None:
    refused = httpx.post(f"{url}/v1/completions", json=TEXT | {"prompt": "x" * 5_000_000, "stream": True}, timeout=60)
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slots(url: str, client: Client, stream: bool) -> None:
    body = TEXT | {"max_tokens": 4000, "stream": stream, "n": 3}
    # without a stream nothing comes for 80 s: the client gives up after a while
    timeout = httpx.Timeout(60, read=60 if stream else 0.5)
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=timeout) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        assert running(client) == 3
    eventually(lambda: running(client) == 0, seconds=20)  # the requests alone would run for 80 s


def test_leaving_a_python_stream_frees_its_slot(client: Client) -> None:
    stream = client.stream("hello", max_tokens=4000)
    assert len(next(stream).text) >= 1
    assert running(client) == 1
    stream.close()
    eventually(lambda: running(client) == 0, seconds=20)


async def test_cancelling_an_async_call_frees_its_slot(client: Client) -> None:
    task = asyncio.create_task(client.agenerate("hello", max_tokens=4000))
    await asyncio.to_thread(eventually, lambda: running(client) == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(eventually, lambda: running(client) == 0)


async def test_the_python_client_gives_the_same_tokens_as_http(url: str, client: Client) -> None:
    reply = httpx.post(f"{url}/v1/completions", json=TEXT | {"seed": 5, "temperature": 1}).json()["choices"][0]
    asked: dict[str, Any] = {"max_tokens": 8, "seed": 5}
    # sync calls are made in a thread: ray refuses to block an event loop
    result = await asyncio.to_thread(client.generate, "hello", **asked)
    events = await asyncio.to_thread(lambda: list(client.stream("hello", **asked)))
    aresult = await client.agenerate(list(b"hello"), **asked)
    aevents = [event async for event in client.astream("hello", **asked)]
    assert result.text == aresult.text == reply["text"]
    assert "".join(e.text for e in events) == "".join(e.text for e in aevents) == reply["text"]
    assert result.token_ids == tuple(id_ for event in aevents for id_ in event.token_ids)
    assert result.prompt_token_ids == tuple(b"hello")
    assert result.usage == aresult.usage == events[-1].usage and result.usage.completion_tokens == 8
    assert result.finish_reason == reply["finish_reason"] == "length"


async def test_the_python_client_chats(url: str, client: Client) -> None:
    messages = [{"role": "user", "content": "hello"}]
    body = {"model": "fake", "messages": messages, "max_tokens": 8, "temperature": 0}
    expected = httpx.post(f"{url}/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    result = await client.achat(messages, max_tokens=8, temperature=0.0, logprobs=1)
    assert result.text == expected
    assert [entry.token_id for entry in result.logprobs] == list(expected.encode())
    streamed = [event.text async for event in client.astream(messages, max_tokens=8, temperature=0.0)]
    assert "".join(streamed) == expected


def test_the_python_client_raises_what_http_answers(client: Client) -> None:
    with pytest.raises(RequestError, match="must be at most") as caught:
        client.generate("x" * 5000)
    assert caught.value.param == "prompt"
    with pytest.raises(RequestError, match="byte 1"):
        client.generate("\x01")
    with pytest.raises(BuddyMoEError, match="could not be read"):
        client.generate("\x02")
    with pytest.raises(ConfigError, match=r"'tempreature'.*temperature"):
        client.generate("x", tempreature=1)
    with pytest.raises(RequestError, match="messages"):
        client.chat([{"role": "user"}])
    with pytest.raises(RequestError, match="token id 'a', must be in"):  # one call takes one prompt
        client.generate(["a", "b"])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match=r"'nothing'.*hint: serve run"):
        Client("nothing")


def test_info(client: Client, url: str) -> None:
    assert client.info().max_model_len == 4096
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["max_model_len"] == 4096


@pytest.fixture(scope="module")
def small(deploy: Deploy) -> str:
    """A service with room for two answers, and a key."""
    return deploy(
        "small",
        open_engine=open_fake_engine,
        model_name="fake",
        num_cpus=0,
        max_running=1,
        max_queued_requests=1,
        retry_after_seconds=9,
        api_key_env=TEST_KEY_VARIABLE,
        require_api_key=True,
    )


def test_a_full_service_is_503_and_goes_on(small: str) -> None:
    client, key = Client("small"), {"Authorization": f"Bearer {TEST_KEY}"}
    running_stream, waiting_stream = (client.stream("hello", max_tokens=4000) for _ in range(2))
    next(running_stream)
    next(waiting_stream)
    for body in (TEXT, TEXT | {"stream": True}):
        refused = httpx.post(f"{small}/v1/completions", json=body, headers=key)
        error = refused.json()["error"]
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "9")
        assert (error["type"], error["code"]) == ("overloaded_error", "overloaded")
    with pytest.raises(CapacityError, match="full"):
        client.generate("x")
    assert httpx.get(f"{small}/health").status_code == 200
    waiting_stream.close()
    eventually(lambda: httpx.post(f"{small}/v1/completions", json=TEXT, headers=key).status_code == 200)
    assert len(next(running_stream).text) >= 1
    running_stream.close()


def test_the_key_comes_from_the_environment_of_the_ingress(small: str) -> None:
    assert httpx.post(f"{small}/v1/completions", json=TEXT).status_code == 401
    for key, ok in ((TEST_KEY, True), ("wrong", False)):
        client = openai.OpenAI(api_key=key, base_url=f"{small}/v1", max_retries=0)
        if ok:
            assert [model.id for model in client.models.list()] == ["fake"]
        else:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()


def test_a_model_that_cannot_be_served_fails_the_deployment_with_its_reason(deploy: Deploy) -> None:
    with pytest.raises(RuntimeError, match="broken"):
        deploy("broken", open_engine=open_broken_engine, num_cpus=0)
    worker = serve.status().applications["broken"].deployments["worker"]
    assert worker.status == "DEPLOY_FAILED"
    assert "builtin:tiny is truncated, must be whole. hint: download it again" in worker.message


def stopped_while_it_answers(url: str, name: str) -> None:
    body = TEXT | {"max_tokens": 150, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        lines: Iterator[str] = (line.removeprefix("data: ") for line in response.iter_lines() if line)
        first = next(lines)
        deleting = threading.Thread(target=serve.delete, args=(name,))
        deleting.start()
        *rest, done = list(lines)
    deleting.join()
    text = "".join(json.loads(line)["choices"][0]["text"] for line in [first, *rest])
    assert (len(text), done) == (150, "[DONE]")


def test_a_stopping_service_lets_running_requests_end(url: str) -> None:
    stopped_while_it_answers(url, "fake")


@pytest.fixture(scope="module")
def own(http_port: int) -> Iterator[str]:
    """A service whose ingress listens itself, at a socket that is kept here."""
    with keeping(Address(host="127.0.0.1", port=0, prefix="/own")) as address:
        with bind(address) as bound:
            port = bound.getsockname()[1]
        app = application(ServeArgs(model_name="fake", num_cpus=0), open_engine=open_fake_engine, address=address)
        serve.run(app, name="own", route_prefix="/own")
        yield f"http://127.0.0.1:{port}/own"


def replica_of_own(deployment: str) -> int:
    """The process of its only replica."""
    title = f"ray::ServeReplica:own:{deployment}".encode()
    [found] = [path.parent for path in Path("/proc").glob("[0-9]*/cmdline") if path.read_bytes().startswith(title)]
    return int(found.name)


async def test_an_ingress_that_listens_itself_asks_its_worker_on_a_channel_and_does_not_need_it(own: str) -> None:
    workers = ReplicaWorkers(serve.get_deployment_handle("worker", "own"), lone=True)
    sampling = SamplingParams(temperature=0.0)
    work = Work(request_id="same", prompts=("hello",), sampling=sampling, max_tokens=8)

    async def told(work: Work) -> list[Reply]:
        return [reply async for reply in resumable(work, workers.generate, ResumeLimits()) if reply.deltas]  # type: ignore[union-attr]

    through_serve = await told(work)
    while (channel := workers.channel()) is None:
        await asyncio.sleep(0.01)
    assert await told(work) == through_serve
    with pytest.raises(TypeError):
        channel.generate(replace(work, prompts=((1 << 64,),)))
    [refused] = [reply async for reply in workers.generate(replace(work, prompts=((1 << 64,),)))]
    assert isinstance(refused, Refusal) and refused.status == 400
    moving = asyncio.create_task(told(replace(work, max_tokens=150, flush_seconds=0.0)))
    await asyncio.sleep(0.3)
    os.kill(replica_of_own("worker"), signal.SIGKILL)
    deltas = [delta for reply in await moving for delta in reply.deltas]  # type: ignore[union-attr]
    assert sum(len(delta.token_ids) for delta in deltas) == 150 and deltas[-1].finish_reason == "length"
    assert not channel.is_open
    while workers.channel() is None:
        await asyncio.sleep(0.01)
    assert await told(work) == through_serve


def test_who_comes_while_it_is_dead_is_answered_and_a_stopping_one_lets_requests_end(own: str) -> None:
    assert httpx.get(f"{own}/health").json()["status"] == "ok"
    os.kill(replica_of_own("ingress"), signal.SIGKILL)
    answer = httpx.post(f"{own}/v1/completions", json=TEXT, timeout=60).json()
    assert len(answer["choices"][0]["text"]) == 8
    stopped_while_it_answers(own, "own")
