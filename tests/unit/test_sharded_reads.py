"""A prompt's missing experts are read by all workers of a node: how many each link carries, and what becomes of it
where a worker stands still or is killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from prompt_sharer import Sharer, share
from slot_churn import open_peers
from test_fake_gpus import EXPERTS, LAYERS, answer, cache_of, peers_of
from test_slot_peers import until

from buddymoe_ray.cache import NVLINK_NEARER, sharded_reads
from buddymoe_ray.cache.sharded_reads import ShardedReads
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.async_engine import AsyncEngine
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.models.synth import synth_checkpoint
from buddymoe_ray.residency.sharing import Sharing
from buddymoe_ray.types import ExpertKey


def linked(engine: Engine) -> int:
    """Experts that came over the GPU's own link, from the host."""
    stats, layout = cache_of(engine).stats(), engine.cache.layout
    return stats.bytes_loaded_device // layout.expert_bytes - stats.peer_hits


def open_ends() -> int:
    """Sockets and shared memory of this process."""
    links = [os.readlink(each.path) for each in os.scandir("/proc/self/fd") if os.path.islink(each.path)]
    return sum(link.startswith(("socket:", "/memfd:")) for link in links)


def meet(engines: Sequence[Engine]) -> None:
    """All read each other's slots."""
    if len(engines) > 1:
        until(lambda: all(peers_of(cache_of(engine)) == len(engines) - 1 for engine in engines))


def test_of_a_prompt_each_link_carries_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(synth_checkpoint("mixtral-tiny", tmp_path / "model"))
    monkeypatch.setattr(sharded_reads, "LEAST_BYTES", 1)
    monkeypatch.setattr(sharded_reads, "BOX", 1e6)
    sizes = {"model": model, "dtype": "float32", "max_model_len": 64, "max_running": 2}
    with closing(Engine.from_config(EngineConfig(memory="100%", device="cpu", **sizes), text=False)) as alone:
        expected = answer(alone, range(5, 29), 1)
    for gpus in (1, 2, 4):
        config = EngineConfig(memory="15%", device="interpret", host_memory="100%", **sizes)
        sharing = Sharing(workers=gpus, tag=uuid.uuid4().hex)
        with ExitStack() as stack:
            engines = [Engine.from_config(config, text=False, sharing=sharing) for _ in range(gpus)]
            for engine in engines[1:]:
                stack.enter_context(closing(AsyncEngine(engine)))
            stack.enter_context(closing(engines[0]))
            meet(engines)
            assert answer(engines[0], range(5, 29), 1) == expected
            carried, stats = [linked(engine) for engine in engines], cache_of(engines[0]).stats()
            assert carried == gpus * [LAYERS * EXPERTS // gpus]
            assert (stats.peer_helped, stats.peer_taken_back) == (LAYERS * EXPERTS * (gpus - 1) // gpus, 0)


def test_what_is_asked_is_asked_until_it_ends_and_only_where_peers_are_nearer() -> None:
    asker, helper = open_peers(tag := uuid.uuid4().hex, 1), open_peers(tag, 1)
    until(lambda: asker.count == 1)
    shards = ShardedReads(asker, sharded_reads.LEAST_BYTES)
    for nearer, part in ((NVLINK_NEARER, [ExpertKey(2, 5), ExpertKey(2, 9)]), (0.0, [])):
        asker.nearer = nearer
        shards.deal(2, [3, 5, 7, 9])
        until(lambda part=part: helper.wanted() == part)
        missing = [ExpertKey(2, expert) for expert in (3, 5, 7, 9)]
        assert shards.due(missing, reading=True) == [key for key in missing if key not in part]
        shards.end()
        until(lambda: not helper.wanted())
        assert shards.due(missing, reading=True) == missing
    asker.close()
    helper.close()


def test_workers_that_are_killed_or_stand_still_cost_a_prompt_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both compute prompts and help each other with them; the other one dies in the middle of it, or is stopped."""
    monkeypatch.setattr(sharded_reads, "LEAST_BYTES", 1)
    monkeypatch.setattr(sharded_reads, "BOX", box := 1e3)
    (tmp_path / "mine").mkdir()
    rng, mine = random.Random(1), Sharer(tmp_path / "mine", tag := uuid.uuid4().hex)
    ends = open_ends()
    for seed, sent in enumerate((signal.SIGKILL, signal.SIGSTOP)):
        (folder := tmp_path / str(seed)).mkdir()
        worker = multiprocessing.get_context("spawn").Process(target=share, args=(folder, tag, box, seed), daemon=True)
        worker.start()
        until(lambda: mine.peers.count == 1)
        helped, loaded, end = mine.cache.stats().peer_helped, 0, time.monotonic() + 30
        while mine.cache.stats().peer_helped < helped + 20 or not loaded:
            mine.some(rng)
            loaded += len(mine.peers.wanted())
            assert time.monotonic() < end, f"helped {mine.cache.stats().peer_helped - helped} times, asked {loaded}"
        if sent == signal.SIGSTOP:
            monkeypatch.setattr(sharded_reads, "BOX", 2.0)
        os.kill(worker.pid or 0, sent)
        before = mine.cache.stats().peer_taken_back
        for _ in range(20):
            mine.some(rng)
        assert sent == signal.SIGKILL or mine.cache.stats().peer_taken_back > before
        worker.kill()
        worker.join()
        # what earlier tests left open may go meanwhile, too
        until(lambda: mine.peers.count == 0 and not mine.peers.wanted() and open_ends() <= ends)
        mine.cache.run_errands(idle=True)
        assert not mine.cache.errands, "a dead worker is helped"
    mine.cache.close()
