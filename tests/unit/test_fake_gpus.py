"""Workers of a node of GPUs that are none: memory apart, kernels in the interpreter, each other's slots mapped."""

from __future__ import annotations

import random
import uuid
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing

import numpy as np
import pytest
from test_slot_peers import until

from buddymoe_ray.cache import ExpertCache
from buddymoe_ray.cache.sources import HostSource
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.models.synth import synth_checkpoint
from buddymoe_ray.residency.sharing import Sharing
from buddymoe_ray.types import GenerationRequest, SamplingParams

LAYERS, EXPERTS = 3, 8


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(synth_checkpoint("mixtral-tiny", tmp_path_factory.mktemp("fake") / "model"))


def config_of(model: str, memory: str, device: str = "interpret") -> EngineConfig:
    return EngineConfig(model=model, memory=memory, device=device, dtype="float32", max_model_len=64, max_running=2)


def answer(engine: Engine, prompt: Sequence[int], tokens: int = 3) -> list[int]:
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    engine.add(GenerationRequest(request_id="r", prompt_token_ids=tuple(prompt), sampling=sampling))
    return [token for event in engine.drain() for token in event.token_ids]


def cache_of(engine: Engine) -> ExpertCache:
    assert isinstance(engine.cache, ExpertCache)
    return engine.cache


def held(engine: Engine) -> list[tuple[int, int]]:
    """Experts in the layers' own slots."""
    tables = cache_of(engine).store.tables
    own = np.flatnonzero((tables.partition >= 0) & (tables.key_layer >= 0)).tolist()
    return [(int(tables.key_layer[slot]), int(tables.key_expert[slot])) for slot in own]


def peers_of(cache: ExpertCache) -> int:
    """How many workers' slots it reads."""
    source = cache._source
    assert isinstance(source, HostSource) and source.shards is not None, f"{source} has no peers"
    return source.shards.peers.count


@pytest.mark.parametrize(("gpus", "memory"), [(2, "75%"), (8, "50%")])
def test_workers_hold_different_experts_and_read_each_others(mixtral: str, gpus: int, memory: str) -> None:
    sharing = Sharing(workers=gpus, tag=uuid.uuid4().hex)
    with ExitStack() as stack:
        engines = [
            stack.enter_context(closing(Engine.from_config(config_of(mixtral, memory), text=False, sharing=sharing)))
            for _ in range(gpus)
        ]
        until(lambda: all(peers_of(cache_of(engine)) == gpus - 1 for engine in engines))
        alone = stack.enter_context(closing(Engine.from_config(config_of(mixtral, "100%", "cpu"), text=False)))
        copies = Counter(key for engine in engines for key in held(engine))
        assert len(copies) == LAYERS * EXPERTS, "an expert is in nobody's slots"
        assert max(copies.values()) - min(copies.values()) <= 1, f"{copies} are not dealt evenly"
        before = [cache_of(engine).stats() for engine in engines]
        for at, prompt in ((0, (5, 6)), (gpus - 1, (60, 61))):
            assert answer(engines[at], prompt) == answer(alone, prompt)
            assert cache_of(engines[at]).stats().peer_hits > 0, "nothing was read of a peer"
        after, nbytes = [cache_of(engine).stats() for engine in engines], alone.cache.layout.expert_bytes
        read = sum(b.bytes_requested_disk - a.bytes_requested_disk for a, b in zip(before, after, strict=True))
        hits = sum(b.peer_hits - a.peer_hits for a, b in zip(before, after, strict=True))
        assert read < hits * nbytes / 4, f"{read} bytes were read from disk beside {hits} experts of peers"


def test_what_all_use_comes_to_be_in_the_slots_of_all_and_the_rest_in_one(mixtral: str) -> None:
    """Four workers under one load: slots follow it, and no expert leaves the node as long as there is room."""
    sharing = Sharing(workers=4, tag=uuid.uuid4().hex)
    with ExitStack() as stack:
        caches = [
            cache_of(
                stack.enter_context(
                    closing(Engine.from_config(config_of(mixtral, "62.5%"), text=False, sharing=sharing))
                )
            )
            for _ in range(4)
        ]
        until(lambda: all(peers_of(cache) == 3 for cache in caches))
        hot, rng = [1, 6], random.Random(0)
        for _ in range(150):
            for cache in caches:
                ids = np.array([*hot, rng.choice([0, 2, 3, 4, 5, 7])])
                cache.count(1, ids)
                for _leases in cache.stream(1, ids.tolist(), protect_residency=False):
                    pass
                cache.check_integrity()
        there = [cache.resident(1) for cache in caches]
        assert all(set(hot) <= mine for mine in there), f"{there} lack what all use"
        assert set().union(*there) == set(range(EXPERTS)), f"{there}: an expert that is used less left the node"
