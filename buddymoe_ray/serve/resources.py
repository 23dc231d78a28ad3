"""How many workers a service has, where they find room, and which devices ray gave to one.

Arithmetic on ray's resource tables; only `assigned_devices` asks ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import ray

__all__ = ["SEES_ALL_GPUS", "assigned_devices", "own_device", "resolve_workers", "workers_on_node"]

SEES_ALL_GPUS: Mapping[str, str] = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
"""Environment of a worker that maps the memory of its node's other GPUs: ray would hide them."""


def resolve_workers(workers: int | Literal["auto"], num_gpus: float, cluster: Mapping[str, float]) -> int:
    """Workers of a service: `auto` is as many as the cluster's GPUs allow, and one where no GPU is asked for."""
    if workers != "auto":
        return workers
    return max(1, int(cluster.get("GPU", 0) // num_gpus)) if num_gpus > 0 else 1


def workers_on_node(workers: int, *, num_cpus: float, num_gpus: float, node: Mapping[str, float]) -> int:
    """How many of `workers` find room on a node of these resources: they share its expert store."""
    room = [int(node.get(name, 0) // wanted) for name, wanted in (("CPU", num_cpus), ("GPU", num_gpus)) if wanted > 0]
    return max(1, min([workers, *room]))


def assigned_devices() -> tuple[str, ...]:
    """Ids of the GPUs that ray assigned to the calling replica, which sees the others, too."""
    return tuple(str(device) for device in ray.get_runtime_context().get_accelerator_ids().get("GPU", []))


def own_device(device: str, assigned: Sequence[str], visible: Sequence[str]) -> str:
    """`device` with the place that the first GPU which was assigned has among those that CUDA shows, of which `visible`
    are the ids (none: all of the node). Any but `auto` and `cuda` is the deployment's own choice."""
    if not assigned or device not in ("auto", "cuda"):
        return device
    at = visible.index(assigned[0]) if assigned[0] in visible else int(assigned[0])
    return f"cuda:{at}"
