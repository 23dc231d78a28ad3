"""`buddymoe batch` as a caller meets it: what HTTP would answer, in order, whatever kills it on the way."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asgi import talking_to
from fakes import LocalWorkers

from buddymoe_ray import LLM
from buddymoe_ray.batch.rows import most_rows, refill_at
from buddymoe_ray.batch.sizes import sized
from buddymoe_ray.cli import main
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.async_engine import AsyncEngine
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.engine.sequence import Sequence
from buddymoe_ray.errors import BuddyMoEError, CacheError, ConfigError, RequestError
from buddymoe_ray.models.resolve import resolve_model
from buddymoe_ray.residency.plan import make_plan
from buddymoe_ray.serve.batches.journal import Journal, JournalEntry
from buddymoe_ray.serve.batches.lines import BatchInput, LineError
from buddymoe_ray.serve.calls import MAX_BODY_BYTES
from buddymoe_ray.serve.worker import Worker
from buddymoe_ray.types import GenerationRequest, SamplingParams

TINY = "builtin:tiny"
ROWS = 6
PROMPTS = ["def add(a, b):", "import os\n", "class Stack:", "naïve = 'ü☃", "for i in range", "x = [", "def f("]


class Killed(BaseException):
    """What stands for a process that ends here."""


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    opened = Engine.from_config(
        EngineConfig(memory="25%", max_running=ROWS, mode="bounded", guard_share=0.0, prefill_chunk=512)
    )
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def resident() -> Iterator[LLM]:
    with LLM(TINY, memory="100%") as llm:
        yield llm


@pytest.fixture
def shared(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The command's engine, loaded once for all tests; its requests are exact unless they say otherwise. No power is
    cut here, so nothing waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(Engine, "from_config", lambda config: engine)
    monkeypatch.setattr(engine, "close", engine.reset)
    return engine


def line(name: str, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    given = {"model": TINY, "max_tokens": 5, "temperature": 0, "buddymoe": {"mode": "exact"}} | body
    return {"custom_id": name, "method": "POST", "url": url, "body": given}


def text_lines(count: int, **body: Any) -> list[dict[str, Any]]:
    """Of different lengths, so that they do not end together."""
    return [
        line(f"r{at}", prompt=f"{PROMPTS[at % 7]} # {at}", **({"max_tokens": 1 + at % 6} | body)) for at in range(count)
    ]


def written(folder: Path, lines: list[Any], name: str = "in.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in lines))
    return path


def run(source: Path, *more: str, status: int = 0) -> list[dict[str, Any]]:
    """What the command wrote beside `source`."""
    output = source.with_name("out.jsonl")
    assert main(["batch", str(source), str(output), "--json", *more]) == status
    return [json.loads(each) for each in output.read_text().splitlines()] if status == 0 else []


def lasting(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers without what depends on when they were made, and on what was resident then."""
    kept = json.loads(json.dumps(answers))
    for each in kept:
        body = (each["response"] or {}).get("body", {})
        body.pop("created", None)
        if "usage" in body:
            body["usage"].pop("prompt_tokens_details")
            for name in ("hits", "fetched"):
                body["usage"]["buddymoe"].pop(name)
    return kept


def texts(answers: list[dict[str, Any]]) -> list[str]:
    return [each["response"]["body"]["choices"][0]["text"] for each in answers]


def test_answers_are_those_of_generate_in_the_order_of_the_input(shared, resident, tmp_path: Path, capsys) -> None:
    lines = text_lines(20)
    source = written(tmp_path, lines)
    answers = run(source)
    assert [each["custom_id"] for each in answers] == [f"r{at}" for at in range(20)]
    for given, answer in zip(lines, answers, strict=True):
        [wanted] = resident.generate(given["body"]["prompt"], max_tokens=given["body"]["max_tokens"])
        body = answer["response"]["body"]
        assert body["choices"][0]["text"] == wanted.text and answer["error"] is None
        assert body["choices"][0]["finish_reason"] == wanted.finish_reason
        assert answer["response"]["status_code"] == 200 and body["id"].startswith("cmpl-")
        assert body["usage"]["completion_tokens"] == len(wanted.token_ids)
        assert body["usage"]["buddymoe"]["mode"] == "exact"
    assert len({each["id"] for each in answers}) == len({each["response"]["request_id"] for each in answers}) == 20
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"], "the journal is gone"
    [said] = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert (said["requests"], said["ok"], said["failed"], said["earlier"], said["max_running"]) == (20, 20, 0, 0, ROWS)
    assert said["tokens"] == sum(each["response"]["body"]["usage"]["completion_tokens"] for each in answers)
    assert said["tok_s"] > 0 and said["bytes_read_per_token"] > 0 and said["expected_rise_percent"] == 0


