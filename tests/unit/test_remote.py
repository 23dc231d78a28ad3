"""Two nodes on one machine, linked: experts computed by a peer are exact, and a peer that is away costs no token."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from link_proxy import DelayProxy

from buddymoe_ray.cache import DiskReader, ExpertCache
from buddymoe_ray.cache.shared import Move, Mover, SharedStore
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.residency.peering import RemoteExperts
from buddymoe_ray.residency.sharing import Sharing
from buddymoe_ray.types import ExpertKey, GenerationRequest, Mode, SamplingParams, Usage

PROMPTS = [(5, 6, 7, 8, 9), (100, 200, 300), (44, 45)]
SECRET = "a secret of this test's own nodes"


def run(engine: Engine, tag: str, count: int = 24) -> tuple[list[list[int]], list[Usage]]:
    for at, prompt in enumerate(PROMPTS):
        sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        engine.add(GenerationRequest(request_id=f"{tag}-{at}", prompt_token_ids=prompt, sampling=sampling))
    made: list[list[int]] = [[] for _ in PROMPTS]
    usages = []
    for event in engine.drain():
        made[int(event.request_id.split("-")[1])].extend(event.token_ids)
        usages += [event.usage] if event.usage else []
    return made, usages


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    engine = Engine.from_config(EngineConfig(memory="100%"), text=False)
    found, _ = run(engine, "e")
    engine.close()
    return found


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Callable[..., tuple[Engine, Engine]]]:
    (tmp_path / "shm").mkdir()
    opened: list[Engine] = []

    def start(*, here: str = "25%", there: str = "60%", mode: Mode = "exact") -> tuple[Engine, Engine]:
        for tag, memory in (("n1", here), ("n2", there)):
            sharing = Sharing(workers=1, tag=tag, folder=tmp_path / "shm", linked=True, secret=SECRET)
            config = EngineConfig(memory=memory, mode=mode, guard_share=0.0)
            opened.append(Engine.from_config(config, text=False, sharing=sharing))
            assert opened[-1].link_address == "", "nothing listens before there is anybody to come"
            opened[-1].link()
            opened[-1].link()
        return opened[0], opened[1]

    yield start
    for engine in opened:
        engine.close()
    assert not list((tmp_path / "shm").iterdir())


def remote(engine: Engine) -> RemoteExperts:
    assert engine._peering is not None
    return engine._peering._remote


def slow_disk(engine: Engine, seconds: float = 5.0) -> None:
    """As if this node's disk took so long for an expert."""
    remote(engine)._fetch_seconds = lambda: seconds


def acquainted(engine: Engine) -> None:
    end = time.monotonic() + 30
    while not any(peer.contents_LE is not None for peer in remote(engine)._peers.values()):
        assert time.monotonic() < end, "the peer's table of contents did not come"
        time.sleep(0.01)


def test_a_peer_computes_what_is_missing_exactly(
    nodes: Callable[..., tuple[Engine, Engine]], expected: list[list[int]]
) -> None:
    here, there = nodes()
    here.set_peers({"n2": there.link_address})
    slow_disk(here)
    acquainted(here)
    got, usages = run(here, "a")
    assert got == expected
    assert sum(usage.peer for usage in usages) > 50, usages
    assert all(usage.hits + usage.fetched + usage.peer == 23 * 4 * 4 for usage in usages)
    assert here.snapshot().access_peer == sum(usage.peer for usage in usages)
    row_bytes = 4 * min(here.cache.layout.shapes["down_proj"])
    assert here.snapshot().link_bytes >= 2 * row_bytes * here.snapshot().access_peer and not there.snapshot().link_bytes
    assert run(there, "b")[0] == expected  # the one that computed for it goes on


