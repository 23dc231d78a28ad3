"""What the layers above need of an expert cache, private or shared: the seam between them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import numpy.typing as npt

from buddymoe_ray.cache.expert_cache import CacheStats
from buddymoe_ray.cache.pool import Glance, Lease
from buddymoe_ray.types import ExpertLayout, SlotPlan

__all__ = ["Experts", "EngineCache"]


Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


class Experts(Protocol):
    """What a MoE block asks for; `ExpertCache` and `SharedExpertCache` give it."""

    def resident_mask(self, layer: int) -> Bools: ...
    def holding(self, layer: int, experts: Sequence[int]) -> AbstractContextManager[Sequence[int]]: ...
    def count(self, layer: int, ids: Ints) -> None: ...
    def glance(self, layer: int) -> Glance | None: ...
    def stream(
        self, layer: int, experts: Sequence[int], *, protect_residency: bool
    ) -> Generator[tuple[Lease, ...], None, None]: ...


class EngineCache(Experts, Protocol):
    """The same with what an engine asks for."""

    @property
    def layout(self) -> ExpertLayout: ...
    @property
    def plan(self) -> SlotPlan: ...
    @property
    def device_bytes(self) -> int: ...
    @property
    def read_mode(self) -> str: ...
    def resident(self, layer: int) -> frozenset[int]: ...
    def warm(self, progress: Callable[..., Iterable[int]] = ...) -> None: ...
    def stats(self) -> CacheStats: ...
    def check_integrity(self) -> None: ...
    def close(self) -> None: ...
