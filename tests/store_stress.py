"""A store under real processes that are stopped and killed at any time: no byte that counts may be another expert's.

    python tests/store_stress.py SECONDS [CHECK ...]

Readers glance, stream and hold at random, a mover exchanges experts, a lender gives slots' memory back and has it again
(of what it gave back nothing may be there), a driver sends SIGSTOP, SIGCONT and SIGKILL and
starts anew what it killed. Prints a line of JSON for the store as it is; then, for each CHECK that is named (`CHECKS`),
one for the store without it, which must find wrong bytes: a stress that finds none proves nothing. The driver forks
its processes, for an import takes seconds; it attaches to no store before they are gone, as a fork keeps the locks of
its parent. 150 seconds on two cores with four times the work: 1,169,602 reads right and none wrong, 5,052 conflicts,
1,498 moves, 4,279 stops, 519 kills, nobody waited.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing import RawArray
from pathlib import Path
from typing import Any

import numpy as np
from store_mutations import Change, weakened

from buddymoe_ray.cache import DiskReader, ExpertCache
from buddymoe_ray.cache.shared import Lender, Move, Mover, SharedStore, lending, store_digest, store_path
from buddymoe_ray.cache.shared.tables import FREE, LOADING, SharedTables
from buddymoe_ray.kernels import slot_words
from buddymoe_ray.types import ExpertKey, ExpertLayout, ExpertPiece, SlotPlan, SlotTensor

LAYERS, EXPERTS, SLOTS, WAVES, LENT = 2, 6, 3, 3, 1
WORDS = 1 << 15  # of 8 bytes in an expert: to look at one takes as long as to read one
RIGHT, CONFLICTS, WRONG, MOVES, ATTACHED, END = range(6)  # columns of the tallies
CHECKS: dict[str, Change] = {
    "unchanged": weakened(slot_words, "unchanged", " == OK", " != 0"),
    "generation": weakened(SharedTables, "take", "self.generation[slot] += 1", "pass"),
    "looked": weakened(lending.Lender, "_looked", "words[row] % 2 and ", "False and "),
    "leased": weakened(SharedTables, "_idle", "[~self.leased(slots)]", ""),
}
Actor = Callable[["Node", random.Random, Any], None]


@dataclass(frozen=True)
class Node:
    """Where the store of a run is."""

    folder: Path
    layout: ExpertLayout
    plan: SlotPlan

    def store(self) -> SharedStore:
        digest = store_digest(self.layout, self.plan)
        return SharedStore(store_path(digest, folder=self.folder), self.layout, self.plan, digest)


@dataclass
class Outcome:
    """What a run came to. While one stood still, others `waited` so often; `hung` did not end though they were asked
    to; `left` is what the dead left behind."""

    check: str = ""
    right: int = 0
    conflicts: int = 0
    wrong: int = 0
    moves: int = 0
    stops: int = 0
    kills: int = 0
    waited: int = 0
    hung: int = 0
    left: str = ""


def truth(key: ExpertKey) -> int:
    """The word that an expert consists of."""
    return (1 + EXPERTS * key.layer + key.expert) * 0x0101010101010101


def make_node(folder: Path) -> Node:
    """A store of experts that are one word each, of which half are resident."""
    pieces = {}
    for layer in range(LAYERS):
        path = folder / f"layer{layer}.bin"
        keys = [ExpertKey(layer, expert) for expert in range(EXPERTS)]
        path.write_bytes(b"".join(np.full(WORDS, truth(key), np.uint64).tobytes() for key in keys))
        for at, key in enumerate(keys):
            pieces[key] = (ExpertPiece(path=str(path), offset=8 * WORDS * at, nbytes=8 * WORDS, slot_offset=0),)
    layout = ExpertLayout(
        tensors=(SlotTensor(name="w", shape=(WORDS,), dtype="int64", offset=0, nbytes=8 * WORDS),),
        slot_bytes=8 * WORDS,
        expert_bytes=8 * WORDS,
        layers=LAYERS,
        experts_per_layer=(EXPERTS,) * LAYERS,
        pieces=pieces,
    )
    plan = SlotPlan(
        budget_bytes=1 << 30,
        slot_bytes=8 * WORDS,
        overhead_bytes=0,
        wave_slots=WAVES,
        layer_slots=(SLOTS + LENT,) * LAYERS,
        fully_resident=False,
        reserved_bytes=8 * WORDS * LENT * LAYERS,
        lent_slots=(LENT,) * LAYERS,
    )
    (folder / "shm").mkdir()
    return Node(folder / "shm", layout, plan)


def read(node: Node, rng: random.Random, tally: Any, glances: float = 0.95) -> None:
    """One step of a reader after the other; of so many a part are glances."""
    store = node.store()
    cache = ExpertCache(store, reader=DiskReader(depth=2, buffer_bytes=16384))
    words_C = store.bytes_C.view(np.uint64)
    first = store.address(0)

    def same(key: ExpertKey, address: int) -> bool:
        return bool((words_C[(address - first) // node.layout.slot_bytes] == truth(key)).all())

    tally[ATTACHED] = 1
    while not tally[END]:
        layer, kind = rng.randrange(LAYERS), rng.random()
        if kind < glances:
            glance = cache.glance(layer)
            assert glance is not None and glance.words_2E is not None
            there = np.flatnonzero(glance.at_E >= 0)
            ids = rng.sample(there.tolist(), min(2, len(there)))
            right = all(same(ExpertKey(layer, expert), int(glance.at_E[expert])) for expert in ids)
            counts = slot_words.unchanged(np.array([ids], np.int64), glance.words_2E)
            store.tables.look(over=True)
            tally[RIGHT if right and counts else WRONG if counts else CONFLICTS] += 1
            continue
        wanted = rng.sample(range(EXPERTS), rng.randint(1, 3))
        with cache.holding(layer, wanted if kind > 0.98 else []) as held:
            for leases in cache.stream(layer, list(held) or wanted, protect_residency=kind > 0.96):
                for lease in leases:
                    right = bool((lease.tensors()["w"].numpy().view(np.uint64) == truth(lease.key)).all())
                    tally[RIGHT if right else WRONG] += 1
    cache.close()


def load(node: Node, rng: random.Random, tally: Any) -> None:
    """A reader that evicts what it can."""
    read(node, rng, tally, glances=0.0)


def move(node: Node, rng: random.Random, tally: Any) -> None:
    """One move of a mover after the other."""
    store = node.store()
    mover = Mover(store, DiskReader(depth=1, buffer_bytes=16384), bytes_per_second=1e9)
    while not tally[END]:
        layer, (load, evict) = rng.randrange(LAYERS), rng.sample(range(EXPERTS), 2)
        with store.tables.locked():
            store.tables.reap()
        moved = mover.run([Move(load=ExpertKey(layer, load), evict=ExpertKey(layer, evict))], lambda: bool(tally[END]))
        tally[MOVES] += moved.moves
    mover.close()
    store.close()


def lend(node: Node, rng: random.Random, tally: Any) -> None:
    """Leaves more and fewer of the lent slots to experts; what it has is its own for a while."""
    lender, store = Lender(node.store()), node.store()
    while not tally[END]:
        count = rng.randrange(LENT * LAYERS + 1)
        if not lender.lend(count, lambda: bool(tally[END])):
            continue
        _, most = store.shape.span(0, store.shape.slots - LENT * LAYERS + count)
        until = time.monotonic() + rng.uniform(0.0, 0.02)
        while time.monotonic() < until:
            tally[RIGHT if 512 * store.path.stat().st_blocks <= most + 4096 else WRONG] += 1
            time.sleep(0.001)
    lender.close()
    store.close()


class Family:
    """Processes of the driver; `tallies` outlive them."""

    def __init__(self, node: Node, actors: list[Actor], rng: random.Random) -> None:
        self._node, self._actors, self._rng = node, actors, rng
        self.tallies = [RawArray("q", END + 1) for _ in actors]
        self.pids = [0] * len(actors)
        for at in range(len(actors)):
            self.start(at)

    def start(self, at: int) -> None:
        """Fork an actor."""
        seed, self.pids[at] = self._rng.random(), os.fork()
        if self.pids[at] == 0:
            code = 1
            try:
                self._actors[at](self._node, random.Random(seed), self.tallies[at])
                code = 0
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(code)

    def kill(self, at: int) -> None:
        """At once, whatever it is doing."""
        self.tallies[at][ATTACHED] = 0
        os.kill(self.pids[at], signal.SIGKILL)
        os.waitpid(self.pids[at], 0)

    def others_go_on(self, at: int, seconds: float) -> bool:
        """Whether every reader but this one takes steps, within so many seconds; one that attaches waits for makers."""
        others = [tally for other, tally in enumerate(self.tallies) if other != at and tally[ATTACHED]]
        before, until = [sum(tally) for tally in others], time.monotonic() + seconds
        while any(sum(tally) == then for tally, then in zip(others, before, strict=True)):
            if time.monotonic() > until:
                return False
            time.sleep(0.001)
        return True

    def end(self, seconds: float) -> int:
        """Ask everybody to end; how many did not in time, or failed."""
        for tally in self.tallies:
            tally[END] = 1
        until, hung = time.monotonic() + seconds, 0
        for at, pid in enumerate(self.pids):
            done, status = os.waitpid(pid, os.WNOHANG)
            while not done and time.monotonic() < until:
                time.sleep(0.01)
                done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                self.kill(at)
            hung += not done or status != 0
        return hung


def run(node: Node, seconds: float, rng: random.Random, *, until_wrong: bool = False) -> Outcome:
    """Readers and a mover for so many seconds, under signals; or until a byte is wrong."""
    actors = [read, read, load, move, lend]
    family, found = Family(node, actors, rng), Outcome()
    until = time.monotonic() + seconds
    while time.monotonic() < until and not (until_wrong and any(tally[WRONG] for tally in family.tallies)):
        time.sleep(rng.uniform(0.001, 0.01))
        at = rng.choice((0, 0, 1, 1, 2, 3, 4))
        if rng.random() < 0.1:
            family.kill(at)
            family.start(at)
            found.kills += 1
        else:
            os.kill(family.pids[at], signal.SIGSTOP)
            if rng.random() < 0.1:
                found.waited += not family.others_go_on(at, 10.0)
            else:
                time.sleep(rng.uniform(0.001, 0.02))
            os.kill(family.pids[at], signal.SIGCONT)
            found.stops += 1
    found.hung = family.end(20.0)
    tallies = np.array([list(tally) for tally in family.tallies]).sum(axis=0)
    found.right, found.conflicts, found.wrong, found.moves = map(int, tallies[:4])
    found.left = left_behind(node)
    return found


def left_behind(node: Node) -> str:
    """What the next process finds that is not in order."""
    store = node.store()
    tables = store.tables
    try:
        with tables.locked():
            tables.reap()
        tables.check_integrity()
        states, waves = tables.state.tolist(), int((tables.partition < 0).sum())
        fine = LOADING not in states and not tables.lease.any() and waves >= WAVES
        for slot in np.flatnonzero(tables.state != FREE).tolist():
            key = ExpertKey(int(tables.key_layer[slot]), int(tables.key_expert[slot]))
            fine = fine and bool((store.bytes_C[slot].view(np.uint64) == truth(key)).all())
        return "" if fine else f"states {states}, leases {int(tables.lease.sum())}, wave slots {waves}, or wrong bytes"
    except AssertionError as error:
        return str(error)
    finally:
        store.close()


def runs(seconds: float, checks: list[str]) -> Iterator[Outcome]:
    """The store as it is, then without each of the checks, for so many seconds or until that shows."""
    slot_words.words_kernel()  # now, and not in each process
    for check in ["", *checks]:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, contextlib.ExitStack() as changed:
            if check:
                changed.enter_context(CHECKS[check].made())
            found = run(make_node(Path(folder)), seconds, random.Random(len(check)), until_wrong=bool(check))
            found.check = check
            yield found


if __name__ == "__main__":
    for outcome in runs(float(sys.argv[1]), sys.argv[2:]):
        print(json.dumps(asdict(outcome)), flush=True)
