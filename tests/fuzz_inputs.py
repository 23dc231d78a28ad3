"""Seeded inputs against everything that reads what somebody else wrote: no exception but the declared one, no hang, no
growth of memory.

A command: `python tests/fuzz_inputs.py [--inputs 1000000] [--seed 1] [--only NAME]`; an input is made from its seed,
name and number alone, and a failure says all three (`--only NAME --first N --inputs 1` makes it again). Inputs are made
like good ones, from /openapi.json where that describes them, then spoilt here and there.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import copy
import gc
import json
import logging
import random
import re
import signal
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgpack
import torch
from fakes import FakeEngine, LocalWorkers, byte_tokenizer
from profiles import MODEL_HASH, make_profile
from transformers import AutoTokenizer

from buddymoe_ray.engine.answer_forms import CALLS
from buddymoe_ray.engine.answers import AnswerForm, AnswerReader, answer_form
from buddymoe_ray.engine.json_schema import checked_output, checked_schema
from buddymoe_ray.errors import ConfigError, LinkError, ProfileError, RequestError
from buddymoe_ray.links.arrays import ArraySpec
from buddymoe_ray.links.messages import check_answer, number_of, parse_question
from buddymoe_ray.links.wire import KINDS, PREFIX_BYTES, FrameLimits, pack_frame, parse_frame, parse_prefix
from buddymoe_ray.models import tiny
from buddymoe_ray.models.profile import load_profile, save_profile
from buddymoe_ray.serve.batches.entries import LineAnswers
from buddymoe_ray.serve.batches.journal import Journal, JournalEntry
from buddymoe_ray.serve.batches.lines import BatchInput, LineError
from buddymoe_ray.serve.calls import CHAT, COMPLETIONS, MESSAGES, RESPONSES, ModelNames, open_call
from buddymoe_ray.serve.http import HttpSettings, http_app
from buddymoe_ray.serve.keys import read_keys
from buddymoe_ray.serve.openapi import OPERATIONS, openapi_document
from buddymoe_ray.serve.prompts import encode, usable
from buddymoe_ray.serve.wire_parsing import parse_body
from buddymoe_ray.serve.work import Refusal
from buddymoe_ray.serve.worker import Worker

__all__ = ["PARSERS", "Finding", "fuzz"]

LIMIT_SECONDS = 10.0
"""For one input, generously: a machine may be busy, and a hang has no end."""
GROWTH_BYTES = 64 << 20
WARM_SHARE = 0.1

NAMES = ModelNames(model="builtin:tiny")
TEXTS = (
    "",
    "a",
    "hello",
    "äé漢",
    "\x00",
    "\ud800",
    "😀",
    "null",
    "{",
    '{"a": 1}',
    "[1]",
    "<tool_call>",
    "</think>",
    "%s{}",
)
NUMBERS = (0, 1, -1, 2, 3.5, -0.0, 1e308, -1e-308, 2**31, 2**63, -(2**63), 2**64, 10**40, float("nan"), float("inf"))
WORDS = (
    "role",
    "content",
    "type",
    "text",
    "user",
    "assistant",
    "tool",
    "system",
    "function",
    "name",
    "arguments",
    "id",
)


class Hang(BaseException):
    """An input took longer than LIMIT_SECONDS."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What went wrong with the input of that number."""

    parser: str
    number: int
    error: str


# ---- making inputs


