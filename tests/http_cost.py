"""What HTTP and the page cost: tokens per second of a running service of `builtin:tiny`, beside the bare engine's.

    python tests/http_cost.py [--streams 16] [--answer-tokens 200] [--seconds 20] [--rounds 5] [--json]
    python tests/http_cost.py --only bare http --seconds 10 --rounds 10 --json   # HTTP alone, in 4.5 minutes

By hand, on a quiet machine: a `buddymoe serve` of its own (or the one at --url) computes with one thread; ingress and
this client want the other core. In each round the bare engine of this process, the service, and the service while two
pages watch it take turns, in an order that changes; each is measured once its streams are under way, by what the engine
itself counts. Says the medians of rates, of what HTTP has of the bare engine, and of what the page costs. Streams
are asked for and read as bytes: with httpx this client took 2.6 to 3.2 ms of CPU a request of 200 tokens, more than the
ingress, and takes .5 so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from statistics import median
from typing import Any

import httpx

from buddymoe_ray import LLM
from buddymoe_ray.commands.common import emit, print_facts
from buddymoe_ray.types import GenerationRequest, SamplingParams

MODEL = "builtin:tiny"
WARM_SECONDS = 2.0
PAGES = 2
TURNS = ["bare", "http", "page"]


def prompt(at: int) -> str:
    """No two begin alike, so none finds what another computed."""
    return f"{at}: def add(a, b):"


def bare(llm: LLM, streams: int, tokens: int, seconds: float) -> float:
    """Tokens per second of the engine alone, with as many requests all the time, of so many tokens each. They end one
    after the other, as those of a service do: of equal ones that began together the prompts would be one pass."""
    engine, numbers, made, began = llm.engine, count(), 0, 0.0

    def ask(tokens: int = tokens) -> None:
        at = next(numbers)
        ids = tuple(engine.encode(prompt(at)))
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        engine.add(GenerationRequest(request_id=str(at), prompt_token_ids=ids, sampling=sampling, mode="exact"))

    for at in range(streams):
        ask(tokens * (at + 1) // streams)
    start = time.perf_counter()
    while not began or time.perf_counter() - began < seconds:
        for event in engine.step():
            made += len(event.token_ids)
            if event.finish_reason is not None:
                ask()
        if not began and time.perf_counter() - start >= WARM_SECONDS:
            began, made = time.perf_counter(), 0
    rate = made / (time.perf_counter() - began)
    for at in range(next(numbers)):
        engine.cancel(str(at))
    engine.drain()
    return rate


async def served(url: str, streams: int, tokens: int, seconds: float, *, pages: int) -> float:
    """The same of the service, by its workers' own counters, while so many pages watch it."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False) as client:
        numbers = count()

        async def stream() -> None:
            at = client.base_url
            reader, writer = await asyncio.open_connection(at.host, at.port, limit=1 << 20)
            head = f"POST {at.path}v1/completions HTTP/1.1\r\nHost: {at.host}\r\nContent-Type: application/json\r\n"
            try:
                while True:
                    body = {"model": MODEL, "prompt": prompt(next(numbers)), "max_tokens": tokens, "ignore_eos": True}
                    body |= {"temperature": 0, "stream": True, "buddymoe": {"mode": "exact"}}
                    data = json.dumps(body)
                    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n{data}".encode())
                    status = await reader.readline()
                    assert b" 200 " in status, status
                    await reader.readuntil(b"\r\n0\r\n\r\n")
            finally:
                writer.close()

        async def page() -> None:
            while True:
                async with client.stream("GET", "/dashboard/events") as reply:
                    async for _ in reply.aiter_raw():
                        pass

        async def generated() -> int:
            workers = (await client.get("/dashboard/data")).json()["workers"]
            return sum(worker["snapshot"]["requests"]["generated_tokens"] for worker in workers)

        tasks = [asyncio.create_task(stream()) for _ in range(streams)]
        tasks += [asyncio.create_task(page()) for _ in range(pages)]
        await asyncio.sleep(WARM_SECONDS)
        before, began = await generated(), time.perf_counter()
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        rate = (await generated() - before) / (time.perf_counter() - began)
        failed = [task.exception() for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert not failed, failed
    return rate


@contextmanager
def service(memory: str, streams: int) -> Iterator[str]:
    """A service of this environment's code, at a free port: its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = f"serve {MODEL} --mode exact --memory {memory} --max-running {streams} --threads 1 --port {port} --json"
    start = [sys.executable, "-c", "from buddymoe_ray.cli import main; raise SystemExit(main())", *command.split()]
    with subprocess.Popen(start, stdout=subprocess.PIPE) as serving:
        assert serving.stdout is not None, "it is a pipe"
        try:
            told = next((line for line in serving.stdout if line.startswith(b"{")), None)
            assert told is not None, "the service did not start"
            yield json.loads(told)["url"].removesuffix("/v1")
        finally:
            serving.send_signal(signal.SIGTERM)
            serving.wait()  # not for the end of its output, which lasts as long as the last process of ray


def measure(args: argparse.Namespace, url: str) -> dict[str, Any]:
    """Rounds of those that are asked for, and what they come to."""
    rates: dict[str, list[float]] = {name: [] for name in args.only}
    with LLM(MODEL, memory=args.memory, mode="exact", threads=1, max_running=args.streams) as llm:
        for turn in range(args.rounds):
            names, first = args.only, turn % len(args.only)
            for name in names[first:] + names[:first]:
                load = args.streams, args.answer_tokens, args.seconds
                if name == "bare":
                    rates[name].append(bare(llm, *load))
                else:
                    pages = PAGES if name == "page" else 0
                    rates[name].append(asyncio.run(served(url, *load, pages=pages)))
    found: dict[str, Any] = {"streams": args.streams, "answer_tokens": args.answer_tokens, "rounds": args.rounds}
    found |= {f"{name}_tok_s": round(median(each), 1) for name, each in rates.items()}
    if {"bare", "http"} <= rates.keys():
        shares = [100 * http / alone for http, alone in zip(rates["http"], rates["bare"], strict=True)]
        found |= _by_round("http_percent", "_of_bare", shares)
    if {"http", "page"} <= rates.keys():
        costs = [100 * (1 - page / http) for page, http in zip(rates["page"], rates["http"], strict=True)]
        found |= _by_round("page_cost_percent", "", costs)
    return found


def _by_round(name: str, of: str, found: list[float]) -> dict[str, Any]:
    return {f"{name}{of}": round(median(found), 1), f"{name}_by_round": [round(each, 1) for each in found]}


def main() -> int:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of a service that runs; without it one is started")
    parser.add_argument("--only", nargs="+", choices=TURNS, default=TURNS)
    parser.add_argument("--memory", default="100%", help="of the bare engine; the service's must be the same")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--answer-tokens", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with nullcontext(args.url) if args.url else service(args.memory, args.streams) as url:
        found = measure(args, url)
    if args.json:
        emit(found)
    else:
        print_facts({name: json.dumps(value) for name, value in found.items()}, title="what HTTP and the page cost")
    return 0


if __name__ == "__main__":
    sys.exit(main())
