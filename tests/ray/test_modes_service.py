"""Modes through the running service: what a bounded request spends, that its record replays, that exact stays exact."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from serving import Deploy, eventually

from buddymoe_ray import LLM
from buddymoe_ray.client import Client
from buddymoe_ray.errors import RequestError

PROMPTS = ["def add(a, b):\n    return", "import os\n", "class Stack:\n    def __init__(self", "for i in range("]


@pytest.fixture(scope="module")
def url(deploy: Deploy) -> str:
    return deploy("modes", model="builtin:tiny", memory="25%", mode="bounded", budget=0.003, guard_share=0.25)


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0) as opened:
        yield opened


def complete(client: openai.OpenAI, prompt: str, **asked: Any) -> tuple[str, Any, dict[str, Any]]:
    reply = client.completions.create(
        model="builtin:tiny", prompt=prompt, max_tokens=48, temperature=0, extra_body={"buddymoe": asked}
    )
    return reply.choices[0].text, reply.usage, reply.usage.model_extra["buddymoe"]  # type: ignore[union-attr,index]


def test_charges_stay_within_budget_and_tokens(client: openai.OpenAI) -> None:
    for budget in (None, 0.001, 0.02):
        asked = {} if budget is None else {"budget": budget}
        for prompt in PROMPTS:
            _, usage, spent = complete(client, prompt, **asked)
            assert spent["mode"] == spent["requested_mode"] == "bounded" and spent["guard"] == "ok"
            assert spent["budget"] == (budget or 0.003)
            assert 0 <= spent["expected_rise"] <= spent["budget"] * usage.completion_tokens
            accesses = spent["hits"] + spent["fetched"] + sum(spent["standins"].values())
            assert accesses == (usage.completion_tokens - 1) * 16, "every access of 4 layers and top-4 has one answer"


@pytest.mark.parametrize("mode", ["bounded", "fast"])
def test_a_record_replays_to_the_same_text_while_others_are_served(client: openai.OpenAI, mode: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        first = list(pool.map(lambda p: complete(client, p, mode=mode, record=True), PROMPTS))
        others = [pool.submit(complete, client, f"# {n}\nx = ", mode="fast") for n in range(4)]
        again = list(
            pool.map(
                lambda pair: complete(client, pair[0], replay=pair[1][2]["record"]), zip(PROMPTS, first, strict=True)
            )
        )
    assert [text for text, _, _ in again] == [text for text, _, _ in first]
    assert [spent["standins"] for *_, spent in again] == [spent["standins"] for *_, spent in first]
    assert sum(sum(spent["standins"].values()) for _, _, spent in first) > 0
    assert all(other.result()[2]["mode"] == "fast" for other in others)


def test_exact_requests_are_the_resident_models_beside_others(client: openai.OpenAI) -> None:
    with LLM("builtin:tiny", memory="100%") as llm:
        resident = [result.text for result in llm.generate(PROMPTS, max_tokens=48)]
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(complete, client, f"# {n}\ny = ", mode="fast") for n in range(4)]
        exact = list(pool.map(lambda p: complete(client, p, mode="exact"), PROMPTS))
    assert [text for text, _, _ in exact] == resident
    assert all(sum(spent["standins"].values()) == 0 and spent["mode"] == "exact" for _, _, spent in exact)
    assert all(other.result()[2]["requested_mode"] == "fast" for other in others)


def test_a_stream_ends_with_what_it_cost(client: openai.OpenAI) -> None:
    *_, last = client.chat.completions.create(
        model="builtin:tiny",
        messages=[{"role": "user", "content": "What does list.append do?"}],
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"buddymoe": {"mode": "fast"}},
    )
    spent = last.usage.model_extra["buddymoe"]  # type: ignore[union-attr,index]
    assert spent["mode"] == "fast" and spent["fetched"] == 0 and "record" not in spent


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"mode": "quick"}, "buddymoe.mode"),
        ({"budget": 3}, "buddymoe.budget"),
        ({"mode": "fast", "budget": 0.1}, "buddymoe.budget"),
        ({"replay": "nonsense"}, "buddymoe.replay"),
    ],
)
def test_what_cannot_be_done_is_a_400_that_names_it(client: openai.OpenAI, asked: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, PROMPTS[0], **asked)
    error = json.loads(refused.value.response.text)["error"]
    assert error["param"] == param and "hint:" in error["message"]


def test_the_python_handle_has_the_same_modes(url: str, client: openai.OpenAI) -> None:
    handle = Client("modes")
    result = handle.generate(PROMPTS[0], mode="fast", record=True, max_tokens=16, temperature=0.0)
    assert result.usage.mode == "fast" and result.usage.fetched == 0 and result.usage.record
    again = handle.generate(PROMPTS[0], replay=result.usage.record, max_tokens=16, temperature=0.0)
    assert again.token_ids == result.token_ids
    streamed = list(handle.stream(PROMPTS[0], mode="bounded", budget=0.01, max_tokens=16, temperature=0.0))
    assert streamed[-1].usage is not None and streamed[-1].usage.budget == 0.01
    assert streamed[-1].usage.expected_rise <= 0.01 * 16
    salted = [handle.generate(PROMPTS[0] * 4, cache_salt=salt, max_tokens=1).usage for salt in ("ours", "mine", "ours")]
    assert [usage.cached_tokens > 0 for usage in salted] == [False, False, True]
    (snapshot,) = handle.snapshots()
    assert snapshot.standins.total > 0 and snapshot.expected_rise > 0 and snapshot.guard.state == "ok"


@pytest.mark.parametrize(
    ("asked", "param"),
    [({"mode": "quick"}, "mode"), ({"budget": "a lot"}, "budget"), ({"mode": "fast", "budget": 0.1}, "budget")],
)
def test_a_python_client_cannot_end_the_engine(url: str, asked: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        Client("modes").generate(PROMPTS[0], **asked)
    assert refused.value.param == f"buddymoe.{param}"
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "problems": []}


def test_metrics_tell_what_the_engine_counted(url: str, client: openai.OpenAI) -> None:
    complete(client, PROMPTS[0], mode="fast")
    (snapshot,) = Client("modes").snapshots()
    text = httpx.get(f"{url}/metrics").text
    families = text_string_to_metric_families(text)
    values = {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}
    [replica] = set(re.findall(r'replica="([^"]+)"', text))
    who = {"builtin:tiny", replica}
    assert values["buddymoe_hits_total", *sorted(who)] == snapshot.access_hits
    assert values["buddymoe_standin_uses_total", *sorted({*who, "lowbit"})] == snapshot.standins.lowbit
    assert values["buddymoe_expected_rise_nats_total", *sorted(who)] == snapshot.expected_rise
    assert values["buddymoe_guard_state", *sorted({*who, "ok"})] == 1.0
    assert values["vllm:generation_tokens_total", *sorted(who)] == snapshot.requests.generated_tokens > 0
    assert values["vllm:time_to_first_token_seconds_count", *sorted(who)] > 0
    [worker] = httpx.get(f"{url}/dashboard/data").json()["workers"]
    assert (worker["replica"], worker["snapshot"]["access_hits"]) == (replica, snapshot.access_hits)
    cells = base64.urlsafe_b64decode(worker["experts"]["cells"])
    assert len(cells) == sum(worker["experts"]["experts_per_layer"]) and any(cell >> 3 for cell in cells)

    def exported() -> bool:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        ports = {node["MetricsExportPort"] for node in nodes}
        pages = [httpx.get(f"http://{nodes[0]['NodeManagerAddress']}:{port}/metrics").text for port in ports]
        return any(re.search(rf'ray_buddymoe_standin_uses.*kind="lowbit".*replica="{replica}"', p) for p in pages)

    eventually(exported)  # ray's own exporter, on every node