async def test_bodies_are_what_http_answers(shared, tmp_path: Path, monkeypatch) -> None:
    """Replies and refusals alike; but for ids, the time, and what happened to be resident."""
    messages = [{"role": "user", "content": "What is a list?"}]
    lines = [
        line("chat", "/v1/chat/completions", messages=messages, logprobs=True, top_logprobs=2),
        line("several", prompt=["import os", "import re"], n=2, temperature=0.8, seed=7, logprobs=1),
        line("ids", prompt=[5, 6, 7], stop="\n", max_tokens=9),
        line("other model", prompt="x") | {"body": {"model": "gpt-4o", "prompt": "x"}},
        line("no model", prompt="x") | {"body": {"prompt": "x"}},
        line("long", prompt="x", max_tokens=100_000),
        line("hopeless", prompt="x" * 200_000),
        line("misspelt", prompt="x", temprature=1),
        line("body", prompt="x") | {"body": ["x"]},
        line("bounded", prompt="import", buddymoe={"mode": "bounded", "budget": 0.01}),
        line("vocabulary", prompt=[10**6]),
    ]
    monkeypatch.setattr("buddymoe_ray.batch.run._MANY_DELTAS", 3)  # a long answer's are joined on the way
    answers = run(written(tmp_path, lines))
    own = AsyncEngine(shared, model_id=TINY)
    try:
        async with talking_to(LocalWorkers(Worker(own)), model=TINY) as client:
            replies = [await client.post(each["url"], json=each["body"]) for each in lines]
    finally:
        own.close()

    def comparable(body: dict[str, Any]) -> dict[str, Any]:
        [kept] = lasting([{"response": {"body": body}}])
        return {name: value for name, value in kept["response"]["body"].items() if name != "id"}

    for given, answer, reply in zip(lines, answers, replies, strict=True):
        got = answer["response"]
        assert got["status_code"] == reply.status_code, (given["custom_id"], got, reply.text)
        if given["custom_id"] != "bounded":
            assert comparable(got["body"]) == comparable(reply.json()), given["custom_id"]
    assert [each["response"]["status_code"] for each in answers[:3]] == [200] * 3
    assert {each["response"]["status_code"] for each in answers[3:9]} == {400, 404}
    assert answers[9]["response"]["body"]["usage"]["buddymoe"]["mode"] == "bounded"
    assert len(answers[1]["response"]["body"]["choices"]) == 4


