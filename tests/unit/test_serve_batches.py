"""/v1/files and /v1/batches as OpenAI's client meets them: what is kept, for whom, how far, and whatever is killed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import multiprocessing
import os
import random
import re
import signal
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from asgi import check_error, conforms, openai_client, serving, talking_to
from fakes import FakeEngine, FakeLimits, LocalWorkers

from buddymoe_ray.serve import keys
from buddymoe_ray.serve.batches import file_routes, job, routes, runner, store
from buddymoe_ray.serve.batches.records import BatchObject, FileObject
from buddymoe_ray.serve.batches.store import FileStore
from buddymoe_ray.serve.http import HttpSettings, http_app
from buddymoe_ray.serve.keys import add_key
from buddymoe_ray.serve.refusals import Refused
from buddymoe_ray.serve.resume import ResumeLimits, WorkerLost
from buddymoe_ray.serve.work import Batch, Refusal, Reply, Work
from buddymoe_ray.serve.worker import Worker
from buddymoe_ray.types import SamplingParams

URL = "/v1/completions"
CREATED: Any = {"endpoint": URL, "completion_window": "24h"}


def line(name: str, **body: Any) -> str:
    asked = {"model": "fake", "max_tokens": 5, "temperature": 0} | body
    return json.dumps({"custom_id": name, "method": "POST", "url": URL, "body": asked})


def lines(count: int, **body: Any) -> bytes:
    return "".join(line(f"r{at}", prompt=f"prompt {at}", **body) + "\n" for at in range(count)).encode()


async def ended(client: openai.AsyncOpenAI, name: str, *also: str) -> Any:
    """The batch, once nothing more becomes of it, or it is in another state that is looked for."""
    while True:
        batch = await client.batches.retrieve(name)
        if batch.status in ("completed", "failed", "expired", "cancelled", *also):
            return batch
        await asyncio.sleep(0.01)


async def told(client: openai.AsyncOpenAI, name: str | None) -> list[dict[str, Any]]:
    assert name is not None
    return [json.loads(each) for each in (await client.files.content(name)).text.splitlines()]


async def begun(client: openai.AsyncOpenAI, data: bytes) -> Any:
    file = await client.files.create(file=("in.jsonl", data), purpose="batch")
    return await client.batches.create(input_file_id=file.id, metadata={"who": "me"}, **CREATED)


async def test_the_client_gets_what_http_would_answer_and_errors_apart(tmp_path: Path) -> None:
    data = lines(9) + "\n".join((line("bad", prompt="x", temperature=7), line("other", prompt="x", model="m"))).encode()
    async with serving(FakeEngine(limits=FakeLimits(max_running=2)), files_folder=tmp_path / "files") as http:
        client = openai_client(http)
        batch = await begun(client, data)
        assert (batch.status, batch.metadata) == ("validating", {"who": "me"})
        done = await ended(client, batch.id)
        good, bad = await told(client, done.output_file_id), await told(client, done.error_file_id)
        for at, each in enumerate(good):
            alone = await client.completions.create(model="fake", prompt=f"prompt {at}", max_tokens=5, temperature=0)
            assert each["custom_id"] == f"r{at}" and each["error"] is None and each["response"]["status_code"] == 200
            assert each["response"]["body"]["choices"][0]["text"] == alone.choices[0].text
        conforms((await http.get(f"/v1/batches/{batch.id}")).json(), "/v1/batches/{batch_id}", "get")
        files = [each async for each in client.files.list(limit=1)]
        assert {each.purpose for each in files} == {"batch", "batch_output"} and len(files) == 3
        assert [each.id async for each in client.batches.list()] == [batch.id]
        assert (await client.files.delete(files[0].id)).deleted
        check_error(await http.get(f"/v1/files/{files[0].id}"), 404, code="not_found")
        check_error(await http.post(f"/v1/batches/{batch.id}/cancel"), 409, code="conflict")
    assert done.status == "completed" and len(good) == 9
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (11, 9, 2)
    assert [(each["custom_id"], each["response"]["status_code"]) for each in bad] == [("bad", 400), ("other", 404)]
    assert (tmp_path / "files").stat().st_mode & 0o777 == 0o700


async def test_what_cannot_be_kept_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def send(data: bytes = b"", purpose: str = "batch", **more: str) -> httpx.Response:
        files = {"file": ("in.jsonl", data)} if data else None
        return await http.post("/v1/files", data={"purpose": purpose, **more}, files=files)

    async with serving(files_folder=tmp_path, files_bytes=3000) as http:
        assert "line 2: it is not JSON" in check_error(await send(lines(1) + b"{"), 400, "file")
        assert "custom_id is 'r0', must be unique" in check_error(await send(lines(1) * 2), 400, "file")
        assert "must have 1 to" in check_error(await send(b"\n"), 400, "file")
        check_error(await send(), 400, "file")
        check_error(await send(lines(1), purpose="fine-tune"), 400, "purpose")
        check_error(await send(lines(1), nonsense="1"), 400, "nonsense")
        check_error(await send(lines(40)), 413, "file", "files_full")
        assert not os.listdir(tmp_path), "nothing of what was refused is kept"
        monkeypatch.setattr(file_routes, "MAX_UPLOAD_BYTES", 2000)
        check_error(await send(lines(20)), 413, "file")
        file = (await send(lines(2))).json()["id"]
        create = {"input_file_id": file, **CREATED}
        check_error(await http.post("/v1/batches", json=create | {"endpoint": "/v1/embeddings"}), 400, "endpoint")
        check_error(await http.post("/v1/batches", json=create | {"completion_window": "1h"}), 400, "completion_window")
        check_error(await http.post("/v1/batches", json=create | {"tools": []}), 400, "tools")
        check_error(await http.post("/v1/batches", json=create | {"input_file_id": "../x"}), 404, code="not_found")
        chat = create | {"endpoint": "/v1/chat/completions"}
        failed = await ended(openai_client(http), (await http.post("/v1/batches", json=chat)).json()["id"])
        assert failed.status == "failed" and [each.line for each in failed.errors.data] == [1, 2]
        monkeypatch.setattr(routes, "MOST_UNFINISHED", 0)
        full = await http.post("/v1/batches", json=create)
        assert check_error(full, 429, code="batches_full") and full.headers["retry-after"] == "60"
        for query, param in (("limit=0", "limit"), ("limit=ten", "limit"), ("after=x", "after"), ("order=up", "order")):
            check_error(await http.get(f"/v1/files?{query}"), 400, param)
    async with serving() as http:
        assert "files_mb" in check_error(await send(lines(1)), 404, code="not_found")


def test_nobody_sees_what_another_keeps(tmp_path: Path) -> None:
    kept = FileStore(tmp_path, quota=10**6)
    (tmp_path / "in").write_bytes(lines(1))
    with open(tmp_path / "in", "rb") as source:
        mine = kept.add(source, filename="a", owner="alice")
    assert kept.records(FileObject, "alice") == [mine] == kept.records(FileObject, None)
    assert kept.records(FileObject, "bob") == []
    for name, owner in ((mine.id, "bob"), (mine.id, ""), ("file-" + "0" * 32, "alice"), ("../in", "alice")):
        with pytest.raises(Refused) as refused:
            kept.find(FileObject, name, owner)
        assert refused.value.refusal.status == 404


async def test_files_are_kept_as_long_as_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LOOK_SECONDS", 0.02)
    hour: Any = {"anchor": "created_at", "seconds": 3600}
    engine = FakeEngine(delay=0.002, limits=FakeLimits(max_running=1))
    async with serving(engine, files_folder=tmp_path) as http:
        client = openai_client(http)
        for wrong, param in (
            ({"seconds": 60}, "seconds"),
            ({"seconds": 10**12}, "seconds"),
            ({"anchor": "x"}, "anchor"),
        ):
            with pytest.raises(openai.BadRequestError) as refused:
                await client.files.create(file=("a", lines(1)), purpose="batch", expires_after=hour | wrong)
            assert refused.value.param == f"expires_after.{param}"
        for_ever = await client.files.create(file=("a", lines(1)), purpose="batch")
        file = await client.files.create(file=("a", lines(60)), purpose="batch", expires_after=hour)
        assert (for_ever.expires_at, file.expires_at) == (None, file.created_at + 3600)
        batch = await client.batches.create(input_file_id=file.id, output_expires_after=hour, **CREATED)
        monkeypatch.setattr(store, "time", SimpleNamespace(time=lambda: file.created_at + 3600))
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(file.id)
        done = await ended(client, batch.id)  # its lines are there as long as they are read
        assert done.request_counts.completed == 60 and done.output_file_id is not None
        output = await client.files.retrieve(done.output_file_id)
        assert output.expires_at == output.created_at + 3600
        while (tmp_path / f"{file.id}.data").exists():
            await asyncio.sleep(0.01)
        assert [each.id async for each in client.files.list()] == [output.id, for_ever.id]


async def test_a_key_sees_what_was_made_with_keys_of_its_name(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("alice", "bob")}
    path.write_text("".join(f'[{name}]\nsha256 = "{digest}"\n' for name, digest in digests.items()))
    path.chmod(0o600)
    async with serving(api_keys=str(path), files_folder=tmp_path / "files") as http:
        alice, bob = openai_client(http, "alice"), openai_client(http, "bob")
        batch = await begun(alice, lines(2))
        done = await ended(alice, batch.id)
        names = [batch.input_file_id, done.output_file_id]
        assert [each.id async for each in bob.files.list()] == [each.id async for each in bob.batches.list()] == []
        for name in names:
            for call in (bob.files.retrieve, bob.files.content, bob.files.delete):
                with pytest.raises(openai.NotFoundError):
                    await call(name)
        for ask in (bob.batches.retrieve, bob.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                await ask(batch.id)
        with pytest.raises(openai.NotFoundError):
            await bob.batches.create(input_file_id=names[0], **CREATED)
        assert sorted([each.id async for each in alice.files.list()]) == sorted(names)


async def test_lines_wait_within_the_limits_of_their_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    keys = [add_key(path, "alice", {"tokens_per_minute": 120, "concurrent_requests": 2}), add_key(path, "bob", {})]
    async with serving(api_keys=str(path), files_folder=tmp_path / "files") as http:
        alice, bob = (openai_client(http, key) for key in keys)
        batch = await begun(alice, lines(20))
        while (await alice.batches.retrieve(batch.id)).request_counts.completed < 3:
            await asyncio.sleep(0.01)
        assert (await ended(bob, (await begun(bob, lines(20))).id)).request_counts.completed == 20, (
            "nobody waits for it"
        )
        asked = await alice.completions.create(model="fake", prompt="now", max_tokens=20)
        assert asked.usage is not None and asked.usage.completion_tokens == 20, "half of the limit is not for batches"
        now = await alice.batches.retrieve(batch.id)
        assert now.status == "in_progress" and now.request_counts.completed < 15
        counted = (await http.get("/metrics", headers={"x-api-key": keys[0]})).text
        await alice.batches.cancel(batch.id)
        await ended(alice, batch.id)
    requests, tokens = (
        float(re.findall(rf"^buddymoe_key_{name}_total{{\S+ ([\d.]+)$", counted, re.M)[0])
        for name in ("requests", "generated_tokens")
    )
    assert requests >= 3 and tokens >= 20 + 3 * 5


async def test_lines_leave_a_place_to_who_waits_for_an_answer(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    key, engine = add_key(path, "alice", {"concurrent_requests": 2}), FakeEngine(delay=0.002)
    async with serving(engine, api_keys=str(path), files_folder=tmp_path / "files") as http:
        client = openai_client(http, key)
        batch = await begun(client, lines(4, max_tokens=10))
        await ended(client, batch.id, "in_progress")
        while not engine.running:
            await asyncio.sleep(0.001)
        for _ in range(5):
            await client.completions.create(model="fake", prompt="now", max_tokens=2)
            assert len(engine.running) < 2
        assert (await ended(client, batch.id)).request_counts.completed == 4


async def test_a_worker_sends_guests_away_when_others_need_their_place() -> None:
    worker = Worker(FakeEngine(delay=0.005, limits=FakeLimits(max_running=2)))
    ask = SamplingParams(temperature=0.0)

    def work(name: str, *, gives_way: bool, tokens: int = 60) -> AsyncGenerator[Reply, None]:
        asked = Work(request_id=name, prompts=(name,), sampling=ask, max_tokens=tokens, gives_way=gives_way)
        return worker.generate(asked)

    guests = [asyncio.create_task(_last(work(f"guest {at}", gives_way=True))) for at in range(2)]
    await asyncio.sleep(0.02)
    third = await _last(work("guest 2", gives_way=True))
    assert isinstance(third, Refusal) and (third.status, third.code) == (503, "overloaded")
    assert isinstance(await _last(work("one", gives_way=False, tokens=3)), Batch)
    first, second = await asyncio.gather(*guests)
    assert isinstance(first, Batch) and isinstance(second, Refusal) and "others need its place" in second.message
    assert isinstance(await _last(work("guest 3", gives_way=True, tokens=3)), Batch), "its place is free again"


async def _last(replies: AsyncGenerator[Reply, None]) -> Reply:
    return [reply async for reply in replies][-1]


async def test_lines_wait_while_others_do_and_come_out_the_same(tmp_path: Path) -> None:
    engine = FakeEngine(delay=0.002, limits=FakeLimits(max_running=2))
    async with serving(engine, files_folder=tmp_path) as http:
        client = openai_client(http)
        batch = await begun(client, lines(6, max_tokens=20))
        await ended(client, batch.id, "in_progress")
        while not engine.cancelled:  # somebody's place was a line's
            if engine.running:  # else lines that were sent away would find no place for long
                await client.completions.create(model="fake", prompt="now", max_tokens=1, n=2)
            await asyncio.sleep(0.001)
        done = await ended(client, batch.id)
        texts = [each["response"]["body"]["choices"][0]["text"] for each in await told(client, done.output_file_id)]
        for at, text in enumerate(texts):
            alone = await client.completions.create(model="fake", prompt=f"prompt {at}", max_tokens=20, temperature=0)
            assert text == alone.choices[0].text
    assert done.request_counts.completed == 6


async def test_a_line_that_its_workers_die_of_ends_alone(tmp_path: Path) -> None:
    class Losing(LocalWorkers):
        deaths = 0

        def generate(self, work: Work) -> AsyncGenerator[Reply, None]:
            async def dying() -> AsyncGenerator[Reply, None]:
                self.deaths += 1
                raise WorkerLost("it died")
                yield

            return dying() if "deadly" in work.prompts else super().generate(work)

    workers = Losing(Worker(FakeEngine()))
    settings = {"files_folder": tmp_path, "limits": ResumeLimits(moves=2)}
    async with talking_to(workers, **settings) as http:
        client = openai_client(http)
        done = await ended(client, (await begun(client, lines(2) + line("d", prompt="deadly").encode())).id)
        [bad] = await told(client, done.error_file_id)
    assert (done.request_counts.completed, workers.deaths) == (2, 3)
    assert bad["custom_id"] == "d" and bad["response"]["status_code"] == 503


@pytest.mark.parametrize("end", ["cancelled", "expired", "files_full"])
async def test_what_ends_early_keeps_what_is_answered(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "SYNC_SECONDS", 0.01)
    if end == "expired":
        monkeypatch.setattr(routes, "WINDOW_SECONDS", 0)
    quota = 12_000 if end == "files_full" else 10**6
    engine = FakeEngine(delay=0.005, limits=FakeLimits(max_running=1))
    async with serving(engine, files_folder=tmp_path, files_bytes=quota) as http:
        client = openai_client(http)
        batch = await begun(client, lines(40))
        if end == "cancelled":
            while not (await client.batches.retrieve(batch.id)).request_counts.completed:
                await asyncio.sleep(0.01)
            file = (await client.batches.retrieve(batch.id)).input_file_id
            check_error(await http.delete(f"/v1/files/{file}"), 409, code="conflict")
            assert (await client.batches.cancel(batch.id)).status == "cancelling"
        done = await ended(client, batch.id)
        good, bad = [
            [] if name is None else await told(client, name) for name in (done.output_file_id, done.error_file_id)
        ]
    assert done.status == {"files_full": "completed"}.get(end, end)
    code = end if end == "files_full" else f"batch_{end}"
    assert {each["error"]["code"] for each in bad} == {code}
    assert sorted(each["custom_id"] for each in (*good, *bad)) == sorted(f"r{at}" for at in range(40))
    assert (done.request_counts.completed, done.request_counts.failed) == (len(good), len(bad))
    assert end == "expired" or good


async def test_a_batch_ends_with_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "SYNC_SECONDS", 0.01)
    monkeypatch.setattr(keys, "LOOK_SECONDS", 0.0)
    path, kept = tmp_path / "keys.toml", FileStore(tmp_path / "files", quota=10**6)
    add_key(path, "bob", {})
    others = path.read_text()
    key = add_key(path, "alice", {})
    both, engine = path.read_text(), FakeEngine(delay=0.005, limits=FakeLimits(max_running=1))
    async with serving(engine, api_keys=str(path), files_folder=tmp_path / "files") as http:
        alice = openai_client(http, key)
        batch = await begun(alice, lines(40))
        while not (await alice.batches.retrieve(batch.id)).request_counts.completed:
            await asyncio.sleep(0.01)
        path.write_text(others)
        while not kept.find(BatchObject, batch.id, "alice").finished:
            await asyncio.sleep(0.01)
        path.write_text(both)
        done = await ended(alice, batch.id)
        good, bad = await told(alice, done.output_file_id), await told(alice, done.error_file_id)
    assert done.status == "cancelled" and good and {each["error"]["code"] for each in bad} == {"key_revoked"}
    assert sorted(each["custom_id"] for each in (*good, *bad)) == sorted(f"r{at}" for at in range(40))


@asynccontextmanager
async def service(folder: Path, delay: float) -> AsyncGenerator[openai.AsyncOpenAI, None]:
    """A whole life of it: what was left is gone on with from the start."""
    app = http_app(LocalWorkers(Worker(FakeEngine(delay=delay))), HttpSettings(model="fake", files_folder=folder))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            yield openai_client(http)


async def test_a_disk_that_fails_for_a_while_leaves_no_batch_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runner, "LOOK_SECONDS", 0.01)
    folder, away = tmp_path / "files", tmp_path / "away"
    async with service(folder, 0.0) as client:
        file = await client.files.create(file=("in.jsonl", lines(3)), purpose="batch")
    batch = BatchObject(
        id=f"batch_{'0' * 32}", endpoint=URL, model="fake", input_file_id=file.id, created_at=1, expires_at=1 << 40
    )
    FileStore(folder, quota=10**6).begin(batch, "")
    app = http_app(LocalWorkers(Worker(FakeEngine())), HttpSettings(model="fake", files_folder=folder))
    folder.rename(away)
    async with asyncio.timeout(10), app.router.lifespan_context(app):
        while "not looked for" not in caplog.text:
            await asyncio.sleep(0.01)
        away.rename(folder)
        while not FileStore(folder, quota=10**6).find(BatchObject, batch.id, None).finished:
            await asyncio.sleep(0.01)


def in_a_process_that_is_killed(act: Callable[[], Awaitable[None]], when: Callable[[], bool]) -> None:
    process = multiprocessing.get_context("fork").Process(target=lambda: asyncio.run(act()))  # type: ignore[arg-type]
    process.start()
    assert process.pid is not None
    while process.is_alive() and not when():
        time.sleep(0.002)
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_killed_anywhere_every_line_comes_out_once(tmp_path: Path) -> None:
    async def first() -> None:
        async with service(tmp_path, 0.002) as client:
            await begun(client, lines(60))
            await asyncio.sleep(60)

    async def again() -> None:
        async with service(tmp_path, 0.002):
            await asyncio.sleep(60)

    def grown(size: int) -> Callable[[], bool]:
        return lambda: any(each.stat().st_size >= size for each in tmp_path.glob("batch_*.data"))

    async def last() -> tuple[Any, list[dict[str, Any]]]:
        async with service(tmp_path, 0.0) as client:
            [batch] = [each async for each in client.batches.list()]
            done = await ended(client, batch.id)
            return done, await told(client, done.output_file_id)

    rng, size = random.Random(1), 1
    for act in (first, again, again):
        in_a_process_that_is_killed(act, grown(size))
        assert grown(size)() and not any(each.name.endswith(".jsonl") for each in tmp_path.iterdir())
        size += rng.randrange(5_000, 12_000)
    done, answers = asyncio.run(last())
    assert done.status == "completed" and [each["custom_id"] for each in answers] == [f"r{at}" for at in range(60)]
    assert done.request_counts.completed == 60
    FileStore(tmp_path, quota=1)
    assert not [*tmp_path.glob("batch_*.data")], "a journal goes with the next start at the latest"