def anything(rng: random.Random, depth: int = 3) -> Any:
    """Some JSON value."""
    kind = rng.random()
    if depth <= 0 or kind < 0.5:
        return rng.choice((None, True, False, rng.choice(TEXTS), rng.choice(NUMBERS), rng.choice(WORDS)))
    if kind < 0.75:
        return [anything(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    return {rng.choice((*WORDS, *TEXTS)): anything(rng, depth - 1) for _ in range(rng.randint(0, 3))}


@cache
def forms() -> dict[str, Any]:
    """Components of /openapi.json."""
    found: dict[str, Any] = openapi_document()["components"]["schemas"]
    return found


def like(schema: Any, rng: random.Random, depth: int = 5) -> Any:
    """A value that a schema of /openapi.json describes, as far as it says."""
    if "$ref" in schema:
        return like(forms()[schema["$ref"].rpartition("/")[2]], rng, depth - 1)
    for many in ("anyOf", "oneOf"):
        if many in schema:
            return like(rng.choice(schema[many]), rng, depth)
    if "const" in schema or "enum" in schema:
        return rng.choice(schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "object":
        named = schema.get("properties", {})
        kept = [name for name in named if name in schema.get("required", ()) or (depth > 0 and rng.random() < 0.15)]
        value = {name: like(named[name], rng, depth - 1) for name in kept}
        more = schema.get("additionalProperties")
        if isinstance(more, dict) or more is True:
            inner = more if isinstance(more, dict) else {}
            value |= {
                str(rng.choice((*TEXTS, *range(9)))): like(inner, rng, depth - 1) for _ in range(rng.randint(0, 2))
            }
        return value
    if kind == "array":
        least, most = schema.get("minItems", 0), schema.get("maxItems", 3)
        return [like(schema.get("items", {}), rng, depth - 1) for _ in range(rng.randint(least, max(least, most)))]
    if kind == "string":
        return rng.choice(("hello", "get_weather", "a", rng.choice(TEXTS)))
    if kind in ("integer", "number"):
        low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
        drawn = rng.choice((low, low + rng.randint(0, 4), schema.get("maximum", low + 7)))
        return drawn if kind == "integer" else float(drawn)
    return {"boolean": rng.random() < 0.5, "null": None}.get(kind, anything(rng, depth - 1))


def spoilt(value: Any, rng: random.Random) -> Any:
    """The same with something in it replaced, left out or added."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        name = rng.choice(list(value))
        act = rng.random()
        if act < 0.6:
            return {**value, name: spoilt(value[name], rng)}
        if act < 0.8:
            return {key: item for key, item in value.items() if key != name}
        return {**value, rng.choice((*WORDS, *TEXTS)): anything(rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], *rng.choice(([], [spoilt(value[at], rng)], [value[at], value[at]])), *value[at + 1 :]]
    return anything(rng)


def scratched(data: bytes, rng: random.Random) -> bytes:
    """The same bytes with a few of them changed, left out or doubled."""
    for _ in range(rng.choice((0, 0, 1, 1, 3))):
        at, upto = rng.randrange(len(data) + 1), rng.randint(0, 8)
        data = data[:at] + rng.choice((b"", rng.randbytes(upto), data[at : at + upto] * 2)) + data[at + upto :]
    return data


def written(value: Any, rng: random.Random) -> bytes:
    """As JSON, which may be spoilt before and scratched after."""
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        value = spoilt(value, rng)
    data = json.dumps(value, ensure_ascii=rng.random() < 0.9).encode(errors="surrogatepass")
    return scratched(data, rng) if rng.random() < 0.3 else data


def talk(rng: random.Random) -> list[dict[str, Any]]:
    """A conversation in the words of chat completions, whose roles have what they may have."""
    told: list[dict[str, Any]] = []
    for at in range(rng.randint(1, 4)):
        said: Any = rng.choice((*TEXTS, *WORDS))
        said = rng.choice((said, [{"type": "text", "text": text} for text in ("one", said)]))
        role = rng.choice(("user", "assistant", "system", "developer", "tool"))
        message: dict[str, Any] = {"role": role, "content": said}
        if role == "tool":
            message["tool_call_id"] = "c"
        if role == "assistant" and rng.random() < 0.5:
            made = {"name": "f", "arguments": json.dumps({"a": anything(rng, 1)})}
            message |= {"content": None, "tool_calls": [{"id": f"c{at}", "type": "function", "function": made}]}
        if role == "assistant" and rng.random() < 0.3:
            message["reasoning_content"] = rng.choice(TEXTS)
        if rng.random() < 0.1:
            message["name"] = rng.choice(TEXTS)
        told.append(message)
    return told


# ---- parsers: each makes the input of a generator, and reads it


def body(rng: random.Random) -> None:
    """A request's body, to what a worker is asked."""
    asked = rng.choice([each for each in OPERATIONS if each.body is not None])
    assert asked.body is not None
    value = like(forms()[asked.body.__name__], rng)
    if "model" in value:
        value["model"] = "builtin:tiny"
    if "messages" in value and rng.random() < 0.7:
        value["messages"] = talk(rng)
    data = written(value, rng)
    with suppress(RequestError):
        endpoint = next((each for each in (CHAT, COMPLETIONS, MESSAGES, RESPONSES) if each.path == asked.path), None)
        if endpoint is None:
            read: Any = parse_body(data, asked.body)
            if hasattr(read, "work"):
                usable(read.work("x"))
        else:
            usable(open_call(endpoint, data, NAMES, unique="x", created=1).work)


def a_schema(rng: random.Random, depth: int = 4) -> Any:
    kind = rng.choice(("object", "array", "string", "integer", "number", "boolean", "null", "any", "ref"))
    if depth <= 0 or kind not in ("object", "array", "any", "ref"):
        return {"type": kind if kind not in ("any", "ref") else "string"}
    if kind == "object":
        named = {word: a_schema(rng, depth - 1) for word in rng.sample(WORDS, rng.randint(0, 3))}
        return {"type": "object", "properties": named, "required": list(named)[:1], "additionalProperties": False}
    if kind == "array":
        return {"type": "array", "items": a_schema(rng, depth - 1), "maxItems": rng.choice((1, 3, -1))}
    if kind == "ref":
        return {"$ref": "#/$defs/a", "$defs": {"a": a_schema(rng, depth - 1)}}
    return {"anyOf": [a_schema(rng, depth - 1) for _ in range(rng.randint(0, 3))]}


def schema(rng: random.Random) -> None:
    """A JSON schema, a pattern, a grammar."""
    value = a_schema(rng)
    for _ in range(rng.choice((0, 1, 2))):
        value = spoilt(value, rng)
    with suppress(RequestError):
        checked_schema(value, "x")
    name = rng.choice(("json", "regex", "choice", "grammar", "json_object", "nonsense"))
    source = value if name == "json" else anything(rng)
    with suppress(RequestError):
        checked_output({name: source} if rng.random() < 0.9 else source)


MARKS = (
    *(
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "<function=f>",
        "</function>",
        "<parameter=a>",
        "</parameter>",
    ),
    *(
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "<|tool_call|>",
        "<|channel|>",
    ),
    *(
        "<minimax:tool_call>",
        '<invoke name="f">',
        "</invoke>",
        '<parameter name="a">',
        "<|message|>",
        "<|call|>",
        "<|end|>",
    ),
    *(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "```json",
        "```",
        "analysis",
    ),
    *(
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        '"name"',
        '"arguments"',
        "NaN",
        "1",
        "\n",
        "commentary to=functions.f ",
        "<|start|>",
    ),
)


@cache
def answer_forms() -> tuple[AnswerForm, ...]:
    """Every family's, as it is found out from a chat template that names its marks."""
    found = []
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    for form in CALLS.values():
        for thoughts in ("", "</think>"):
            tokenizer = copy.copy(byte_tokenizer())
            tokenizer.chat_template = "".join(form.marks) + thoughts + "{{ tools }}"
            read = answer_form(tokenizer, {}, tools)
            assert read is not None
            found.append(read)
    return tuple(found)


def answer(rng: random.Random) -> None:
    """What a model says, in pieces: nothing is raised, and no word is lost."""
    words = [f"w{at}x" for at in range(4)]
    text = "".join(word + "".join(rng.choices(MARKS, k=rng.randint(0, 3))) for word in ("", *words))
    reader, told, step = AnswerReader(rng.choice(answer_forms())), "", rng.choice((1, 4, 10_000))
    pieces = [text[at : at + step] for at in range(0, len(text), step)]
    for at, piece in enumerate(pieces):
        for each in reader.feed(piece, ended=at == len(pieces) - 1):
            told += f"{each.text} {each.reasoning} {each.name} {each.arguments} "
            if each.name:
                json.loads(each.arguments)
    spaceless = re.sub(r"\s", "", told)
    lost = [word for word in words if word not in spaceless]
    assert not lost, f"{lost} of {text!r} are nowhere in {told!r}"


def link(rng: random.Random) -> None:
    """A frame, from its prefix to the arrays of an answer."""
    specs = [[rng.randint(0, 3), "float32", [rng.randint(0, 2), 4]] for _ in range(rng.randint(0, 3))]
    header: Any = {"kind": rng.choice(sorted(KINDS)), "id": 1, "layer": 0, "patience": 5, "arrays": specs}
    for _ in range(rng.choice((0, 1, 2))):
        header = spoilt(header, rng)
    with suppress(ValueError, OverflowError, UnicodeEncodeError):  # what msgpack itself cannot write
        payload = torch.zeros(rng.choice((0, 64, 128, 7)), dtype=torch.uint8)
        frame = scratched(pack_frame(header, payload.numel()), rng)
        with suppress(LinkError):
            if len(frame) >= PREFIX_BYTES:
                parse_prefix(frame[:PREFIX_BYTES], FrameLimits())
            read = parse_frame(frame[PREFIX_BYTES:], payload)
            number_of(read)
            with suppress(LinkError):
                parse_question(read)
            check_answer(read, [ArraySpec(key=0, dtype="float32", shape=(1, 4))])


@cache
def scratch() -> Path:
    """A folder in memory."""
    folder = TemporaryDirectory(dir="/dev/shm", prefix="fuzz-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def batch(rng: random.Random) -> None:
    """A file of a batch's lines, and the journal of its answers."""
    path, journal, lines = scratch() / "in.jsonl", scratch() / "journal", []
    for at in range(rng.randint(0, 3)):
        asked = {"model": "builtin:tiny", **like(forms()["CompletionRequest"], rng, 2)}
        line = {"custom_id": rng.choice((f"r{at}", "r")), "method": "POST", "url": COMPLETIONS.path, "body": asked}
        lines.append(written(line, rng).replace(b"\n", b" "))
    path.write_bytes(b"\n".join(lines))
    source = BatchInput(path)
    answers = LineAnswers(source, NAMES)
    for at in range(len(source)):
        read = source.read(at)
        if not isinstance(read, LineError):
            answers.replied(at, read, opened if isinstance(opened := answers.open(at, read), Refusal) else b"{}")
    source.close()
    entries = [JournalEntry(at, 200, json.dumps(anything(rng)).encode()) for at in range(3)]
    journal.unlink(missing_ok=True)
    with closing(Journal.open(journal, {"x": 1}, count=3)) as first:
        for entry in entries:
            first.append(entry)
    journal.write_bytes(scratched(journal.read_bytes(), rng))
    with suppress(ConfigError), closing(Journal.open(journal, {"x": 1}, count=3)) as again:
        for entry in entries:
            if not again.has(entry.at):
                again.append(entry)
        assert [*again.entries()] == entries, "what the journal kept is not what was put there"


def keys(rng: random.Random) -> None:
    """A file of named keys."""
    path, names = scratch() / "keys.toml", ("alice", "bob", rng.choice(("alice", "a b", "", "default")))
    lines = [f'[{name}]\nsha256 = "{sha256(name.encode()).hexdigest()}"\n' for name in names[: rng.randint(0, 3)]]
    lines += [f"{rng.choice(('tokens_per_minute', 'x'))} = {rng.choice((*NUMBERS, '[]', 'true'))}\n"] * rng.randint(
        0, 2
    )
    path.write_bytes(scratched("".join(lines).encode(), rng))
    path.chmod(0o600)
    with suppress(ConfigError):
        read_keys(path)


@cache
def profile_fields() -> dict[str, Any]:
    path = scratch() / "whole.profile"
    save_profile(make_profile(layers=1, experts=4, top_k=2, tokens=4), path)
    whole = msgpack.unpackb(path.read_bytes())
    return {**whole, "body": msgpack.unpackb(zlib.decompress(whole["body"]))}


def profile(rng: random.Random) -> None:
    """A profile's file, spoilt before its checksum was made or after."""
    whole, path = profile_fields(), scratch() / "spoilt.profile"
    body = whole["body"]
    for _ in range(rng.choice((0, 1, 1, 2))):
        body = spoilt(body, rng)
    with suppress(ValueError, OverflowError, UnicodeEncodeError):
        packed = zlib.compress(scratched(msgpack.packb(body), rng), 1)
        outer = {**whole, "body": packed, "sha256": sha256(packed).hexdigest()}
        path.write_bytes(scratched(msgpack.packb(outer if rng.random() < 0.8 else spoilt(outer, rng)), rng))
        with suppress(ProfileError):
            load_profile(path, model_hash=MODEL_HASH)


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(tiny.path()))


def template(rng: random.Random) -> None:
    """A conversation through a chat template, that of a checkpoint or one like it."""
    able = tokenizer()
    if rng.random() < 0.3:
        able = copy.copy(able)
        able.chat_template = scratched(tokenizer().chat_template.encode(), rng).decode(errors="replace")
    asked = {"messages": talk(rng)}
    if rng.random() < 0.3:
        asked["tools"] = [like(forms()["Tool"], rng)]
    if rng.random() < 0.1:
        asked["chat_template_kwargs"] = rng.choice(
            ({"enable_thinking": True}, {"add_generation_prompt": anything(rng)})
        )
    with suppress(RequestError):
        read = open_call(CHAT, json.dumps({**asked, "model": "builtin:tiny"}).encode(), NAMES, unique="x", created=1)
        work = usable(read.work)
        answer_form(able, work.template_options, work.tools.tools if work.tools else ())
        encode(able, work)


@cache
def app() -> Any:
    return http_app(
        LocalWorkers(Worker(FakeEngine(model_id="builtin:tiny"))), HttpSettings(model="x", api_key="sesame")
    )


@cache
def loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def headers(rng: random.Random) -> None:
    """A request's line and headers: whoever has no key gets in nowhere, and nothing breaks."""
    given = []
    for _ in range(rng.randint(0, 4)):
        name = rng.choice((b"authorization", b"x-api-key", b"accept", b"content-type", b"content-length", b"cookie"))
        value = rng.choice(
            (b"Bearer sesame", b"bearer  sesame", b"Basic eDp4", b"*/*", b"application/openmetrics-text")
        )
        value = rng.choice((value, b"multipart/form-data; boundary=x", b"9" * 30, b"Bearer"))
        given.append((name, scratched(value, rng)))
    paths = [each.path for each in OPERATIONS if each.path != "/dashboard/events"]
    path = scratched(rng.choice(paths).encode(), rng).decode(errors="replace")
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "path": path,
        "raw_path": path.encode(), "query_string": scratched(b"limit=1", rng), "root_path": "", "headers": given,
        "method": rng.choice(("GET", "HEAD", "POST", "DELETE", "PUT", "OPTIONS", "x")), "client": None, "server": None,
    }  # fmt: skip
    body, statuses = [{"type": "http.request", "body": scratched(b"--x\r\n", rng), "more_body": False}], []

    async def receive() -> Any:
        return body.pop() if body else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        statuses.extend([message["status"]] if "status" in message else [])

    loop().run_until_complete(app()(scope, receive, send))
    known = {bytes(value).split(b" ", 1)[-1].strip(b" ") for name, value in given if name != b"accept"}
    guarded = path.startswith(("/v1/models", "/v1/files", "/metrics", "/dashboard/data", "/tokenizer_info"))
    assert len(statuses) == 1 and (statuses[0] < 500 or statuses[0] == 503), f"{scope}: {statuses}"
    assert b"sesame" in known or not guarded or statuses[0] in (401, 404, 405), f"{scope}: {statuses}"


PARSERS: dict[str, tuple[float, Callable[[random.Random], None]]] = {
    "body": (0.4, body),
    "schema": (0.2, schema),
    "link": (0.2, link),
    "answer": (0.08, answer),
    "batch": (0.05, batch),
    "profile": (0.03, profile),
    "headers": (0.02, headers),
    "keys": (0.01, keys),
    "template": (0.01, template),
}
"""By name: its share of the inputs, by what they cost, and what makes and reads one."""


@contextmanager
def limited() -> Iterator[None]:
    """Raises Hang after LIMIT_SECONDS."""
    signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def rss_bytes() -> int:
    """Of this process's own: pages of files come and go as the machine has memory."""
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, "the kernel counts anonymous memory"
    return int(found[1]) << 10


def fuzz(name: str, seed: int, numbers: range) -> Iterator[Finding]:
    """Inputs of these numbers through one parser; what went wrong. Memory is looked at once a tenth is done."""

    def hung(*_: Any) -> None:
        raise Hang(f"took more than {LIMIT_SECONDS} s")

    signal.signal(signal.SIGALRM, hung)
    warm, before = numbers.start + int(WARM_SHARE * len(numbers)), 0
    for number in numbers:
        if number == warm:
            gc.collect()
            before = rss_bytes()
        try:
            with limited():
                PARSERS[name][1](random.Random(f"{seed}/{name}/{number}"))
        except (Exception, Hang) as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{last.filename.rpartition('/')[2]}:{last.lineno}"
            yield Finding(parser=name, number=number, error=f"{type(error).__name__} at {place}: {error}"[:600])
    gc.collect()
    grown = rss_bytes() - before
    if grown > GROWTH_BYTES:
        yield Finding(parser=name, number=-1, error=f"{grown >> 20} MiB more after {len(numbers)} inputs")
    if len(numbers) > 1000:
        print(f"{name}: {len(numbers):,} inputs, {grown / 2**20:+.1f} MiB", flush=True)


def main() -> int:
    """All of it; 1 where something went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=sorted(PARSERS))
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_args()
    logging.disable(logging.ERROR)
    begun, found = time.monotonic(), 0
    for name in [args.only] if args.only else PARSERS:
        count = args.inputs if args.only else round(PARSERS[name][0] * args.inputs)
        for finding in fuzz(name, args.seed, range(args.first, args.first + count)):
            found += 1
            if found <= 50:
                print(finding, flush=True)
    print(f"{args.inputs:,} inputs in {time.monotonic() - begun:.0f} s: {found} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
