"""Are experts in two pieces faster, with the tops of more of them in memory (MoEpic, 2509.08342)? Replays routes.

Discrete events of one thread that computes and one disk. `python tests/split_experts.py NAME=ROUTES...` writes the
table's rows, `buddymoe simulate --record` routes. A layer's resident pieces are computed while others arrive; reads
ahead follow the layer's own, and where the guess was wrong they are given up, but for the part that is being read. Both
forms evict as the cache does, keep as many bytes and start from the same experts. In favour of two pieces: half a read
takes half the time, a piece is computed without the other, and the fastest share of tops and bottoms counts.

Legend: T tokens, L layers, K experts per token, E experts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import numpy as np
import numpy.typing as npt

from buddymoe_ray.cache.usage import Usage
from buddymoe_ray.calibrate.workloads import load_routes

OUT = Path(__file__).parent / "golden" / "measured" / "split.jsonl"
TOKENS, WARM = 256, 64
MEMORY, DISK_GBPS, TOPS = (25, 50), (1, 2, 4, 10), (1 / 2, 2 / 3)
RIGHT = 0.9  # of the experts that are guessed for the next layer, as measured on an OLMoE shape
_PARTS = 3  # an expert is read matrix by matrix

Ints = npt.NDArray[np.int64]
Arrivals = dict[tuple[int, int], float]
"""When a piece of an expert is there, by (piece, expert)."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A disk's bytes a second and what was measured of an OLMoE expert in 4 bits on the machine of `peers.jsonl`:
    its bytes, seconds of its product with a row, of a layer besides, and of the thread that computes for each read
    (handing it out, being woken, calling the kernel for what came: 92 us a miss)."""

    disk: float
    expert_bytes: float = 3.34e6
    expert: float = 1e-4
    layer: float = 6e-4
    handling: float = 9e-5


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A share of every expert, and of how many experts a layer keeps it."""

    share: float
    slots: int


@dataclass(frozen=True, kw_only=True)
class PerToken:
    """What a token came to."""

    nbytes: float
    seconds: float


class Replay:
    """`routes_TLK` on a machine that keeps `pieces`; `guess_TLK` is what was guessed of each layer while the one
    before it computed. The first `warm` tokens are not counted."""

    def __init__(self, machine: Machine, pieces: Sequence[Piece], routes_TLK: Ints, guess_TLK: Ints, E: int) -> None:
        self._machine, self._pieces, self._routes_TLK, self._guess_TLK = machine, pieces, routes_TLK, guess_TLK
        L = routes_TLK.shape[1]
        self._usage = Usage(np.tile(-1e3 - np.arange(E), (L, 1)), np.zeros(L, np.int64))
        self._arrives = [[dict.fromkeys(range(piece.slots), 0.0) for _ in range(L)] for piece in pieces]
        self._now = self._disk_free = self._nbytes = 0.0
        self._ahead: list[tuple[int, int]] = []  # (piece, expert) of the next layer, not begun
        self._guessed_at = 0.0

    def run(self, warm: int = WARM) -> PerToken:
        """Replay all; of the tokens after the first `warm`."""
        T, L, _ = self._routes_TLK.shape
        began = nbytes = 0.0
        for t in range(T):
            if t == warm:
                began, nbytes = self._now, self._nbytes
            for layer in range(L):
                self._layer(t, layer)
        return PerToken(nbytes=(self._nbytes - nbytes) / (T - warm), seconds=(self._now - began) / (T - warm))

    def _layer(self, t: int, layer: int) -> None:
        self._now += self._machine.layer
        wanted = self._routes_TLK[t, layer].tolist()
        landed = self._read_ahead(layer, wanted, set(self._guess_TLK[t, layer].tolist()))
        self._usage.note(layer, self._routes_TLK[t, layer])
        work = []
        for expert in wanted:
            for p, piece in enumerate(self._pieces):
                at, handling = self._arrives[p][layer].get(expert), 0.0
                if at is None or (p, expert) in landed:
                    handling = self._machine.handling
                    at = landed.get((p, expert)) or self._read(
                        p, layer, expert, max(self._disk_free, self._now), wanted
                    )
                work.append((max(at, self._now), handling + piece.share * self._machine.expert))
        T, L, _ = self._routes_TLK.shape
        at = t * L + layer + 1
        routed_at = self._now
        for arrives, seconds in sorted(work):
            self._now = max(self._now, arrives) + seconds
        if at < T * L:
            self._guess(*divmod(at, L), routed_at if at % L else self._now)

    def _guess(self, t: int, layer: int, at: float) -> None:
        """What to read of the layer that comes next."""
        guessed, pieces = dict.fromkeys(self._guess_TLK[t, layer].tolist()), range(len(self._pieces))
        self._ahead = [(p, e) for e in guessed for p in pieces if e not in self._arrives[p][layer]]
        self._guessed_at = at

    def _read_ahead(self, layer: int, wanted: Collection[int], guessed: Collection[int]) -> Arrivals:
        """What the disk has begun by now of the guess; when it arrives."""
        found: Arrivals = {}
        for p, expert in self._ahead:
            start = max(self._disk_free, self._guessed_at)
            if start >= self._now:
                break
            stop = None if expert in wanted else self._now
            found[p, expert] = self._read(p, layer, expert, start, guessed, stop)
        return found

    def _read(
        self, p: int, layer: int, expert: int, start: float, staying: Collection[int], stop: float | None = None
    ) -> float:
        """When the piece is there. At `stop` parts that were not begun are given up, and with them the piece."""
        piece, kept = self._pieces[p], self._arrives[p][layer]
        part = piece.share * self._machine.expert_bytes / _PARTS
        begun = _PARTS if stop is None else min(_PARTS, ceil((stop - start) * self._machine.disk / part))
        self._nbytes += begun * part
        self._disk_free = start + begun * part / self._machine.disk
        if len(kept) >= piece.slots:
            usage_E = self._usage.usage_LE[layer]
            least = min((e for e in kept if e not in staying), key=usage_E.__getitem__, default=None)
            if least is None:
                return self._disk_free  # it passes through a wave slot
            del kept[least]
        if begun == _PARTS:
            kept[expert] = self._disk_free
        return self._disk_free


