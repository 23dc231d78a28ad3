"""A running service of `builtin:tiny` at more than it can do: streams with tools, schemas and seeds, some left early,
and a worker killed now and then. Nothing may be wrong, lost or doubled, and memory must stay flat.

    buddymoe serve --workers 2 --mode exact --queue-seconds 60
    python tests/overload.py --streams 64 --minutes 10 [--key sk-… --key sk-…] [--json]

By hand, on the machine of the service, whose workers are found on its page and killed by pid. What each request must
come to is asked of the service before, alone, and of plain texts of the model in this process, with all its experts in
memory. A request that is refused comes again when it was told to. With several keys the last one has a single stream,
and all others the first one's. Exit status 1 where an answer was wrong, lost or doubled.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import jsonschema

from buddymoe_ray import LLM
from buddymoe_ray.commands.common import emit, print_facts

MODEL = "builtin:tiny"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": CITY}} for name in ("get_weather", "find_hotel")]
TEXTS = ("def add(a, b):", "import os\n", "class Stack:\n", "for item in", "What is 12 + 30?")
SAMPLE_SECONDS = 2.0
PROCESSES = ("ray::ServeReplica:", "ray::ProxyActor")


@dataclass(frozen=True)
class Question:
    """A request, and the text that its stream must come to."""

    kind: str
    path: str
    body: dict[str, Any]
    answer: str = ""
    schema: dict[str, Any] | None = None


@dataclass
class Tally:
    """What became of the requests."""

    ended: Counter[str] = field(default_factory=Counter)  # by kind
    refused: Counter[str] = field(default_factory=Counter)  # by status and code
    faults: list[str] = field(default_factory=list)
    left: int = 0
    kills: int = 0
    pieces: int = 0
    ttft: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))  # by number of the key
    rss: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # by process


def questions() -> list[Question]:
    """What is asked, without the answers."""
    found = []
    for at, text in enumerate(TEXTS):
        plain = {"prompt": text, "max_tokens": 40 + 20 * at, "ignore_eos": True}
        found.append(Question("greedy", "/completions", plain | {"temperature": 0}))
        found.append(Question("seeded", "/completions", plain | {"temperature": 0.8, "seed": at}))
    for name in ("Anna", "Bob"):
        asked = {"messages": [{"role": "user", "content": f"Extract JSON: {name} is 34 and lives in Rome."}]}
        form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
        schema = {"temperature": 0, "max_tokens": 60, "response_format": form}
        found.append(Question("schema", "/chat/completions", asked | schema, schema=PERSON))
    for town in ("Oslo", "Lima"):
        asked = {"messages": [{"role": "user", "content": f"What is the weather in {town}?"}]}
        called = {"temperature": 0, "max_tokens": 60, "tools": TOOLS, "tool_choice": "required"}
        found.append(Question("tool", "/chat/completions", asked | called))
    exact = {"model": MODEL, "stream": True, "buddymoe": {"mode": "exact"}}
    return [Question(each.kind, each.path, each.body | exact, schema=each.schema) for each in found]


async def pieces(client: httpx.AsyncClient, question: Question) -> AsyncIterator[str]:
    """What a stream says, piece by piece. Raises ValueError where it does not end as it must."""
    async with client.stream("POST", question.path, json=question.body) as reply:
        if reply.status_code != 200:
            await reply.aread()
            reply.raise_for_status()
        finished = done = False
        async for line in reply.aiter_lines():
            data = line.removeprefix("data: ")
            if not data or done:
                if done and data:
                    raise ValueError(f"{data!r} comes after the end")
                continue
            if data == "[DONE]":
                done = True
                continue
            message = json.loads(data)
            if "error" in message:
                raise ValueError(message["error"]["message"])
            (choice,) = message["choices"]
            delta = choice.get("delta", choice)
            calls = [call["function"] for call in delta.get("tool_calls", ())]
            yield (delta.get("text") or delta.get("content") or "") + (json.dumps(calls) if calls else "")
            finished = finished or choice["finish_reason"] is not None
        if not (finished and done):
            raise ValueError("the stream was cut off")


async def answered(client: httpx.AsyncClient, asked: Iterable[Question]) -> list[Question]:
    """The same with their answers, each asked for alone; of greedy texts those of a model of our own."""
    found = []
    for each in asked:
        text = "".join([piece async for piece in pieces(client, each)])
        if each.schema is not None:
            jsonschema.validate(json.loads(text), each.schema)
        found.append(Question(each.kind, each.path, each.body, text, each.schema))
    with LLM(MODEL, memory="100%") as llm:
        for each in found:
            if each.kind == "greedy":
                options = {name: each.body[name] for name in ("max_tokens", "ignore_eos", "temperature")}
                (own,) = llm.generate([each.body["prompt"]], **options)
                assert own.text == each.answer, f"the service says {each.answer!r}, must be {own.text!r}"
    return found


async def stream(client: httpx.AsyncClient, key: int, asked: list[Question], tally: Tally, seed: int) -> None:
    """Ask one thing after the other until cancelled."""
    rng = random.Random(seed)
    while True:
        question, leave = rng.choice(asked), rng.randrange(1, 8) if rng.random() < 0.15 else math.inf
        began, text, told = time.monotonic(), "", 0
        try:
            async for piece in pieces(client, question):
                if piece and not told:
                    tally.ttft[key].append(time.monotonic() - began)
                told += 1
                text += piece
                tally.pieces += 1
                if told >= leave:
                    tally.left += 1
                    break
            else:
                tally.ended[question.kind] += 1
                if text != question.answer:
                    tally.faults.append(f"wrong: {question.body} gave {text!r}, must be {question.answer!r}")
        except httpx.HTTPStatusError as error:
            if error.response.status_code not in (429, 503):
                tally.faults.append(f"refused: {error.response.status_code} {error.response.text}")
            tally.refused[f"key {key}: {error.response.status_code} {error.response.json()['error']['code']}"] += 1
            await asyncio.sleep(min(float(error.response.headers["retry-after"]), 10.0))
        except (httpx.HTTPError, ValueError) as error:
            tally.faults.append(f"lost after {told} pieces: {error!r}")


async def workers(client: httpx.AsyncClient) -> list[int]:
    """Their process ids."""
    told = await client.get(str(client.base_url).replace("/v1/", "/dashboard/data"))
    return [worker["pid"] for worker in told.json()["workers"]] if told.status_code == 200 else []


async def killing(client: httpx.AsyncClient, every: float, tally: Tally, seed: int) -> None:
    """End one of several workers, again and again."""
    rng = random.Random(seed)
    while True:
        await asyncio.sleep(every)
        pids = await workers(client)
        if len(pids) > 1:
            os.kill(rng.choice(pids), signal.SIGKILL)
            tally.kills += 1


async def watching(tally: Tally) -> None:
    """Resident bytes of the service's processes, by name and pid."""
    while True:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                name = (folder / "cmdline").read_text().rstrip("\0")
                pages = int((folder / "statm").read_text().split()[1])
            except OSError:
                continue
            if name.startswith(PROCESSES):
                tally.rss[f"{name.removeprefix('ray::').split('.')[0]} {folder.name}"].append(pages * 4096)
        await asyncio.sleep(SAMPLE_SECONDS)


