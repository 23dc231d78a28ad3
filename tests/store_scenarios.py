"""Small nodes whose every interleaving is tried: who is there, and what each does with production calls.

Whole, with a kill of anybody at any step: two readers, a writer, a repairer and a sweeper are 514,819 states, of which
each of 3,992 ways from the start ran what was not known yet (17 CPU seconds, `golden/store_nodes.log`; before each step
was run once for what it sees, 228,700 states took 120 s, and they were not all).
"""

from __future__ import annotations

import logging
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from interleaving_search import explore
from interleavings import Actor, Reader, Until, Violation, World, instrumented, point, truth

from buddymoe_ray.cache import ExpertCache, HostTier, open_private
from buddymoe_ray.cache.shared import Lender, Move, Mover, SharedStore, sweep
from buddymoe_ray.device import open_device
from buddymoe_ray.kernels import slot_words
from buddymoe_ray.types import ExpertKey, SlotPlan

__all__ = ["Scenario", "scenarios"]

Prepare = Callable[[Actor], Callable[[Actor], None]]
X, Y, Z = (ExpertKey(0, expert) for expert in range(3))
V = ExpertKey(1, 0)


def worker(
    world: World,
    *experts: int,
    held: tuple[int, ...] = (),
    ahead: tuple[int, ...] = (),
    prompt: bool = False,
    seconds: float = 0.0,
    after: float = 0.0,
) -> Prepare:
    """Streams the experts once; inside a hold, after reading some ahead, for a prompt, computing long, or only after a
    while, where asked."""

    def prepare(me: Actor) -> Callable[[Actor], None]:
        cache = ExpertCache(world.attach(me), reader=Reader())  # type: ignore[arg-type]

        def program(me: Actor) -> None:
            if after:
                point("long", Until(now=after))
            try:
                if ahead:
                    cache.read_ahead(0, ahead, protect_residency=prompt)
                use(me)
            finally:
                cache.settle_ahead()

        def use(me: Actor) -> None:
            with cache.holding(0, list(held)) as able:
                wanted = [*able, *(e for e in experts if e not in able)]
                waves = cache.stream(0, wanted, protect_residency=bool(held) or prompt)  # a name: so its state is seen
                for leases in waves:
                    until = world.now + seconds
                    me.access(leases)
                    if seconds:
                        point("long", Until(now=until))
                        me.access(leases)

        return program

    return prepare


