"""/dashboard: a page that loads nothing and trusts nothing, what it is told, to whom, and for how long."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import math
import re
from collections.abc import AsyncIterator, MutableMapping
from pathlib import Path
from typing import Any, get_args

import httpx
import numpy as np
import pytest
from asgi import CHAT, TEXT, check_error, messages_of, serving
from fakes import FakeEngine, LocalWorkers

from buddymoe_ray import LLM
from buddymoe_ray.observe import CalibrationSnapshot, ExpertMap
from buddymoe_ray.serve import dashboard
from buddymoe_ray.serve.dashboard import EVENTS, READ, Dashboard
from buddymoe_ray.serve.http import HttpSettings, http_app
from buddymoe_ray.serve.worker import Worker
from buddymoe_ray.types import ExpertKey, Mode, StandinAccesses

PAGE = Path(dashboard.__file__).with_suffix(".html").read_text()


async def test_the_page_needs_no_key_and_its_data_does() -> None:
    async with serving(api_key="secret") as client:
        page = await client.get("/dashboard")
        for path in ("/dashboard/data", "/dashboard/events"):
            for method in READ:
                refused = await client.request(method, path)
                assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
            check_error(await client.get(f"{path}?key=secret"), 401, code="invalid_api_key")
        data = await client.get("/dashboard/data", headers={"Authorization": "Bearer secret"})
        heads = [
            await client.head(path, headers={"x-api-key": "secret"}) for path in ("/dashboard", "/dashboard/events")
        ]
    assert page.status_code == 200 and page.text == PAGE and "secret" not in page.text
    assert data.json()["model"] == "fake" and data.headers["cache-control"] == "no-store"
    assert [(head.status_code, head.content) for head in heads] == [(200, b"")] * 2


async def test_the_policy_lets_nothing_in_but_what_is_in_the_page() -> None:
    async with serving() as client:
        policy = (await client.get("/dashboard")).headers["content-security-policy"]
    for tag in ("script", "style"):
        [content] = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", PAGE, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy.split("; ")
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    assert not re.findall(r"\bsrc=|\bhref=|https?:|@import|url\(|\bstyle=|\bon\w+=", PAGE)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\(|localStorage", PAGE)


def test_what_the_script_names_is_there() -> None:
    markup, script = PAGE.split("<script>")
    ids = re.findall(r'\bid="([\w-]+)"', markup)
    assert len(ids) == len(set(ids))
    [swatches] = re.findall(r"\[(.*)\]\.forEach\(\(id,", script)
    named = {*re.findall(r'\$\("([\w-]+)"\)', script), *re.findall(r'"([\w-]+)"', swatches)}
    assert len(named) > 20 and named == set(ids) - {"map-title", "answers-title", "links-title", "chat-title"}
    assert {*re.findall(r'(?:for|aria-labelledby|aria-describedby)="([\w-]+)"', markup)} <= set(ids)
    assert set(re.findall(r"<option>(\w+)", markup)) == set(get_args(Mode))
    [kinds] = re.findall(r"const KINDS = \{(.*?)\}", script, re.DOTALL)
    colors = set(re.findall(r"--(\w+):", markup))
    assert set(re.findall(r"(\w+):", kinds)) == {"hits", "peer", "host", "fetched", *vars(StandinAccesses())} <= colors


async def test_data_is_what_the_workers_count() -> None:
    class Linked(FakeEngine):
        def link_seconds(self) -> dict[str, float]:
            return {"other": 0.002}

    engines = (Linked(), Linked())
    async with serving(*engines, mode="bounded", budget=0.01) as client:
        await client.post("/v1/completions", json=TEXT)
        data = (await client.get("/dashboard/data")).json()
    assert (data["mode"], data["budget"], len(data["workers"])) == ("bounded", 0.01, 2)
    assert sorted(worker["snapshot"]["steps"] for worker in data["workers"]) == [0, 6]
    for worker in data["workers"]:
        assert {"hits", "standins", "guard", "calibration", "requests", "expected_rise"} <= set(worker["snapshot"])
        assert worker["experts"]["experts_per_layer"] == [3] and worker["links"] == {"other": 0.002}
        assert base64.urlsafe_b64decode(worker["experts"]["cells"]) == engines[0].expert_map().cells


async def test_tokens_say_what_stand_ins_had_a_part_in_them() -> None:
    async with serving(mode="bounded") as client:
        for mode, expected in (("exact", 0), ("bounded", 2)):
            asked = CHAT | {"logprobs": True, "buddymoe": {"mode": mode}}
            whole = (await client.post("/v1/chat/completions", json=asked)).json()
            told = messages_of((await client.post("/v1/chat/completions", json=asked | {"stream": True})).text)[:-1]
            streamed = [entry for message in told for entry in json.loads(message)["choices"][0]["logprobs"]["content"]]
            for tokens in (whole["choices"][0]["logprobs"]["content"], streamed):
                assert [token["standins"] for token in tokens] == [expected] * CHAT["max_tokens"]
    assert {"bytes", "standins"} <= set(re.findall(r"token\.(\w+)", PAGE)), "the page marks them"


def test_many_experts_are_few_bytes_and_infinity_is_null() -> None:
    [report] = asyncio.run(LocalWorkers(Worker(FakeEngine())).reports())
    assert report.experts is None  # only who asks for them pays
    big = ExpertMap(experts_per_layer=(128,) * 48, cells=bytes([255]) * (128 * 48))
    vars(report)["experts"] = big
    vars(report.snapshot)["calibration"] = CalibrationSnapshot(factor=math.inf)
    whole = Dashboard(seconds=0.0, model="m", mode="fast", budget=0.0, workers=(report,)).to_json()
    assert json.loads(whole)["workers"][0]["snapshot"]["calibration"]["factor"] is None
    assert len(whole) < 12_000 and b"Infinity" not in whole


async def test_who_watches_does_not_keep_a_service_from_its_end() -> None:
    app = http_app(LocalWorkers(Worker(FakeEngine())), HttpSettings(model="fake", dashboard_seconds=0.2))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        watching = asyncio.create_task(client.get("/dashboard/events"))
        await asyncio.sleep(0.1)
        assert await app.state.tenants.close(30) == 0
        async with asyncio.timeout(2):
            assert 1 <= len(messages_of((await watching).text)) < EVENTS


async def test_events_come_one_by_one_and_end() -> None:
    async with serving(dashboard_seconds=0.002) as client:
        reply = await client.get("/dashboard/events")
    assert reply.headers["content-type"].startswith("text/event-stream")
    times = [json.loads(message)["seconds"] for message in messages_of(reply.text)]
    assert len(times) == EVENTS and times == sorted(times) and len(set(times)) > 2


@pytest.mark.parametrize("watchers", [1, 5])
async def test_workers_are_asked_once_however_many_watch_and_not_after_they_left(watchers: int) -> None:
    class Counting(LocalWorkers):
        asked = 0

        async def reports(self, *, experts: bool = False) -> Any:
            self.asked += 1
            return await super().reports(experts=experts)

    workers = Counting(Worker(FakeEngine()))
    app = http_app(workers, HttpSettings(model="fake", dashboard_seconds=60.0))
    await asyncio.gather(*(asyncio.wait_for(_watch_one_event(app), 5) for _ in range(watchers)))
    assert workers.asked == 1


async def _watch_one_event(app: Any) -> None:
    """Leaves after the first event; returns when the app has let go, which is asleep for a minute by then."""
    seen = asyncio.Event()

    async def messages() -> AsyncIterator[dict[str, Any]]:
        yield {"type": "http.request", "body": b"", "more_body": False}
        await seen.wait()
        yield {"type": "http.disconnect"}

    incoming = messages()

    async def receive() -> dict[str, Any]:
        return await anext(incoming)

    async def send(message: MutableMapping[str, Any]) -> None:
        if message.get("body", b"").startswith(b"data: "):
            seen.set()

    scope = {"type": "http", "method": "GET", "path": "/dashboard/events", "query_string": b"", "headers": []}
    await app(scope | {"http_version": "1.1", "asgi": {"version": "3.0", "spec_version": "2.3"}}, receive, send)
    assert seen.is_set()


@pytest.mark.parametrize("mode", ["exact", "bounded"])
def test_an_engine_tells_where_its_experts_are(mode: Mode) -> None:
    host_memory = "50%" if mode == "exact" else "0"
    with LLM("builtin:tiny", memory="50%", host_memory=host_memory, mode=mode, threads=1) as llm:
        before = llm.engine.expert_map()
        llm.generate("What is 3 + 4?", max_tokens=8)
        now, cache = llm.engine.expert_map(), llm.engine.cache
        assert now.experts_per_layer == tuple(cache.layout.experts_per_layer)
        cells_LE = np.frombuffer(now.cells, np.uint8).reshape(len(now.experts_per_layer), -1)
        for layer, cells_E in enumerate(cells_LE):
            assert set(np.flatnonzero(cells_E & 1)) == cache.resident(layer)
            in_host = [cache.host is not None and cache.host.holds(ExpertKey(layer, e)) for e in range(len(cells_E))]
            assert list(cells_E & 4 != 0) == in_host
    assert not any(cell >> 3 for cell in before.cells)
    if mode == "exact":
        assert not (cells_LE & 2).any() and (cells_LE & 4).any() and (cells_LE >> 3).any(axis=1).all()
    else:  # pinned: nothing is evicted, so nothing is counted
        assert (cells_LE & 3).all() and not (cells_LE >> 3).any()


def test_shares_are_those_of_the_latest_steps() -> None:
    from buddymoe_ray.cache.usage import Usage

    usage = Usage(np.full((1, 4), -np.inf), np.zeros(1, np.int64))
    asked = [np.array([0, step % 2 + 1]) for step in range(400)]
    for ids in asked:
        usage.note(0, ids)
    weights = 2.0 ** -(np.arange(400)[::-1] / 32)
    expected = [sum(w for w, ids in zip(weights, asked, strict=True) if e in ids) / weights.sum() for e in range(4)]
    np.testing.assert_allclose(usage.shares(0), expected, atol=1e-3)
