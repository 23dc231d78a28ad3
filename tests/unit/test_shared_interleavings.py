"""The shared store under every interleaving that small nodes can have, and under those that once went wrong."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from interleaving_search import explore
from interleavings import instrumented, replay
from store_mutations import as_they_are, changes, goes_wrong, known
from store_scenarios import Scenario, scenarios

STATES = 100  # of each node; `python tests/store_scenarios.py 60` goes on for a minute each

TRACES = {
    "a read that fails between look-up and wait": (
        "same",
        "A:settle#1 B:lock#1 A-0 B:read-state#1 A:write-lease#3 B:end#1",
    ),
    "a mover's read that fails while it is looked at": (
        "move, failed",
        "M:wait#1 A:read-generation#2 A+0 M-0 A:read-key_layer#1 M:write-lease#3 A:end#1",
    ),
    "a repair while a mover keeps a slot": (
        "repair",
        "M:read-lease#1 K:write-head#2 !K M:lock#3 A:settle#1 M:submit#1 A+0 M:wait#1 M+0 M:write-lease#3 A:end#1",
    ),
    "a mover is killed, another one takes the slot that is computed with": (
        "movers",
        "A:compute#1 M:read-lease#1 !M N:wait#1 N+0 N:end#1 A:end#1",
    ),
    "a mover is killed, its slot is freed, its lease is looked at": (
        "movers",
        "A:read-generation#2 M:read-lease#1 !M N:lock#2 A:end#1",
    ),
    "an expert that had to go came elsewhere": ("long", "A:long#1 M:sleep#1 B:settle#1 B+0 B:end#1"),
    "a wave slot is exchanged for one that its only user holds": ("roles", "A:lock#2 M:end#1 A:end#1"),
    "a start between another's tables and row": ("start", "B:lock#2 A:unlock#7 B:end#1"),
    "a sweeper between tables and row": ("sweep", "A:lock#2 S:unlock#2 A:end#1"),
    "every slot of the host tier is lent": ("devices", "B:wait#1 A:end#1"),
    "killed in freeing a slot, which a mover keeps then": (
        "repair, and again",
        "A:write-key_layer#1 !A M:lock#3 K:write-head#2 !K B:sleep#1 M:end#1 M+0 M:end#1 B:end#1",
    ),
    "killed in freeing what it failed to read": (
        "move, to a free slot",
        "M:wait#1 A:sleep#1 M-0 A:sleep#2 M:write-key_expert#2 !M A:end#1",
    ),
    "a read that fails while one stands still with the tables": (
        "stopped, failed",
        "B:settle#1 A:write-generation#1 =A B-0 B:lock#2 ~ B:lock#3 ~ B:lock#4 ~ B:lock#5",
    ),
    "whoever reads for us is killed": ("devices, killed", "B:unlock#1 !B A:sleep#2 ~ A:end#1"),
}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Scenario]]:
    logging.getLogger("buddymoe_ray.cache.shared.store").disabled = True  # sweepers say what they removed
    with instrumented():
        yield scenarios(tmp_path_factory.mktemp("shm"))
    logging.getLogger("buddymoe_ray.cache.shared.store").disabled = False


@pytest.mark.parametrize("fault", TRACES)
def test_what_once_went_wrong_goes_well(nodes: dict[str, Scenario], fault: str) -> None:
    name, trace = TRACES[fault]
    assert replay(nodes[name].make, trace.split()) == ""


def test_no_step_is_for_nothing(nodes: dict[str, Scenario]) -> None:
    """Without it a node goes wrong, or it is said why none does."""
    told, all_ = known(), {change.name: change for change in changes()}
    assert told.keys() == all_.keys(), "`tests/store_mutations.py` says how to look for what is new"
    shown = {name: shown for name, shown in told.items() if shown.node in nodes}
    assert len(shown) > 200 and all(shown.trace for shown in told.values())
    with as_they_are():  # so that what shows is what is dropped, and not how the source is taken apart
        for trace in {*shown.values()}:
            assert replay(nodes[trace.node].make, trace.trace.split()) == "", trace
    for name, trace in shown.items():
        with all_[name].made():
            assert goes_wrong(nodes[trace.node], trace.trace), f"{name} shows no more by {trace}"


@pytest.mark.parametrize("name", list(scenarios(Path())))
def test_no_order_of_steps_goes_wrong(nodes: dict[str, Scenario], name: str) -> None:
    node = nodes[name]
    found = explore(node.make, kills=node.kills, failures=node.failures, most_states=STATES)
    assert not found.violation, f"{found.violation}, after {' '.join(found.trace)}"
    assert not found.unlike and (found.states >= STATES or found.complete), found.unlike
