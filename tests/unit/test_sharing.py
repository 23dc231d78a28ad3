"""Engines that share one node's experts: the same tokens, one copy of everything, within the budget of all."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from buddymoe_ray.cache.shared import SharedStore
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.errors import BudgetError, ConfigError
from buddymoe_ray.residency.sharing import Sharing, StoreSpec
from buddymoe_ray.types import GenerationRequest, Mode, SamplingParams, TokenEvent

PROMPTS = [(5, 6, 7, 8, 9), (100, 200, 300), (44, 45), (1000, 1001, 1002, 1003, 1004, 1005)]


def tokens(engine: Engine, *, tag: str = "r", mode: Mode | None = None, count: int = 24) -> list[list[int]]:
    for at, prompt in enumerate(PROMPTS):
        engine.add(
            GenerationRequest(
                request_id=f"{tag}-{at}",
                prompt_token_ids=prompt,
                sampling=SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True),
                mode=mode,
            )
        )
    made: list[list[int]] = [[] for _ in PROMPTS]
    for event in engine.drain():
        made[int(event.request_id.split("-")[1])].extend(event.token_ids)
    return made


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    engine = Engine.from_config(EngineConfig(memory="100%"), text=False)
    found = tokens(engine)
    engine.close()
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shm").mkdir()
    return tmp_path / "shm"


def opened(folder: Path, count: int, *, memory: str = "25%", mode: Mode = "exact", **options: object) -> list[Engine]:
    sharing = Sharing(workers=count, folder=folder, **options)  # type: ignore[arg-type]
    config = EngineConfig(memory=memory, mode=mode, guard_share=0.0)
    return [Engine.from_config(config, text=False, sharing=sharing) for _ in range(count)]


@pytest.mark.parametrize(("workers", "memory"), [(1, "25%"), (2, "25%"), (3, "20%"), (2, "60%")])
def test_exact_tokens_at_once(folder: Path, expected: list[list[int]], workers: int, memory: str) -> None:
    engines = opened(folder, workers, memory=memory)
    results: dict[int, list[list[int]]] = {}
    threads = [
        threading.Thread(target=lambda at=at, engine=engine: results.update({at: tokens(engine)}))
        for at, engine in enumerate(engines)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [results.get(at) for at in range(workers)] == [expected] * workers
    for engine in engines:
        engine.cache.check_integrity()
        engine.close()
    assert not list(folder.iterdir()), "shared memory is left behind"


def test_one_copy_within_the_budget_of_all(folder: Path) -> None:
    first, second = opened(folder, 2, mode="fast")
    total = first.cache.layout.total_bytes
    files = {path.suffix: path.stat().st_size for path in folder.iterdir()}
    assert set(files) == {".experts", ".records"}
    assert first.cache.device_bytes == second.cache.device_bytes
    held = first.cache.device_bytes + first.standin_bytes
    assert held + first.cache.plan.overhead_bytes - first.standin_bytes <= 2 * total // 4
    alone = opened(folder, 1, mode="fast")[0]
    shared_full = sum(first.cache.plan.layer_slots)
    assert shared_full > 2 * sum(alone.cache.plan.layer_slots), "the records' one copy must leave room for experts"
    for engine in (first, second, alone):
        engine.close()


def test_what_one_worker_reads_the_other_does_not(folder: Path, expected: list[list[int]]) -> None:
    first, second = opened(folder, 2, memory="60%")
    assert tokens(first) == expected
    before = second.snapshot().bytes_read_disk
    first_read = first.snapshot().bytes_read_disk
    assert tokens(second) == expected
    assert second.snapshot().bytes_read_disk - before < first_read / 2
    first.close()
    second.close()


@pytest.mark.parametrize("movable", [False, True])
def test_fast_reads_nothing_in_decode(folder: Path, movable: bool) -> None:
    engines = opened(folder, 2, mode="fast", movable=movable)
    for engine in engines:
        engine.add(
            GenerationRequest(
                request_id="x",
                prompt_token_ids=PROMPTS[3],
                sampling=SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True),
            )
        )
        events: list[TokenEvent] = engine.step()
        before = engine.snapshot().bytes_read_disk
        events += engine.drain()
        usage = events[-1].usage
        assert usage is not None and usage.fetched == 0 and usage.standins.total > 0
        assert engine.snapshot().bytes_read_disk == before
    if movable:
        experts = sum(engines[0].cache.layout.experts_per_layer)
        assert engines[0]._setup is not None and len(engines[0]._setup.kind_of) == experts
    for engine in engines:
        engine.close()


def test_the_keeper_hears_of_the_store_before_anyone_attaches(folder: Path) -> None:
    kept: list[StoreSpec] = []

    def keep(spec: StoreSpec) -> None:
        assert not spec.path.exists()
        kept.append(spec)

    engine = opened(folder, 1, keeper=keep)[0]
    store = engine.cache.store
    assert isinstance(store, SharedStore) and kept[0].path == store.path
    engine.close()


def test_workers_must_be_counted() -> None:
    with pytest.raises(ConfigError, match="workers is 0"):
        Sharing(workers=0)


def test_a_budget_too_small_for_all_workers_says_so(folder: Path) -> None:
    with pytest.raises(BudgetError, match=r"hint: use --memory"):
        opened(folder, 4, memory="1%")
