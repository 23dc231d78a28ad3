"""The seeded inputs of `tests/fuzz_inputs.py`, a few of each; and that it would say what went wrong."""

from __future__ import annotations

import random
import time
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

import fuzz_inputs
import pytest
from fuzz_inputs import PARSERS, fuzz

from buddymoe_ray.engine.json_schema import checked_schema
from buddymoe_ray.errors import RequestError

FEW = {
    "body": 400,
    "schema": 1500,
    "link": 600,
    "answer": 150,
    "batch": 60,
    "profile": 100,
    "keys": 100,
    "headers": 60,
    "template": 20,
}


@pytest.mark.parametrize("name", PARSERS)
def test_nothing_but_what_is_declared_is_raised(name: str) -> None:
    assert [*fuzz(name, 1, range(FEW[name]))] == []


def test_a_crash_a_hang_and_growth_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = list[mmap]()

    def faulty(rng: random.Random) -> None:
        at = len(kept)
        kept.append(mmap(-1, 2_000_000, flags=MAP_PRIVATE | MAP_ANONYMOUS))  # no memory that is free already
        kept[-1][:] = bytes([rng.randrange(1, 256)]) * 2_000_000
        if at == 3:
            raise KeyError("nobody declared this")
        if at == 5:
            time.sleep(30)

    monkeypatch.setattr(fuzz_inputs, "LIMIT_SECONDS", 1.0)
    monkeypatch.setattr(fuzz_inputs, "GROWTH_BYTES", 16 << 20)
    monkeypatch.setitem(PARSERS, "faulty", (0.0, faulty))
    found = [*fuzz("faulty", 1, range(40))]
    assert [each.number for each in found] == [3, 5, -1]
    for each, word in zip(found, ("KeyError", "Hang", "MiB more"), strict=True):
        assert word in each.error


@pytest.mark.parametrize("required", [[{}], [["a"]], [1], ["a", None]])
def test_what_is_required_must_be_names(required: list[object]) -> None:
    with pytest.raises(RequestError, match="has required"):
        checked_schema({"type": "object", "properties": {"a": {"type": "string"}}, "required": required}, "x")
