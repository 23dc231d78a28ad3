"""What a slow link and a slow disk cost in each mode: the latency of a token, against an engine that misses nothing.

A program: `python delayed_links.py --rounds 5`. Two nodes on this machine, linked through a proxy that delays every
byte by 50 ms; the disk takes 20 ms more for every read. Engines take turns (A B A B), one sequence at a time, and a
JSON line per mode says p99 inter-token latency, its ratio to the run without misses beside it, and what answered.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from link_proxy import DelayProxy

from buddymoe_ray.cache.disk import DiskReader
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.residency.sharing import Sharing
from buddymoe_ray.types import GenerationRequest, SamplingParams, Usage

LINK_SECONDS, DISK_SECONDS = 0.05, 0.02
CONTENTS_SECONDS = 1.0  # until an engine knows what its peer holds
RUNS: dict[str, dict[str, Any]] = {
    "no misses": {"memory": "100%", "mode": "exact"},
    "fast": {"mode": "fast"},
    "bounded": {"mode": "bounded"},
    "fast buddy:coactivation": {"mode": "fast", "standin": "buddy:coactivation"},
    "fast buddy:router": {"mode": "fast", "standin": "buddy:router"},
    "exact": {"mode": "exact"},
}
PROMPTS = [(5, 6, 7, 8, 9), (100, 200, 300), (44, 45, 46), (900, 901, 902)]


def slow_disk() -> None:
    """Every read of every engine waits, once the engines are loaded."""
    read = DiskReader._read

    def slow(self: DiskReader, *args: Any) -> None:
        time.sleep(DISK_SECONDS)
        read(self, *args)

    DiskReader._read = slow  # type: ignore[method-assign]


def generate(engine: Engine, tag: str, tokens: int) -> tuple[list[float], list[Usage]]:
    gaps, usages = list[float](), list[Usage]()
    for at, prompt in enumerate(PROMPTS):
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        engine.add(GenerationRequest(request_id=f"{tag}-{at}", prompt_token_ids=prompt, sampling=sampling))
        last: float | None = None
        while engine.has_work():
            for event in engine.step():
                now = time.perf_counter()
                if last is not None:
                    gaps.append(now - last)
                last = now
                usages += [event.usage] if event.usage else []
    return gaps, usages


def p99(gaps: list[float]) -> float:
    return sorted(gaps)[min(len(gaps) - 1, int(0.99 * len(gaps)))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--memory", default="50%")
    parser.add_argument("--runs", default=",".join(RUNS), help="which of " + ", ".join(RUNS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    runs = {name: RUNS[name] for name in args.runs.split(",")}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        engines: dict[str, Engine] = {}
        for name, options in ({"there": {"mode": "exact"}} | runs).items():
            base = {"model": args.model, "memory": args.memory, "guard_share": 0.0, "kv_memory": "64MiB"}
            tag = "".join(filter(str.isalpha, name))
            sharing = Sharing(workers=1, tag=tag, folder=Path(folder), linked=True, secret="delayed links " * 2)
            engines[name] = Engine.from_config(EngineConfig(**(base | options)), text=False, sharing=sharing)
            engines[name].link()
        proxy = DelayProxy(engines["there"].link_address, delay_seconds=LINK_SECONDS)
        slow_disk()
        tails: dict[str, list[float]] = {name: [] for name in runs}
        middles: dict[str, list[float]] = {name: [] for name in runs}
        answered: dict[str, list[Usage]] = {name: [] for name in runs}
        for turn in range(args.rounds + 1):
            for name in runs:
                engines[name].set_peers({"there": proxy.address})
                time.sleep(CONTENTS_SECONDS)
                gaps, usages = generate(engines[name], f"{turn}", args.tokens)
                engines[name].set_peers({})  # the others' threads are not to be part of anyone's latency
                if turn:  # the first warms up
                    tails[name].append(p99(gaps))
                    middles[name].append(statistics.median(gaps))
                    answered[name] += usages
        for engine in engines.values():
            engine.close()
        proxy.close()
    least = tails["no misses"]
    for name in runs:
        accesses = answered[name]
        ratios = [tail / other for tail, other in zip(tails[name], least, strict=True)]
        record = {
            "run": name,
            "model": Path(args.model).name,
            "memory": RUNS[name].get("memory", args.memory),
            "link_delay_ms": 1e3 * LINK_SECONDS,
            "disk_delay_ms": 1e3 * DISK_SECONDS,
            "rounds": args.rounds,
            "p99_itl_ms": round(1e3 * statistics.median(tails[name]), 2),
            "median_itl_ms": round(1e3 * statistics.median(middles[name]), 2),
            "p99_ratio": round(statistics.median(ratios), 3),
            "p99_ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
            "hits": sum(u.hits for u in accesses),
            "fetched": sum(u.fetched for u in accesses),
            "peer": sum(u.peer for u in accesses),
            "lowbit": sum(u.standins.lowbit for u in accesses),
            "buddy": sum(u.standins.buddy for u in accesses),
            "dropped": sum(u.standins.drop for u in accesses),
        }
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
