"""The HTTP app in process: an httpx client over the ASGI transport, and readers of its replies. No ray, no sockets."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import httpx
import jsonschema
import openai
from fakes import FakeEngine, LocalWorkers

from buddymoe_ray.serve.http import HttpSettings, http_app
from buddymoe_ray.serve.openapi import openapi_document
from buddymoe_ray.serve.worker import Worker

__all__ = [
    "CHAT",
    "TEXT",
    "check_error",
    "conforms",
    "messages_of",
    "named_events_of",
    "openai_client",
    "schema_of",
    "serving",
    "talking_to",
]

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 6}
TEXT = {"model": "fake", "prompt": "hello", "max_tokens": 6}


@asynccontextmanager
async def serving(*engines: FakeEngine, **settings: Any) -> AsyncGenerator[httpx.AsyncClient, None]:
    """An HTTP client of an app over one worker per engine."""
    workers = LocalWorkers(*[Worker(engine, name=str(at)) for at, engine in enumerate(engines or (FakeEngine(),))])
    async with talking_to(workers, **settings) as client:
        yield client


@asynccontextmanager
async def talking_to(workers: Any, **settings: Any) -> AsyncGenerator[httpx.AsyncClient, None]:
    app = http_app(workers, HttpSettings(**{"model": "fake", "flush_seconds": 0.0} | settings))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def openai_client(client: httpx.AsyncClient, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key=key, base_url="http://test/v1", http_client=client, max_retries=0)


def messages_of(body: str) -> list[str]:
    """The data of every server-sent event."""
    events = body.split("\n\n")
    assert events.pop() == "" and all(event.startswith("data: ") for event in events), body
    return [event.removeprefix("data: ") for event in events]


def named_events_of(body: str) -> list[dict[str, Any]]:
    """The data of every server-sent event, which is named as its type says."""
    told = []
    for event in body.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        told.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {told[-1]['type']}"
    return told


def check_error(response: httpx.Response, status: int, param: str | None = None, code: str | None = None) -> str:
    """The reply is OpenAI's envelope; returns its message."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code), error
    message = error["message"]
    assert isinstance(message, str)
    return message


@cache
def _document() -> dict[str, Any]:
    return openapi_document()


def schema_of(body: type[Any] | None) -> dict[str, Any]:
    """What the schema says of a body."""
    assert body is not None
    described: dict[str, Any] = _document()["components"]["schemas"][body.__name__]
    return described


def conforms(told: Any, path: str, method: str = "post", *, status: int = 200, event: bool = False) -> None:
    """A reply, or an event of one, is as /openapi.json says."""
    content = _document()["paths"][path][method]["responses"][str(status)]["content"]
    wanted = content["text/event-stream" if event else "application/json"]["schema"]
    wanted = wanted["properties"]["data"]["anyOf"][0]["contentSchema"] if event else wanted
    whole = {**wanted, "components": _document()["components"]}
    wrong = next(jsonschema.Draft202012Validator(whole).iter_errors(told), None)
    assert wrong is None, f"{method} {path}: {wrong.message} at {list(wrong.absolute_path)} of {told}"
