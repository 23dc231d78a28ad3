"""`python tests/cluster_check.py`: what sharing and placement do on this machine. No Ray, no network.

`--check memory`: N workers of a node against one copy of the experts, as the kernel counts it (PSS).
`--check shift`: the hot set changes in the middle of a text; how fast the map follows, and what workers feel of it.
Needs a model: `shift` one of `buddymoe synth --hot-sets 2` with a profile. Prints JSON lines; exit status 1 when a
check fails. Processes are real: the keeper of the store runs in one of its own, as it does under Ray.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Iterator
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import Any

import numpy as np
from torch import Tensor

from buddymoe_ray.actors.host_store import HostStore, KeeperOptions
from buddymoe_ray.actors.placement import Placement, PlacementOptions
from buddymoe_ray.actors.words import StoreStatus
from buddymoe_ray.cache.shared import SharedStore
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.engine.sampler import Sampled
from buddymoe_ray.engine.sequence import Sequence
from buddymoe_ray.residency.sharing import Sharing, StoreSpec
from buddymoe_ray.types import GenerationRequest, SamplingParams

__all__ = ["main"]

_PROMPT = (1, 2, 3, 4)


def shared_memory_bytes(pid: int, name: str) -> tuple[int, int]:
    """Of a process's shared-memory files whose name holds `name`: the bytes charged to it (PSS: a page that n processes
    map counts 1/n) and the bytes mapped."""
    charged = mapped = 0
    inside = False
    with open(f"/proc/{pid}/smaps") as lines:
        for line in lines:
            first = line.split(maxsplit=1)[0]
            if "-" in first:
                inside = "/dev/shm/" in line and name in line
            elif inside and first in ("Pss:", "Size:"):
                count = int(line.split()[1]) * 1024
                charged += count if first == "Pss:" else 0
                mapped += count if first == "Size:" else 0
    return charged, mapped


class _Forced:
    """Chooses the next token from a stream of random ids of one half of the vocabulary, whatever the model says."""

    def __init__(self, seed: int) -> None:
        self._rng, self.upper, self.vocab = random.Random(seed), False, 2

    def choose(self, logits_BV: Tensor, sequences: Rows[Sequence]) -> list[Sampled]:
        half = self.vocab // 2
        return [Sampled(token_id=self._rng.randrange(half) + half * self.upper) for _ in sequences]


@dataclass
class _Keeper:
    """A HostStore in a process of its own."""

    options: KeeperOptions
    placement: PlacementOptions | None
    _child: Any = None
    _stop: Event | None = None
    _status: Connection | None = None
    statuses: list[StoreStatus] = field(default_factory=list)

    def keep(self, spec: StoreSpec) -> None:
        """The engine's `keeper`."""
        context = multiprocessing.get_context("spawn")
        self._status, sender = context.Pipe(duplex=False)
        self._stop = context.Event()
        self._child = context.Process(
            target=_keep, args=(spec, self.options, self.placement, self._stop, sender), daemon=True
        )
        self._child.start()
        sender.close()
        assert self._status.poll(300), "the keeper did not start within 300 s"
        self.statuses.append(self._status.recv())

    def now(self) -> StoreStatus:
        """The newest status."""
        assert self._status is not None, "no engine has started the keeper"
        while self._status.poll():
            self.statuses.append(self._status.recv())
        return self.statuses[-1]

    def close(self) -> None:
        assert self._stop is not None, "no engine has started the keeper"
        self._stop.set()
        self._child.join(60)


def _keep(
    spec: StoreSpec, options: KeeperOptions, placement: PlacementOptions | None, stop: Event, sender: Connection
) -> None:
    import os

    os.nice(5)  # as under Ray
    planner = None if placement is None else Placement(placement)
    store = HostStore(spec, node="here", options=options, planner=planner)
    while not stop.wait(0.05):
        sender.send(store.status())
    store.close()