def growth(rss: list[int]) -> float:
    """MB that the last third has more than the second; the first is for what is made once."""
    third = len(rss) // 3
    return (median(rss[-third:]) - median(rss[third : 2 * third])) / 1e6 if third else 0.0


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """Ask, and say what came of it."""
    keys, tally = args.key or ["none"], Tally()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=args.streams)
    clients = [
        httpx.AsyncClient(
            base_url=args.url, headers={"Authorization": f"Bearer {key}"}, timeout=900, limits=limits, trust_env=False
        )
        for key in keys
    ]
    asked = await answered(clients[0], questions())
    owners = [0] * (args.streams - len(keys) + 1) + [*range(1, len(keys))]
    began = time.monotonic()
    beside = [asyncio.create_task(watching(tally))]
    if args.kill_every:
        beside += [asyncio.create_task(killing(clients[0], args.kill_every, tally, args.seed))]
    tasks = [
        asyncio.create_task(stream(clients[key], key, asked, tally, args.seed + at)) for at, key in enumerate(owners)
    ]
    await asyncio.wait([*tasks, *beside], timeout=60 * args.minutes, return_when=asyncio.FIRST_COMPLETED)
    crashed = [task.exception() for task in (*tasks, *beside) if task.done()]
    seconds = time.monotonic() - began
    for task in (*tasks, *beside):
        task.cancel()
    await asyncio.gather(*tasks, *beside, return_exceptions=True)
    for client in clients:
        await client.aclose()
    ttft = {f"key {key}": sorted(found) for key, found in sorted(tally.ttft.items()) if found}
    return {
        "streams": args.streams,
        "seconds": round(seconds, 1),
        "ended": dict(tally.ended),
        "left": tally.left,
        "refused": dict(tally.refused),
        "kills": tally.kills,
        "pieces_s": round(tally.pieces / seconds, 1),
        "ttft_p50_s": {key: round(found[len(found) // 2], 3) for key, found in ttft.items()},
        "ttft_p99_s": {key: round(found[len(found) * 99 // 100], 3) for key, found in ttft.items()},
        "rss_growth_mb": {name: round(growth(rss), 1) for name, rss in tally.rss.items() if len(rss) >= 15},
        "faults": [*map(repr, crashed), *tally.faults],
    }


def main() -> int:
    """Exit status 0 where every answer was right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--key", action="append", help="an API key; several for several tenants")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--kill-every", type=float, default=60, help="seconds; 0 kills none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = asyncio.run(run(args))
    if args.json:
        emit(found)
    else:
        print_facts({name: json.dumps(value) for name, value in found.items() if name != "faults"}, title="overload")
        print(f"{len(found['faults'])} faults", *found["faults"][:10], sep="\n")
    return int(bool(found["faults"]))


if __name__ == "__main__":
    sys.exit(main())