def test_bad_lines_are_told_in_their_place_and_cost_nobody_else_anything(shared, tmp_path: Path, capsys) -> None:
    good = text_lines(3)
    half = json.dumps(line("x", prompt="x")).replace('"x"', '"\\ud800"', 1)
    lines: list[Any] = [
        good[0],
        "not json",
        "",
        "[1]",
        {name: value for name, value in line("a", prompt="x").items() if name != "custom_id"},
        line("b", prompt="x") | {"custom_id": 7},
        half,
        good[1],
        good[0],
        line("c", prompt="x") | {"method": "GET"},
        line("d", "/v1/embeddings", prompt="x"),
        line("e", prompt="x") | {"url": ["/v1/completions"]},
        {name: value for name, value in line("f", prompt="x").items() if name != "body"},
        line("g", prompt="x") | {"metadata": {}},
        "[" * 100_000,
        line("h", prompt="x", stream=True),
        line("i", prompt="x", user="y" * MAX_BODY_BYTES),
        "x" * (MAX_BODY_BYTES + (2 << 20)),
        good[2],
        line("j", prompt="x", buddymoe={"timeout": 5}),
    ]
    answers = run(written(tmp_path, lines))
    codes = [(each["error"] or {}).get("code") for each in answers]
    assert codes == [
        *(None, "invalid_json_line", "invalid_json_line", "missing_required_parameter", "invalid_custom_id"),
        *("invalid_custom_id", None, "duplicate_custom_id", "invalid_method", "invalid_url", "invalid_url"),
        *("missing_required_parameter", "unknown_parameter", "invalid_json_line", None, None, "invalid_json_line"),
        *(None, None),
    ]
    numbers = [2, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 18]
    bad = [each for each in answers if each["error"]]
    assert [each["error"]["message"].split(":")[0] for each in bad] == [f"line {number}" for number in numbers]
    assert all(each["response"] is None for each in bad) and "line 1 has it" in bad[5]["error"]["message"]
    assert answers[0]["custom_id"] == "r0" and bad[5]["custom_id"] == "r0", "the first of two is answered"
    streamed, large = answers[14]["response"], answers[15]["response"]
    assert streamed["status_code"] == 400 and streamed["body"]["error"]["param"] == "stream"
    assert large["status_code"] == 413
    assert answers[18]["response"]["body"]["error"]["param"] == "buddymoe.timeout", "nobody waits for it"
    alone = run(written(tmp_path, good), "--restart")
    assert [texts([answers[at]]) for at in (0, 6, 17)] == [[text] for text in texts(alone)]
    said = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert (said[0]["requests"], said[0]["ok"], said[0]["failed"]) == (19, 3, 16)


def test_seeds_are_honoured_and_without_one_a_file_draws_the_same_again(shared, resident, tmp_path: Path) -> None:
    sampled = {"temperature": 1.0, "max_tokens": 12}
    source = written(
        tmp_path, [line("a", prompt="x = ", seed=3, **sampled), *(line(n, prompt="x = ", **sampled) for n in "bc")]
    )
    first = run(source)
    params = SamplingParams(temperature=1.0, max_tokens=12, seed=3)
    assert texts(first)[0] == resident.generate("x = ", params)[0].text
    assert texts(run(source, "--restart")) == texts(first) and len({*texts(first)}) == 3


def test_what_fails_in_the_engine_ends_that_line_alone(shared, tmp_path: Path, monkeypatch) -> None:
    """Before it is begun, at the second of its choices, and in the midst of its tokens."""
    prepare, admit, append = shared.prepare, shared.admit, Sequence.append
    lines = [*text_lines(8), *(line(name, prompt=[at] * 9, n=2) for at, name in enumerate(("early", "half", "late")))]

    def failing(request: GenerationRequest) -> Sequence:
        if request.prompt_token_ids[0] == 0:
            raise ValueError("nobody foresaw this")
        return prepare(request)

    def admitting(seq: Sequence) -> None:
        if seq.request.prompt_token_ids[0] == 1 and seq.request_id.endswith("-1"):
            raise RequestError("prompt is odd, must be even. hint: change it", param="prompt")
        admit(seq)

    def appending(self: Sequence, sampled: Any) -> Any:
        if self.request.prompt_token_ids[0] == 2 and self.request_id.endswith("-1") and self.num_output == 2:
            raise CacheError("an expert is gone. hint: check the disk")
        return append(self, sampled)

    wanted = run(written(tmp_path, lines))
    assert [each["response"]["status_code"] for each in wanted] == [200] * 11
    cancel, cancelled = shared.cancel, list[str]()
    monkeypatch.setattr(shared, "cancel", lambda name: (cancelled.append(name), cancel(name))[1])
    monkeypatch.setattr(shared, "prepare", failing)
    monkeypatch.setattr(shared, "admit", admitting)
    monkeypatch.setattr(Sequence, "append", appending)
    answers = run(written(tmp_path, lines), "--restart")
    early, half, late = [each["response"] for each in answers[8:]]
    assert lasting(answers[:8]) == lasting(wanted[:8])
    assert early["status_code"] == 500 and "internal error" in early["body"]["error"]["message"]
    assert half["status_code"] == 400 and half["body"]["error"]["param"] == "prompt"
    assert late["status_code"] == 500 and "an expert is gone" in late["body"]["error"]["message"]
    [ended] = cancelled
    assert ended.endswith("-0") and not shared.has_work(), "nothing of a line that was refused goes on"


