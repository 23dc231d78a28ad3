"""Missing experts of a GPU's layer computed by its host: from their bytes in the host tier, by the CPU's kernels.

Rows go to the host and outputs come back, and no slot is taken: `policy.HostCost` says for which misses that is sooner
than their bytes over the link. The most used of them, where it is used more than something that is resident, is brought
behind the answer, one at a time. CPU and GPU round differently, in the last bits: so it is no answer for rows that must
be exact. An expert that cannot be had there is fetched as ever, and what is wrong with it is met there.

Legend: T accesses, E experts, D hidden.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress

import torch
from torch import Tensor

from buddymoe_ray.cache import ExpertCache
from buddymoe_ray.cache.private_store import PrivateStore
from buddymoe_ray.config import EngineConfig, parse_memory
from buddymoe_ray.device import Device, download, upload
from buddymoe_ray.errors import CacheError, ConfigError
from buddymoe_ray.kernels import ExpertLayer, ExpertMath, LowbitFormat
from buddymoe_ray.models.load import LoadedModel
from buddymoe_ray.policy import HostCost
from buddymoe_ray.residency.arithmetic import cpu_layers
from buddymoe_ray.types import ExpertKey

__all__ = ["HostExperts", "open_host_experts"]

log = logging.getLogger(__name__)


class HostExperts:
    """`moe.PeerExperts` by this machine's CPU, for the layers of `cache`, whose slots are on `device`; with `always`
    whatever it takes. Used from the thread that steps; a thread of its own computes."""

    exact = False

    def __init__(
        self, cache: ExpertCache, layers: Sequence[ExpertLayer], device: Device, *, always: bool = False
    ) -> None:
        assert cache.host is not None and isinstance(cache.store, PrivateStore), "slots are apart, above a host tier"
        self._cache, self._host, self._layers, self._device = cache, cache.host, layers, device
        self._peers = cache.store.peers
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="host-compute")
        self._promoted = ExpertKey(0, 0)  # the latest
        row_TD, begin_E = torch.zeros(1, layers[0].hidden, dtype=layers[0].dtype), [self._host.store.address(0)]
        seconds = [self._compute(0, lambda: [row_TD], begin_E, [1])[1] for _ in "12"]  # the first one is cold
        self.cost, self._always = HostCost(seconds[-1]), always
        log.info("an access takes the host %.3g s, while nothing else runs", seconds[-1])

    def able(self, layer: int, accesses_of: Mapping[int, int]) -> Sequence[int]:
        """See moe.PeerExperts: those used least, as far as that pays; none that is on its way, or at a nearer GPU."""
        tables, usage_E, peers = self._cache.store.tables, self._cache.usage.usage_LE[layer], self._peers
        nearer = () if peers is None or peers.nearer <= 0 else peers.experts(layer)
        here = [
            expert
            for expert in sorted(accesses_of, key=lambda expert: float(usage_E[expert]))
            if expert not in nearer and tables.slot_of[layer, expert] < 0 and self._host.holds(ExpertKey(layer, expert))
        ]
        if self._always:
            return here
        return here[: self.cost.count([accesses_of[expert] for expert in here], self._host.copy_seconds)]

    def ask(self, layer: int, rows_of: Mapping[int, Tensor]) -> _Answers:
        """See moe.PeerExperts."""
        slots, sizes = dict[int, int](), [len(rows_TD) for rows_TD in rows_of.values()]
        try:
            for expert in rows_of:
                if (slot := self._lease(ExpertKey(layer, expert))) is not None:
                    slots[expert] = slot
            begin_E = [self._host.store.address(slots[expert]) if expert in slots else -1 for expert in rows_of]
            future = self._thread.submit(self._compute, layer, download(torch.cat([*rows_of.values()])), begin_E, sizes)
        except BaseException:
            for slot in slots.values():
                self._host.release(slot)
            raise
        self._host.lend([*slots.values()], future)

        def collect() -> Mapping[int, Tensor]:
            try:
                y_TD, seconds = future.result()
            finally:
                wait([future])  # an interrupt leaves it running
                self._host.take_back()
            parts = upload(y_TD, self._device.torch).split(sizes)
            found = {expert: y_RD for expert, y_RD in zip(rows_of, parts, strict=True) if expert in slots}
            if found:
                self.cost.note(seconds, sum(map(len, found.values())))
                self._promote(layer, found)
            return found

        return _Answers(collect)

    def _compute(
        self, layer: int, arrive: Callable[[], list[Tensor]], begin_E: Sequence[int], sizes: Sequence[int]
    ) -> tuple[Tensor, float]:
        """`[T, D]` of experts at these addresses, each over so many of the rows that arrive, and the seconds."""
        expert_T1 = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[:, None]
        with torch.inference_mode():
            x_TD = arrive()[0]
            out_TD, began = torch.empty_like(x_TD), time.perf_counter()
            self._layers[layer](x_TD, None, torch.tensor(begin_E, dtype=torch.int64), expert_T1, out_TD)
            return out_TD, time.perf_counter() - began

    def _lease(self, key: ExpertKey) -> int | None:
        """The host slot that has the expert, until it is released; None where it cannot be had."""
        with suppress(CacheError):
            fetched = self._host.fetch(key)
            if fetched is None:
                return None
            slot, read = fetched
            try:
                read.wait()  # another worker evicted it just now, where that takes any time
            except BaseException:
                read.settle()
                self._host.release(slot)
                raise
            return slot
        return None

    def _promote(self, layer: int, answered: Iterable[int]) -> None:
        """Begin to bring the most used, where it will be used more than what goes for it, and nothing is on its way."""
        tables, usage_E, latest = self._cache.store.tables, self._cache.usage.usage_LE[layer], self._promoted
        on_its_way = tables.slot_of[latest.layer, latest.expert] >= 0 and not tables.entry[latest.layer, latest.expert]
        if on_its_way or self._cache.plan.pinned:
            return
        best, held = max(answered, key=lambda e: float(usage_E[e])), tables.key_expert[tables.partition == layer]
        if (usage_E[held[held >= 0]] < usage_E[best]).any() and self._cache.read_ahead(layer, [best]):
            self._promoted = ExpertKey(layer, best)


class _Answers:
    """`moe.PeerAnswers`."""

    def __init__(self, collect: Callable[[], Mapping[int, Tensor]]) -> None:
        self.collect = collect


def open_host_experts(
    config: EngineConfig,
    loaded: LoadedModel,
    maths: list[ExpertMath],
    packed: LowbitFormat | None,
    cache: ExpertCache,
    device: Device,
) -> HostExperts | None:
    """None where it is not wanted, or no expert is ever missing. Raises ConfigError where it is to be `on`, and cannot
    be: the host keeps no experts, the device's memory is the host's, or its kernels do not know what they compute."""
    if config.mode == "exact" or config.host_compute == "off" or cache.plan.fully_resident:
        return None
    kept, layers = parse_memory(config.host_memory, total_expert_bytes=loaded.layout.total_bytes), None
    if device.apart and kept:
        layers = cpu_layers(loaded, maths, packed, config.threads)
    if layers is not None:
        return HostExperts(cache, layers, device, always=config.host_compute == "on")
    if config.host_compute == "on":
        raise ConfigError(
            f"host_compute is 'on' with host_memory {config.host_memory} and device {config.device}, must be beside a "
            "GPU, with host memory, and experts that CPU kernels know. hint: set it to auto"
        )
    return None
