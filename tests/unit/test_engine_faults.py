"""What is raised inside a step costs the sequence it belongs to and nobody else; an interrupt leaves a clean engine."""

from __future__ import annotations

import errno
import itertools
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tqdm import tqdm

from buddymoe_ray import LLM, EngineConfig, SamplingParams
from buddymoe_ray.cache.disk import DiskReader
from buddymoe_ray.engine import engine as engine_module
from buddymoe_ray.engine.account import Account
from buddymoe_ray.engine.chooser import SamplingChooser
from buddymoe_ray.engine.detokenize import IncrementalDetokenizer
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.engine.guard import GuardWork
from buddymoe_ray.engine.replay import Recorder
from buddymoe_ray.engine.sequence import Sequence
from buddymoe_ray.types import GenerationRequest, TokenEvent

PROMPTS = {"first": (5, 6, 7), "victim": (8, 9, 10, 11), "last": (12, 13)}
OPTIONS: dict[str, Any] = {"memory": "30%", "max_model_len": 64, "max_running": 4, "guard_share": 1.0}


def request(name: str, **changes: Any) -> GenerationRequest:
    sampling = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    return GenerationRequest(**{"request_id": name, "prompt_token_ids": PROMPTS[name], "sampling": sampling} | changes)


@pytest.fixture(scope="module", params=["packed", "solo"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    made = Engine.from_config(EngineConfig(**OPTIONS, mode="fast", batching=request.param))
    yield made
    made.close()


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("builtin:tiny", **(OPTIONS | {"guard_share": 0.0}), mode="exact") as made:
        yield made


def told(events: list[TokenEvent]) -> dict[str, tuple[str | None, tuple[int, ...]]]:
    """How each request ended, and its tokens."""
    names = {event.request_id for event in events}
    assert all(sum(e.request_id == name and e.finish_reason is not None for e in events) == 1 for name in names)
    reasons = {e.request_id: e.finish_reason for e in events if e.finish_reason is not None}
    return {n: (reasons[n], tuple(t for e in events if e.request_id == n for t in e.token_ids)) for n in names}


def run(engine: Engine, **changes: Any) -> dict[str, tuple[str | None, tuple[int, ...]]]:
    """All three requests; `changes` are the victim's."""
    for name in PROMPTS:
        engine.add(request(name, **(changes if name == "victim" else {"mode": "exact"})))
    return told(engine.drain())


def clean(engine: Engine) -> None:
    engine.cache.check_integrity()
    engine._scheduler.check_integrity()
    seen = engine.snapshot()
    assert (seen.running, seen.waiting, seen.free_kv_blocks) == (0, 0, seen.total_kv_blocks)
    assert not engine.has_work() and not engine.cache.store.tables.lease.any()


class Broken(Exception):
    """None of ours."""


def breaking(owner: Any, name: str, when: Callable[..., bool], error: BaseException) -> Callable[..., Any]:
    """The method, raising before it does anything where `when(*arguments)`."""
    was = getattr(owner, name)

    def call(*arguments: Any, **keywords: Any) -> Any:
        if when(*arguments, **keywords):
            raise error
        return was(*arguments, **keywords)

    return call


def is_victim(*arguments: Any, **_: Any) -> bool:
    """Whether anything among the arguments is the victim, or belongs to it."""
    for one in arguments:
        many = one if isinstance(one, list | tuple) else [one]
        for item in many:
            item = getattr(item, "seq", item)
            if getattr(item, "request_id", None) == "victim" or getattr(item, "victim", False):
                return True
    return False


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (engine_module, "terms_of"),
        (SamplingChooser, "choose"),
        (Sequence, "append"),
        (Sequence, "advance"),
        (Sequence, "usage"),
        (GuardWork, "watch"),
    ],
)
def test_what_breaks_on_one_sequence_ends_that_one(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    whole = run(engine)
    monkeypatch.setattr(owner, name, breaking(owner, name, is_victim, Broken("of one request")))
    after = run(engine)
    assert after["victim"][0] == "error"
    assert {n: after[n] for n in ("first", "last")} == {n: whole[n] for n in ("first", "last")}
    monkeypatch.undo()
    assert run(engine) == whole
    clean(engine)


@pytest.mark.parametrize(
    ("part", "name"),
    [("account", "begin"), ("account", "settle"), ("_detokenizer", "push"), ("_stop", "push")],
)
def test_what_breaks_in_a_part_of_one_sequence_ends_that_one(engine: Engine, part: str, name: str) -> None:
    whole = run(engine)
    for who in PROMPTS:
        engine.add(request(who, **({} if who == "victim" else {"mode": "exact"})))
    engine.step()
    broken = getattr(engine._scheduler._admitted["victim"], part)
    setattr(broken, name, breaking(broken, name, lambda *_, **__: True, Broken("in a part")))
    first = {"first": whole["first"][1][:1], "last": whole["last"][1][:1]}
    after = told(engine.drain())
    assert after["victim"][0] == "error"
    for who, begun in first.items():
        assert (after[who][0], begun + after[who][1]) == whole[who]
    clean(engine)


def test_a_record_that_breaks_costs_its_request(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(engine)
    for name in ("add", "text"):
        monkeypatch.setattr(Recorder, name, breaking(Recorder, name, lambda *_, **__: True, Broken("recording")))
        after = run(engine, record=True)
        assert after["victim"][0] == "error" and after["first"] == whole["first"] and after["last"] == whole["last"]
        monkeypatch.undo()
    clean(engine)


@pytest.mark.parametrize("name", ["_go_on", "ended"])
def test_a_guard_that_breaks_costs_a_sample(engine: Engine, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    whole = run(engine)
    monkeypatch.setattr(GuardWork, name, breaking(GuardWork, name, lambda *_, **__: True, Broken("guarding")))
    if name == "_go_on":
        monkeypatch.setattr(GuardWork, "has_work", lambda self: bool(engine._scheduler.has_work()))
    assert run(engine) == whole
    monkeypatch.undo()
    assert run(engine) == whole
    clean(engine)


@pytest.mark.parametrize("name", ["prefill", "decode"])
@pytest.mark.parametrize("alone", [False, True])
def test_a_pass_that_one_sequence_breaks_is_computed_without_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, name: str, alone: bool
) -> None:
    whole = run(engine)
    runner = engine._runner
    monkeypatch.setattr(runner, name, breaking(runner, name, is_victim, Broken("a pass")))
    if alone:
        engine.add(request("victim"))
        assert told(engine.drain())["victim"][0] == "error"
    else:
        after = run(engine)
        assert after["victim"][0] == "error"
        assert {n: after[n] for n in ("first", "last")} == {n: whole[n] for n in ("first", "last")}
    monkeypatch.undo()
    assert run(engine) == whole
    clean(engine)


def test_an_unreadable_expert_ends_those_that_need_it(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    needed: dict[str, set[tuple[int, int]]] = {}
    for name in PROMPTS:
        mine = needed[name] = set[tuple[int, int]]()
        engine._step.observer = lambda layer, _, ids_TK, __, mine=mine: mine.update(
            (layer, expert) for expert in ids_TK.unique().tolist()
        )
        engine.add(request(name, mode="exact"))
        engine.drain()
    engine._step.observer = None
    own = needed["victim"] - needed["first"] - needed["last"]
    whole = run(engine, mode="exact")
    pieces = [piece for key, pieces in engine.cache.layout.pieces.items() if key[:2] in own for piece in pieces]
    bad, read = {(piece.path, piece.offset) for piece in pieces}, DiskReader._read_through

    def failing(self: DiskReader, buffer: Any, path: str, offset: int, targets: Any) -> None:
        if (path, offset) in bad:
            raise OSError(errno.EIO, "input/output error")
        read(self, buffer, path, offset, targets)

    monkeypatch.setattr(DiskReader, "_read_through", failing)
    after = run(engine, mode="exact")
    assert own and after["victim"][0] == "error"
    assert {n: after[n] for n in ("first", "last")} == {n: whole[n] for n in ("first", "last")}
    monkeypatch.undo()
    assert run(engine, mode="exact") == whole
    clean(engine)


# --- interrupts

INNER: list[tuple[str, Callable[[LLM], Any], str]] = [
    ("schedule", lambda llm: llm.engine._scheduler, "schedule"),
    ("admit", lambda llm: llm.engine._scheduler._allocator, "allocate"),
    ("prefill", lambda llm: llm.engine._runner, "prefill"),
    ("decode", lambda llm: llm.engine._runner, "decode"),
    ("sample", lambda llm: SamplingChooser, "choose"),
    ("append", lambda llm: Sequence, "append"),
    ("account", lambda llm: Account, "settle"),
    ("detokenise", lambda llm: IncrementalDetokenizer, "push"),
    ("stream", lambda llm: llm.engine.cache, "stream"),
    ("claim", lambda llm: llm.engine.cache.store.tables, "claim"),
    ("submit", lambda llm: DiskReader, "submit"),
    ("finish", lambda llm: llm.engine.cache._loads, "_finish"),
    ("add", lambda llm: llm.engine, "add"),
]


@pytest.mark.parametrize(("owner", "name"), [inner[1:] for inner in INNER], ids=[inner[0] for inner in INNER])
def test_an_interrupt_anywhere_leaves_nothing(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, owner: Callable[[LLM], Any], name: str
) -> None:
    whole = generate(llm)
    patched, last = owner(llm), -1
    for at in (*range(6), *range(6, 60, 9)):
        monkeypatch.setattr(patched, name, breaking(patched, name, turn(at), KeyboardInterrupt()))
        try:
            assert generate(llm) == whole, "an interrupt was swallowed"
            break
        except KeyboardInterrupt:
            last = at
        finally:
            monkeypatch.undo()
        clean(llm.engine)
        assert generate(llm) == whole
    assert last >= 0, f"{name} is never called"


def turn(at: int) -> Callable[..., bool]:
    """True on the call number `at`."""
    turns = itertools.count()
    return lambda *_, **__: next(turns) == at


def generate(llm: LLM, **options: Any) -> list[tuple[int, ...]]:
    prompts = list(PROMPTS.values())[1:]
    return [result.token_ids for result in llm.generate(prompts, max_tokens=2, ignore_eos=True, **options)]


def test_a_ctrl_c_waits_for_the_step_and_a_second_one_does_not(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, ended = generate(llm), []
    decode = type(llm.engine._runner).decode

    def interrupted(self: Any, *arguments: Any) -> Any:
        for _ in range(presses[0]):
            signal.raise_signal(signal.SIGINT)
        ended.append(decode(self, *arguments))
        return ended[-1]

    monkeypatch.setattr(type(llm.engine._runner), "decode", interrupted)
    presses = [0]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job begins with it ignored
    try:
        for presses[0], through in ((1, 1), (2, 0)):
            ended.clear()
            with pytest.raises(KeyboardInterrupt):
                generate(llm)
            assert len(ended) == through and signal.getsignal(signal.SIGINT) is signal.default_int_handler
            clean(llm.engine)
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.undo()
    assert generate(llm) == whole


def test_an_exception_in_a_callback_leaves_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generate(llm)
    monkeypatch.setattr("buddymoe_ray.engine.llm.tqdm.update", breaking(tqdm, "update", lambda *_: True, Broken("bar")))
    with pytest.raises(Broken):
        generate(llm, progress=True)
    monkeypatch.undo()
    clean(llm.engine)

    def observe(*_: object) -> None:
        raise KeyboardInterrupt

    llm.engine._step.observer = observe
    with pytest.raises(KeyboardInterrupt):
        generate(llm)
    llm.engine._step.observer = None
    clean(llm.engine)
    assert generate(llm) == whole
