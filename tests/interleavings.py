"""Every interleaving of the shared store's own code: actors are production calls, stopped before each shared effect.

An actor is a greenlet that runs production code. It stops at a *point* before every effect that others can see: a lock,
a write to the tables (a read too, where no lock is held), a read from disk, a sleep, an unlink. Between two points one
of the operations happens: an actor goes on to its next point (`A`), is killed as by SIGKILL (`!A`: no `finally` has an
effect, its locks go, its reads stop), is stopped as by SIGSTOP (`=A`: what it has stays its own, until it is killed
when the others are done, or have waited long), a read of its lands or fails (`A+0`, `A-0`), or, where nothing else can
happen, time passes (`~`).
`interleaving_search` tries all orders: of what an actor alone knows (its frames) and of what all see (tables, bytes,
locks, files) this file makes the keys by which it tells states apart.
What must hold is looked at all the time: the bytes of a lease are its expert's own, nobody waits for ever, a file that
is attached is not unlinked, tables mirror each other, and in the end no slot, lease or role of a slot is lost.
A violation is kept as a trace of segments, `A:lock#2` is "A goes on until it is about to lock for the second time", so
that it can be played on code that has changed since.
"""

from __future__ import annotations

import bisect
import contextlib
import dis
import errno
import fcntl
import functools
import math
import os
import sys
import time
import types
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from greenlet import getcurrent, greenlet

from buddymoe_ray.cache import ExpertCache, HostTier, ahead, host, loads
from buddymoe_ray.cache.pool import Glance, Lease
from buddymoe_ray.cache.shared import SharedStore, calls, lending, locks, mover, shape, tables
from buddymoe_ray.errors import CacheError
from buddymoe_ray.kernels import slot_words
from buddymoe_ray.types import ExpertKey, ExpertLayout, ExpertPiece, SlotPlan, SlotTensor

__all__ = [
    "FREE_LABELS",
    "Actor",
    "Reader",
    "Until",
    "Violation",
    "World",
    "instrumented",
    "made",
    "point",
    "replay",
    "trace_of",
    "truth",
]

SLOT, HALF = 64, 32
DIGEST = b"d" * 32
_TICK, _MOST_STEPS = 1.0, 2000
FREE_LABELS = ("read", "write", "compute", "open", "unlink")  # from these an actor looks at tables, bytes or files
_LOOSE = {"accesses", "last_used"}  # tables that decide nothing, or only by their order
_IGNORED = {
    "fd",
    "pause",
    "store",
    "stop",
    "progress",
    "pool",
    "destination",
    "plain",
    "word",
    "at_E",
    "words_2E",
    "last_used_C",
}

Program = Callable[["Actor"], None]
_world: World | None = None


class Violation(Exception):
    """Something that must hold does not."""


class Killed(BaseException):
    """Unwinds a killed actor; whatever it still does on the way has no effect."""


@dataclass(eq=False)
class Actor:
    """A process. `stores` are its attachments, `fds` its open shared files."""

    name: str
    program: Program
    stores: list[SharedStore] = field(default_factory=list)
    fds: set[int] = field(default_factory=set)
    label: str = "start"
    until: Until | None = None
    in_lock: bool = False
    state: str = "live"  # live, stopped, done or dead
    seen: int = 0
    listed: tuple[Any, ...] = ()  # looked at for a list that is being made, which no frame shows
    lends: int | None = None  # how many of the lent slots it leaves to experts: the others have no memory
    passed: Counter[str] = field(default_factory=Counter)
    reads: list[_Read] = field(default_factory=list)
    thread: greenlet | None = None

    def access(self, leases: Sequence[Lease]) -> None:
        """Compute with leases: the bytes must be the experts' own as long as it takes."""
        bytes_of = [lease.tensors()["w"] for lease in leases]
        for _ in range(2):
            for lease, view in zip(leases, bytes_of, strict=True):
                found = set(view.tolist())
                if found != {truth(lease.key)}:
                    raise Violation(f"{self.name} computes with {found}, must be {truth(lease.key)} ({lease.key})")
            point("compute")

    def look(self, slot: int) -> set[int]:
        """The bytes of a slot, whoever may write them."""
        if _world is not None and slot in _world.holes:
            raise Violation(f"{self.name} reads slot {slot}, whose memory was given back: it comes back with that")
        return set(self.stores[-1].bytes_C[slot].tolist())

    def use_copies(self, leases: Sequence[Lease]) -> None:
        """The same with leases of a private cache: what was copied must be the experts' own."""
        for lease in leases:
            found = set(lease.tensors()["w"].tolist())
            if found != {truth(lease.key)}:
                raise Violation(f"{self.name} copied {found}, must be {truth(lease.key)} ({lease.key})")


