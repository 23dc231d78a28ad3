"""Random JSON schemas over the HTTP app: whatever an unforced model says under `strict` validates, or ends by length;
the same schema with a keyword that no grammar here enforces is refused by that keyword's name.

    python tests/schema_answers.py [--schemas 500] [--seed 1000] [--tokens 220] [--json]

By hand: minutes. `builtin:tiny` answers as it would anybody, with half its experts, in all three modes and at
temperatures 0, .7 and 1.3; its texts are cut at `--tokens`. Exit status 1 where an answer was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import Counter
from random import Random
from typing import Any

import httpx
import jsonschema
from asgi import talking_to
from fakes import LocalWorkers
from schemas import random_schema

from buddymoe_ray.commands.common import emit, print_facts
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.async_engine import AsyncEngine
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.serve.worker import Worker

MODEL = "builtin:tiny"
AT_ONCE = 16
MODES, TEMPERATURES = ("exact", "bounded", "fast"), (0.0, 0.7, 1.3)
QUESTIONS = ("Extract JSON: Anna is 34 and lives in Paris.", "What is 12 + 30?", "JSON:")
UNENFORCED: dict[str, Any] = {
    "not": {"type": "null"},
    "allOf": [{"type": "object"}],
    "oneOf": [{"type": "object"}],
    "if": {"type": "object"},
    "uniqueItems": True,
    "contains": {"type": "integer"},
    "minContains": 1,
    "patternProperties": {"^a": {"type": "string"}},
    "propertyNames": {"maxLength": 3},
    "minProperties": 1,
    "maxProperties": 2,
    "dependentRequired": {"a": ["b"]},
    "dependentSchemas": {"a": {"type": "object"}},
    "unevaluatedProperties": False,
    "contentEncoding": "base64",
    "$dynamicRef": "#node",
}


def places(schema: Any) -> list[dict[str, Any]]:
    """Every schema within a schema."""
    if not isinstance(schema, dict):
        return []
    inner = [*schema.get("properties", {}).values(), *schema.get("$defs", {}).values(), schema.get("items")]
    inner += [*schema.get("anyOf", ()), *schema.get("prefixItems", ())]
    return [schema, *(place for part in inner for place in places(part))]


def kind_of(schema: dict[str, Any]) -> str:
    """Whether it refers to itself, or else holds objects or lists within."""
    inner = places(schema)[1:]
    if any("$ref" in place for place in inner):
        return "recursive"
    return "nested" if any(place.get("type") in ("object", "array") for place in inner) else "flat"


async def ask(client: httpx.AsyncClient, schema: dict[str, Any], seed: int, tokens: int) -> httpx.Response:
    """One answer, of the chat's kind."""
    form = {"name": "answer", "strict": True, "schema": schema}
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": QUESTIONS[seed % len(QUESTIONS)]}],
        "response_format": {"type": "json_schema", "json_schema": form},
        "temperature": TEMPERATURES[seed % 3],
        "seed": seed,
        "max_tokens": tokens,
        "buddymoe": {"mode": MODES[seed // 3 % 3]},
    }
    return await client.post("/v1/chat/completions", json=body)


def fault_of(reply: httpx.Response, schema: dict[str, Any]) -> tuple[str, str]:
    """How an answer ended, and what is wrong with it."""
    if reply.status_code != 200:
        return str(reply.status_code), reply.text
    (choice,) = reply.json()["choices"]
    reason, text = choice["finish_reason"], choice["message"]["content"]
    if reason != "stop":
        return reason, "" if reason == "length" else text
    try:
        found = json.loads(text)
    except ValueError as error:
        return reason, f"{error}: {text}"
    wrong = next(jsonschema.Draft202012Validator(schema).iter_errors(found), None)
    return reason, "" if wrong is None else f"{wrong.message}: {text}"


async def run(client: httpx.AsyncClient, seeds: range, tokens: int) -> tuple[Counter[str], list[str]]:
    """What became of all, and what is wrong."""
    tally, faults, free = Counter[str](), list[str](), asyncio.Semaphore(AT_ONCE)

    async def one(seed: int) -> None:
        async with free:
            schema = random_schema(seed)
            tally[kind_of(schema)] += 1
            ended, fault = fault_of(await ask(client, schema, seed, tokens), schema)
            tally[ended] += 1
            if fault:
                faults.append(f"seed {seed}: {fault}")
            rng = Random(seed)
            keyword = rng.choice(list(UNENFORCED))
            rng.choice(places(schema))[keyword] = UNENFORCED[keyword]
            reply = await ask(client, schema, seed, tokens)
            if reply.status_code == 400 and repr(keyword) in reply.json()["error"]["message"]:
                tally["refused"] += 1
            else:
                faults.append(f"seed {seed}: {keyword} in {schema}: {reply.status_code} {reply.text}")

    await asyncio.gather(*map(one, seeds))
    return tally, faults


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All of it, in numbers."""
    engine = AsyncEngine(
        Engine.from_config(EngineConfig(memory="50%", mode="bounded", threads=1, max_running=AT_ONCE)), model_id=MODEL
    )
    try:
        async with talking_to(LocalWorkers(Worker(engine)), model=MODEL) as client:
            tally, faults = await run(client, range(args.seed, args.seed + args.schemas), args.tokens)
    finally:
        engine.close()
    told = ("flat", "nested", "recursive", "stop", "length", "refused")
    return {"schemas": args.schemas, "seed": args.seed, **{name: tally[name] for name in told}, "wrong": faults}


def main() -> int:
    """Print what became of the answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemas", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=220)
    parser.add_argument("--json", action="store_true")
    found = asyncio.run(measure(args := parser.parse_args()))
    if args.json:
        emit(found)
    else:
        print_facts({name: json.dumps(value) for name, value in found.items()}, title="answers of random schemas")
    return bool(found["wrong"])


if __name__ == "__main__":
    sys.exit(main())
