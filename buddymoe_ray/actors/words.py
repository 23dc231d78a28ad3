"""What HostStore and Placement tell each other, once per window: frozen records of numbers and names.

Legend: L layers, E experts of the widest layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from buddymoe_ray.observe import PlacementSnapshot

__all__ = ["Directive", "NodeReport", "NodeView", "StoreStatus"]


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """The last window of one pool: a node's, or a GPU's, which has a name of its own and says on which `machine` it is:
    of others there it reads an expert in `peer_seconds`, of no others.

    `counts_LE` are accesses (token, slot) since the last report, `pin_slots` how many experts the map may pin here,
    `links` where its workers answer peers, `pins` what is pinned now under map `epoch` (a restarted Placement starts
    from it). `fetch_seconds` is one expert from this node's disk, `link_seconds` how long each worker of other nodes
    takes to answer, by its name in `Directive.peers`. `standin_LE`, where every expert has a stand-in, says what one
    access of it costs as a share (0 to 1) of that.
    """

    node: str
    links: tuple[str, ...]
    experts_per_layer: tuple[int, ...]
    expert_bytes: int
    pin_slots: int
    counts_LE: npt.NDArray[np.float32]
    fetch_seconds: float
    link_seconds: tuple[tuple[str, float], ...]
    standin_LE: npt.NDArray[np.float32] | None
    epoch: int
    pins: tuple[tuple[int, int], ...]
    machine: str = ""
    peer_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Directive:
    """What a node is to do: pin these experts (the most wanted first), and where the other nodes answer."""

    epoch: int
    pins: tuple[tuple[int, int], ...]
    peers: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class NodeView:
    """What a node's store tells its workers: where the other nodes' answer, and the map it follows, if it was told of
    one."""

    peers: tuple[tuple[str, str], ...] = ()
    placement: PlacementSnapshot | None = None


@dataclass(frozen=True, kw_only=True)
class StoreStatus:
    """A node's store, now. `made` is False when it was found filled; `filled` says that every slot was once."""

    path: str
    node: str
    nbytes: int
    attached: int
    resident: int
    made: bool
    filled: bool
    epoch: int
    pinned: int
    moves: int
    moved_bytes: int
    skipped: int
    pid: int
    workers: tuple[str, ...] = ()
    shards: tuple[tuple[tuple[int, int], ...], ...] = ()
    error: str = ""