def guesses(routes_TLK: Ints, E: int, right: float = RIGHT) -> Ints:
    """The experts that will be asked for, some replaced by others."""
    rng = np.random.default_rng(0)
    wrong = rng.random(routes_TLK.shape) >= right
    return np.where(wrong, rng.integers(0, E, routes_TLK.shape), routes_TLK)


def splits(slots: int, E: int) -> Iterator[tuple[Piece, Piece]]:
    """Tops of more than `slots` experts and bottoms of fewer, in the same bytes."""
    for share in TOPS:
        most = min(E, int(slots / share))
        for tops in np.unique(np.linspace(slots + 1, most, 6).astype(int)).tolist():
            bottoms = int((slots - share * tops) / (1 - share) + 1e-9)
            yield Piece(share=share, slots=tops), Piece(share=1 - share, slots=bottoms)


def rows(name: str, path: Path) -> Iterator[dict[str, object]]:
    """One for every memory, disk and cost of handling a read."""
    routes = load_routes(path)
    E, routes_TLK = routes.experts_per_layer[0], routes.routes_TLK[:TOKENS].astype(np.int64)
    guess_TLK = guesses(routes_TLK, E)
    for memory in MEMORY:
        slots = E * memory // 100
        for machine in (Machine(disk=rate * 1e9) for rate in DISK_GBPS):
            for each in (machine, replace(machine, handling=0.0)):
                one = Replay(each, [Piece(share=1.0, slots=slots)], routes_TLK, guess_TLK, E).run()
                found = {pair: Replay(each, pair, routes_TLK, guess_TLK, E).run() for pair in splits(slots, E)}
                tops, bottoms = min(found, key=lambda pair: found[pair].seconds)
                two = found[tops, bottoms]
                yield {
                    "routes": name,
                    "memory": memory,
                    "disk_gbps": each.disk / 1e9,
                    "handling_us": 1e6 * each.handling,
                    "slots": slots,
                    "top_share": tops.share,
                    "tops": tops.slots,
                    "bottoms": bottoms.slots,
                    "ms": [1e3 * one.seconds, 1e3 * two.seconds],
                    "mb": [one.nbytes / 1e6, two.nbytes / 1e6],
                }


if __name__ == "__main__":
    with OUT.open("w") as out:
        for given in sys.argv[1:]:
            name, _, path = given.partition("=")
            for row in rows(name, Path(path)):
                print(json.dumps(row), file=out, flush=True)