@dataclass(eq=False)
class _Read:
    """A read in flight, as its own ticket."""

    key: ExpertKey
    into: np.ndarray[Any, Any]
    came: bool = False
    failed: bool = False
    cancelled: bool = False  # of its parts some, others are under way
    found: bool = False  # over, by who asked last: a list that is being made of such does not show

    def over(self) -> bool:
        return self.failed or self.came

    def done(self) -> bool:
        point("done?")
        self.found = self.over()
        return self.found

    landed = done  # into a slot of this process: nothing is copied behind it

    def wait(self) -> None:
        point("wait", Until(read=self))
        if self.failed or self.cancelled:
            raise CacheError(f"{self.key} cannot be read. hint: a test")

    def settle(self) -> None:
        point("settle", Until(read=self))

    def cancel(self) -> bool:
        point("cancel")
        self.cancelled = not self.over()
        return self.cancelled


class Reader:
    """The disk of one actor."""

    mode, bytes_read, bytes_requested = "direct", 0, 0

    def submit(self, pieces: Sequence[ExpertPiece], destination: np.ndarray[Any, Any]) -> _Read:
        point("submit")
        assert _world is not None and _world.owner is not None
        layer, expert = pieces[0].path.split(".")
        read = _Read(ExpertKey(int(layer), int(expert)), destination)
        _world.owner.reads.append(read)
        return read

    def seconds(self, nbytes: int) -> float:
        """As before the first read."""
        return 0.0

    def close(self) -> None:
        """Nothing is in flight any more."""


def truth(key: ExpertKey) -> int:
    """The byte that an expert consists of."""
    return 1 + 16 * key.layer + key.expert


@dataclass(frozen=True, kw_only=True)
class Until:
    """What whoever waits is waiting for, one of these: a time, that nobody has a byte of a file, that others wrote
    something, the end of a read."""

    now: float = math.inf
    byte: tuple[int, int] | None = None
    written: bool = False
    read: _Read | None = None


def point(label: str, until: Until | None = None) -> None:
    """Before an effect that others see: whoever is chosen goes on."""
    me = _world.current if _world else None
    if me is None:
        return
    if me.state == "dead":
        raise Killed
    me.label, me.until = label, until
    assert me.thread is not None and me.thread.parent is not None
    me.thread.parent.switch()
    if me.state == "dead":
        raise Killed
    me.until = None
    me.passed[label] += 1


class _Watched(np.ndarray[Any, Any]):
    """A table: writes are points, and so are reads where no lock is held."""

    label: str

    def __array_finalize__(self, made_from: object) -> None:
        self.label = getattr(made_from, "label", "")

    def __getitem__(self, at: Any) -> Any:
        _before_read(self)
        found = np.asarray(self)[at]
        if isinstance(found, np.ndarray) and found.base is not None and np.may_share_memory(found, self):
            return _watched(found, self.label)
        if _world is not None and _world.current is not None and not _world.current.in_lock:
            listed = sys._getframe(1).f_code.co_name == "<listcomp>"
            _world.current.listed = (*_world.current.listed, _frozen(found)) if listed else ()
        return found

    def __setitem__(self, at: Any, value: Any) -> None:
        if _world is None or _world.current is None:
            np.asarray(self)[at] = value
            return
        plain = np.asarray(self)
        if np.array_equal(plain[at], value) and _world.current.in_lock:
            return
        word, value = value, None if self.label == "head" else value  # how late it is by the clock says nothing
        point(f"write-{self.label}")
        plain[at] = word
        if self.label != "head":
            _world.wrote(_world.current)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        _before_read(self)
        options.pop("out", None)
        return getattr(ufunc, method)(*[np.asarray(x) if isinstance(x, _Watched) else x for x in inputs], **options)


def _before_read(table: _Watched) -> None:
    if _world is not None and _world.current is not None and not _world.current.in_lock:
        point(f"read-{table.label}")


