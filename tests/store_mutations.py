"""The shared store without one of its steps: what goes wrong then, or why nothing can.

Each step of the protocol is dropped in its turn (`store_drops`), and by hand some are made weaker. `KNOWN` is
`golden/store_drops.tsv`: by the name of such a change the node and the trace that show it, or `=` and why nothing
goes wrong, or `?` where neither is known. A step that is new to the code is not in it, and a test says so. Then

    python tests/store_mutations.py STATES [FUNCTION...] >> tests/golden/store_drops.tsv

looks for what is missing there: first among the traces that are known, then by exploring every node, up to so many
states each. What survives gets `?`: whoever adds a step says why instead, mends a node, or drops the step.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
import tempfile
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interleaving_search import explore
from interleavings import instrumented, replay
from store_drops import dropped, taken_apart
from store_scenarios import Scenario, scenarios

from buddymoe_ray.cache import ExpertCache, ahead, host, loads
from buddymoe_ray.cache.shared import lending, locks, mover, store, tables
from buddymoe_ray.kernels import slot_words

__all__ = ["GOLDEN", "Change", "Shown", "as_they_are", "changes", "goes_wrong", "known", "weakened"]

GOLDEN = Path(__file__).with_name("golden") / "store_drops.tsv"
_NO_STEPS = {"__init__", "initialise", "check_integrity", "nbytes", "resident", "run", "pin"}


@dataclass(frozen=True)
class Change:
    """A function of `owner` as `text` has it, which lacks something."""

    owner: Any
    function: str
    lacks: str
    text: str

    @property
    def name(self) -> str:
        """By which it is known."""
        return f"{self.owner.__name__.rpartition('.')[2]}.{self.function}: {' '.join(self.lacks.split())}"

    @contextlib.contextmanager
    def made(self) -> Iterator[None]:
        """The code is changed inside the block."""
        before = inspect.getattr_static(self.owner, self.function)
        module = sys.modules[self.owner.__module__] if isinstance(self.owner, type) else self.owner
        names = vars(module) | {"nullcontext": contextlib.nullcontext}
        exec(compile("from __future__ import annotations\n" + self.text, "changed", "exec"), names)
        users = [m for n, m in sys.modules.items() if n.startswith("buddymoe_ray.cache")]
        places = [self.owner, *(m for m in users if vars(m).get(self.function) is before)]
        try:
            for place in places:
                setattr(place, self.function, names[self.function])
            yield
        finally:
            for place in places:
                setattr(place, self.function, before)


@dataclass(frozen=True)
class Shown:
    """Where a change shows, and how; `node` is `=` where nothing goes wrong, and `trace` says why, and `?`
    where that is not known."""

    node: str
    trace: str


_STEPS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (tables.SharedTables, ()),
    (mover.Mover, ()),
    (lending.Lender, ()),
    (locks, ("remove_unused",)),
)
"""Whose functions are the protocol, and which; all where none is named. What opens and closes files is not dropped step
by step: it would close those of whoever looks for that."""

_TABLES, _LOADS, _LENDER, _CACHE = tables.SharedTables, loads.Loads, lending.Lender, ExpertCache
_LOOKS = "with tables.locked_soon():\n        slot = int("
_WEAKER: tuple[tuple[Any, str, str, str], ...] = (
    (ahead.ReadsAhead, "give_up", "self._cancelled.append(self._loads.pop(key))", "self._loads.pop(key)"),
    (locks, "remove_unused", "not locks.lock(TABLES_BYTE, _LONGEST_WAIT_SECONDS)", "False"),
    (locks, "remove_unused", "locks.lock(TABLES_BYTE, _LONGEST_WAIT_SECONDS)", "locks.lock(TABLES_BYTE)"),
    (slot_words, "unchanged", " == OK", " != 0"),
    (store, "open_locked", "_lock_tables(path, locks)", "pass"),
    (store, "open_locked", "if same_file(path, fd):", "if True:"),
    (_TABLES, "reap", "if not self.alive(row)", "if row != self.row"),
    (
        _TABLES,
        "glance",
        "self.entry[layer].tobytes()",
        "(lambda e: e >> 40 << 40 | self.generation[np.maximum(e >> 40, 1) - 1])(1 * self.entry[layer]).tobytes()",
    ),
    (_TABLES, "take", "expert] = slot", "expert] = slot; self._publish(slot)"),
    (_TABLES, "vacate", "self.key_layer[slot] =", "self.state[slot] = FREE; self.key_layer[slot] ="),
    (_TABLES, "locked_soon", "self._patience", "None"),
    (_TABLES, "reap_now_and_then", "suppress(Stalled), self.locked_soon()", "self.locked()"),
    (_TABLES, "lent", "self.lends.min()", "self.lends[self.row]"),
    (_LOADS, "_gather", "call.missing.append(load.key)", "raise"),
    (_CACHE, "_stream", "self._tables.locked_soon()", "nullcontext()"),
    (_CACHE, "holding", "self._tables.locked_soon()", "nullcontext()"),
    (_CACHE, "_sort", "tables.release([slot])", "pass"),
    (_CACHE, "glance", "self._tables.look()", "pass"),
    (_LOADS, "start", "self._tables.locked_soon()", "nullcontext()"),
    (_LOADS, "_others", "tables.locked_soon()", "nullcontext()"),
    (_LOADS, "_finish", "self._tables.locked_soon()", "nullcontext()"),
    (_LOADS, "_free", "self._tables.locked_soon()", "nullcontext()"),
    (_LOADS, "_gather", "self.ahead.land()", "pass"),
    (_LOADS, "read_ahead", "self._tables.locked_soon()", "nullcontext()"),
    (_LOADS, "claim", "if slot < 0:", "if True:"),
    (_LOADS, "wait", "self._check_patience(call)", "pass"),
    (_LOADS, "submit_claimed", "self._abandon(call.claimed)", "pass"),
    (ahead.ReadsAhead, "settle", "load.ticket.settle()", "pass"),
    (ahead.ReadsAhead, "settle", "self.land(waits=True)", "pass"),
    (host._Read, "conclude", "with tables.locked_soon():", "with nullcontext():"),
    (host.HostTier, "fetch", _LOOKS, _LOOKS.replace("tables.locked_soon()", "nullcontext()")),
    (_LENDER, "_looked", "words[row] % 2 and ", "False and "),
    (_LENDER, "_use", "slot >= self._first + tables.lent", "False"),
)
"""See `weakened`."""


def changes() -> Iterator[Change]:
    """All of them."""
    for owner, function, text in _sources():
        yield from (Change(owner, function, lacks, without) for lacks, without in dropped(text))
    for weaker in _WEAKER:
        yield weakened(*weaker)


@contextlib.contextmanager
def as_they_are() -> Iterator[None]:
    """Inside the block every function is as `changes` have it, and lacks nothing."""
    with contextlib.ExitStack() as made:
        for owner, function, text in [*_sources()]:
            made.enter_context(Change(owner, function, "", taken_apart(text)).made())
        yield


def _sources() -> Iterator[tuple[Any, str, str]]:
    for owner, named in _STEPS:
        for function in [f for f in vars(owner) if f not in _NO_STEPS and f in (named or vars(owner))]:
            if text := _source(owner, function):
                yield owner, function, text


def weakened(owner: Any, function: str, old: str, new: str) -> Change:
    """In a function of `owner` one text becomes another."""
    text = _source(owner, function)
    assert text.count(old) == 1, f"{function} must have {old!r} once"
    return Change(owner, function, f"{new} for {old}", text.replace(old, new))


def _source(owner: Any, function: str) -> str:
    found = inspect.getattr_static(owner, function)
    found = found.fget if isinstance(found, property) else found
    known = isinstance(found, types.FunctionType) and found.__name__ == function
    return textwrap.dedent(inspect.getsource(found)) if known else ""


def known() -> dict[str, Shown]:
    """What is known of the changes, by their names."""
    lines = [line.split("\t") for line in GOLDEN.read_text().splitlines()]
    return {name: Shown(node, trace) for name, node, trace in lines}


def goes_wrong(node: Scenario, trace: str) -> bool:
    """Whether something does, after a trace; a node that cannot even be made counts."""
    try:
        return replay(node.make, trace.split()) != ""
    except Exception:
        return True


def _shown(change: Change, nodes: dict[str, Scenario], traces: list[Shown], states: int) -> Shown:
    with change.made():
        for shown in traces:
            if goes_wrong(nodes[shown.node], shown.trace):
                return shown
        for name, node in nodes.items():
            found = explore(node.make, kills=node.kills, failures=node.failures, most_states=states)
            if found.violation:
                return Shown(name, " ".join(found.trace))
    return Shown("?", f"nor after {states} states of each node")


def main(states: int, *functions: str) -> None:
    """Print a line for each change that is not known."""
    logging.disable(logging.WARNING)
    before = known()
    traces = [shown for shown in before.values() if shown.node not in "=?"]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, instrumented():
        nodes = scenarios(Path(folder))
        for change in changes():
            if change.name not in before and (not functions or change.function in functions):
                shown = _shown(change, nodes, traces, states)
                traces = [shown, *traces] if shown.node != "?" and shown not in traces else traces
                print(change.name, shown.node, shown.trace, sep="\t", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
