"""Workers that read each other's device slots: in two processes, one killed at any point, and two engines' tokens."""

from __future__ import annotations

import gc
import multiprocessing
import random
import time
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from experts_on_disk import make_layout, plan_of
from slot_churn import DIGEST, SLOT, churn, open_peers
from test_cache_stream import access

from buddymoe_ray.cache import DiskReader, ExpertCache, SlotPeers, open_private
from buddymoe_ray.cache.shared.calls import ReadLost
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.device import open_device
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.residency.sharing import Sharing
from buddymoe_ray.types import ExpertKey, GenerationRequest, SamplingParams


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


def test_what_is_read_of_a_worker_that_is_killed_is_right_or_refused() -> None:
    tag, rng, target = uuid.uuid4().hex, random.Random(1), torch.empty(SLOT, dtype=torch.uint8)
    mine, right, lost = open_peers(tag, 1), 0, 0
    for seed in range(2):
        worker = multiprocessing.get_context("spawn").Process(target=churn, args=(tag, seed), daemon=True)
        worker.start()
        until(lambda: mine.count == 1)
        began, kill_after, before = time.monotonic(), rng.uniform(0.3, 0.8), right
        while worker.is_alive() or mine.count:  # what a dead one had is right too
            assert time.monotonic() < began + 60, f"{right} right, {lost} refused, and no end"
            expert = rng.randrange(6)
            read = mine.read(ExpertKey(1, expert), target)
            if read is not None:
                try:
                    read.wait()
                except ReadLost:
                    lost += 1
                else:
                    assert bool((target == expert).all()), "bytes of two experts"
                    right += 1
            if right > before and time.monotonic() > began + kill_after:
                worker.kill()
        worker.join()
        assert mine.read(ExpertKey(1, 0), target) is None
    mine.close()
    assert right > 20 and lost > 0, f"{right} right, {lost} refused: no slot was used anew while it was read"


def test_memory_of_a_generation_is_unmapped_when_there_is_another() -> None:
    tag, target, key = uuid.uuid4().hex, torch.empty(SLOT, dtype=torch.uint8), ExpertKey(0, 5)
    reader, owner = open_peers(tag, 1), open_peers(tag, 2)
    until(lambda: reader.count == 1 and owner.count == 1)
    owner.memory.fill_(7)
    owner.publish(1, key)
    under_way = reader.read(key, target)
    assert under_way is not None
    mapped = weakref.ref(under_way.source)
    owner.close()
    with pytest.raises(ReadLost, match="used anew"):
        under_way.wait()
    assert reader.read(key, target) is None, "before the thread has heard of it"
    until(lambda: reader.count == 0)
    del under_way
    gc.collect()
    assert mapped() is None, "it is still mapped"
    owner = open_peers(tag, 2)
    until(lambda: reader.count == 1)
    assert reader.read(key, target) is None
    owner.memory.fill_(8)
    owner.publish(0, key)
    again = reader.read(key, target)
    assert again is not None
    again.wait()
    assert bool((target == 8).all())
    reader.close()
    owner.close()


def test_caches_read_what_the_other_has_and_every_byte_is_right(tmp_path: Path) -> None:
    layout, truth = make_layout(tmp_path)
    rng, tag = random.Random(2), uuid.uuid4().hex
    plan = plan_of(layout, 8)
    device, caches = open_device("interpret"), list[ExpertCache]()
    for _ in range(2):
        shared = SlotPeers(device, slots=plan.slots_total, slot_bytes=layout.slot_bytes, digest=DIGEST, tag=tag)
        reader = DiskReader(depth=4, buffer_bytes=8192)
        caches.append(open_private(layout, plan, reader=reader, device=device, host_slots=4, peers=shared))
    for _ in range(400):
        cache, layer = rng.choice(caches), rng.randrange(3)
        access(cache, truth, layer, sorted(rng.sample(range(6), rng.randint(1, 4))), rng.random() < 0.3)
        cache.check_integrity()
    found = [cache.stats() for cache in caches]
    assert all(stats.peer_hits > 20 for stats in found), found
    read = sum(stats.bytes_requested_disk for stats in found) + sum(stats.host_hits for stats in found)
    assert read < sum(stats.misses for stats in found) * layout.expert_bytes
    for cache in caches:
        cache.close()


def test_what_an_engine_lacks_is_read_of_another_and_its_tokens_are_the_same() -> None:
    config = EngineConfig(memory="50%", device="interpret", dtype="float32")
    sharing = Sharing(workers=2, tag=uuid.uuid4().hex)
    answers, read = list[list[int]](), list[int]()
    engines = [Engine.from_config(config, text=False, sharing=sharing) for _ in range(2)]
    for engine in engines:
        read.append(engine.cache.stats().bytes_requested_disk)
        sampling = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
        engine.add(GenerationRequest(request_id="r", prompt_token_ids=(5, 6), sampling=sampling))
        answers.append([token for event in engine.drain() for token in event.token_ids])
    alone = Engine.from_config(EngineConfig(memory="50%", dtype="float32"), text=False)
    alone.add(GenerationRequest(request_id="r", prompt_token_ids=(5, 6), sampling=sampling))
    assert answers == 2 * [[token for event in alone.drain() for token in event.token_ids]]
    assert read[0] == read[1] > 0, f"{read} bytes read from disk to fill the slots"
    assert engines[1].cache.stats().peer_hits > 0, "nothing that the first has was read there"
    for engine in (*engines, alone):
        engine.close()