def _watched_views(shape_: shape.StoreShape, memory: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    loose = shape_.fields() if shape_.rows == 1 else _LOOSE  # what is private nobody else sees
    return {name: v if name in loose else _watched(v, name) for name, v in _views(shape_, memory).items()}


def _watched_head(shape_: shape.StoreShape, memory: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return _head(shape_, memory) if shape_.rows == 1 else _watched(_head(shape_, memory), "head")


def _watched(array: np.ndarray[Any, Any], label: str) -> _Watched:
    table = array.view(_Watched)
    table.label = label
    return table


class World:
    """One node: a store's file in `folder`, actors, and what may happen next."""

    def __init__(
        self, folder: Path, *, slots: int = 1, waves: int = 1, layers: int = 1, lent: int = 0, experts: int = 3
    ) -> None:
        self.path = folder / f"buddymoe-{os.geteuid()}-x.experts"
        self.path.unlink(missing_ok=True)
        self.layout = ExpertLayout(
            tensors=(SlotTensor(name="w", shape=(SLOT,), dtype="uint8", offset=0, nbytes=SLOT),),
            slot_bytes=SLOT,
            expert_bytes=SLOT,
            layers=layers,
            experts_per_layer=(experts,) * layers,
            pieces={
                ExpertKey(la, e): (ExpertPiece(path=f"{la}.{e}", offset=0, nbytes=SLOT, slot_offset=0),)
                for la in range(layers)
                for e in range(experts)
            },
        )
        self.plan = SlotPlan(
            budget_bytes=1 << 20,
            slot_bytes=SLOT,
            overhead_bytes=0,
            wave_slots=waves,
            layer_slots=(slots + lent,) * layers,
            fully_resident=False,
            reserved_bytes=lent * SLOT,
            lent_slots=(lent,) * layers if lent else (),
        )
        self.holes = set[int]()  # slots without memory
        self.files: list[int] = []  # inodes of all that were made at `path`
        self.held: dict[tuple[int, int], int] = {}  # locks, by file and byte: whose descriptor has them
        self.actors: dict[str, Actor] = {}
        self.current: Actor | None = None
        self.owner: Actor | None = None  # whose files and reads are made now
        self.now, self.ticks, self.failures, self.kills, self.stops = 0.0, 0, 0, 0, 0
        self._writes: Counter[str] = Counter()
        self._hub = getcurrent()
        global _world
        _world = self
        self.victims: frozenset[str] = frozenset()
        self.may_stop = False  # one of the victims
        self.full = False  # so that no memory that was given back comes again
        self.patience = 3  # most ticks in which nothing happens: somebody waits for ever then
        self.violation, self.unlinked, self.steps = "", False, 0

    # ---- setting up

    def actor(self, name: str, prepare: Callable[[Actor], Program]) -> Actor:
        """Add an actor: `prepare` runs now and without points, what it returns is explored."""
        actor = self.actors[name] = Actor(name, lambda _: None)
        self.owner = actor
        actor.program = prepare(actor)
        actor.thread = greenlet(lambda: self._run(actor), self._hub)
        self._switch(actor)
        return actor

    def attach(self, actor: Actor) -> SharedStore:
        """A row of the actor's own."""
        store = SharedStore(self.path, self.layout, self.plan, DIGEST)
        actor.stores.append(store)
        return store

    def fill(self, *keys: ExpertKey) -> None:
        """Make experts resident, before anything happens."""
        store = next(iter(self.actors.values())).stores[0]
        for key in keys:
            with store.tables.locked():
                [(_, slot)] = store.tables.claim([key], protect=True, kept=np.zeros(store.shape.slots, dtype=bool))
                store.tables.commit([slot])
            store.tables.release([slot])
            store.bytes_C[slot] = truth(key)

    # ---- what may happen

    def options(self) -> list[str]:
        """All that may happen while nobody is killed and no read fails; who went on last comes first."""
        able = sorted((a for a in self.actors.values() if self.able(a)), key=lambda actor: actor is not self.owner)
        found = [actor.name for actor in able] + [f"{name}+{at}" for name, at in self.flying()]
        return found or ["~"] * any(actor.state == "live" for actor in self.actors.values())

    def flying(self) -> list[tuple[str, int]]:
        """Reads on their way: whose, and which of them."""
        live = [actor for actor in self.actors.values() if actor.state != "dead"]
        return [(actor.name, at) for actor in live for at, read in enumerate(actor.reads) if not read.over()]

    def able(self, actor: Actor) -> bool:
        """Whether it can go on to its next point."""
        until = actor.until
        return actor.state == "live" and (
            until is None
            or self.now >= until.now
            or (until.byte is not None and until.byte not in self.held)
            or (until.written and self.written(actor) != actor.seen)
            or (until.read is not None and until.read.over())
        )

    def apply(self, op: str) -> None:
        """Let it happen. Raises Violation."""
        self.steps += 1
        if self.steps > _MOST_STEPS:
            raise Violation("somebody goes round for ever")
        if op == "~":
            self._tick()
        elif op[0] == "!":
            self._kill(self.actors[op[1:]])
        elif op[0] == "=":
            self.actors[op[1:]].state = "stopped"
            self.stops += 1
        elif "+" in op or "-" in op:
            self._land(op)
        else:
            self.owner = self.actors[op]
            self._switch(self.actors[op])
        if self.violation:
            raise Violation(self.violation)
        if self.unlinked:
            self._check_files()
        self._check_memory()

    def wrote(self, by: Actor | None) -> None:
        """Somebody changed what others may wait for."""
        self._writes[by.name if by else ""] += 1
        self.ticks = 0

    @property
    def writes(self) -> int:
        """How often anybody wrote, or time went on."""
        return sum(self._writes.values())

    def written(self, actor: Actor) -> int:
        """How often others wrote, or time went on: a sleeper looks again when it is more."""
        return self.writes - self._writes[actor.name]

    def let_go(self, fd: int) -> None:
        """A descriptor has no locks any more."""
        self.held = {byte: holder for byte, holder in self.held.items() if holder != fd}

    def file_of(self, fd: int) -> int:
        """The number of an open file, of all that were made at `path`."""
        inode = os.fstat(fd).st_ino
        if inode not in self.files:
            self.files.append(inode)
        return self.files.index(inode)

    def finish(self) -> None:
        """At the end: a fresh process finds everything in order. Raises Violation."""
        for actor in self.actors.values():
            if actor.state == "stopped":
                self._kill(actor)
        if self.stops:  # what could not be given back goes with its row
            for store in (store for actor in self.actors.values() if actor.state == "done" for store in actor.stores):
                store.close()
        if not self.path.exists():
            return
        stores = [store for actor in self.actors.values() for store in actor.stores]
        if stores and not self.kills and all(store._fd < 0 for store in stores):
            raise Violation("the file is there, and nobody uses it")
        store = SharedStore(self.path, self.layout, self.plan, DIGEST)
        try:
            mine = store.tables
            with mine.locked():
                mine.reap()
            mine.check_integrity()
            state, lease = np.asarray(mine.state), np.asarray(mine.lease)
            waves = int((np.asarray(mine.partition) == tables.WAVE).sum())
            free = (np.asarray(mine.pid) == 0) | (np.arange(len(mine.pid)) == mine.row)
            left = np.asarray(mine.looks)[free].any() or (np.asarray(mine.lends)[free] != mine.shape.lent).any()
            if left:
                raise Violation("a row looks, or lends, that nobody had or has just taken")
            if (state == tables.LOADING).any() or lease.any():
                raise Violation(f"states are {state.tolist()} and {int(lease.sum())} leases are left, must be none")
            if waves < self.plan.wave_slots or (waves > self.plan.wave_slots and not self.kills):
                raise Violation(f"wave slots are {waves}, must be {self.plan.wave_slots}")
            lends = [actor.lends for actor in self.actors.values() if actor.lends is not None]
            first = self.plan.slots_total - sum(self.plan.lent_slots)
            unused = np.asarray(mine.partition)[first : first + min(lends, default=0)] == tables.UNUSED
            if unused.any() and not self.kills and not self.full:
                raise Violation(f"of slots that everybody lends {unused.tolist()} are unused")
        except AssertionError as error:
            raise Violation(f"in the end {error}") from error
        finally:
            store.close()

    def dispose(self) -> None:
        """End all actors without effect."""
        for actor in self.actors.values():
            if actor.state in ("live", "stopped"):
                self._end(actor)
            self._close(actor)
        self.path.unlink(missing_ok=True)

    # ---- inside

    def _switch(self, actor: Actor) -> None:
        self.current = actor
        assert actor.thread is not None
        actor.thread.switch()
        self.current = None

    def _run(self, actor: Actor) -> None:
        try:
            point("start")
            actor.program(actor)
            self.current = None
            self._check_leaks(actor)
        except Killed:
            return
        except CacheError as error:
            self.current = None
            if not self.failures:
                self.violation = f"{actor.name} fails, and no read has: {error}"
            self._check_leaks(actor)
        except BaseException as error:
            self.violation = f"{actor.name}: {type(error).__name__} {error}"
        finally:
            if actor.state == "live":
                actor.state = "done"
            self.current = None

    def _check_leaks(self, actor: Actor) -> None:
        for store in actor.stores:
            mine = store.tables
            if mine.row < 0:
                continue
            leased = np.asarray(mine.lease)[mine.row].tolist()
            loading = ((np.asarray(mine.state) == tables.LOADING) & (np.asarray(mine.loader) == mine.row)).tolist()
            if (any(leased) or any(loading)) and not self.stops:  # else it waits for the tables
                self.violation = self.violation or f"{actor.name} ended, leases are {leased} and it loads {loading}"

    def _tick(self) -> None:
        sleeping = [
            actor
            for actor in self.actors.values()
            if actor.state == "live" and actor.label in ("sleep", "long", "lock")
        ]
        self.ticks += 1
        if not sleeping or self.ticks > self.patience:
            stuck = {a.name: a.label for a in self.actors.values() if a.state == "live"}
            raise Violation(f"{stuck} wait for ever")
        self.now += _TICK
        self._writes["~"] += 1

    def _land(self, op: str) -> None:
        name, lands, at = op.partition("+") if "+" in op else op.partition("-")
        read = self.actors[name].reads[int(at)]
        read.into[:HALF] = truth(read.key)
        if lands == "+":
            read.into[HALF:] = truth(read.key)
            read.came = True
        else:
            read.failed = True
            self.failures += 1
        self.wrote(None)

    def _kill(self, actor: Actor) -> None:
        self.kills += 1
        for read in actor.reads:
            if not read.over():
                read.into[:HALF] = truth(read.key)
        self._end(actor)
        self._close(actor)
        self.wrote(None)

    def _end(self, actor: Actor) -> None:
        actor.state, actor.lends = "dead", None
        self.current = actor
        assert actor.thread is not None
        actor.thread.throw(Killed)
        self.current = None

    def _close(self, actor: Actor) -> None:
        for fd in actor.fds:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, locks._flock(fcntl.F_UNLCK, 0, 0))
            _close(fd)
            self.let_go(fd)
        actor.fds.clear()

    def _check_files(self) -> None:
        for actor in self.actors.values():
            for store in actor.stores if actor.state != "dead" else ():
                if store.tables.row >= 0 and not locks_same_file(self.path, store._fd):
                    raise Violation(f"{actor.name} is attached to a file that was unlinked")

    def _check_memory(self) -> None:
        first = self.plan.slots_total - sum(self.plan.lent_slots)
        for actor in self.actors.values():
            beyond = range(self.plan.slots_total if actor.lends is None else first + actor.lends, self.plan.slots_total)
            if actor.state != "dead" and not self.holes.issuperset(beyond):
                raise Violation(f"{actor.name} wants the memory of {beyond}, and only {self.holes} have none")
            for store in actor.stores if self.holes and actor.state != "dead" else ():
                if store._fd < 0:
                    continue
                if store.bytes_C[sorted(self.holes)].any():
                    raise Violation(f"something was written to a slot of {self.holes}, whose memory was given back")
                if (np.asarray(store.tables.partition)[sorted(self.holes)] != tables.UNUSED).any():
                    raise Violation(f"a slot of {self.holes} may be used, and its memory was given back")

    def shared(self) -> tuple[Any, ...]:
        """All that more than one of the actors can see: with what an actor `own`s it says what its next step does."""
        live = [actor for actor in self.actors.values() if actor.state != "dead"]
        files = {self.file_of(s._fd): _content(s._array, s.shape) for a in live for s in a.stores if s._fd >= 0}
        at_path, paths = -1, [f"/proc/self/fd/{fd}" for a in live for fd in a.fds if self.file_of(fd) not in files]
        with contextlib.suppress(FileNotFoundError):
            at_path = self.files.index(os.stat(self.path).st_ino)
            paths += [str(self.path)] * (at_path not in files)
        for path in paths:
            memory, form = np.fromfile(path, np.uint8), shape.StoreShape.of(self.layout, self.plan)
            whole = len(memory) == form.total_bytes
            files[self.files.index(os.stat(path).st_ino)] = _content(memory, form) if whole else (memory.tobytes(),)
        users = tuple((a.lends, tuple(sorted(self.file_of(fd) for fd in a.fds))) for a in self.actors.values())
        held, holes = frozenset(self.held), frozenset(self.holes)
        return held, holes, self.now, users, at_path, tuple(sorted(files.items()))

    def own(self, actor: Actor) -> tuple[Any, ...]:
        """What nobody but this actor can see."""
        if actor.state == "dead":
            return ("dead",)
        until = actor.until
        return (
            (actor.state, actor.label, actor.in_lock, actor.listed),
            until and (until.now, until.byte, until.written, until.read is not None and until.read.over()),
            tuple((s._fd >= 0, s.tables.row, s.tables._patience, s.tables._reaped) for s in actor.stores),
            tuple((_frozen(read), self._slot_of(actor, read)) for read in actor.reads),
            _frames(actor),
        )

    def _slot_of(self, actor: Actor, read: _Read) -> int:
        """Where in a store it reads to; -1 is elsewhere."""
        for store in actor.stores:
            at = read.into.ctypes.data - store.bytes_C.ctypes.data
            if store._fd >= 0 and 0 <= at < store.bytes_C.nbytes:
                return int(at) // SLOT
        return -1


# ---- states


def _content(memory: np.ndarray[Any, Any], form: shape.StoreShape) -> tuple[Any, ...]:
    """What decides anything of a store's bytes."""
    views, head = _views(form, memory), _head(form, memory)
    found = [views["last_used"].argsort(kind="stable").tobytes(), form.slot_bytes_of(memory).tobytes()]
    found += [views[name].tobytes() for name in views if name not in _LOOSE]
    return int(head[shape.HeaderWord.DIRTY]), int(head[shape.HeaderWord.READY]), *found


def _frames(actor: Actor) -> tuple[Any, ...]:
    frame, found = actor.thread.gr_frame if actor.thread else None, []
    while frame is not None:
        found.append((id(frame.f_code), _place(frame), _locals(frame.f_locals)))
        frame = frame.f_back
    return tuple(found)


def _place(frame: types.FrameType) -> int:
    """Where the instruction begins that a frame is at."""
    begins = _begins(frame.f_code)
    return begins[bisect.bisect_right(begins, frame.f_lasti) - 1]


@functools.cache
def _begins(code: types.CodeType) -> list[int]:
    """Offsets of instructions; a call and what prepares it are one, as they are where the interpreter has made them
    so."""
    found, before = [0], ""
    for instruction in dis.get_instructions(code):
        if before != "PRECALL":
            found.append(instruction.offset)
        before = instruction.opname
    return found


def _locals(values: dict[str, Any]) -> tuple[Any, ...]:
    return tuple([(name, _frozen(values[name])) for name in sorted(values) if name not in _IGNORED])


def _frozen(value: Any) -> Any:
    """What of a value may decide what an actor does next."""
    freeze = _FREEZERS.get(type(value))
    if freeze is None:
        freeze = _FREEZERS[type(value)] = _freezer(type(value))
    return freeze(value)


def _freezer(kind: type) -> Callable[[Any], Any]:
    if issubclass(kind, np.generic):
        return lambda value: value.item()
    if kind.__module__.startswith("buddymoe_ray.device."):
        return lambda _: kind.__name__  # of a copy that has begun, or has not
    if issubclass(kind, BaseException):
        return lambda _: kind.__name__  # of which some are caught where others are not
    if is_dataclass(kind) and kind.__module__.startswith("buddymoe_ray.cache."):
        names = [f.name for f in fields(kind) if f.name not in _IGNORED]
        return lambda value: tuple([_frozen(getattr(value, name)) for name in names])
    return lambda _: None


def _private(mine: tables.SharedTables) -> list[np.ndarray[Any, Any]]:
    return [mine.generation, mine.key_expert, mine.state, mine.partition, mine.lease]


def _each(values: Any) -> tuple[Any, ...]:
    return tuple([_frozen(value) for value in values])


def _generator(value: Any) -> Any:
    frame = value.gi_frame
    return (
        None
        if frame is None
        else (_place(frame), _locals(frame.f_locals), None if value.gi_running else _frozen(value.gi_yieldfrom))
    )


def _itself(value: Any) -> Any:
    return value


_FREEZERS: dict[type, Callable[[Any], Any]] = {
    **dict.fromkeys((int, bool, str, bytes, float, type(None), ExpertKey), _itself),
    **dict.fromkeys((list, tuple, deque), _each),
    set: frozenset,
    dict: lambda value: _each(value.items()),
    np.ndarray: lambda value: value.tobytes() if value.size <= SLOT else None,
    types.GeneratorType: _generator,
    _Read: lambda value: (value.key, value.came, value.failed, value.cancelled, value.found),
    ExpertCache: lambda value: (
        _frozen(value._held),
        _frozen(value._loads),
        tuple(table.tobytes() for table in _private(value._tables)) if value.store.alone else None,
    ),
    loads.Loads: lambda value: (
        value.kept_C.tobytes(),
        _frozen(value.ahead),
        _frozen(value._stalled),
        value._crowded,
        round(value.fetch_seconds, 6),
    ),
    host._Awaited: lambda value: (value.slot, value.key, value.end, vars(value).get("found")),
    Glance: lambda value: (value.at_E >= 0).tobytes() + value.words_2E[1].tobytes(),
    ahead.ReadsAhead: lambda value: (_frozen(value._loads), _frozen(value._cancelled)),
    HostTier: lambda value: (
        _frozen(value._reading),
        _frozen(value._stalled),
        value._full_since,
        _frozen(value._own_slots),
    ),
    mover.Moved: lambda value: (value.moves, value.skipped),
}


# ---- the seams


_views, _head = shape.StoreShape.views, shape.StoreShape.head
_close, _unlink, _open = os.close, os.unlink, os.open
_alone, _awaited = calls.OwnSlot.read, host._Awaited.done


def locks_same_file(path: Path, fd: int) -> bool:
    try:
        return os.stat(path).st_ino == os.fstat(fd).st_ino
    except FileNotFoundError:
        return False


class _Locks(locks.FileLocks):
    """Real locks; to wait for one is a point that is passed when it is free."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._file = -1 if _world is None or fd < 0 else _world.file_of(fd)
        if _world is not None and _world.owner is not None and fd >= 0:
            _world.owner.fds.add(fd)

    def lock(self, at: int, seconds: float | None = None) -> bool:
        if _world is None or _world.current is None:
            return self._had(at, super().lock(at, seconds))
        until = math.inf if seconds is None else _world.now + seconds
        point("lock", Until(now=until, byte=(self._file, at)))
        if not self._had(at, super().try_lock(at)):
            assert _world.now >= until, "a lock that was free is not"
            return False
        _world.current.in_lock |= at == 0
        return True

    def _had(self, at: int, had: bool) -> bool:
        if had and _world is not None:
            _world.held[self._file, at] = self._fd
        return had

    def unlock(self, at: int) -> None:
        point("unlock")
        super().unlock(at)
        if _world is not None:
            del _world.held[self._file, at]
        if _world is not None and _world.current is not None:
            if at == 0:
                _world.current.in_lock = False
            else:
                _world.wrote(_world.current)

    def try_lock(self, at: int) -> bool:
        point("try_lock")
        return self._had(at, super().try_lock(at))

    def close(self) -> None:
        point("close")
        if _world is not None and _world.current is not None:
            _world.current.in_lock = False
            _world.wrote(_world.current)
        if _world is not None:
            _world.let_go(self._fd)
        super().close()


def _closed(fd: int) -> None:
    if _world is not None:
        for actor in _world.actors.values():
            actor.fds.discard(fd)
        _world.let_go(fd)
    _close(fd)


def _unlinked(path: Any, *args: Any, **options: Any) -> None:
    point("unlink")
    if _world is not None:
        _world.unlinked = True
    _unlink(path, *args, **options)


def _opened(path: Any, *args: Any, **options: Any) -> int:
    point("open")
    return _open(path, *args, **options)


def _read_alone(slot: calls.OwnSlot, key: ExpertKey) -> Lease:
    if _world is not None and _world.current is not None and not _world.stops:
        raise AssertionError(f"{key} is waited for for ever, and nobody stands still")
    return _alone(slot, key)


def _looked_for(read: host._Awaited) -> bool:
    """As `_Read.done`: a list that is being made of those that have ended does not show."""
    found = _awaited(read)
    vars(read)["found"] = found
    return found


def _given_back(store: SharedStore, first: int) -> None:
    point("punch")
    if _world is not None:
        _world.holes |= set(range(first, store.shape.slots))
        _world.wrote(_world.current)
    store.bytes_C[first:] = 0


def _taken_back(store: SharedStore, slot: int) -> None:
    point("fallocate")
    if _world is not None and _world.full:
        raise OSError(errno.ENOSPC, "no memory is left")
    if _world is not None:
        _world.holes.discard(slot)
        _world.wrote(_world.current)


@contextlib.contextmanager
def instrumented() -> Iterator[None]:
    """Production code runs with points inside the block."""
    slot_words.words_kernel()  # else its first use opens files
    now = lambda: _world.now if _world else 0.0  # noqa: E731
    clock = types.SimpleNamespace(sleep=_sleep, monotonic=now, perf_counter=now)
    data_offset = functools.cache(shape.StoreShape.data_offset.fget)  # type: ignore[attr-defined]
    changes: list[tuple[Any, str, Any]] = [
        (shape.StoreShape, "views", _watched_views),
        (shape.StoreShape, "head", _watched_head),
        (shape.StoreShape, "data_offset", property(data_offset)),
        (os, "close", _closed),
        (os, "unlink", _unlinked),
        (os, "open", _opened),
        (calls.OwnSlot, "read", _read_alone),
        (host._Awaited, "done", _looked_for),
        (SharedStore, "give_back", _given_back),
        (SharedStore, "take_back", _taken_back),
        (lending, "_pause", lambda: point("pause")),
    ]
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("buddymoe_ray.cache"):
            if vars(module).get("FileLocks") is locks.FileLocks:
                changes.append((module, "FileLocks", _Locks))
            if vars(module).get("time") is time:
                changes.append((module, "time", clock))
    # a generator that a killed actor leaves behind is closed, and says that it was killed
    quiet = lambda lost: None if isinstance(lost.exc_value, Killed) else sys.__unraisablehook__(lost)  # noqa: E731
    changes.append((sys, "unraisablehook", quiet))
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _sleep(pause: float) -> None:
    world, me = _world, _world.current if _world else None
    if world is None or me is None:
        return
    point("sleep", Until(written=True))
    me.seen = world.written(me)


# ---- playing


def replay(make: Callable[[], World], trace: Sequence[str]) -> str:
    """Play a trace and let everybody end in turn; returns the violation, or nothing."""
    with made(make) as world:
        try:
            for segment in trace:
                for op in _ops_of(world, segment):
                    world.apply(op)
            while options := world.options():
                world.apply(options[0])
            world.finish()
        except Violation as error:
            return str(error)
    return ""


def _ops_of(world: World, segment: str) -> Iterator[str]:
    name, _, until = segment.partition(":")
    if not until:
        state_of = {name: world.actors[name].state for name in world.victims}
        ends = ["!" + name for name, state in state_of.items() if state in ("live", "stopped")]
        ends += ["=" + name for name, state in state_of.items() if state == "live" and world.may_stop]
        known = {*world.options(), *ends, *(f"{name}-{at}" for name, at in world.flying())}
        yield from [segment] if segment in known else []
        return
    label, _, count = until.partition("#")
    actor = world.actors[name]
    while world.able(actor) and not (actor.label == label and actor.passed[label] + 1 >= int(count)):
        yield name


def trace_of(make: Callable[[], World], path: Sequence[str]) -> tuple[str, ...]:
    """A path as segments."""
    trace: list[str] = []
    with made(make) as world, contextlib.suppress(Violation):
        for at, op in enumerate(path):
            actor = world.actors.get(op)
            if actor is not None and at + 1 == len(path):
                trace.append(f"{op}:end#1")
            world.apply(op)
            if actor is None:
                trace.append(op)
            elif at + 1 < len(path) and path[at + 1] != op:
                trace.append(f"{op}:{actor.label}#{actor.passed[actor.label] + 1}")
    return tuple(trace)


@contextlib.contextmanager
def made(make: Callable[[], World]) -> Iterator[World]:
    global _world
    try:
        _world = world = make()
        yield world
    finally:
        try:
            if _world is not None:
                _world.dispose()
        finally:
            _world = None
