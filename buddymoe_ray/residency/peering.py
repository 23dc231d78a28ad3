"""Experts of other nodes' workers: asks peers to compute what is missing here, and computes for them what is resident.

Peers say several times a second which experts they hold; an expert is asked for only where a peer holds it and its
answer is expected before the disk's. What peers ask is computed by the link server's threads, on an attachment of their
own to the node's store, so that this engine's steps never wait for it. Knows links and caches, not placement.
Invariant: an answer is what this engine would have computed, or there is none and the expert is fetched.

Legend: L layers, E experts of the widest layer, R rows of one expert, D hidden.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from buddymoe_ray.cache import DiskReader, ExpertCache
from buddymoe_ray.cache.shared import SharedStore
from buddymoe_ray.errors import LinkError
from buddymoe_ray.links import LinkServer, PeerLinks, PendingAnswer, derive_secret
from buddymoe_ray.moe import ExpertCompute
from buddymoe_ray.residency.sharing import Sharing
from buddymoe_ray.residency.tier import ExpertTier

__all__ = ["PeerService", "Peering", "RemoteExperts", "open_peering"]

_CONTENTS_SECONDS = 0.2
_TIMEOUT_SECONDS = 1.0
_PATIENCE = 4.0  # times the disk's time for an expert: later than that the peer's answer is not worth waiting for

Bools = npt.NDArray[np.bool_]


class PeerService:
    """What this worker does for its peers; the link server calls it."""

    def __init__(self, cache: ExpertCache, computes: Sequence[ExpertCompute]) -> None:
        self._cache, self._computes = cache, computes
        self._lock = threading.Lock()

    def compute(self, layer: int, expert_rows: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
        """Outputs `[R, D]` of those experts that are resident now."""
        if not 0 <= layer < len(self._computes):
            raise LinkError(f"layer is {layer}, must be below {len(self._computes)}")
        answers: dict[int, Tensor] = {}
        known = [expert for expert in expert_rows if 0 <= expert < self._cache.layout.experts_per_layer[layer]]
        with self._lock, torch.inference_mode(), self._cache.holding(layer, known) as able:
            for leases in self._cache.stream(layer, able, protect_residency=True):
                for lease in leases:
                    rows = expert_rows[lease.key.expert]
                    answers[lease.key.expert] = self._computes[layer](rows, lease.tensors())
        return answers

    def contents(self) -> bytes:
        """A bit per (layer, expert), set where it is resident."""
        return np.packbits(self._cache.store.tables.resident).tobytes()


@dataclass
class _Moved:
    """What went over links for decode steps, both ways; counted by the thread that steps."""

    nbytes: int = 0


class _PendingAnswers:
    """Questions under way at some peers."""

    def __init__(self, pending: list[tuple[_Peer, PendingAnswer]], patience: float, moved: _Moved) -> None:
        self._pending, self._patience, self._moved = pending, patience, moved
        self._began = time.perf_counter()

    def collect(self) -> Mapping[int, Tensor]:
        found: dict[int, Tensor] = {}
        for peer, pending in self._pending:
            try:
                answers = pending.collect(max(0.0, self._began + self._patience - time.perf_counter()))
                self._moved.nbytes += sum(outputs.nbytes for outputs in answers.values())
                found |= answers
                peer.note(pending.seconds)
            except LinkError:
                peer.note(self._patience)  # what is missing is fetched; the link's breaker has noted why
        return found


class _Peer:
    """One peer's contents and how long it takes to answer (seconds, smoothed)."""

    def __init__(self) -> None:
        self.contents_LE: Bools | None = None
        self.seconds = 0.0

    def note(self, seconds: float) -> None:
        self.seconds = 0.7 * self.seconds + 0.3 * seconds if self.seconds else seconds


