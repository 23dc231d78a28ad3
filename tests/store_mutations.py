"""The shared store without one of its locks or checks: each such change must be found by exploring small nodes."""

from __future__ import annotations

import contextlib
import inspect
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interleaving_search import explore
from interleavings import instrumented
from store_scenarios import scenarios

from buddymoe_ray.cache import ExpertCache, HostTier, ahead, host, loads
from buddymoe_ray.cache.shared import lending, locks, mover, store, tables
from buddymoe_ray.kernels import slot_words

__all__ = ["MUTATIONS", "Mutation"]

Cache, Loads, Tables = ExpertCache, loads.Loads, tables.SharedTables
Mover, Ahead, Lender = mover.Mover, ahead.ReadsAhead, lending.Lender


@dataclass(frozen=True)
class Mutation:
    """In `function` of `owner` the text `old`, the `nth` one, becomes `new`; `node` is where that shows, and `trace`
    how."""

    owner: Any
    function: str
    old: str
    new: str
    node: str
    trace: str
    nth: int = 0

    @contextlib.contextmanager
    def made(self) -> Iterator[None]:
        """The code is changed inside the block."""
        before = inspect.getattr_static(self.owner, self.function)
        text = textwrap.dedent(inspect.getsource(before.fget if isinstance(before, property) else before))
        parts = text.split(self.old)
        assert len(parts) > self.nth + 1, f"{self.function} has no {self.old!r} number {self.nth}"
        text = self.old.join(parts[: self.nth + 1]) + self.new + self.old.join(parts[self.nth + 1 :])
        module = sys.modules[self.owner.__module__] if isinstance(self.owner, type) else self.owner
        names = vars(module) | {"nullcontext": contextlib.nullcontext}
        exec(compile("from __future__ import annotations\n" + text, "mutated", "exec"), names)
        users = [m for n, m in sys.modules.items() if n.startswith("buddymoe_ray.cache")]
        places = [self.owner, *(m for m in users if vars(m).get(self.function) is before)]
        try:
            for place in places:
                setattr(place, self.function, names[self.function])
            yield
        finally:
            for place in places:
                setattr(place, self.function, before)


