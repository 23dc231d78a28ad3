"""Ray actors around the expert memory: one HostStore per node, one Placement per service.

Control plane only: a call per window and per worker's start, never one per token. Bytes are in shared memory, tokens
travel over links. Each actor is a plain class, tested without ray, in a thin ray wrapper.
"""

from buddymoe_ray.actors.host_store import HostStore, KeeperOptions, Planner
from buddymoe_ray.actors.node import MemoryOptions, NodeMemory, placement_map, store_statuses
from buddymoe_ray.actors.placement import Placement, PlacementOptions
from buddymoe_ray.actors.words import Directive, NodeReport, StoreStatus

__all__ = [
    "Directive",
    "HostStore",
    "KeeperOptions",
    "MemoryOptions",
    "NodeMemory",
    "NodeReport",
    "Placement",
    "PlacementOptions",
    "Planner",
    "StoreStatus",
    "placement_map",
    "store_statuses",
]
