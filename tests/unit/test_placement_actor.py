"""The Placement without ray: windows in, maps out, with a clock of the test's own."""

from __future__ import annotations

import numpy as np
import pytest

from buddymoe_ray.actors.placement import Placement, PlacementOptions, contradicts
from buddymoe_ray.actors.words import Directive, NodeReport

LAYERS, EXPERTS, SLOTS = 2, 16, 8


class Nodes:
    """Nodes that follow every map at once, over counts drawn from a given popularity."""

    def __init__(self, names: tuple[str, ...] = ("a",), *, standins: bool = False) -> None:
        self.now, self.rng = 0.0, np.random.default_rng(1)
        self.standins, self.link = standins, 0.0005
        self.pins: dict[str, tuple[tuple[int, int], ...]] = dict.fromkeys(names, ())
        self.epochs = dict.fromkeys(names, 0)
        self.placement = self.restarted()

    def restarted(self) -> Placement:
        self.placement = Placement(PlacementOptions(window_seconds=1.0), clock=lambda: self.now)
        return self.placement

    def window(self, popular_LE: np.ndarray, *, only: str | None = None, accesses: int = 2000) -> dict[str, Directive]:
        """One window of every node (or `only` one); returns what each was told."""
        told = {}
        for name in [only] if only else list(self.pins):
            counts_LE = np.stack([self.rng.multinomial(accesses, row / row.sum()) for row in popular_LE])
            told[name] = self.placement.report(self.report(name, counts_LE.astype(np.float32)))
            if told[name].epoch > self.epochs[name]:
                self.epochs[name], self.pins[name] = told[name].epoch, told[name].pins
        self.now += 1.0
        return told

    def report(self, name: str, counts_LE: np.ndarray) -> NodeReport:
        return NodeReport(
            node=name,
            links=(f"{name}:1",),
            experts_per_layer=(EXPERTS,) * LAYERS,
            expert_bytes=1_000_000,
            pin_slots=SLOTS,
            counts_LE=counts_LE,
            fetch_seconds=0.01,
            link_seconds=tuple((f"{other}/0", self.link) for other in self.pins if other != name),
            standin_LE=np.full((LAYERS, EXPERTS), 0.5, np.float32) if self.standins else None,
            epoch=self.epochs[name],
            pins=self.pins[name],
        )

    def share(self, name: str, popular_LE: np.ndarray) -> float:
        return float(sum(popular_LE[pin] for pin in self.pins[name]) / popular_LE.sum())


def zipf(reverse: bool = False) -> np.ndarray:
    row = 1.0 / np.arange(1, EXPERTS + 1) ** 1.5
    return np.stack([row[::-1] if reverse else row] * LAYERS)


def best(popular_LE: np.ndarray) -> float:
    return float(np.sort(popular_LE.reshape(-1))[::-1][:SLOTS].sum() / popular_LE.sum())


@pytest.mark.parametrize("standins", [False, True])
def test_the_hot_set_is_pinned_and_stays(standins: bool) -> None:
    nodes = Nodes(standins=standins)
    for _ in range(3):
        nodes.window(zipf())
    assert nodes.share("a", zipf()) > best(zipf()) - 0.02
    epoch = nodes.epochs["a"]
    for _ in range(10):
        nodes.window(zipf())
    assert nodes.epochs["a"] - epoch <= 2, "noise must not move experts"


def test_a_shift_is_followed_within_three_windows() -> None:
    nodes = Nodes()
    for _ in range(20):
        nodes.window(zipf())
    assert nodes.share("a", zipf(reverse=True)) < 0.3
    for _ in range(3):
        nodes.window(zipf(reverse=True))
    assert nodes.share("a", zipf(reverse=True)) > best(zipf(reverse=True)) - 0.02