LOCKED, UNLOCKED = "with tables.locked():", "with nullcontext():"
SOON, MINE, FREE = "tables.locked_soon()", "self._tables.locked_soon()", "nullcontext()"
MUTATIONS = [
    Mutation(
        Cache,
        "_stream",
        MINE,
        FREE,
        "one, another",
        "A:read-lease#1 B:settle#1 A:sleep#2 B+0 A:sleep#3 B:write-lease#4 A:end#1",
    ),
    Mutation(Cache, "holding", MINE, FREE, "hold", "A:read-state#1 M:wait#1 M+0 M:write-lease#3 A:end#1"),
    Mutation(
        Loads,
        "start",
        MINE,
        FREE,
        "waves",
        "A:settle#1 A+1 A+0 A:read-partition#4 B:settle#1 B+0 B:write-lease#5 A:settle#2 A+2 A:end#1",
    ),
    Mutation(Loads, "_others", SOON, FREE, "same", "A:settle#1 B:lock#1 A-0 B:read-state#4 A:write-lease#3 B:end#1"),
    Mutation(
        Loads,
        "_finish",
        MINE,
        FREE,
        "same, killed",
        "A:settle#1 B:sleep#2 A+0 B:sleep#3 A:write-state#2 !A B:sleep#4",
    ),
    Mutation(
        Loads,
        "_abandon",
        MINE,
        FREE,
        "failed, repaired",
        "A:settle#1 A-0 A:write-state#2 K:write-head#2 !K B:lock#2 A:end#1 B:end#1",
    ),
    Mutation(Mover, "_empty_slot", LOCKED, UNLOCKED, "move", "A:write-lease#3 M:write-key_expert#1 !M"),
    Mutation(
        Mover,
        "_one",
        LOCKED,
        UNLOCKED,
        "move",
        "A:lock#1 M:write-loader#2 A:settle#1 M:wait#1 A+0 A:write-lease#3 M+0 M:end#1",
    ),
    Mutation(
        Mover,
        "_one",
        LOCKED,
        UNLOCKED,
        "moves, failed, killed",
        "M:wait#1 M-0 M:write-state#1 !M B:settle#1 B+0 B:end#1",
        nth=1,
    ),
    Mutation(
        Mover,
        "_one",
        LOCKED,
        UNLOCKED,
        "move, killed",
        "M:wait#1 B:sleep#2 M+0 B:sleep#3 M:write-state#4 !M B:sleep#4",
        nth=2,
    ),
    Mutation(
        Mover,
        "_drained",
        LOCKED,
        UNLOCKED,
        "long, late",
        "A:long#1 M:sleep#2 B:long#1 ~ M:sleep#3 ~ M:sleep#4 ~ M:sleep#5 ~ M:sleep#6 ~ M:sleep#7 ~ M:write-key_layer#2 "
        "B:settle#1 M:read-resident#2 B+0 B:write-lease#3 ~ A:end#1",
    ),
    Mutation(
        HostTier,
        "fetch",
        LOCKED,
        UNLOCKED,
        "devices",
        "A:write-loader#1 B:wait#1 A:wait#1 A+0 A:write-lease#4 B+0 B:wait#2 B+1 B:end#1",
    ),
    Mutation(
        host._Read,
        "conclude",
        LOCKED,
        UNLOCKED,
        "devices, killed",
        "A:wait#1 B:sleep#2 A+0 B:sleep#3 A:write-state#2 !A B:sleep#4 B+0 B:sleep#5",
    ),
    Mutation(
        Loads,
        "_gather",
        "self.ahead.land()",
        "pass",
        "ahead, for each other",
        "A:submit#1 B:sleep#2 A:sleep#2 B:sleep#3 A+0 B:sleep#4 A:sleep#3 B+0 A:sleep#4 B:sleep#5 ~ B:sleep#6 "
        "A:sleep#5 ~ A:sleep#6 B:sleep#7 ~ B:sleep#8 A:sleep#7",
    ),
    Mutation(
        Loads,
        "read_ahead",
        MINE,
        FREE,
        "ahead",
        "A:read-pinned#1 B:settle#1 A:settle#1 B+0 A+0 A+1 A:write-lease#7 B:end#1",
    ),
    Mutation(
        Cache,
        "_sort",
        "tables.release([slot])",
        "pass",
        "ahead",
        "A:settle#1 B:sleep#2 A+0 B:sleep#3 A:settle#2 B:sleep#4 A+1 B:sleep#5 A:end#1",
    ),
    Mutation(Ahead, "settle", "load.ticket.settle()", "pass", "ahead", "A:settle#1 B:sleep#2 A+0 B:sleep#3 A:end#1"),
    Mutation(
        Ahead,
        "settle",
        "self.land(waits=True)",
        "pass",
        "ahead",
        "A:settle#1 B:sleep#2 A+0 B:sleep#3 A:settle#2 B:sleep#4 A+1 B:sleep#5 A:end#1",
    ),
    Mutation(
        Ahead,
        "give_up",
        "self._cancelled.append(self._loads.pop(key))",
        "self._loads.pop(key)",
        "ahead",
        "A:settle#1 B:sleep#2 A+0 B:sleep#3 A:end#1",
    ),
    Mutation(store, "open_locked", "locks.lock(TABLES_BYTE)", "pass", "start", "A:write-usage#1 B:end#1"),
    Mutation(store, "open_locked", "if same_file(path, fd):", "if True:", "start", "A:lock#1 B:close#3 A:end#1"),
    Mutation(
        locks,
        "remove_unused",
        "not locks.lock(TABLES_BYTE, _LONGEST_WAIT_SECONDS)",
        "False",
        "sweep",
        "A:unlink#1 S:close#2 A:end#1",
    ),
    Mutation(locks, "remove_unused", "not used and ", "", "sweep", "A:attached#1 S:end#1"),
    Mutation(locks, "remove_unused", " and same_file(path, fd)", "", "start", "A:lock#3 B:close#3 A:end#1"),
    Mutation(
        Tables,
        "_idle",
        "[~self.leased(slots)]",
        "",
        "movers",
        "A:compute#1 M:read-lease#1 !M N:wait#1 N+0 N:end#1 A:end#1",
    ),
    Mutation(
        Tables,
        "_idle",
        "[~self.leased(slots)]",
        "",
        "evict",
        "A:read-generation#2 B:settle#1 A:end#1",
    ),
    Mutation(
        Tables,
        "arrived",
        "if self.state[slot] == FREE:",
        "if False:",
        "same",
        "A:settle#1 B:lock#1 A-0 B:sleep#2 A:write-lease#3 B:end#1",
    ),
    Mutation(
        Tables,
        "arrived",
        " or self.key_layer[slot] < 0",
        "",
        "wait, move",
        "A:settle#1 B:sleep#2 A+0 A:end#1 M:sleep#1 B:end#1",
    ),
    Mutation(
        Tables,
        "_repair",
        "if layer < 0 and held:",
        "if False:",
        "repair",
        "M:read-lease#1 K:write-head#2 !K M:lock#3 A:settle#1 M:submit#1 A+0 M:wait#1 M+0 M:write-lease#3 A:end#1",
    ),
    Mutation(
        Tables,
        "_repair",
        "orphan or ",
        "",
        "same, killed",
        "A:settle#1 B:sleep#2 A+0 B:sleep#3 A:write-state#2 !A B:sleep#4",
    ),
    Mutation(
        Tables,
        "_begin",
        "if self.head[HeaderWord.DIRTY]:",
        "if False:",
        "same, killed",
        "A:write-slot_of#1 !A B:settle#1 B+0 B:end#1",
    ),
    Mutation(Tables, "reap", "if not self.alive(row)", "if row != self.row", "move", "A:write-head#2 !A M:sleep#2"),
    Mutation(Tables, "alive", "row == self.row or ", "", "same, killed", "A:unlock#2 !A B:sleep#2"),
    Mutation(
        Loads,
        "claim",
        "if slot < 0:",
        "if True:",
        "waves",
        "A:settle#1 A+1 A+0 A:lock#4 B:settle#1 B+0 B:write-lease#5 A:settle#2 A+2 A:end#1",
    ),
    Mutation(
        Mover,
        "_one",
        "if (now := int(tables.slot_of[key.layer, key.expert])) >= 0:",
        "if False:",
        "move, failed",
        "M:lock#3 A:done?#1 A+0 A:done?#2 A+1 A:write-lease#5 M:wait#1 M+0 M:end#1",
    ),
    Mutation(
        Mover,
        "_empty_slot",
        " and not tables.leased(np.array([slot]))[0]",
        "",
        "roles",
        "A:lock#2 M:read-resident#2 A:sleep#2",
    ),
    Mutation(
        Mover,
        "_drained",
        "while tables.leased(np.array([slot]))[0]:",
        "while False:",
        "move",
        "A:read-generation#2 M:wait#1 A:end#1",
    ),
    Mutation(
        Tables,
        "restore",
        "if self.slot_of[key.layer, key.expert] < 0:",
        "if True:",
        "long",
        "A:long#1 M:sleep#2 B:settle#1 M:sleep#3 B+0 M:sleep#4 B:write-lease#3 M:sleep#5",
    ),
    Mutation(
        Tables,
        "restore",
        "self.vacate(slot)",
        "pass",
        "long",
        "A:long#1 M:sleep#2 B:settle#1 M:sleep#3 B+0 M:sleep#4 B:write-lease#3 M:sleep#5",
    ),
    Mutation(
        slot_words,
        "unchanged",
        " == OK",
        " != 0",
        "glance",
        "A:compute#1 B:settle#1 B+0 B:write-lease#3 A:end#1",
    ),
    Mutation(
        Tables,
        "glance",
        "self.entry[layer].tobytes()",
        "(lambda e: e >> 40 << 40 | self.generation[np.maximum(e >> 40, 1) - 1])(1 * self.entry[layer]).tobytes()",
        "glance",
        "A:read-generation#1 B:settle#1 B+0 B:write-lease#3 A:end#1",
    ),
    Mutation(
        Tables,
        "take",
        "self.slot_of[key.layer, key.expert] = slot",
        "self.slot_of[key.layer, key.expert] = slot; self._publish(slot)",
        "glance, arrive",
        "B:settle#1 A:end#1",
    ),
    Mutation(Tables, "vacate", "self.entry[layer, expert] = 0", "pass", "evict", "B:settle#1 B+0 B:end#1"),
    Mutation(Tables, "retire", "self.entry[layer, expert] = 0", "pass", "move", "A:write-lease#3 M:wait#1 M+0 M:end#1"),
    Mutation(Tables, "_repair", "self.entry[...] = 0", "pass", "move", "A:write-lease#3 M:write-key_expert#1 !M"),
    Mutation(Tables, "_repair", "self._publish(slot)", "pass", "evict", "A:write-lease#1 !A B:settle#1 B+0 B:end#1"),
    Mutation(
        Tables,
        "take",
        "self.generation[slot] += 1",
        "pass",
        "glance",
        "A:compute#1 B:settle#1 B+0 B:write-lease#3 A:end#1",
    ),
    Mutation(Tables, "hold", " and self.partition[slot] == layer", "", "hold a wave", "A:sleep#1"),
    Mutation(Tables, "_void", "self.lease[row] = 0", "pass", "evict", "A:write-head#2 !A B:sleep#2"),
    Mutation(Tables, "reap_now_and_then", "self.reap()", "pass", "same, killed", "A:unlock#2 !A B:sleep#2"),
    Mutation(Loads, "wait", "self._check_patience(call)", "pass", "stopped", "A:submit#1 =A"),
    Mutation(Tables, "locked_soon", "self._patience", "None", "stopped", "A:write-head#1 =A"),
    Mutation(
        Tables,
        "reap_now_and_then",
        "suppress(Stalled), self.locked_soon()",
        "self.locked()",
        "stopped",
        "A:settle#1 B:sleep#1 A+0 A+1 B:sleep#2 A:write-head#4 =A ~ B:lock#4 ~ ~",
    ),
    Mutation(
        Tables,
        "leave",
        "suppress(Stalled), self.locked_soon()",
        "self.locked()",
        "stopped, ending",
        "A:write-head#1 =A",
    ),
    Mutation(
        locks,
        "remove_unused",
        "locks.lock(TABLES_BYTE, _LONGEST_WAIT_SECONDS)",
        "locks.lock(TABLES_BYTE)",
        "stopped, ending",
        "A:write-head#1 =A",
    ),
    Mutation(
        Loads,
        "_gather",
        "call.missing.append(load.key)",
        "raise",
        "devices, killed",
        "A:unlock#1 !A B:sleep#2 B+0 B:sleep#3",
    ),
    Mutation(Loads, "submit_claimed", "self._abandon(call.claimed)", "pass", "devices, full", "B:wait#1 A:end#1"),
    Mutation(Lender, "_emptied", LOCKED, UNLOCKED, "lent", "A:read-looks#4 L:write-slot_of#1 !L"),
    Mutation(
        Lender,
        "_emptied",
        "tables.reap()",
        "pass",
        "lent",
        "A:write-head#2 !A L:sleep#2 ~ L:sleep#3 ~ L:sleep#4 ~ L:sleep#5",
    ),
    Mutation(Lender, "_emptied", " | (tables.partition[slots] != UNUSED)", "", "lent, and read", "L:end#1"),
    Mutation(
        Lender,
        "_emptied",
        "if tables.state[slot] in (FREE, READY):",
        "if True:",
        "lent, and read",
        "A:settle#1 L:sleep#2 A+0 L:sleep#3 A:read-looks#4 L:end#1",
    ),
    Mutation(
        Lender,
        "_emptied",
        "(tables.state[slots] != FREE).any() or ",
        "",
        "lent, by two",
        "L:write-lends#1 N:write-loader#1 L:lock#1 N:fallocate#1 L:compute#2 N:end#1",
    ),
    Mutation(
        Lender, "_emptied", " or tables.leased(slots).any()", "", "lent", "A:read-generation#1 L:compute#2 A:end#1"
    ),
    Mutation(
        Lender, "_looked", "words[row] % 2 and ", "False and ", "lent, and looked at", "A:compute#1 L:compute#2 A:end#1"
    ),
    Mutation(
        Lender,
        "_looked",
        " and tables.looks[row, 0] == words[row]",
        "",
        "lent, and looked at",
        "A:read-entry#1 L:sleep#2 A:write-looks#3 L:sleep#3 ~ L:sleep#4 ~ L:sleep#5 ~ L:sleep#6",
    ),
    Mutation(
        Lender,
        "_looked",
        " and tables.alive(row)",
        "",
        "lent, and looked at",
        "A:read-entry#1 L:sleep#2 A:read-looks#3 !A L:sleep#3 ~ L:sleep#4 ~ L:sleep#5 ~ L:sleep#6",
    ),
    Mutation(Lender, "_use", LOCKED, UNLOCKED, "lent, by two", "L:write-lends#1 N:read-state#1 L:compute#2 N:end#1"),
    Mutation(Lender, "_use", "slot >= self._first + tables.lent", "False", "lent, by two", "L:end#1"),
    Mutation(
        Lender,
        "_use",
        "tables.free_of(np.array([slot])) is None",
        "False",
        "lent, by two, and again",
        "L:lock#4 N:fallocate#1 L:end#1",
    ),
    Mutation(
        Lender,
        "_use",
        "tables.reserve(slot)",
        "pass",
        "lent, by two",
        "L:write-lends#1 N:write-head#8 L:lock#1 N:fallocate#1 L:compute#2 N:end#1",
    ),
    Mutation(
        Lender,
        "_use",
        LOCKED,
        UNLOCKED,
        "lent, by two",
        "L:write-lends#1 N:write-loader#1 L:lock#1 N:write-loader#2 L:compute#2 N:end#1",
        nth=2,
    ),
    Mutation(
        Tables,
        "lent",
        "np.where(self.pid != 0, self.lends, self.shape.lent).min()",
        "self.lends[self.row]",
        "lent, by two",
        "L:compute#2 N:end#1",
    ),
    Mutation(Cache, "glance", "self._tables.look()", "pass", "lent, and looked at", "A:compute#1 L:compute#2 A:end#1"),
    Mutation(Mover, "_exchange", " and not lent", "", "lent, for a wave", "M:read-entry#2 L:end#1"),
]


def main(seconds: float) -> None:
    """Explore every mutation until it shows."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, instrumented():
        nodes = scenarios(Path(folder))
        for mutation in MUTATIONS:
            node = nodes[mutation.node]
            with mutation.made():
                found = explore(node.make, kills=node.kills, failures=node.failures, seconds=seconds)
            print(mutation.function, repr(mutation.old), mutation.node, found, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))