def test_another_worker_and_a_mover_change_what_is_resident_while_peers_are_asked(
    nodes: Callable[..., tuple[Engine, Engine]], expected: list[list[int]]
) -> None:
    """A layer is decided on one look: what it counted as hits is not asked for, whatever became of it since."""
    here, there = nodes(here="40%", there="100%")
    here.set_peers({"n2": there.link_address})
    slow_disk(here)
    acquainted(here)
    cache = here.cache
    assert isinstance(cache.store, SharedStore)
    spec, done = cache.store, threading.Event()
    experts = [ExpertKey(la, e) for la, count in enumerate(cache.layout.experts_per_layer) for e in range(count)]

    def disturb(seed: int) -> None:
        rng = random.Random(seed)
        store = SharedStore(spec.path, spec.layout, spec.plan, spec._digest)
        other = ExpertCache(store, reader=DiskReader(depth=1))
        mover = Mover(store, DiskReader(depth=1), bytes_per_second=1e12)
        while not done.is_set():
            key, evict = rng.sample(experts, 2)
            mover.run([Move(load=key, evict=evict)])
            for _ in other.stream(key.layer, [evict.expert], protect_residency=False):
                pass
        mover.close()
        other.close()

    threads = [threading.Thread(target=disturb, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    try:
        got, usages = run(here, "a", count=10)
    finally:
        done.set()
        for thread in threads:
            thread.join(30)
    assert got == [tokens[:10] for tokens in expected] and sum(usage.peer for usage in usages)
    assert all(usage.hits + usage.fetched + usage.peer == 9 * 4 * 4 for usage in usages)
    cache.check_integrity()


def test_a_dead_peer_costs_no_token(nodes: Callable[..., tuple[Engine, Engine]], expected: list[list[int]]) -> None:
    here, there = nodes()
    proxy = DelayProxy(there.link_address)
    here.set_peers({"n2": proxy.address})
    slow_disk(here, 0.2)
    acquainted(here)
    assert run(here, "a")[0] == expected
    proxy.cut()
    got, usages = run(here, "b")
    assert got == expected
    proxy.close()
    got, usages = run(here, "c")
    assert got == expected and sum(usage.peer for usage in usages) == 0


def test_a_slow_peer_is_not_asked(nodes: Callable[..., tuple[Engine, Engine]], expected: list[list[int]]) -> None:
    """The disk answers sooner: exact waits for it, not for a link of 50 ms."""
    here, there = nodes()
    proxy = DelayProxy(there.link_address, delay_seconds=0.05)
    here.set_peers({"n2": proxy.address})
    acquainted(here)
    slow_disk(here, 0.01)
    got, usages = run(here, "a")
    assert got == expected and sum(usage.peer for usage in usages) == 0
    proxy.close()


def test_a_wrong_secret_shares_nothing(
    nodes: Callable[..., tuple[Engine, Engine]], expected: list[list[int]], tmp_path: Path
) -> None:
    here, _ = nodes()
    stranger = Sharing(workers=1, tag="n3", folder=tmp_path / "shm", linked=True, secret="another secret altogether")
    other = Engine.from_config(EngineConfig(memory="60%"), text=False, sharing=stranger)
    other.link()
    here.set_peers({"n3": other.link_address})
    slow_disk(here)
    time.sleep(1.0)
    assert not any(peer.contents_LE is not None for peer in remote(here)._peers.values())
    got, usages = run(here, "a")
    assert got == expected and sum(usage.peer for usage in usages) == 0
    other.close()


@pytest.mark.parametrize("mode", ["fast", "bounded"])
def test_stand_ins_answer_without_asking_anybody(nodes: Callable[..., tuple[Engine, Engine]], mode: Mode) -> None:
    here, there = nodes(mode=mode)
    proxy = DelayProxy(there.link_address, delay_seconds=0.05)
    here.set_peers({"n2": proxy.address})
    slow_disk(here)
    acquainted(here)
    _, usages = run(here, "a")
    assert all(usage.standins.total > 0 for usage in usages)
    if mode == "fast":
        assert all(usage.fetched + usage.peer == 0 for usage in usages)
    proxy.close()
