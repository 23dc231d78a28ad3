"""A service on a cluster of nodes that share this machine, through migration and the death of every kind of process.

A program (`python cluster_scenario.py --nodes 3 --workers 3 --kill`) on a cluster of its own, or on one that a test
has. Tells a JSON object per phase: streams that gave exactly the resident model's tokens, what the map did, how long
streams stood still.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from named_actors import placement_handles, placement_maps, store_handles, store_statuses
from ray import serve
from ray.cluster_utils import Cluster
from ray.util import placement_group, remove_placement_group

from buddymoe_ray.client import Client
from buddymoe_ray.engine.llm import LLM
from buddymoe_ray.serve.app import build_app
from buddymoe_ray.serve.args import ServeArgs
from buddymoe_ray.serve.handles import WORKER_NAME
from buddymoe_ray.serve.work import WorkerReport

APP = "cluster"
SHM = Path("/dev/shm")
NODE: dict[str, Any] = {"object_store_memory": 100 << 20, "include_dashboard": False}
PROMPTS = [f"def function_{n}(a, b):\n    " for n in range(16)]


@dataclass
class Stream:
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    error: str = ""
    usage: Any = None

    @property
    def wait(self) -> float:
        return max((b - a for a, b in zip(self.times, self.times[1:], strict=False)), default=0.0)


async def follow(client: Client, prompt: str, count: int, stream: Stream) -> None:
    try:
        async for event in client.astream(prompt, max_tokens=count, temperature=0.0, ignore_eos=True):
            stream.tokens += event.token_ids
            stream.times.append(time.monotonic())
            stream.usage = event.usage or stream.usage
    except Exception as error:  # told in the record: a stream may end in an error, but a clear one
        stream.error = f"{type(error).__name__}: {error}"


async def sixteen(client: Client, count: int, after: Callable[[], None] | None) -> list[Stream]:
    streams = [Stream() for _ in PROMPTS]
    tasks = [
        asyncio.create_task(follow(client, prompt, count, stream))
        for prompt, stream in zip(PROMPTS, streams, strict=True)
    ]
    if after is not None:
        while sum(len(stream.times) >= 3 for stream in streams) < len(streams) // 2:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(after)
    await asyncio.gather(*tasks)
    return streams


class Scenario:
    """`records` has what was told. Nodes join the head of a given `cluster`, whose other CPUs are kept back."""

    def __init__(self, args: argparse.Namespace, cluster: Cluster | None = None) -> None:
        self.args, self.records = args, list[dict[str, Any]]()
        with LLM("builtin:tiny", memory="100%") as llm:
            results = llm.generate(PROMPTS, max_tokens=args.tokens, temperature=0.0, ignore_eos=True)
        self.expected = [list(result.token_ids) for result in results]
        self.nodes: list[Any] = []
        self.kept_back: Any = None
        if cluster is None:
            self.cluster = None if args.address else Cluster(True, head_node_args=NODE | {"num_cpus": self.cpus(0)})
            ray.init(address=args.address or self.cluster.address, log_to_driver=False)
            serve.start(proxy_location="Disabled")
        else:
            self.cluster = cluster
            spare = ray.cluster_resources()["CPU"] - self.cpus(0)
            self.kept_back = placement_group([{"CPU": spare}])
            assert self.kept_back.wait(60), f"{spare} CPUs are in use, must be free"
        if self.cluster is not None:
            self.nodes = [self.cluster.add_node(num_cpus=self.cpus(at), **NODE) for at in range(1, args.nodes)]
        options = ServeArgs(
            model="builtin:tiny",
            memory=args.memory,
            mode=args.mode,
            workers=args.workers,
            max_workers=args.grow,
            max_running=32 if args.grow is None else 8,
            num_cpus=1,
            flush_ms=0,
            guard_share=0,
            placement_window_seconds=0.5,
            request_timeout_seconds=120,
        )
        serve.run(build_app(options), name=APP, route_prefix=None)
        self.client = Client(APP)

    def cpus(self, node: int) -> int:
        """Workers fill the nodes evenly."""
        each, more = divmod(self.args.workers, self.args.nodes)
        return each + (node < more)

    def phase(self, name: str, after: Callable[[], None] | None = None) -> None:
        """Sixteen streams; `after` is done once half of them flow."""
        streams = asyncio.run(sixteen(self.client, self.args.tokens, after))
        same = sum(s.tokens == expected for s, expected in zip(streams, self.expected, strict=True))
        usages = [s.usage for s in streams if s.usage is not None]
        found = self.map()
        record = {
            "phase": name,
            "streams": len(streams),
            "same": same,
            "errors": sorted({s.error for s in streams if s.error}),
            "resumed": sum(usage.resumed > 0 for usage in usages),
            "peer": sum(usage.peer for usage in usages),
            "fetched": sum(usage.fetched for usage in usages),
            "longest_wait_seconds": round(max(s.wait for s in streams), 3),
            "epoch": 0 if found is None else found.epoch,
            "stores": [
                {"node": s.node[:6], "moves": s.moves, "epoch": s.epoch, "made": s.made, "workers": len(s.workers)}
                for s in self.stores()
            ],
        }
        self.tell(record)

    def migrate(self, seconds: float = 60) -> None:
        """Streams while a newer map is followed. Sixteen may end before there is one: then sixteen more, unless one of
        them was wrong."""
        before, end = self.records[-1]["epoch"], time.monotonic() + seconds
        self.phase("migrating")
        while self.records[-1]["same"] == len(self.expected) and self.records[-1]["epoch"] == before:
            if time.monotonic() > end:
                return
            self.phase("migrating")

    def tell(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        print(json.dumps(record), flush=True)

    def map(self, seconds: float = 60) -> Any:
        """The newest map, from a Placement that may have to be restarted first."""
        end = time.monotonic() + seconds
        while True:
            try:
                return next(iter(placement_maps(APP)), None)
            except (ValueError, ray.exceptions.RayError):
                if time.monotonic() > end:
                    raise
                time.sleep(0.5)

    def stores(self) -> list[Any]:
        try:
            return store_statuses()
        except ray.exceptions.RayError:
            return []

    def worker_pids(self) -> list[int]:
        handle: Any = serve.get_deployment_handle(WORKER_NAME, APP)
        try:
            answers = handle.broadcast("report").results(timeout_s=10, return_exceptions=True)
        except (TimeoutError, ray.exceptions.RayError):
            return []
        return [answer.pid for answer in answers if isinstance(answer, WorkerReport)]

    def kill(self, name: str, deed: Callable[[], None], workers: int) -> None:
        """Do it under load, and time how long the service takes to be whole again while the streams go on."""
        seconds: list[float] = []

        def done() -> None:
            deed()
            seconds.append(self.whole_again(workers))

        self.phase(f"kill {name}", done)
        self.tell({"recovered": name, "seconds": seconds[0]})

    def grow(self, workers: int, seconds: float = 180) -> None:
        """A node joins; load until Serve has started so many workers and each is in the map; then all streams once
        more."""
        self.nodes.append(self.cluster.add_node(num_cpus=workers - self.args.workers, **NODE))
        began, rounds = time.monotonic(), 0
        while time.monotonic() - began < seconds:
            rounds += 1
            self.phase(f"load {rounds}")
            found = self.map()
            if found is not None and sum(map(len, found.workers)) == workers == len(self.worker_pids()):
                break
        grown = time.monotonic() - began
        self.phase("grown")
        placed = [sorted(found.workers[at]) for at in range(len(found.pools))]
        self.tell({"grown": workers, "seconds": round(grown, 1), "workers": [len(names) for names in placed]})

    def kill_worker(self) -> None:
        os.kill(self.worker_pids()[0], signal.SIGKILL)

    def kill_store(self) -> None:
        os.kill(ray.get(store_handles()[0].pid.remote()), signal.SIGKILL)

    def kill_placement(self) -> None:
        [handle] = placement_handles(APP)
        os.kill(ray.get(handle.pid.remote()), signal.SIGKILL)

    def kill_node(self) -> None:
        self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)

    def whole_again(self, workers: int, seconds: float = 120) -> float:
        """Seconds until so many workers answer and every node's store is kept."""
        began = time.monotonic()
        while True:
            time.sleep(0.5)
            pids, stores, found = self.worker_pids(), self.stores(), self.map()
            if len(pids) == workers and stores and all(s.filled for s in stores) and found is not None:
                return round(time.monotonic() - began, 2)
            if time.monotonic() - began > seconds:
                kept = [(s.node[:6], s.filled, s.error) for s in stores]
                print(f"not whole: {len(pids)} workers, must be {workers}; {kept=} {found=}", file=sys.stderr)
                return -1.0

    def run(self) -> None:
        """The phases that were asked for; then nothing of the service runs."""
        args = self.args
        try:
            self.phase("first")
            self.migrate()
            if args.grow:
                self.grow(args.grow)
            if args.kill:
                self.kill("worker", self.kill_worker, args.workers)
                self.kill("store", self.kill_store, args.workers)
                self.kill("placement", self.kill_placement, args.workers)
                if args.nodes > 1:
                    self.kill("node", self.kill_node, args.workers - 1)
                self.phase("after")
            if args.cut:
                self.kill("network", lambda: subprocess.run(args.cut, shell=True, check=True), args.workers - 1)
                self.phase("after")
        finally:
            self.close()
        if not args.address:  # nodes that live on keep their stores for a while
            self.tell({"leftovers": leftovers()})

    def close(self) -> None:
        if self.kept_back is None:
            serve.shutdown()
            ray.shutdown()
            if self.cluster is not None:
                self.cluster.shutdown()
            return
        serve.delete(APP)
        end_stores()
        for node in self.nodes:
            self.cluster.remove_node(node)
        remove_placement_group(self.kept_back)


def end_stores() -> None:
    """Those whose services are gone would stay for a minute, for the next service."""
    for handle in store_handles():
        ray.kill(handle)


def leftovers(seconds: float = 60) -> list[str]:
    """Shared files that are still there once the janitors had their time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and list(SHM.glob(f"buddymoe-{os.geteuid()}-*")):
        time.sleep(0.5)
    return [path.name for path in SHM.glob(f"buddymoe-{os.geteuid()}-*")]


def options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--memory", default="25%")
    parser.add_argument("--mode", default="exact")
    parser.add_argument("--address", help="of a cluster that runs already, whose head is here")
    parser.add_argument("--cut", help="shell command that takes a node off the network, done under load")
    parser.add_argument("--grow", type=int, help="a node joins, and Serve starts up to so many workers under load")
    parser.add_argument("--kill", action="store_true", help="end each kind of process, and a node, under load")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    Scenario(options(sys.argv[1:])).run()
