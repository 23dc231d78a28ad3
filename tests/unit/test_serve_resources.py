"""How many workers a service has, and how many of them share a node."""

from __future__ import annotations

import pytest

from buddymoe_ray.serve.resources import own_device, resolve_workers, workers_on_node


@pytest.mark.parametrize(
    ("workers", "num_gpus", "gpus", "expected"),
    [(3, 1, 8, 3), ("auto", 1, 8, 8), ("auto", 2, 8, 4), ("auto", 1, 0, 1), ("auto", 0, 8, 1), ("auto", 0.5, 2, 4)],
)
def test_workers_follow_the_clusters_gpus(workers: int, num_gpus: float, gpus: int, expected: int) -> None:
    assert resolve_workers(workers, num_gpus, {"CPU": 16.0, "GPU": float(gpus)}) == expected


def test_a_cluster_without_gpus_has_no_entry_for_them() -> None:
    assert resolve_workers("auto", 1, {"CPU": 4.0}) == 1


@pytest.mark.parametrize(
    ("workers", "num_cpus", "num_gpus", "expected"),
    [(8, 1, 0, 4), (2, 1, 0, 2), (8, 0, 1, 2), (8, 4, 1, 1), (8, 0, 0, 8), (8, 16, 0, 1)],
)
def test_workers_of_a_node_are_those_that_find_room(
    workers: int, num_cpus: float, num_gpus: float, expected: int
) -> None:
    node = {"CPU": 4.0, "GPU": 2.0}
    assert workers_on_node(workers, num_cpus=num_cpus, num_gpus=num_gpus, node=node) == expected


@pytest.mark.parametrize(
    ("device", "assigned", "visible", "expected"),
    [
        ("auto", ("3",), (), "cuda:3"),
        ("cuda", ("6", "7"), ("4", "5", "6", "7"), "cuda:2"),
        ("auto", ("GPU-b",), ("GPU-a", "GPU-b"), "cuda:1"),
        ("cuda:1", ("0",), (), "cuda:1"),
        ("interpret", ("1",), (), "interpret"),
        ("auto", (), (), "auto"),
    ],
)
def test_a_worker_that_sees_all_gpus_owns_the_one_that_it_was_given(
    device: str, assigned: tuple[str, ...], visible: tuple[str, ...], expected: str
) -> None:
    assert own_device(device, assigned, visible) == expected
