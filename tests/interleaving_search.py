"""The search through every interleaving of a node's actors, by states: each step of theirs is run once.

What an actor's next step does follows from what it alone knows (its frames) and from what all see (tables, bytes,
locks, files): so it is run the first time that the two come together, and known from then on, whatever the others are
about to do. A state is everybody's own part, and the shared one; all that may happen in it is gone through without
running anything that is known, those with the fewest switches first. To run a step that is not known the way to its
state is played from the start, and what comes of that must be that very state: else something that decides is not in
the keys, and the search says so.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from interleavings import FREE_LABELS, Actor, Violation, World, made, trace_of

__all__ = ["Found", "explore"]

State = tuple[int, ...]
"""Numbers: each actor's own part, the shared one, kills, stops, failures, and ticks since anybody wrote."""


@dataclass(kw_only=True)
class Found:
    """What exploring came to: `steps` were run, in `runs` from the start. `trace` is the first violation's, empty where
    there is none. `unlike` says that a step did not come to the same twice: where that is so not all was tried."""

    states: int = 0
    moves: int = 0
    runs: int = 0
    steps: int = 0
    complete: bool = False
    unlike: str = ""
    violation: str = ""
    trace: tuple[str, ...] = ()


class _Own(NamedTuple):
    """Of an actor, by `World.own`; `woken` says that others wrote since it last slept."""

    key: tuple[Any, ...]
    woken: bool
    state: str
    label: str
    in_lock: bool
    now: float  # it goes on at that time
    byte: tuple[int, int] | None  # or once nobody has this lock
    free: bool  # or at once
    flying: tuple[int, ...]  # reads


class _Effect(NamedTuple):
    """What a step comes to: what the actor is then, and what all see."""

    own: int
    shared: int
    wrote: bool
    violation: str = ""


class _Numbers:
    """Each of things that are equal has one."""

    def __init__(self) -> None:
        self.of: dict[Any, int] = {}
        self.all: list[Any] = []

    def __call__(self, thing: Any) -> int:
        found = self.of.get(thing)
        if found is None:
            found = self.of[thing] = len(self.all)
            self.all.append(thing)
        return found


