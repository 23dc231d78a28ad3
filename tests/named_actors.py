"""A running cluster's HostStores and Placements, found by their names as `actors.node` gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray

from buddymoe_ray.actors.node import NAMESPACE
from buddymoe_ray.actors.words import StoreStatus
from buddymoe_ray.policy import PlacementMap

__all__ = ["placement_handles", "placement_maps", "store_handles", "store_statuses"]


def store_handles() -> list[Any]:
    """Handles of all living HostStores of the cluster."""
    return _handles(lambda name: name.startswith("host-store-"))


def placement_handles(service: str) -> list[Any]:
    """Handles of the service's Placements: one, and for a while that of a model which it served before."""
    return _handles(lambda name: name.rpartition("-")[0] == f"placement-{service}")


def placement_maps(service: str) -> list[PlacementMap]:
    """Their newest maps, of those that have one."""
    maps = ray.get([handle.map.remote() for handle in placement_handles(service)], timeout=10)
    return [found for found in maps if found is not None]


def store_statuses() -> list[StoreStatus]:
    """Every node's store that answers."""
    return list(ray.get([handle.status.remote() for handle in store_handles()], timeout=10))


def _handles(is_meant: Callable[[str], bool]) -> list[Any]:
    entries = ray.util.list_named_actors(all_namespaces=True)
    names = [entry["name"] for entry in entries if entry["namespace"] == NAMESPACE and is_meant(entry["name"])]
    return [ray.get_actor(name, namespace=NAMESPACE) for name in names]