class Killer:
    """Ends the process that is played at the `left`-th of the `named` calls from now on: writes, syncs, steps, ..."""

    FILE_CALLS = frozenset({"pwrite", "fsync", "replace", "unlink"})

    def __init__(self, rng: random.Random, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self._rng = 10**9, rng
        self.named = self.FILE_CALLS | {"step"}
        self.places: set[str] = set()
        for name in self.FILE_CALLS:
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))
        monkeypatch.setattr(engine, "step", self._watched("step", engine.step))

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.left -= name in self.named
            if self.left == 0 and name in self.named:
                self.places.add(name)
                if name == "pwrite":  # torn anywhere
                    real(args[0], bytes(args[1])[: self._rng.randrange(len(args[1]) + 1)], args[2])
                elif self._rng.random() < 0.5:
                    real(*args)
                raise Killed
            return real(*args)

        return call


def test_killed_anywhere_it_goes_on_without_loss_or_duplicates(shared, tmp_path: Path, monkeypatch) -> None:
    lines = [
        *text_lines(8, temperature=0.7),
        "not json",
        line("mid", prompt="y"),
        line("last", prompt="x", stream=True),
    ]
    source, output = written(tmp_path, lines), tmp_path / "out.jsonl"
    wanted = lasting(run(source))
    command = ["batch", str(source), str(output), "--json"]
    rng, kills = random.Random(1), 0
    killer = Killer(rng, shared, monkeypatch)
    anywhere = killer.named
    for first in [anywhere] * 5 + [frozenset({"replace"}), frozenset({"unlink"})]:  # chance meets the last two late
        output.unlink()
        killer.named, killer.left = first, 1
        while True:
            if killer.named is anywhere:
                killer.left = rng.randrange(1, 16)
            before = output.with_name("out.jsonl.partial").exists()
            try:
                status = main(command)
            except Killed:
                kills += 1
                continue
            finally:
                killer.named, killer.left = anywhere, 10**9
            if status == 2:  # only after it was put in place, and its journal deleted
                assert not before and output.exists()
            else:
                assert status == 0
            break
        assert lasting([json.loads(each) for each in output.read_text().splitlines()]) == wanted
        assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]
    assert kills >= 20 and killer.places == anywhere


def partial(folder: Path, lines: list[Any], monkeypatch: pytest.MonkeyPatch, engine: Engine, *, steps: int) -> Path:
    """A run that was killed after some steps; its input."""
    source = written(folder, lines)
    real, left = engine.step, [steps]

    def step() -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return real()

    with monkeypatch.context() as patched:
        patched.setattr(engine, "step", step)
        with pytest.raises(Killed):
            main(["batch", str(source), str(folder / "out.jsonl"), "--json"])
    return source