class _Node:
    """What is known of what `make`'s world can do."""

    def __init__(self, make: Callable[[], World], kills: int, failures: int) -> None:
        self.make, self.kills, self.failures = make, kills, failures
        self.owns, self.shareds = _Numbers(), _Numbers()
        self.woken: dict[int, int] = {}
        self.effects: dict[tuple[str, int, int], _Effect] = {}
        self.ends: dict[State, str] = {}
        self.found = Found()
        with made(make) as world:
            self.names, self.victims = list(world.actors), world.victims
            self.may_stop, self.patience = world.may_stop, world.patience
            self.root = self.state_of(world)
        self.at = {name: at for at, name in enumerate(self.names)}
        self.parents: dict[State, tuple[State, str] | None] = {self.root: None}

    # ---- what may happen

    def options(self, state: State, last: str) -> list[str]:
        """All that may happen and differs from what may happen later; who went on last comes first."""
        n = len(self.names)
        owns: list[_Own] = [self.owns.all[number] for number in state[:n]]
        held, now = self.shareds.all[state[n]][0], self.shareds.all[state[n]][2]
        live = [(name, own) for name, own in zip(self.names, owns, strict=True) if own.state == "live"]
        able = [
            (name, own)
            for name, own in live
            if own.free
            or own.now <= now
            or (own.byte is not None and own.byte not in held)
            or (own.label == "sleep" and own.woken)
        ]
        flying = [(name, at) for name, own in zip(self.names, owns, strict=True) for at in own.flying]
        locked = any(own.in_lock for _, own in live)
        if locked:  # only who looks without the lock can tell when it goes on, or when a read lands
            able = [(name, own) for name, own in able if own.in_lock or own.label.startswith(FREE_LABELS)]
            flying = flying if any(not own.in_lock for _, own in able) else []
        found = sorted((name for name, _ in able), key=lambda name: name != last)
        found += [f"{name}+{at}" for name, at in flying]
        if not found and live:
            stopped = [name for name, own in zip(self.names, owns, strict=True) if own.state == "stopped"]
            over = ["!" + name for name in stopped if state[n + 1] < self.kills]  # which does not last for ever
            return over if over and state[n + 4] >= self.patience else ["~", *over]
        if state[n + 3] < self.failures and not locked:
            found += [f"{name}-{at}" for name, at in flying]
        if state[n + 1] < self.kills:
            found += ["!" + name for name, _ in live if name in self.victims]
        if self.may_stop and not state[n + 2]:
            found += ["=" + name for name, _ in live if name in self.victims]
        return found

    def after(self, state: State, op: str) -> State:
        """The state that it leads to. Raises Violation."""
        n = len(self.names)
        effect = self.effects.get(self._step(state, op))
        if effect is None:
            self._run(state, op)
            effect = self.effects[self._step(state, op)]
        if effect.violation:
            raise Violation(effect.violation)
        owns, (kills, stops, failures, ticks) = list(state[:n]), state[n + 1 :]
        if op == "~":
            ticks += 1
            asleep = (
                own.label in ("sleep", "long", "lock")
                for own in map(self.owns.all.__getitem__, owns)
                if own.state == "live"
            )
            if ticks > self.patience or not any(asleep):
                raise Violation("they wait for ever")
        if effect.wrote:
            owns = [self._awake(own) for own in owns]
            ticks = ticks if op == "~" else 0
        if op != "~":
            owns[self._actor(op)] = effect.own
        return (*owns, effect.shared, kills + (op[0] == "!"), stops + (op[0] == "="), failures + ("-" in op), ticks)

    def end(self, state: State) -> State:
        """Nothing can happen any more: the same state. Raises Violation."""
        n = len(self.names)
        what = state if state[n + 2] else state[n : n + 1]
        if what not in self.ends:
            with self._played(state) as world:
                self.ends[what] = ""
                try:
                    world.finish()
                except Violation as error:
                    self.ends[what] = str(error)
        if self.ends[what]:
            raise Violation(self.ends[what])
        return state

    # ---- inside

    def _actor(self, op: str) -> int:
        return self.at[op.lstrip("!=").partition("+")[0].partition("-")[0]]

    def _step(self, state: State, op: str) -> tuple[str, int, int]:
        n = len(self.names)
        return op, -1 if op == "~" else state[self._actor(op)], state[n]

    def _awake(self, number: int) -> int:
        found = self.woken.get(number)
        if found is None:
            own = self.owns.all[number]
            found = self.woken[number] = self.owns(own._replace(woken=own.state == "live"))
        return found

    def _run(self, state: State, op: str) -> None:
        """Find out, and what comes next as long as that is not known either."""
        world: World
        with self._played(state) as world:
            while op:
                step, wrote = self._step(state, op), world.writes
                self.found.steps += 1
                try:
                    world.apply(op)
                except Violation as error:
                    self.effects[step] = _Effect(-1, -1, False, str(error))
                    return
                own = -1 if op == "~" else self.number_of(world, world.actors[self.names[self._actor(op)]])
                self.effects[step] = _Effect(own, self.shareds(world.shared()), world.writes != wrote)
                state = self.after(state, op)
                self._check(world, state)
                known = (
                    o for o in self.options(state, op) if o[0] not in "!=" and self._step(state, o) not in self.effects
                )
                op = next(known, "")

    @contextlib.contextmanager
    def _played(self, state: State) -> Iterator[World]:
        with made(self.make) as world:
            self.found.runs += 1
            for op in self.path(state):
                self.found.steps += 1
                try:
                    world.apply(op)
                except (IndexError, Violation) as error:  # no such read, or what was well is not
                    raise _Unlike(f"{op} cannot be: {error}") from error
            self._check(world, state)
            yield world

    def path(self, state: State) -> list[str]:
        """What led to a state first."""
        path: list[str] = []
        while (parent := self.parents[state]) is not None:
            state = parent[0]
            path.append(parent[1])
        return path[::-1]

    def state_of(self, world: World) -> State:
        owns = [self.number_of(world, actor) for actor in world.actors.values()]
        return (*owns, self.shareds(world.shared()), world.kills, world.stops, world.failures, world.ticks)

    def number_of(self, world: World, actor: Actor) -> int:
        until, live = actor.until, actor.state == "live"
        return self.owns(
            _Own(
                key=world.own(actor),
                woken=live and world.written(actor) != actor.seen,
                state=actor.state,
                label=actor.label,
                in_lock=actor.in_lock,
                now=math.inf if until is None else until.now,
                byte=None if until is None else until.byte,
                free=until is None or (until.read is not None and until.read.over()),
                flying=tuple(at for at, read in enumerate(actor.reads) if not read.over() and actor.state != "dead"),
            )
        )

    def _check(self, world: World, state: State) -> None:
        n, same = len(self.names), self.state_of(world)
        if same == state:
            return
        known = [(self.shareds if at == n else self.owns).all for at in range(n + 1)]
        pairs = [(all_[a], all_[b]) for all_, a, b in zip(known, state, same, strict=False) if a != b]
        found = [*itertools.chain.from_iterable(itertools.starmap(_unlike, pairs))]
        raise _Unlike(f"it is {found or (state, same)} (as it was run, as it was known)")


class _Unlike(Exception):
    """A state is another one than was known."""


def _unlike(said: Any, same: Any) -> Iterator[tuple[Any, Any]]:
    """The innermost tuples that differ."""
    alike = isinstance(said, tuple) and isinstance(same, tuple) and len(said) == len(same)
    inner = [*itertools.chain.from_iterable(itertools.starmap(_unlike, zip(said, same, strict=True)))] if alike else []
    yield from inner if any(isinstance(pair[0], tuple) for pair in inner) else [(same, said)] * (said != same)


def explore(
    make: Callable[[], World], *, kills: int = 0, failures: int = 0, most_states: int = 10**9, seconds: float = 1e9
) -> Found:
    """Try all orders of what `make`'s world can do, with at most so many kills and failed reads, until a violation."""
    node, number, end = _Node(make, kills, failures), itertools.count(), time.process_time() + seconds
    found, parents = node.found, node.parents
    waiting: list[tuple[int, int, State, str]] = [(0, 0, node.root, "")]
    while waiting and not found.violation and len(parents) < most_states and time.process_time() < end:
        cost, _, state, last = heapq.heappop(waiting)
        options = node.options(state, last)
        for op in options or [""]:
            found.moves += 1
            try:
                after = node.after(state, op) if op else node.end(state)
            except _Unlike as error:
                found.unlike = str(error)
                continue
            except Violation as error:
                found.violation, found.trace = str(error), trace_of(make, [*node.path(state), *[op] * bool(op)])
                break
            if after not in parents:
                parents[after] = (state, op)
                more = op[0] in "!=" or "-" in op or (options[0] == last and op in node.at and op != last)
                heapq.heappush(waiting, (cost + more, next(number), after, op if op in node.at else last))
    found.states, found.complete = len(parents), not (waiting or found.violation or found.unlike)
    return found
