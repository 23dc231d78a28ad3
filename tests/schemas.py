"""Random JSON schemas of the kind that is served, from a seed: nested, recursive, with bounds that can all be kept."""

from __future__ import annotations

from random import Random
from typing import Any

__all__ = ["random_schema"]


def random_schema(seed: int) -> dict[str, Any]:
    """A schema whose answers fit in some hundred tokens; two of three are nested, one of four recursive."""
    rng = Random(seed)
    if rng.random() < 0.25:
        leaf = _value(rng, 0)
        node = {
            "type": "object",
            "properties": {"value": leaf, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["value", "next"],
            "additionalProperties": False,
        }
        return {"$ref": "#/$defs/node", "$defs": {"node": node}}
    return _object(rng, rng.choice((1, 2, 2, 3)))


def _object(rng: Random, depth: int) -> dict[str, Any]:
    names = rng.sample(("name", "age", "a-b", 'q"', "größe", "x y", "id", "list"), rng.randint(1, 4))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _value(rng, depth) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "title": "T",
    }
    if rng.random() < 0.7:
        schema["additionalProperties"] = False
    return schema


def _value(rng: Random, depth: int) -> dict[str, Any]:
    kind = rng.choice(("string", "integer", "number", "boolean", "null", "enum", "const"))
    if depth > 0 and rng.random() < 0.6:
        kind = rng.choice(("object", "array", "anyOf", "tuple"))
    low = rng.randint(-50, 50)
    made: dict[str, dict[str, Any]] = {
        "string": rng.choice(
            (
                {"type": "string", "maxLength": rng.randint(1, 12)},
                {"type": "string", "minLength": 2, "maxLength": 6},
                {"type": "string", "pattern": "^[a-c]{1,4}-[0-9]+$"},
                {"type": "string", "format": rng.choice(("date", "uuid", "ipv4", "email"))},
                {"type": ["string", "null"], "maxLength": 4},
            )
        ),
        "integer": rng.choice(
            (
                {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 300)},
                {"type": "integer", "exclusiveMinimum": low},
                {"type": "integer"},
                {"type": "integer", "multipleOf": rng.randint(2, 12)},
            )
        ),
        "number": rng.choice(({"type": "number"}, {"type": "number", "minimum": low, "exclusiveMaximum": low + 9.5})),
        "boolean": {"type": "boolean"},
        "null": {"type": "null"},
        "enum": {"enum": rng.sample(["red", "green", 3, None, True, 2.5, "ü"], rng.randint(1, 4))},
        "const": {"const": rng.choice(["x", 7, {"a": [1, "b"]}, [None]])},
    }
    if kind == "object":
        return _object(rng, depth - 1)
    if kind == "array":
        return {"type": "array", "items": _value(rng, depth - 1), "minItems": rng.randint(0, 2), "maxItems": 3}
    if kind == "tuple":
        return {"type": "array", "prefixItems": [_value(rng, 0), _value(rng, 0)], "minItems": 2, "items": False}
    if kind == "anyOf":
        return {"anyOf": [_value(rng, depth - 1), _value(rng, 0)], "default": None}
    return made[kind]