def computed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requests that are begun from now on."""
    begun: list[str] = []
    real = engine.admit
    monkeypatch.setattr(engine, "admit", lambda seq: (begun.append(seq.request_id), real(seq))[1])
    return begun


def test_a_torn_or_damaged_entry_is_computed_again_and_no_other(shared, tmp_path: Path, monkeypatch, capsys) -> None:
    lines = text_lines(12)
    source = partial(tmp_path, lines, monkeypatch, shared, steps=6)
    journal = tmp_path / "out.jsonl.partial"
    whole = journal.read_bytes()
    header, *entries = whole.splitlines(keepends=True)
    assert len(entries) >= 4
    damaged = entries[-2].replace(b'"text":"', b'"text":"?', 1)
    assert damaged != entries[-2]
    cases = [(whole[:-3], len(entries) - 1), (whole[:-1], len(entries) - 1), (whole + b"7 2", len(entries))]
    cases += [(header + b"".join([*entries[:-2], damaged, entries[-1]]), len(entries) - 2), (header[:-9], 0)]
    cases += [(whole + b"\0" * 512, len(entries)), (whole + entries[0], len(entries))]
    wanted = None
    for content, kept in cases:
        journal.write_bytes(content)
        begun = computed(shared, monkeypatch)
        answers = run(source)
        (tmp_path / "out.jsonl").unlink()
        assert len(begun) == len(lines) - kept
        assert json.loads(capsys.readouterr().out)["earlier"] == kept
        wanted = wanted or lasting(answers)
        assert lasting(answers) == wanted and len(answers) == len(lines)


def test_a_journal_of_something_else_is_refused_unless_restarted(shared, tmp_path: Path, monkeypatch, capsys) -> None:
    source = partial(tmp_path, text_lines(9), monkeypatch, shared, steps=3)
    journal = tmp_path / "out.jsonl.partial"
    before = journal.read_bytes()
    assert before.count(b"\n") > 1
    other = written(tmp_path, text_lines(8), "other.jsonl")
    cases = [(other, [], "input"), (source, ["--seed", "1"], "seed 0"), (source, ["--mode", "fast"], "mode 'exact'")]
    cases += [(source, ["--model-name", "x"], "model_name"), (source, ["--max-model-len", "64"], "max_model_len")]
    for path, more, named in cases:
        run(path, *more, status=2)
        said = capsys.readouterr().err
        assert named in said and "must be with" in said and "--restart" in said and said.count("\n") == 1
        assert journal.read_bytes() == before
    journal.write_text("my own notes\n")
    run(source, status=2)
    assert "must be the journal" in capsys.readouterr().err and journal.read_text() == "my own notes\n"
    journal.write_bytes(before)
    begun = computed(shared, monkeypatch)
    run(source, "--memory", "30%", "--threads", "1")
    assert 0 < len(begun) < 9, "options that change no answer may differ"
    answers = run(other, "--restart")
    assert len(answers) == 8 and not journal.exists()


def test_a_finished_output_is_kept_unless_restarted(shared, tmp_path: Path, monkeypatch, capsys) -> None:
    source, output = written(tmp_path, text_lines(3)), tmp_path / "out.jsonl"
    output.write_text("precious\n")
    run(source, status=2)
    assert "--restart" in capsys.readouterr().err and output.read_text() == "precious\n"
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]
    source = partial_restart(source, monkeypatch, shared)
    assert output.read_text() == "precious\n", "replaced only by a finished one"
    assert len(run(source)) == 3, "a restart that was killed goes on too"


def partial_restart(source: Path, monkeypatch: pytest.MonkeyPatch, engine: Engine) -> Path:
    def die() -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(engine, "step", die)
        with pytest.raises(Killed):
            run(source, "--restart")
    return source


def test_a_second_run_on_the_same_output_is_refused(shared, tmp_path: Path, monkeypatch, capsys) -> None:
    source = written(tmp_path, text_lines(4))
    real, tried = shared.step, []

    def step() -> Any:
        if not tried:
            tried.append(main(["batch", str(source), str(tmp_path / "out.jsonl"), "--restart"]))
        return real()

    monkeypatch.setattr(shared, "step", step)
    assert len(run(source)) == 4 and tried == [2]
    assert "in use by another run" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["at once", "after some bytes", "when synced"])
def test_a_full_disk_is_told_and_what_is_finished_is_kept(
    how: str, shared, tmp_path: Path, monkeypatch, capsys
) -> None:
    source, calls = written(tmp_path, text_lines(10)), [0]
    write, sync = os.pwrite, os.fsync

    def full(fd: int, data: Any, place: int) -> int:
        calls[0] += 1
        if calls[0] < 6:
            return write(fd, data, place)
        if how == "after some bytes" and calls[0] == 6:
            return write(fd, bytes(data)[:20], place)
        raise OSError(errno.ENOSPC, "No space left on device")

    def unsynced(fd: int) -> None:
        calls[0] += 1
        if calls[0] > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(fd)

    with monkeypatch.context() as patched:
        patched.setattr(os, *(("fsync", unsynced) if how == "when synced" else ("pwrite", full)))
        patched.setattr("buddymoe_ray.commands.batch._SYNC_SECONDS", 0.0)
        run(source, status=1)
    said = capsys.readouterr().err
    assert "No space left" in said and "hint: free some space" in said and said.count("\n") == 1
    begun = computed(shared, monkeypatch)
    assert len(run(source)) == 10 and 0 < len(begun) < 10


def test_a_disk_full_at_the_end_keeps_every_answer(shared, tmp_path: Path, monkeypatch, capsys) -> None:
    source = written(tmp_path, text_lines(5))

    def full(fd: int) -> None:
        if (tmp_path / "out.jsonl.part").exists():
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        run(source, status=1)
    assert "every answer is kept" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl.partial"]
    begun = computed(shared, monkeypatch)
    assert len(run(source)) == 5 and not begun, "no model is needed any more"


def test_only_as_many_lines_are_open_as_have_rows(shared, tmp_path: Path, monkeypatch) -> None:
    """Lines are read when there is room for them, and the engine never holds more than its rows."""
    source = written(tmp_path, text_lines(40))
    read, step, running, ahead = BatchInput.read, shared.step, [0], [0]
    at_once: list[int] = []

    def counted(self: BatchInput, at: int) -> Any:
        ahead[0] += 1
        return read(self, at)

    def watched() -> Any:
        snapshot = shared.snapshot()
        at_once.append(snapshot.running + snapshot.waiting)
        events = step()
        running[0] += sum(event.finish_reason is not None for event in events)
        assert ahead[0] - running[0] <= ROWS, "read ahead of the engine"
        return events

    monkeypatch.setattr(BatchInput, "read", counted)
    monkeypatch.setattr(shared, "step", watched)
    assert len(run(source)) == 40
    assert max(at_once) == ROWS and sum(at_once) / len(at_once) > ROWS / 2


def test_answers_do_not_change_where_the_kv_cache_is_short(resident, tmp_path: Path, capsys) -> None:
    """Blocks for three of eight: the others wait or are computed again."""
    lines = [line(f"r{at}", prompt=f"{PROMPTS[at % 7]} # {at}", max_tokens=40, ignore_eos=True) for at in range(8)]
    small = ["--kv-memory", "1MiB", "--memory", "25%", "--max-running", "8"]
    for each in lines:
        del each["body"]["buddymoe"]
    answers = run(written(tmp_path, lines), *small)
    said = json.loads(capsys.readouterr().out)
    assert said["max_running"] < 8 or said["preemptions"] > 0, said
    sampling = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    assert texts(answers) == [r.text for r in resident.generate([each["body"]["prompt"] for each in lines], sampling)]


def test_rows_are_as_many_as_there_are_requests_and_memory() -> None:
    assert sized(EngineConfig(), choices=3, max_running=None).max_running == 3
    assert sized(EngineConfig(), choices=10**6, max_running=None).max_running == 256
    assert sized(EngineConfig(), choices=3, max_running=9).max_running == 9
    assert sized(EngineConfig(batching="solo"), choices=99, max_running=None).max_running == EngineConfig.max_running
    assert sized(EngineConfig(prefill_chunk=64), choices=9, max_running=None).prefill_chunk == 64
    assert most_rows(choices=10**6, hidden=16384, experts_per_token=16, item_bytes=2, vocab=256_000) == 76


def test_steps_of_many_rows_bring_small_experts_in_larger_waves() -> None:
    few, many = (
        make_plan(EngineConfig(memory="25%", max_running=rows, max_model_len=64), resolve_model(TINY), gpus=()).devices[
            0
        ]
        for rows in (32, 128)
    )
    assert (few.wave_slots, many.wave_slots) == (2, 6) and few.slots == many.slots


def test_places_are_refilled_in_groups_only_where_that_saves_passes() -> None:
    assert refill_at(128, mean_output=16, fully_resident=True) == 1
    assert refill_at(128, mean_output=1, fully_resident=False) == 32
    assert refill_at(128, mean_output=512, fully_resident=False) == 8
    assert refill_at(1, mean_output=4, fully_resident=False) == 1


def test_an_input_that_cannot_be_used_is_refused(shared, tmp_path: Path, monkeypatch, capsys) -> None:
    run(tmp_path / "nowhere.jsonl", status=2)
    source = written(tmp_path, text_lines(9), "out.jsonl")
    assert main(["batch", str(source), str(source), "--restart"]) == 2
    assert main(["batch", str(source), str(tmp_path)]) == 2
    os.mkfifo(tmp_path / "pipe")
    run(tmp_path / "pipe", status=2)
    assert capsys.readouterr().err.count("hint: ") == 4
    assert run(written(tmp_path, ["", " "]), "--restart") == []
    source, real = written(tmp_path, text_lines(9)), shared.step

    def step() -> Any:
        source.write_text("changed\n")
        return real()

    monkeypatch.setattr(shared, "step", step)
    run(source, "--restart", status=2)
    assert "changed while it was read" in capsys.readouterr().err


def test_two_ids_whose_marks_collide_are_no_duplicates(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("buddymoe_ray.serve.batches.lines._mark", lambda fields: 5)
    source = BatchInput(written(tmp_path, [line("a", prompt="x"), line("b", prompt="x"), line("a", prompt="x")]))
    found = [source.read(at) for at in range(3)]
    assert [isinstance(each, LineError) for each in found] == [False, False, True]
    assert source.choices == 3 and [source.number(at) for at in range(3)] == [1, 2, 3]
    source.close()


def test_a_journal_gives_its_entries_in_order(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with pytest.raises(BuddyMoEError, match="has no entry 1"):
        journal = Journal.open(path, {"input": "x"}, count=3)
        for at in (2, 0):
            journal.append(JournalEntry(at, 200 if at else 0, b"%d\t \xff" % at))
        list(journal.entries())
    with pytest.raises(ConfigError, match="in use"):
        Journal.open(path, {"input": "x"}, count=3)
    journal.close()
    again = Journal.open(path, {"input": "x"}, count=3)
    assert (again.finished, again.succeeded, again.has(1)) == (2, 1, False)
    again.append(JournalEntry(1, 404, b"{}"))
    assert [entry.data for entry in again.entries()] == [b"0\t \xff", b"{}", b"2\t \xff"]
    again.remove()
    assert not path.exists()


def command(source: Path, output: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "buddymoe_ray.cli", "batch", str(source), str(output), "--memory", "25%"]
    return subprocess.Popen([*words, "--max-running", "4"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, entries: int, process: subprocess.Popen[str]) -> None:
    """Until a journal has so many entries, header not counted."""
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") <= entries:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def test_the_real_command_goes_on_after_sigkill(shared, resident, tmp_path: Path, monkeypatch) -> None:
    lines = text_lines(80)
    for each in lines:
        del each["body"]["buddymoe"]
    source, output = written(tmp_path, lines), tmp_path / "out.jsonl"
    journal = tmp_path / "out.jsonl.partial"
    killed = command(source, output)
    wait_for(journal, 5, killed)
    assert main(["batch", str(source), str(output)]) == 2, "it is locked"
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    kept = journal.read_bytes().count(b"\n") - 1
    assert not output.exists() and 5 <= kept < 80
    monkeypatch.setattr(shared, "config", EngineConfig(memory="25%", max_running=ROWS))
    begun = computed(shared, monkeypatch)
    answers = run(source, "--memory", "25%")
    assert 80 - kept <= len(begun) <= 80 - kept + 1 and [each["custom_id"] for each in answers] == [
        f"r{at}" for at in range(80)
    ]
    for at in range(0, 80, 9):
        body = lines[at]["body"]
        assert texts([answers[at]]) == [resident.generate(body["prompt"], max_tokens=body["max_tokens"])[0].text]


def test_ctrl_c_keeps_what_ended_and_says_how_to_go_on(shared, tmp_path: Path, monkeypatch, capsys) -> None:
    """What ends in the step that Ctrl-C comes in is kept too."""
    source, real = written(tmp_path, text_lines(10, max_tokens=1)), shared.step

    def step() -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # until Python looks
        return real()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job begins with it ignored
    try:
        with monkeypatch.context() as patched:
            patched.setattr(shared, "step", step)
            run(source, status=130)
    finally:
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().err
    assert f"{ROWS} of 10 requests are kept" in said and "hint: run the same command again to go on" in said
    begun = computed(shared, monkeypatch)
    assert len(run(source)) == 10 and len(begun) == 10 - ROWS