class RemoteExperts:
    """`moe.PeerExperts` over links.

    Args:
        links: to the peers; closed by its owner.
        shape: (L, E) of the table of contents.
        fetch_seconds: how long an expert takes from this node's own disk, now.
    """

    def __init__(self, links: PeerLinks, shape: tuple[int, int], *, fetch_seconds: Callable[[], float]) -> None:
        self._links, self._shape, self._fetch_seconds = links, shape, fetch_seconds
        self._peers: dict[str, _Peer] = {}
        self._moved = _Moved()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="peer-contents", daemon=True)
        self._thread.start()

    exact = True

    def able(self, layer: int, accesses_of: Mapping[int, int]) -> Sequence[int]:
        """Which of the experts some peer has and would answer before the disk does."""
        return [expert for expert in accesses_of if self._best(layer, expert) is not None]

    def ask(self, layer: int, rows_of: Mapping[int, Tensor]) -> _PendingAnswers:
        """One question per peer; a peer that cannot be reached any more is left out."""
        by_peer: dict[str, dict[int, Tensor]] = {}
        for expert, rows in rows_of.items():
            name = self._best(layer, expert)
            if name is not None:
                by_peer.setdefault(name, {})[expert] = rows
        pending = []
        for name, asked in by_peer.items():
            try:
                pending.append((self._peers[name], self._links.get(name).submit(layer, asked)))
            except (KeyError, LinkError):
                continue
            self._moved.nbytes += sum(rows.nbytes for rows in asked.values())
        return _PendingAnswers(pending, _PATIENCE * self._fetch_seconds(), self._moved)

    @property
    def moved_bytes(self) -> int:
        """Of rows that peers were asked to compute, and of what they made of them."""
        return self._moved.nbytes

    def seconds(self) -> dict[str, float]:
        """How long each peer takes to answer, lately; one that does not answer takes the whole timeout."""
        return {name: peer.seconds for name, peer in self._peers.items() if peer.seconds}

    def close(self) -> None:
        """Stop following the peers' contents."""
        self._stop.set()
        self._thread.join(timeout=2 * _TIMEOUT_SECONDS)

    def _best(self, layer: int, expert: int) -> str | None:
        limit, best = self._fetch_seconds(), None
        for name, peer in self._peers.items():
            if peer.contents_LE is None or not peer.contents_LE[layer, expert] or peer.seconds >= limit:
                continue
            limit, best = peer.seconds, name
        return best

    def _follow(self) -> None:
        """Read every peer's table of contents again and again; one that does not answer has nothing."""
        size = -(-self._shape[0] * self._shape[1] // 8)
        while not self._stop.wait(_CONTENTS_SECONDS):
            names = self._links.names()
            peers = {name: self._peers.get(name) or _Peer() for name in names}
            for name, peer in peers.items():
                try:
                    contents_B, seconds = self._links.get(name).contents(size)
                except LinkError:
                    peer.contents_LE, seconds = None, _TIMEOUT_SECONDS
                else:
                    peer.contents_LE = self._table(contents_B)
                peer.note(seconds)
            self._peers = peers

    def _table(self, contents_B: Tensor) -> Bools:
        count = self._shape[0] * self._shape[1]
        return np.unpackbits(contents_B.numpy(), count=count).astype(bool).reshape(self._shape)


class Peering:
    """Both directions of one engine. Made by `open_peering`; `close` ends all threads and sockets."""

    def __init__(self, tier: ExpertTier, sharing: Sharing) -> None:
        cache = tier.cache
        assert isinstance(cache.store, SharedStore), "only a node's store is linked"
        layout = cache.layout
        purpose = repr(
            (layout.tensors, layout.coded, layout.slot_bytes, layout.experts_per_layer)
        )  # workers of another model stay out
        secret = derive_secret(sharing.secret.encode(), purpose)
        reader = DiskReader(depth=1, buffer_bytes=4096, files=layout.files)
        self._own = ExpertCache(cache.store.again(), reader=reader)
        try:
            service = PeerService(self._own, tier.new_compute())
            self._server = LinkServer(service, secret=secret, address=f"{sharing.host}:0")
        except BaseException:
            self._own.close()
            raise
        self._links = PeerLinks(secret, timeout=_TIMEOUT_SECONDS)
        shape = (len(layout.experts_per_layer), max(layout.experts_per_layer))
        self._remote = RemoteExperts(self._links, shape, fetch_seconds=lambda: cache.fetch_seconds)
        for block in tier.blocks:
            block.peers = self._remote

    @property
    def address(self) -> str:
        """Where peers reach this worker."""
        return self._server.address

    def set_peers(self, peers: Mapping[str, str]) -> None:
        """From now on these are the peers: name to address. Raises LinkError for an address that is none."""
        self._links.update(peers)

    def seconds(self) -> dict[str, float]:
        """How long each peer takes to answer, by name."""
        return self._remote.seconds()

    @property
    def moved_bytes(self) -> int:
        """Of rows that peers were asked to compute, and of what they made of them."""
        return self._remote.moved_bytes

    def close(self) -> None:
        """End both directions. Safe to call twice."""
        self._remote.close()
        self._links.close()
        self._server.close()
        self._own.close()


def open_peering(tier: ExpertTier, sharing: Sharing) -> Peering | None:
    """Links to other nodes' workers, where it may have any and the experts are in a shared store. Raises LinkError,
    CacheError."""
    if not sharing.linked or tier.cache.store.alone:
        return None
    return Peering(tier, sharing)