def test_two_nodes_hold_different_experts_and_know_each_other() -> None:
    nodes = Nodes(("a", "b"))
    for _ in range(4):
        told = nodes.window(np.ones((LAYERS, EXPERTS)))
    assert told["a"].peers == (("b/0", "b:1"),) and told["b"].peers == (("a/0", "a:1"),)
    assert len(set(nodes.pins["a"]) | set(nodes.pins["b"])) > SLOTS, "a peer's copy makes a second one a waste"


def test_nodes_whose_link_is_slower_than_the_disk_each_hold_the_hot_set() -> None:
    nodes = Nodes(("a", "b"))
    nodes.link = 1.0
    for _ in range(4):
        nodes.window(zipf())
    for name in ("a", "b"):
        assert nodes.share(name, zipf()) > best(zipf()) - 0.02


def test_a_silent_node_is_forgotten_and_its_experts_placed_elsewhere() -> None:
    nodes = Nodes(("a", "b"))
    for _ in range(3):
        nodes.window(zipf())
    for _ in range(8):
        told = nodes.window(zipf(), only="a")
    assert told["a"].peers == ()
    found = nodes.placement.map()
    assert found is not None and found.pools == ("a",)


def test_a_new_placement_starts_from_what_the_nodes_pin() -> None:
    nodes = Nodes()
    for _ in range(4):
        nodes.window(zipf())
    pins, epoch = set(nodes.pins["a"]), nodes.epochs["a"]
    nodes.restarted()
    told = nodes.window(zipf())["a"]
    assert told.epoch >= epoch and len(set(told.pins) & pins) >= SLOTS - 2


def test_a_new_placement_without_load_keeps_what_all_nodes_pin() -> None:
    nodes = Nodes(("a", "b"))
    for _ in range(4):
        nodes.window(zipf())
    pins = {name: set(kept) for name, kept in nodes.pins.items()}
    nodes.restarted()
    for _ in range(2):
        for name in ("a", "b"):
            told = nodes.placement.report(nodes.report(name, np.zeros((LAYERS, EXPERTS), np.float32)))
            assert told.epoch >= nodes.epochs[name] and set(told.pins) == pins[name]
        nodes.now += 1.0
    found = nodes.placement.map()
    assert found is not None and found.pools == ("a", "b")


def test_a_new_placement_hears_all_nodes_before_it_moves_anything() -> None:
    nodes = Nodes(("a", "b"))
    for _ in range(4):
        nodes.window(zipf())
    pins = {name: set(kept) for name, kept in nodes.pins.items()}
    nodes.restarted()
    for _ in range(3):
        nodes.window(zipf())
    for name in ("a", "b"):
        assert len(set(nodes.pins[name]) & pins[name]) >= SLOTS - 2


def test_a_node_from_a_later_epoch_is_heard() -> None:
    nodes = Nodes(("a", "b"))
    nodes.window(zipf(), only="a")
    nodes.epochs["b"] = 40
    nodes.window(zipf())
    told = nodes.window(zipf(reverse=True))
    assert told["b"].epoch >= 40 and nodes.pins["b"]


def test_without_counts_nothing_is_decided() -> None:
    nodes = Nodes()
    told = nodes.placement.report(nodes.report("a", np.zeros((LAYERS, EXPERTS), np.float32)))
    assert (told.epoch, told.pins) == (0, ())


def test_idleness_is_told() -> None:
    nodes = Nodes()
    nodes.window(zipf())
    nodes.now += 41.0
    assert nodes.placement.idle_seconds() == pytest.approx(42.0)


def test_only_a_clear_shift_contradicts() -> None:
    history, pins = np.zeros((1, 4), np.float32), ((0, 0), (0, 1))
    history[0] = (40, 40, 10, 10)
    assert not contradicts(history, np.array([[300, 300, 200, 200]], np.float32), pins)
    assert contradicts(history, np.array([[100, 100, 400, 400]], np.float32), pins)
    assert not contradicts(history, np.array([[0, 1, 2, 2]], np.float32), pins), "five uses say nothing"
    assert not contradicts(history, np.zeros((1, 4), np.float32), pins)
    assert not contradicts(np.zeros((1, 4), np.float32), history, pins)
