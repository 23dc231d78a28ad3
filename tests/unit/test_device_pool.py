"""Slots of GPUs that are none, as pools of a placement: what is asked of them decides what is kept where, for all."""

from __future__ import annotations

import uuid
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
from test_fake_gpus import EXPERTS, LAYERS, answer, cache_of, config_of, held, peers_of
from test_slot_peers import until

from buddymoe_ray.actors.node import pool_report
from buddymoe_ray.actors.placement import Placement, PlacementOptions
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.models.synth import synth_checkpoint
from buddymoe_ray.residency.device_pool import DevicePool
from buddymoe_ray.residency.sharing import Sharing

MEMORY = ("95%", "80%")  # of each


class Service:
    """Engines of one node, and the placement that they report to."""

    def __init__(self, model: str, stack: ExitStack) -> None:
        self.pools, self.epochs, self.now = list[DevicePool](), [0] * len(MEMORY), 0.0
        tag = uuid.uuid4().hex
        sharing = Sharing(workers=len(MEMORY), tag=tag, placer=self.pools.append)
        configs = [config_of(model, memory) for memory in MEMORY]
        self.engines = [
            stack.enter_context(closing(Engine.from_config(config, text=False, sharing=sharing))) for config in configs
        ]
        until(lambda: all(peers_of(cache_of(engine)) == len(MEMORY) - 1 for engine in self.engines))
        options = PlacementOptions(window_seconds=1.0, bytes_per_second=1e12)
        self.placement = Placement(options, clock=lambda: self.now)

    def windows(self, count: int, hot: list[int]) -> None:
        """Each layer is asked for the hot experts in every step, and for one of the others in turn."""
        others = [expert for expert in range(EXPERTS) if expert not in hot]
        for _ in range(count):
            for step in range(6):
                for engine in self.engines:
                    for layer in range(LAYERS):
                        ids = np.array([*hot, others[step % len(others)]])
                        cache_of(engine).count(layer, ids)
                        for _leases in cache_of(engine).stream(layer, ids.tolist(), protect_residency=False):
                            pass
            self.now += 1.0
            for at, pool in enumerate(self.pools):
                report = pool_report(pool, name=f"n/{at}", machine="n", epoch=self.epochs[at])
                directive = self.placement.report(report)
                if directive.epoch > self.epochs[at]:
                    self.epochs[at] = directive.epoch
                    pool.pin(directive.pins, 1e12)
            for engine in self.engines:
                while engine.cache.errands:
                    engine.cache.run_errands(idle=True)
                cache_of(engine).check_integrity()

    def holders(self) -> dict[tuple[int, int], int]:
        found = dict.fromkeys(((la, e) for la in range(LAYERS) for e in range(EXPERTS)), 0)
        for engine in self.engines:
            for key in held(engine):
                found[key] += 1
        return found


def test_what_is_asked_decides_what_devices_of_unequal_memory_hold(tmp_path: Path) -> None:
    model = str(synth_checkpoint("mixtral-tiny", tmp_path / "model"))
    with ExitStack() as stack:
        alone = stack.enter_context(closing(Engine.from_config(config_of(model, "100%", "cpu"), text=False)))
        service = Service(model, stack)
        slots = [pool.slots for pool in service.pools]
        assert slots[0] > slots[1] and LAYERS * EXPERTS < sum(slots) < 2 * LAYERS * EXPERTS
        for hot in ([1, 6], [0, 3]):  # the load changes, and with it what has two copies
            service.windows(6, hot)
            holders = service.holders()
            assert min(holders.values()) == 1, f"{holders}: nobody has some expert"
            assert all(holders[layer, expert] == 2 for layer in range(LAYERS) for expert in hot), holders
            pins = [set(pool.pins) for pool in service.pools]
            assert [len(each) for each in pins] == slots and pins[0] | pins[1] == holders.keys()
            before = [cache_of(engine).stats() for engine in service.engines]
            for engine, prompt in zip(service.engines, ((5, 6), (60, 61)), strict=True):
                assert answer(engine, prompt, 2) == answer(alone, prompt, 2)
            after = [cache_of(engine).stats() for engine in service.engines]
            assert sum(a.peer_hits - b.peer_hits for a, b in zip(after, before, strict=True)) > 0
            assert all(a.bytes_requested_disk == b.bytes_requested_disk for a, b in zip(after, before, strict=True))
