"""The seam between a cache and where its slots are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from buddymoe_ray.cache.shared.shape import StoreShape
from buddymoe_ray.cache.shared.tables import SharedTables
from buddymoe_ray.types import ExpertLayout, SlotPlan

__all__ = ["Store"]


class Store(Protocol):
    """Slots, and who holds what: a node's `SharedStore`, or a `PrivateStore` where one is `alone`."""

    @property
    def alone(self) -> bool: ...
    @property
    def layout(self) -> ExpertLayout: ...
    @property
    def plan(self) -> SlotPlan: ...
    @property
    def shape(self) -> StoreShape: ...
    @property
    def tables(self) -> SharedTables: ...
    @property
    def bytes_C(self) -> npt.NDArray[np.uint8]:
        """`[C, slot_bytes]` of slots on the CPU."""

    @property
    def tensor_C(self) -> Tensor:
        """`[C, slot_bytes]` uint8, wherever they are."""

    @property
    def generation(self) -> Any:
        """How often each slot's content changed; indexed by slot."""

    def tensors(self, slot: int) -> Mapping[str, Tensor]: ...
    def address(self, slot: int) -> int: ...
    def give_back(self, first: int) -> None: ...
    def take_back(self, slot: int) -> None: ...
    def close(self) -> None: ...
