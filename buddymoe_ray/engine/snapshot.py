"""An engine's counters at one moment, put together from its parts. Reads, decides nothing; safe from any thread."""

from __future__ import annotations

import numpy as np

from buddymoe_ray.engine.account import StepTotals
from buddymoe_ray.engine.scheduler import Scheduler
from buddymoe_ray.observe import CalibrationSnapshot, EngineSnapshot, ExpertMap, GuardSnapshot, RequestsSnapshot
from buddymoe_ray.residency.tier import ExpertTier
from buddymoe_ray.types import ExpertKey

__all__ = ["engine_snapshot", "expert_map"]


def engine_snapshot(
    scheduler: Scheduler,
    experts: ExpertTier,
    spent: StepTotals,
    *,
    steps: int,
    guard: GuardSnapshot,
    calibration: CalibrationSnapshot,
    requests: RequestsSnapshot,
) -> EngineSnapshot:
    """What `Engine.snapshot` tells."""
    stats, layout = experts.cache.stats(), experts.cache.layout
    counts, ahead = layout.experts_per_layer, experts.ahead
    return EngineSnapshot(
        running=scheduler.num_running,
        waiting=scheduler.num_waiting,
        free_kv_blocks=scheduler.free_blocks,
        total_kv_blocks=scheduler.num_blocks,
        preemptions=scheduler.preemptions,
        prompt_tokens=scheduler.prompt_tokens,
        cached_tokens=scheduler.cached_tokens,
        steps=steps,
        hits=stats.hits,
        misses=stats.misses,
        bytes_loaded_device=stats.bytes_loaded_device,
        bytes_read_disk=stats.bytes_read_disk,
        stall_seconds=stats.stall_seconds,
        peer_slot_reads=stats.peer_hits,
        peer_helped_reads=stats.peer_helped,
        peer_taken_back=stats.peer_taken_back,
        access_hits=spent.hits,
        access_peer=spent.peer,
        access_host=spent.host,
        access_fetched=spent.fetched,
        standins=spent.standins,
        expected_rise=spent.expected_rise,
        read_ahead_useful_bytes=0 if ahead is None else ahead.gain.useful * layout.expert_bytes,
        read_ahead_wasted_bytes=0 if ahead is None else ahead.gain.wasted * layout.expert_bytes,
        residency=sum(int(experts.cache.resident_mask(layer).sum()) for layer in range(len(counts))) / sum(counts),
        guard=guard,
        calibration=calibration,
        requests=requests,
    )


def expert_map(experts: ExpertTier) -> ExpertMap:
    """What `Engine.expert_map` tells: costs a page's reader a millisecond or two, and steps nothing."""
    cache, counts = experts.cache, experts.cache.layout.experts_per_layer
    cells_LE = [cache.resident_mask(layer).astype(np.uint8) for layer in range(len(counts))]
    for key in {} if experts.setup is None else experts.setup.kind_of:
        cells_LE[key.layer][key.expert] |= 2
    if (host := cache.host) is not None:
        for layer, count in enumerate(counts):
            cells_LE[layer] |= (
                np.array([host.holds(ExpertKey(layer, expert)) for expert in range(count)], np.uint8) << 2
            )
    for layer, (cells_E, count) in enumerate(zip(cells_LE, counts, strict=True)):
        cells_E |= np.rint(31 * np.sqrt(cache.usage.shares(layer)[:count])).astype(np.uint8) << 3
    return ExpertMap(experts_per_layer=tuple(counts), cells=np.concatenate(cells_LE).tobytes())
