"""Named API keys: the file, what is wrong with it, its changes while it is served, and what a key may do over HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from asgi import CHAT, TEXT, check_error, serving, talking_to
from fakes import FakeEngine, FakeLimits, LocalWorkers

from buddymoe_ray.cli import main
from buddymoe_ray.errors import ConfigError
from buddymoe_ray.serve.http import HttpSettings, http_app
from buddymoe_ray.serve.keys import MOST_BYTES, KeyLimits, KeyRing, _parsed, add_key, read_keys
from buddymoe_ray.serve.tenants import Foreseen, Tenant, TenantCounters, Visit
from buddymoe_ray.serve.work import Work
from buddymoe_ray.serve.worker import Worker
from buddymoe_ray.types import SamplingParams

KEY = "sk-a-key-of-somebody"
HASH = hashlib.sha256(KEY.encode()).hexdigest()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def keys_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "keys.toml"
    path.write_text(text)
    path.chmod(mode)
    return path


def with_key(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_a_key_is_shown_once_and_only_its_hash_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "keys.toml"
    words = ["key", "alice", "--file", str(path), "--requests-per-minute", "60", "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert main(["key", "bob", "--file", str(path), "--weight", "2.5"]) == 0
    assert re.search(r"sk-[\w-]{43}\b", capsys.readouterr().out)
    alice, bob = read_keys(path)
    assert (alice.name, bob.name, alice.limits.requests_per_minute) == ("alice", "bob", 60)
    assert (alice.limits.weight, bob.limits.weight) == (1.0, 2.5)
    assert alice.digest == hashlib.sha256(told["key"].encode()).digest() != bob.digest
    assert told["key"] not in path.read_text() and path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in path.parent.iterdir()] == ["keys.toml"], "nothing is left beside it"
    before = path.read_bytes()
    for name in ("alice", "Alice", "a b", 'x"]\n[y', "default", ""):
        assert main(["key", name, "--file", str(path)]) == 2
        assert "hint: " in capsys.readouterr().err
    assert main(["key", "carl", "--file", str(path), "--tokens-per-minute", "0"]) == 2
    assert path.read_bytes() == before


ENTRY = f'[alice]\nsha256 = "{HASH}"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no key"),
        ("# nothing\n", "no key"),
        ("[alice\n", "no TOML"),
        (ENTRY + ENTRY, "no TOML"),
        ("\ud800", "no TOML"),
        ("a = " + "[" * 100_000, "no TOML"),
        (ENTRY + "tokens_per_minute = " + "9" * 5000, "no TOML"),
        (ENTRY + "weight = 0", "weight"),
        (ENTRY + "weight = nan", "weight"),
        ("alice = 1\n", "alice"),
        ("[alice]\n", "sha256: Field required"),
        (f'[alice]\nsha256 = "{KEY}"\n', "alice.sha256"),
        (f'[alice]\nsha256 = "{HASH.upper()}"\n', "alice.sha256"),
        (f'[Alice]\nsha256 = "{HASH}"\n', "Alice"),
        (f'["al.ice"]\nsha256 = "{HASH}"\n', "al.ice"),
        (f'["\u00e4"]\nsha256 = "{HASH}"\n', "\u00e4"),
        (f'[default]\nsha256 = "{HASH}"\n', "environment"),
        (ENTRY + "requests_per_minute = 0\n", "requests_per_minute"),
        (ENTRY + "tokens_per_minute = -1\n", "tokens_per_minute"),
        (ENTRY + "tokens_per_minute = 1.5\n", "tokens_per_minute"),
        (ENTRY + "concurrent_requests = true\n", "concurrent_requests"),
        (ENTRY + "token_per_minute = 5\n", "token_per_minute"),
        (ENTRY + ENTRY.replace("alice", "bob"), "one key"),
        ("#" * (MOST_BYTES + 1), "longer"),
    ],
)
def test_a_file_that_is_not_right_is_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    path.chmod(0o600)
    with pytest.raises(ConfigError) as refused:
        read_keys(path)
    message = str(refused.value)
    assert said in message and "hint: " in message and "\n" not in message and KEY not in message, message


def test_others_may_not_write_and_it_must_be_a_file(tmp_path: Path) -> None:
    assert read_keys(keys_file(tmp_path, ENTRY, mode=0o644))
    for mode in (0o620, 0o602):
        with pytest.raises(ConfigError, match=r"nobody else can write to"):
            read_keys(keys_file(tmp_path, ENTRY, mode=mode))
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "absent"):
        with pytest.raises(ConfigError, match=r"hint: "):
            read_keys(path)
    link = tmp_path / "link"
    link.symlink_to(keys_file(tmp_path, ENTRY))
    assert read_keys(link), "as a mounted secret is"


def test_changes_are_taken_over_and_bad_ones_are_not(tmp_path: Path, caplog, monkeypatch) -> None:
    clock, path = Clock(), keys_file(tmp_path, ENTRY)
    ring = KeyRing("sk-\u00e9", str(path), clock=clock)

    def found(key: str) -> str | None:
        key_found = ring.find([key.encode()])
        return None if key_found is None else key_found.name

    assert [found(key) for key in (KEY, "sk-\u00e9", "", HASH, KEY + " ")] == ["alice", "default", None, None, None]
    bob = add_key(path, "bob", {})
    assert found(bob) is None, "it is read once a second"
    clock.now += 1.5
    assert found(bob) == "bob"
    for spoil in (lambda: path.write_text("["), lambda: path.write_text(""), path.unlink, path.mkdir):
        spoil()
        for _ in range(3):
            clock.now += 1.5
            assert (found(KEY), found(bob)) == ("alice", "bob"), "the last good ones stay"
    assert len([r for r in caplog.records if "stay as they were" in r.message]) == 4, "each is said once"
    path.rmdir()
    parsed: list[int] = []
    monkeypatch.setattr("buddymoe_ray.serve.keys._parsed", lambda *given: parsed.append(1) or _parsed(*given))
    keys_file(tmp_path, "[" * 1000)
    for _ in range(5):
        clock.now += 1.5
        ring.find([])
    assert len(parsed) == 1, "a bad one is not read over and over"
    keys_file(tmp_path, ENTRY.replace("alice", "carl"))
    clock.now += 1.5
    assert (found(KEY), found(bob)) == ("carl", None), "a key is revoked without a restart"
    assert KEY not in caplog.text and bob not in caplog.text


def test_every_key_is_compared_and_few_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.toml"
    keys = [add_key(path, f"k{at}", {}) for at in range(5)]
    ring, compared = KeyRing(None, str(path)), []
    monkeypatch.setattr(
        "buddymoe_ray.serve.keys.hmac.compare_digest", lambda a, b: compared.append(1) or a == b
    )  # counts, beside the real decision
    for given in ([keys[0]], [keys[4]], ["wrong"], [""]):
        compared.clear()
        ring.find([key.encode() for key in given])
        assert len(compared) == 5, "which one it is, and whether, takes as long"
    compared.clear()
    assert ring.find([b"wrong"] * 1000 + [keys[0].encode()]) is None
    assert len(compared) == 20, "a thousand headers are not a thousand searches"


async def test_the_file_guards_the_api_and_names_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    path = tmp_path / "keys.toml"
    alice, bob = add_key(path, "alice", {}), add_key(path, "bob", {"weight": 3})
    engine = FakeEngine()
    async with serving(engine, api_keys=str(path), api_key="sk-old") as client:
        for key in (alice, bob, "sk-old"):
            assert (await client.post("/v1/chat/completions", json=CHAT, headers={"x-API-key": key})).status_code == 200
        for headers in ({}, with_key("sk-other"), with_key(HASH), {"Cookie": f"x-api-key={alice}"}):
            check_error(await client.post("/v1/completions", json=TEXT, headers=headers), 401, None, "invalid_api_key")
        for query in (f"?api_key={alice}", f"?x-api-key={alice}", f"?key={alice}"):
            check_error(await client.post(f"/v1/completions{query}", json=TEXT), 401, None, "invalid_api_key")
        text, own = [(await client.get("/metrics", headers=with_key(key))).text for key in ("sk-old", bob)]
    assert 'key="bob"' in own and 'key="alice"' not in own, "one tenant does not read what another does"
    assert [(request.tenant, request.weight) for request in engine.seen] == [("alice", 1), ("bob", 3), ("default", 1)]
    assert len({request.cache_salt for request in engine.seen}) == 3, "no tenant learns what another has asked"
    counted = dict(re.findall(r'^buddymoe_key_requests_total\{key="(\w+)",model="fake"\} ([\d.]+)$', text, re.M))
    assert counted == {"alice": "1.0", "bob": "1.0", "default": "1.0"}
    said = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("buddymoe_ray"))
    assert "key alice: 7 prompt and 6 generated tokens" in said
    assert not any(key in said or key in text for key in (alice, bob, "sk-old"))


async def test_salts_cannot_be_made_to_meet(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    keys = [add_key(path, name, {}) for name in ("a", "b")]
    engine = FakeEngine()
    async with serving(engine, api_keys=str(path)) as client:
        for key, salt in ((keys[0], "x"), (keys[1], "x"), (keys[1], "a/x"), (keys[1], "/x")):
            reply = await client.post("/v1/completions", json=TEXT | {"cache_salt": salt}, headers=with_key(key))
            assert reply.status_code == 200
    assert len({request.cache_salt for request in engine.seen}) == 4


async def test_without_a_file_nothing_is_told_apart() -> None:
    engine = FakeEngine()
    async with serving(engine, api_key="sk-k") as client:
        reply = await client.post("/v1/completions", json=TEXT | {"cache_salt": "s"}, headers=with_key("sk-k"))
        assert "buddymoe_key_requests_total{" not in (await client.get("/metrics", headers=with_key("sk-k"))).text
    assert not any(name.startswith("x-ratelimit") for name in reply.headers)
    assert (engine.seen[0].tenant, engine.seen[0].cache_salt) == ("", "s")


async def limited(client: httpx.AsyncClient, key: str, **body: Any) -> httpx.Response:
    return await client.post("/v1/completions", json=TEXT | body, headers=with_key(key))


async def test_requests_beyond_a_limit_are_told_when_to_come_back(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    key, free = add_key(path, "alice", {"requests_per_minute": 2}), add_key(path, "bob", {})
    async with serving(api_keys=str(path)) as client:
        first = await limited(client, key)
        assert (first.status_code, first.headers["x-ratelimit-limit-requests"]) == (200, "2")
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert re.fullmatch(r"\d+\.\d{3}s", first.headers["x-ratelimit-reset-requests"])
        assert (await limited(client, key, stream=True)).status_code == 200
        refused = await limited(client, key)
        message = check_error(refused, 429, None, "rate_limit_exceeded")
        assert (
            "requests_per_minute of this key: 0 of 2 are left, this takes 1." in message
            and 1 <= int(refused.headers["retry-after"]) <= 30
        )
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        counted = await client.post("/tokenize", json={"prompt": "x"}, headers=with_key(key))
        assert counted.status_code == 429, "there is no way around"
        body = {"model": "fake", "max_tokens": 4, "messages": [{"role": "user", "content": "x"}]}
        other = await client.post("/v1/messages", json=body, headers={"x-api-key": key})
        assert (other.status_code, other.json()["error"]["type"]) == (429, "rate_limit_error")
        assert (await client.get("/v1/models", headers=with_key(key))).status_code == 200
        assert (await limited(client, free)).status_code == 200, "others are not touched"
        metrics = (await client.get("/metrics", headers=with_key(key))).text
    assert 'buddymoe_key_refused_total{key="alice",model="fake"} 3.0' in metrics


async def test_tokens_are_foreseen_and_settled(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    key = add_key(path, "alice", {"tokens_per_minute": 1000})
    async with serving(api_keys=str(path)) as client:
        for _ in range(20):  # ends with its first token: what was foreseen beyond is given back
            reply = await limited(client, key, max_tokens=100, stop=[*"abcdefghijklmnopqrstuvwxyz"])
            assert reply.status_code == 200
        while reply.status_code == 200:
            reply = await limited(client, key, max_tokens=100)
        used = 1000 - int(reply.headers["x-ratelimit-remaining-tokens"])
        message = check_error(reply, 429, None, "rate_limit_exceeded")
        assert "tokens_per_minute" in message and f"{1000 - used} of 1000 are left" in message and 880 <= used <= 1000
    scored = Work(request_id="s", prompts=("x", "y"), sampling=SamplingParams(), max_tokens=0, echo=True)
    asked = replace(scored, max_tokens=None)
    assert [Foreseen.of(work, b"x" * 40, default_max_tokens=7).total for work in (scored, asked)] == [10, 10 + 2 * 7]


def visited(tokens: int | None, **limits: int) -> tuple[Tenant, Visit]:
    tenant = Tenant("alice", KeyLimits(**limits), Clock())
    visit = tenant.begin(Foreseen(prompt=50, output=tokens or 0))
    assert isinstance(visit, Visit)
    return tenant, visit


async def test_who_leaves_early_pays_for_the_prompt() -> None:
    tenant, visit = visited(10, tokens_per_minute=1000, concurrent_requests=1)
    refused = tenant.begin(Foreseen(prompt=1, output=1))
    assert not isinstance(refused, Visit) and refused.status == 429 and refused.retry_after_seconds == 1
    visit.end()
    visit.end()
    assert tenant.counters == TenantCounters(refused=1, prompt_tokens=50) and tenant.running == 0
    assert tenant.headers()["x-ratelimit-remaining-tokens"] == "950"


async def test_a_stream_that_is_left_makes_room(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    key = add_key(path, "alice", {"concurrent_requests": 1})
    workers = LocalWorkers(Worker(FakeEngine(delay=0.05)))
    app = http_app(workers, HttpSettings(model="fake", flush_seconds=0.0, api_keys=str(path)))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        running = asyncio.create_task(limited(client, key, max_tokens=100))
        while not app.state.tenants.running:
            await asyncio.sleep(0.01)
        check_error(await limited(client, key), 429, None, "rate_limit_exceeded")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        while app.state.tenants.running:
            await asyncio.sleep(0.01)
        assert (await limited(client, key)).status_code == 200
        check_error(await limited(client, key, max_tokens=500), 400, "prompt", "context_length_exceeded")
        assert not app.state.tenants.running, "what is refused later has ended, too"


async def test_a_service_that_stops_ends_what_runs_and_begins_nothing() -> None:
    app = http_app(LocalWorkers(Worker(FakeEngine(delay=0.01))), HttpSettings(model="fake", flush_seconds=0.0))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        running = asyncio.create_task(client.post("/v1/completions", json=TEXT | {"max_tokens": 40, "stream": True}))
        while not app.state.tenants.running:
            await asyncio.sleep(0.01)
        left = asyncio.create_task(app.state.tenants.close(30))
        await asyncio.sleep(0)
        refused = await client.post("/v1/completions", json=TEXT)
        check_error(refused, 503, None, "unavailable")
        assert refused.headers["retry-after"] == "2"
        health = await client.get("/health")
        assert health.status_code == 503 and health.json()["problems"] == ["the service is stopping"]
        assert (await client.get("/metrics")).status_code == 200
        assert (await running).text.endswith("data: [DONE]\n\n") and await left == 0
        assert await app.state.tenants.close(0) == 0


async def test_what_has_no_time_to_end_is_told_so() -> None:
    engine = FakeEngine(delay=0.02)
    app = http_app(LocalWorkers(Worker(engine)), HttpSettings(model="fake", flush_seconds=0.0))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        running = asyncio.create_task(client.post("/v1/completions", json=TEXT | {"max_tokens": 100, "stream": True}))
        while not engine.running:
            await asyncio.sleep(0.01)
        assert await app.state.tenants.close(0.1) == 1
        *_, last, nothing = (await running).text.split("\n\n")
        assert "the service is stopping" in last and nothing == ""
        while engine.running:
            await asyncio.sleep(0.01)


async def test_a_deadline_ends_a_request(tmp_path: Path) -> None:
    engine = FakeEngine(delay=0.05)
    async with serving(engine) as client:
        late = TEXT | {"max_tokens": 100, "buddymoe": {"timeout": 0.2}}
        message = check_error(await client.post("/v1/completions", json=late), 504, None, "timeout")
        assert "0.2 s" in message and "buddymoe.timeout" in message
        later = late | {"buddymoe": {"timeout": 1.5}}
        stream = await client.post("/v1/completions", json=later | {"stream": True})
        assert stream.status_code == 200 and '"code":"timeout"' in stream.text and "[DONE]" not in stream.text
        while engine.running:
            await asyncio.sleep(0.01)
        for wrong in (0, -1, "x", 1e9, True):
            reply = await client.post("/v1/completions", json=TEXT | {"buddymoe": {"timeout": wrong}})
            check_error(reply, 400, "buddymoe.timeout")


async def test_what_could_not_begin_in_time_is_refused_at_once() -> None:
    engine = FakeEngine(delay=0.02, limits=FakeLimits(max_running=2))
    async with talking_to(LocalWorkers(Worker(engine)), queue_seconds=1e-3) as client:
        asked = [client.post("/v1/completions", json=TEXT | {"max_tokens": 3}) for _ in range(12)]
        replies = await asyncio.gather(*asked)
        assert {reply.status_code for reply in replies} == {200}, "nothing was measured before"
        running = [asyncio.create_task(client.post("/v1/completions", json=TEXT | {"max_tokens": 100})) for _ in "ab"]
        while len(engine.running) < 2:
            await asyncio.sleep(0.01)
        refused = await client.post("/v1/completions", json=TEXT | {"max_tokens": 3})
        message = check_error(refused, 429, None, "overloaded")
        assert "would wait about" in message and int(refused.headers["retry-after"]) >= 2
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        while engine.running:
            await asyncio.sleep(0.01)
        assert (await client.post("/v1/completions", json=TEXT)).status_code == 200


async def test_one_tenant_cannot_fill_the_queue_of_others(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    alice, bob = add_key(path, "alice", {}), add_key(path, "bob", {})
    worker = Worker(FakeEngine(delay=0.05, limits=FakeLimits(max_running=2)), max_queued_requests=18)
    async with talking_to(LocalWorkers(worker), api_keys=str(path)) as client:
        flood = [asyncio.create_task(limited(client, alice, max_tokens=100)) for _ in range(40)]
        while sum(task.done() for task in flood) < 24:
            await asyncio.sleep(0.01)
        assert {task.result().status_code for task in flood if task.done()} == {503}, "16 of 20 places are taken"
        assert (await limited(client, bob, max_tokens=1)).status_code == 200
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
