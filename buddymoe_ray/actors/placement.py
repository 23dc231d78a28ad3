"""The placement of one service's experts over its nodes: counts come in once per window, an epoch-numbered map goes
out.

A thin state machine around `policy.solve`. Nobody waits for it: while it is away every node keeps its last map, and a
new one starts from what the nodes say they pin. Knows neither ray nor bytes.
Pools report no transitions between layers (ExFlow, 2401.08383): a token's activations stay with its worker, and experts
are read to it, or activations go out and back once per layer and peer, so where its next expert is changes nothing.
Where the solver was told all the same (routes of builtin:tiny, learnt from half of them; 2, 4 and 8 GPUs of 25 and
50 %; a successor at the same device worth a peer's read), .35, .28, .39 of the successors were at the device that had
answered before at 25 %, and .39, .45, .45 then; but a token's reads from peers went from 5.5, 11.4, 10.1 to 5.5, 10.9,
11.0, at 50 % from 7.2, 5.8, 5.4 to 7.1, 7.3, 6.6, and from the host up to .4 more: reads cost up to 27 % more.
The solver takes transitions for `buddymoe simulate`.
Invariant: an epoch never stands for two maps.

Legend: L layers, E experts of the widest layer, P pools (one per node, or per GPU), N experts of all layers end to end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from buddymoe_ray.actors.words import Directive, NodeReport
from buddymoe_ray.policy import PlacementMap, PlacementProblem, Pool, previous_held, publish, solve

__all__ = ["Placement", "PlacementOptions"]

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]

_SHIFT_ERRORS, _SHIFT_SHARE = 5.0, 1 / 3


@dataclass(frozen=True, kw_only=True)
class PlacementOptions:
    """How placement is decided.

    Args:
        window_seconds: how often nodes report.
        memory: weight of the windows before in the counts that are solved for; 0 looks at the last one alone. High, for
            the noise of one window moves experts to no avail; history is dropped when a window contradicts it.
        horizon_windows: for how many windows a move must pay.
        bytes_per_second: what migration may read, on each node.
        link_seconds: one access computed on another node, until its workers have measured how long that takes.
        forget_windows: a node that is silent for so many is gone.
    """

    window_seconds: float = 5.0
    memory: float = 0.8
    horizon_windows: float = 60.0
    bytes_per_second: float = 200e6
    link_seconds: float = 500e-6
    forget_windows: float = 4.0


@dataclass(kw_only=True)
class _Node:
    report: NodeReport
    counts_LE: Floats
    windows: int
    seen: float


def contradicts(history_LE: Floats, window_LE: Floats, pins: tuple[tuple[int, int], ...]) -> bool:
    """Whether far fewer accesses fall on the pinned experts than history predicts: the hot set has shifted.

    "Far" is five binomial standard errors and a third of the share. What is pinned was chosen by the same history, so
    its share is overestimated, the more so the shorter the history: a tighter test would drop it again every window.
    """
    before, now = float(history_LE.sum()), float(window_LE.sum())
    if before <= 0 or now <= 0 or not pins:
        return False
    at = tuple(np.array(pins).T)
    expected, found = float(history_LE[at].sum()) / before, float(window_LE[at].sum()) / now
    error = float(np.sqrt(max(expected * (1 - expected), 1e-6) / now))
    return expected - found > max(_SHIFT_ERRORS * error, _SHIFT_SHARE * expected)


class Placement:
    """`clock` gives seconds; tests bring their own."""

    def __init__(self, options: PlacementOptions | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._options, self._clock = options or PlacementOptions(), clock
        self._nodes: dict[str, _Node] = {}
        self._map: PlacementMap | None = None
        self._began: float | None = None
        self._solved = -np.inf

    def report(self, report: NodeReport) -> Directive:
        """Take a node's window; returns what it is to do under the newest map."""
        now = self._clock()
        self._began = now if self._began is None else self._began
        self._take(report, now)
        if now - self._solved >= 0.9 * self._options.window_seconds or report.node not in self._pools():
            self._solve(young=now - self._began < self._options.window_seconds)
            self._solved = now
        return self._directive(report.node)

    def map(self) -> PlacementMap | None:
        """The newest map."""
        return self._map

    def idle_seconds(self) -> float:
        """How long no node has reported."""
        return self._clock() - max((node.seen for node in self._nodes.values()), default=self._clock())

    def _pools(self) -> tuple[str, ...]:
        return self._map.pools if self._map is not None else ()

    def _take(self, report: NodeReport, now: float) -> None:
        known = self._nodes.get(report.node)
        counts_LE, windows = report.counts_LE.astype(np.float32), 1
        if known is not None and known.counts_LE.shape == counts_LE.shape:
            keep = self._options.memory
            windows = known.windows + 1
            if contradicts(known.counts_LE, counts_LE, report.pins):
                log.info("node %s uses other experts than before: its history is dropped", report.node)
                windows = 1
            keep = min(keep, 1 - 1 / windows)  # a short history is a plain mean
            counts_LE = keep * known.counts_LE + (1 - keep) * counts_LE
        self._nodes[report.node] = _Node(report=report, counts_LE=counts_LE, windows=windows, seen=now)
        limit = self._options.forget_windows * self._options.window_seconds
        for name in [name for name, node in self._nodes.items() if now - node.seen > limit]:
            log.warning("node %s is silent: its experts are placed elsewhere", name)
            del self._nodes[name]

    def _solve(self, *, young: bool) -> None:
        """What the nodes follow already stays the map while nothing is known of demand, and for the first window of a
        Placement that took over: not all nodes have reported yet, and what they hold would be placed twice."""
        nodes = list(self._nodes.values())
        problem = self._problem(nodes)
        previous = self._known(nodes, problem)
        if not problem.total_N.any() or (young and previous.epoch > 0):
            self._map = previous
            return
        found = solve(problem, previous)
        if found.epoch > previous.epoch:
            log.info("map %d moves %.1f MB", found.epoch, found.load_bytes / 1e6)
        self._map = found

    def _problem(self, nodes: list[_Node]) -> PlacementProblem:
        options, first = self._options, nodes[0].report
        standins = [node.report.standin_LE for node in nodes]
        fetch_P = np.array([node.report.fetch_seconds for node in nodes])
        return PlacementProblem(
            pools=tuple(
                Pool(
                    name=node.report.node,
                    node=node.report.machine or node.report.node,
                    bytes=node.report.pin_slots * node.report.expert_bytes,
                )
                for node in nodes
            ),
            expert_bytes=first.expert_bytes,
            experts_per_layer=first.experts_per_layer,
            fetch_cost_P=fetch_P,
            links=self._links(nodes),
            counts_PLE=np.stack([node.counts_LE for node in nodes]),
            # a stand-in is never worth more than the wait it spares
            standin_cost_LE=None if standins[0] is None else standins[0] * float(fetch_P.min()),
            migrate_bytes_per_second=options.bytes_per_second * len(nodes),
            horizon_seconds=options.horizon_windows * options.window_seconds,
            window_seconds=options.window_seconds,
        )

    def _links(self, nodes: list[_Node]) -> Floats:
        """Seconds of one access of each row's node that each column's computes, as the row's workers measured it."""
        seconds_PP = np.full((len(nodes), len(nodes)), self._options.link_seconds, dtype=np.float32)
        at_of = {node.report.node: at for at, node in enumerate(nodes)}
        for asking, node in enumerate(nodes):
            if node.report.machine:
                near_P = [other.report.machine == node.report.machine for other in nodes]
                seconds_PP[asking] = np.where(near_P, node.report.peer_seconds, np.inf)
            measured: dict[int, float] = {}
            for peer, seconds in node.report.link_seconds:
                asked = at_of.get(peer.rpartition("/")[0])
                if asked is not None:
                    measured[asked] = min(seconds, measured.get(asked, seconds))
            for asked, seconds in measured.items():
                seconds_PP[asking, asked] = seconds
        np.fill_diagonal(seconds_PP, 0.0)
        return seconds_PP

    def _known(self, nodes: list[_Node], problem: PlacementProblem) -> PlacementMap:
        """The last map, with what nodes say they pin that it lacks: all that a new Placement knows."""
        epoch = max([node.report.epoch for node in nodes] + [self._map.epoch if self._map else 0])
        held_PN, known = previous_held(problem, self._map), self._pools()
        for at, node in enumerate(nodes):
            if node.report.node in known:
                continue
            for layer, expert in node.report.pins:
                held_PN[at, int(problem.offset_L[layer]) + expert] = True
        found = publish(problem, held_PN, self._map, before=0.0, after=0.0)
        return replace(found, epoch=epoch + (self._map is not None and known != found.pools))

    def _directive(self, name: str) -> Directive:
        peers = tuple(
            (f"{node}/{at}", address)
            for node, known in sorted(self._nodes.items())
            if node != name
            for at, address in enumerate(known.report.links)
        )
        if self._map is None or name not in self._map.pools:
            return Directive(epoch=0, pins=(), peers=peers)
        held_N = self._map.held_PN[self._map.pools.index(name)]
        counts = self._nodes[name].counts_LE
        pins = self._map.keys(np.flatnonzero(held_N))
        pins.sort(key=lambda pin: -float(counts[pin]))
        return Directive(epoch=self._map.epoch, pins=tuple(pins), peers=peers)