def glancer(world: World, *experts: int) -> Prepare:
    """Computes with experts that are READY and holds nothing; what it computed counts if nothing changed meanwhile."""

    def prepare(me: Actor) -> Callable[[Actor], None]:
        store, ids = world.attach(me), np.array(experts)
        cache = ExpertCache(store, reader=Reader())  # type: ignore[arg-type]

        def program(me: Actor) -> None:
            try:
                take_a_look(me)
            finally:
                cache.settle_ahead()

        def take_a_look(me: Actor) -> None:
            glance = cache.glance(0)
            assert glance is not None and glance.words_2E is not None, "loads are in order here"
            if (glance.at_E[ids] < 0).any():
                return
            slots = ((glance.at_E[ids] - store.address(0)) // world.layout.slot_bytes).tolist()
            found = [me.look(slot) for slot in slots]
            point("compute")
            found += [me.look(slot) for slot in slots]
            point("computed")
            wanted = 2 * [{truth(ExpertKey(0, expert))} for expert in experts]
            if slot_words.unchanged(ids, glance.words_2E) and found != wanted:
                raise Violation(f"{me.name} takes {found} for {wanted}")

        return program

    return prepare


def keeper(world: World, *moves: Move) -> Prepare:
    """Frees what the dead held, then moves experts, as a node's keeper does."""

    def prepare(me: Actor) -> Callable[[Actor], None]:
        store = world.attach(me)
        mover = Mover(store, Reader(), bytes_per_second=1e12)  # type: ignore[arg-type]

        def program(_: Actor) -> None:
            with store.tables.locked():
                store.tables.reap()
            mover.run(moves)

        return program

    return prepare


def lender(world: World, *counts: int, until: float = math.inf) -> Prepare:
    """Leaves so many of the lent slots to experts and has the memory of the others, then as many as come next; gives up
    at that time."""

    def prepare(me: Actor) -> Callable[[Actor], None]:
        own = Lender(world.attach(me))

        def ended() -> bool:
            return world.now >= until

        def program(me: Actor) -> None:
            for count in counts:
                me.lends = None if me.lends is None else max(me.lends, count)
                if not own.lend(count, ended):
                    assert ended(), "nobody stopped it"
                    return
                me.lends = count
                point("compute")

        return program

    return prepare


def reaper(world: World) -> Prepare:
    """Holds the lock once, with changes: the one that is killed half-way."""

    def prepare(me: Actor) -> Callable[[Actor], None]:
        store = world.attach(me)

        def program(_: Actor) -> None:
            with store.tables.locked():
                store.tables.reap()

        return program

    return prepare


def device(world: World, *experts: int) -> Prepare:
    """A GPU worker's cache over the node's host tier."""

    def prepare(me: Actor) -> Callable[[Actor], None]:
        reader = Reader()
        host = HostTier(world.attach(me), reader=reader, device=open_device("cpu"))  # type: ignore[arg-type]
        plan = SlotPlan(
            budget_bytes=1 << 20,
            slot_bytes=world.layout.slot_bytes,
            overhead_bytes=0,
            wave_slots=1,
            layer_slots=(1,),
            fully_resident=False,
        )
        cache = open_private(world.layout, plan, reader=reader, host=host)  # type: ignore[arg-type]

        def program(me: Actor) -> None:
            waves = cache.stream(0, list(experts), protect_residency=False)
            for leases in waves:
                me.use_copies(leases)

        return program

    return prepare


def starter(world: World) -> Prepare:
    """Attaches, and leaves."""

    def prepare(_: Actor) -> Callable[[Actor], None]:
        def program(me: Actor) -> None:
            store = SharedStore(world.path, world.layout, world.plan, b"d" * 32)
            me.stores.append(store)
            point("attached")
            store.close()

        return program

    return prepare


def leaver(world: World) -> Prepare:
    """Leaves."""

    def prepare(me: Actor) -> Callable[[Actor], None]:
        store = world.attach(me)
        return lambda _: store.close()

    return prepare


def sweeper(world: World) -> Prepare:
    """Removes what nobody uses."""
    return lambda _: lambda _: sweep(world.path.parent) and None  # type: ignore[func-returns-value]


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A world, and how much may go wrong in it: kills (of `victims`, else of anybody) and failed reads. In some one of
    the victims may be stopped for good."""

    make: Callable[[], World]
    kills: int = 0
    failures: int = 0


def _scenario(
    folder: Path,
    actors: dict[str, Callable[[World], Prepare]],
    *resident: ExpertKey,
    kills: int = 0,
    failures: int = 0,
    victims: str = "",
    patience: int = 3,
    slots: int = 1,
    lent: int = 0,
    layers: int = 1,
    stops: bool = False,
    full: bool = False,
) -> Scenario:
    def make() -> World:
        world = World(folder, slots=slots, lent=lent, layers=layers)
        world.victims, world.patience, world.may_stop = frozenset(victims or actors), patience, stops
        world.full = full
        for name, prepare in actors.items():
            world.actor(name, prepare(world))
        if resident:
            world.fill(*resident)
        world.owner = None  # who begins is open
        return world

    return Scenario(make=make, kills=kills, failures=failures)


def _worker(*experts: int, **options: Any) -> Callable[[World], Prepare]:
    return lambda world: worker(world, *experts, **options)


def _glancer(*experts: int) -> Callable[[World], Prepare]:
    return lambda world: glancer(world, *experts)


def _keeper(*moves: Move) -> Callable[[World], Prepare]:
    return lambda world: keeper(world, *moves)


def _device(*experts: int) -> Callable[[World], Prepare]:
    return lambda world: device(world, *experts)


def _lender(*counts: int, **options: Any) -> Callable[[World], Prepare]:
    return lambda world: lender(world, *counts, **options)


def scenarios(folder: Path) -> dict[str, Scenario]:
    """All of them, by name."""
    swap = Move(load=Y, evict=X)
    return {
        "same": _scenario(folder, {"A": _worker(0), "B": _worker(0)}, failures=1),
        "same, killed": _scenario(folder, {"A": _worker(0), "B": _worker(0)}, kills=1),
        "evict": _scenario(folder, {"A": _worker(0, 1), "B": _worker(2)}, X, Y, kills=1),
        "waves": _scenario(folder, {"A": _worker(0, 1, 2), "B": _worker(2, 1)}, failures=1),
        "move": _scenario(folder, {"A": _worker(0), "M": _keeper(swap)}, X, kills=1),
        "move, failed": _scenario(folder, {"A": _worker(0, 1), "M": _keeper(swap)}, X, failures=1),
        "movers": _scenario(
            folder, {"A": _worker(0), "M": _keeper(swap), "N": _keeper(Move(load=Z))}, X, kills=1, victims="M"
        ),
        "repair": _scenario(folder, {"M": _keeper(swap), "A": _worker(2), "K": reaper}, X, kills=1, victims="K"),
        "repair, kept": _scenario(
            folder, {"M": _keeper(Move(load=Y)), "A": _worker(2), "K": reaper}, kills=1, victims="K"
        ),
        "repair, and again": _scenario(
            folder,
            {"A": _worker(2), "M": _keeper(Move(load=Y)), "K": reaper, "B": _worker(0)},
            X,
            kills=2,
            victims="AK",
        ),
        "killed, and two wait": _scenario(
            folder, {"A": _worker(0), "B": _worker(0), "C": _worker(0)}, kills=1, victims="A"
        ),
        "killed, beside the last": _scenario(folder, {"A": _worker(1), "M": _keeper(swap)}, X, Z, kills=1),
        "killed, beside the last, late": _scenario(
            folder, {"A": _worker(0, seconds=7.0), "M": _keeper(swap)}, X, Z, kills=1, victims="M", patience=12
        ),
        "killed, and who sees to it": _scenario(folder, {"A": _worker(0), "K": reaper}, X, kills=2),
        "killed in a look": _scenario(folder, {"A": _glancer(0), "K": reaper}, X, kills=2, lent=1),
        "killed, having lent": _scenario(folder, {"L": _lender(0), "K": reaper}, X, kills=2, lent=1),
        "move, to a free slot": _scenario(
            folder, {"M": _keeper(Move(load=Y)), "A": _worker(1)}, kills=1, failures=1, victims="M"
        ),
        "move, of another layer": _scenario(
            folder, {"M": _keeper(Move(load=Y, evict=V)), "A": _worker(1)}, V, kills=1, layers=2
        ),
        "move, out of a wave": _scenario(folder, {"M": _keeper(Move(load=Z, evict=Y)), "A": _worker(0)}, X, Y),
        "move, of what is there": _scenario(
            folder, {"M": _keeper(Move(load=Y, evict=X)), "A": _worker(1)}, X, Y, slots=2
        ),
        "move, for one that is gone": _scenario(
            folder, {"M": _keeper(Move(load=Z, evict=Y)), "A": _worker(1, held=(1,))}, X, slots=0, lent=1
        ),
        "long": _scenario(folder, {"A": _worker(0, seconds=7.0), "M": _keeper(swap), "B": _worker(0)}, X, patience=12),
        "roles": _scenario(folder, {"A": _worker(0, 2, held=(0,)), "M": _keeper(swap)}, X, Y, kills=1),
        "wait, move": _scenario(folder, {"A": _worker(0), "B": _worker(0), "M": _keeper(swap)}),
        "hold a wave": _scenario(folder, {"A": _worker(1, 2, held=(1,))}, X, Y),
        "one, another": _scenario(folder, {"A": _worker(0), "B": _worker(1)}, X, kills=1),
        "hold": _scenario(folder, {"A": _worker(0, held=(0,)), "M": _keeper(swap)}, X),
        "hold, arrive": _scenario(folder, {"A": _worker(0, held=(0,)), "B": _worker(0)}),
        "failed, killed": _scenario(folder, {"A": _worker(0), "B": _worker(0)}, kills=1, failures=1, victims="A"),
        "moves, failed, killed": _scenario(
            folder, {"M": _keeper(swap), "B": _worker(1)}, X, kills=1, failures=1, victims="M"
        ),
        "failed, repaired": _scenario(
            folder, {"A": _worker(0), "B": _worker(0), "K": reaper}, kills=1, failures=1, victims="K"
        ),
        "move, killed": _scenario(folder, {"M": _keeper(swap), "B": _worker(1)}, X, kills=1, victims="M"),
        "long, late": _scenario(
            folder, {"A": _worker(0, seconds=7.0), "M": _keeper(swap), "B": _worker(0, after=6.0)}, X, patience=12
        ),
        "devices, failed": _scenario(folder, {"A": _device(0), "B": _device(0)}, failures=1),
        "glance": _scenario(folder, {"A": _glancer(0), "B": _worker(1)}, X, kills=1, failures=1),
        "glance, move": _scenario(folder, {"A": _glancer(0), "M": _keeper(swap)}, X, kills=1),
        "glance, arrive": _scenario(folder, {"A": _glancer(0), "B": _worker(0)}, kills=1),
        "glance, arrive, repaired": _scenario(
            folder, {"A": _glancer(0), "B": _worker(0), "K": reaper, "C": reaper}, kills=1, victims="K"
        ),
        "glance, with all": _scenario(
            folder, {"A": _glancer(0), "B": _glancer(0), "W": _worker(1), "K": reaper, "S": sweeper}, X, kills=1
        ),
        "ahead": _scenario(folder, {"A": _worker(0, ahead=(0, 1)), "B": _worker(1)}, kills=1, failures=1, slots=2),
        "ahead, for each other": _scenario(
            folder, {"A": _worker(1, ahead=(0,)), "B": _worker(0, ahead=(1,))}, kills=1, slots=2
        ),
        "ahead, evicting": _scenario(folder, {"A": _worker(2, ahead=(2, 0)), "B": _worker(0, 1)}, X, Y, failures=1),
        "ahead, for a prompt": _scenario(
            folder, {"A": _worker(1, 2, ahead=(2, 1), prompt=True), "B": _worker(2)}, X, kills=1, failures=1
        ),
        "ahead, both for prompts": _scenario(
            folder,
            {"A": _worker(1, ahead=(2,), prompt=True), "B": _worker(2, ahead=(1,), prompt=True)},
            X,
            Y,
            kills=1,
        ),
        "stopped": _scenario(folder, {"A": _worker(0, 1), "B": _worker(0, ahead=(1,))}, victims="A", stops=True),
        "stopped, failed": _scenario(folder, {"A": _worker(0), "B": _worker(1)}, failures=1, victims="A", stops=True),
        "stopped, computing": _scenario(
            folder, {"A": _worker(0, 1), "B": _worker(2, 1)}, X, Y, victims="A", stops=True
        ),
        "stopped, holding": _scenario(
            folder, {"A": _worker(0, 2, held=(0,)), "B": _worker(1, held=(0, 1))}, X, Y, victims="A", stops=True
        ),
        "stopped, for a prompt": _scenario(
            folder, {"A": _worker(1, 2, prompt=True), "B": _worker(2, prompt=True)}, X, victims="A", stops=True
        ),
        "stopped, moving": _scenario(folder, {"M": _keeper(swap), "B": _worker(1, 0)}, X, victims="M", stops=True),
        "stopped, and moved": _scenario(
            folder,
            {"A": _worker(0, 1, held=(0,)), "M": _keeper(swap)},
            X,
            kills=1,
            victims="A",
            stops=True,
            patience=12,
        ),
        "stopped, ending": _scenario(folder, {"A": _worker(0), "B": leaver}, victims="A", stops=True, patience=6),
        "stopped, lending": _scenario(
            folder, {"A": _worker(1), "L": _lender(0, until=2.0)}, X, Y, victims="A", stops=True, lent=1
        ),
        "lent": _scenario(folder, {"A": _worker(1), "L": _lender(0)}, X, Y, kills=1, lent=1),
        "lent, and read": _scenario(folder, {"A": _worker(1), "L": _lender(0)}, X, kills=1, failures=1, lent=1),
        "lent, and looked at": _scenario(folder, {"A": _glancer(1), "L": _lender(0)}, X, Y, kills=1, lent=1),
        "lent, by two": _scenario(folder, {"L": _lender(0), "N": _lender(0, 1)}, X, Y, kills=1, lent=1),
        "lent, by two, and again": _scenario(folder, {"L": _lender(0, 1), "N": _lender(0, 1)}, X, kills=1, lent=1),
        "lent, and none comes back": _scenario(
            folder, {"L": _lender(0, 1), "N": _lender(0, 1)}, X, kills=1, lent=1, full=True
        ),
        "lent, and moved": _scenario(
            folder, {"M": _keeper(Move(load=Z, evict=Y)), "L": _lender(0)}, X, Y, kills=1, failures=1, lent=1
        ),
        "lent, for a wave": _scenario(
            folder, {"M": _keeper(Move(load=Z, evict=Y)), "L": _lender(0)}, X, Y, Z, kills=1, lent=1
        ),
        "lent, and again": _scenario(folder, {"L": _lender(0, 1), "A": _worker(0, 1, 2)}, X, Y, kills=1, lent=1),
        "start": _scenario(folder, {"A": starter, "B": starter}, kills=1),
        "sweep": _scenario(folder, {"A": starter, "S": sweeper}, kills=1),
        "devices": _scenario(folder, {"A": _device(0), "B": _device(1, 2)}, failures=1),
        "devices, full": _scenario(folder, {"A": _device(0, 1), "B": _device(1, 2)}),
        "devices, killed": _scenario(folder, {"A": _device(0), "B": _device(0, 1)}, kills=1),
    }


def main(seconds: float, *names: str) -> None:
    """Explore the nodes so named (else all), each for so many seconds of this processor at most."""
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, instrumented():
        for name, node in scenarios(Path(folder)).items():
            if not names or name in names:
                began = time.process_time()
                found = explore(node.make, kills=node.kills, failures=node.failures, seconds=seconds)
                print(f"{name}: {time.process_time() - began:.1f} CPU seconds, {found}", flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), *sys.argv[2:])