def check_memory(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Bytes of shared experts that the kernel charges to N workers together, against one copy."""
    context = multiprocessing.get_context("spawn")
    for workers in (1, 2, 3):
        gate, done = context.Barrier(workers + 1), context.Event()
        config = EngineConfig(model=args.model, memory=args.memory, mode=args.mode, kv_memory="64MiB")
        children = [
            context.Process(target=_resident, args=(config, workers, gate, done), daemon=True) for _ in range(workers)
        ]
        for child in children:
            child.start()
        gate.wait(600)
        found = [shared_memory_bytes(child.pid or 0, "buddymoe-") for child in children]
        done.set()
        for child in children:
            child.join(60)
        pss, size = sum(pss for pss, _ in found), max(size for _, size in found)
        yield {
            "check": "memory",
            "workers": workers,
            "store_bytes": size,
            "pss_bytes": pss,
            "copies": round(pss / size, 3),
            "ok": pss <= 1.01 * size,
        }


def _resident(config: EngineConfig, workers: int, gate: Any, done: Event) -> None:
    engine = Engine.from_config(config, text=False, sharing=Sharing(workers=workers, tag="memorycheck"))
    engine.add(_request("0", 8))
    engine.drain()
    engine.add(_request("1", 2))
    _store(engine).bytes_C[:, ::4096].sum()  # maps every page, as time would
    gate.wait(600)
    done.wait(600)
    engine.close()


def check_shift(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Hit rate by window around a change of the hot set, against the best static placement for what came after it."""
    for rep in range(args.reps):
        yield _shift(args, rep, dynamic=True)
        yield _shift(args, rep, dynamic=False)


@dataclass
class _Window:
    hits: int = 0
    accesses: int = 0
    accesses_LE: Any = None
    gaps: list[float] = field(default_factory=list)
    moving: bool = False


def _shift(args: argparse.Namespace, rep: int, *, dynamic: bool) -> dict[str, Any]:
    window = args.window
    keeper = _Keeper(
        KeeperOptions(window_seconds=window, bytes_per_second=args.rate * 1e6, pin_share=1.0),
        PlacementOptions(window_seconds=window, bytes_per_second=args.rate * 1e6) if dynamic else None,
    )
    config = EngineConfig(model=args.model, memory=args.memory, mode="fast", guard_share=0.0, kv_memory="256MiB")
    sharing = Sharing(workers=1, tag="shiftcheck", movable=True, keeper=keeper.keep)
    forced = _Forced(rep)
    engine = Engine.from_config(config, text=False, sharing=sharing, chooser=forced)
    forced.vocab = engine.vocab_size
    try:
        before = [_run_window(engine, keeper, window, args.batch) for _ in range(args.before)]
        forced.upper = True
        after = [_run_window(engine, keeper, window, args.batch) for _ in range(args.after)]
        oracle = _oracle(engine, after)
        status = keeper.now()
    finally:
        engine.close()
        keeper.close()
    rates = [100 * w.hits / max(1, w.accesses) for w in after]
    back = next((at + 1 for at, rate in enumerate(rates) if rate >= oracle - 2), None)
    quiet = [gap for w in (*before[1:], *after) if not w.moving for gap in w.gaps]
    moving = [gap for w in after if w.moving for gap in w.gaps]
    return {
        "check": "shift",
        "placement": "dynamic" if dynamic else "static",
        "rep": rep,
        "window_seconds": window,
        "hit_before": round(statistics.median(100 * w.hits / max(1, w.accesses) for w in before), 1),
        "hit_after": [round(rate, 1) for rate in rates],
        "oracle_static": round(oracle, 1),
        "windows_to_recover": back,
        "moved_mb": round(status.moved_bytes / 1e6, 1),
        "p99_itl_ms_quiet": round(1e3 * _p99(quiet), 2),
        "p99_itl_ms_moving": round(1e3 * _p99(moving), 2) if moving else None,
        "p99_itl_ms_after": round(1e3 * _p99([gap for w in after for gap in w.gaps]), 2),
        "median_itl_ms": round(1e3 * statistics.median(quiet), 2),
        "ok": (back is not None) if dynamic else None,
    }


def _run_window(engine: Engine, keeper: _Keeper, seconds: float, batch: int) -> _Window:
    """Decode sequences for so long; the window says whether experts moved during it."""
    found, before, began = _Window(), engine.snapshot(), time.perf_counter()
    moved, accesses_LE = keeper.now().moves, _accesses(engine)
    last = began
    while time.perf_counter() - began < seconds:
        if not engine.has_work():
            for at in range(batch):
                engine.add(_request(f"{last}-{at}", engine.limits.max_model_len // 2))
            engine.step()  # prefill is not decode's latency
            last = time.perf_counter()
        engine.step()
        now = time.perf_counter()
        found.gaps.append(now - last)
        last = now
    after = engine.snapshot()
    found.hits = after.access_hits - before.access_hits
    found.accesses = (
        found.hits + after.standins.total - before.standins.total + after.access_fetched - before.access_fetched
    )
    found.accesses_LE = _accesses(engine) - accesses_LE
    found.moving = keeper.now().moves > moved
    return found


def _request(name: str, count: int) -> GenerationRequest:
    sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    return GenerationRequest(request_id=name, prompt_token_ids=_PROMPT, sampling=sampling)


def _accesses(engine: Engine) -> Any:
    return _store(engine).tables.accesses.sum(axis=0).astype(np.int64)


def _store(engine: Engine) -> SharedStore:
    store = engine.cache.store
    assert isinstance(store, SharedStore), "the engine shares nothing"
    return store


def _oracle(engine: Engine, windows: list[_Window]) -> float:
    """Hits (%) of the best static choice of as many experts as are pinned: chosen by every second window and scored on
    the others, both ways, for a choice scored on its own sample flatters itself."""
    slots = sum(engine.cache.plan.layer_slots)
    halves = [np.sum([w.accesses_LE for w in windows[first::2]], axis=0).reshape(-1) for first in (0, 1)]
    shares = []
    for known, scored in (halves, halves[::-1]):
        chosen = np.argsort(-known, kind="stable")[:slots]
        shares.append(100 * scored[chosen].sum() / max(1, scored.sum()))
    return float(np.mean(shares))


def _p99(gaps: list[float]) -> float:
    ordered = sorted(gaps)
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))] if ordered else 0.0


def main(argv: list[str] | None = None) -> int:
    """Run the check; exit status 0 when it holds."""
    parser = argparse.ArgumentParser(prog="python tests/cluster_check.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", choices=("memory", "shift"), required=True)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--memory", default="25%", help="budget of one worker")
    parser.add_argument("--mode", default="exact", choices=("exact", "fast"), help="of the workers of `memory`")
    parser.add_argument("--reps", type=int, default=5, help="times `shift` is run")
    parser.add_argument("--batch", type=int, default=8, help="sequences that `shift` decodes side by side")
    parser.add_argument("--window", type=float, default=3.0, help="seconds of a placement window")
    parser.add_argument("--before", type=int, default=4, help="windows before the shift")
    parser.add_argument("--after", type=int, default=10, help="windows after it")
    parser.add_argument("--rate", type=float, default=200.0, help="MB per second that migration may read")
    args = parser.parse_args(argv)
    failed = 0
    for record in (check_memory if args.check == "memory" else check_shift)(args):
        failed += record["ok"] is False
        print(json.dumps(record, separators=(",", ":")), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
