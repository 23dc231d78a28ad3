"""What a caller wants the text to be, checked and in one form; of JSON schemas only what a grammar can hold to the end.

Pure: knows no grammar library. xgrammar reads past keywords that it does not know (`not`, `if`, `uniqueItems`) and
those beside `anyOf` or `$ref`; text that breaks them would pass for valid, so they are refused here, by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from buddymoe_ray.errors import RequestError
from buddymoe_ray.types import StructuredKind, StructuredOutput

__all__ = ["checked_output", "checked_schema"]

MAX_CHARACTERS = 128 << 10
MAX_DEPTH = 64

_RANGE = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_OF_TYPE: dict[str, tuple[str, ...]] = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": _RANGE,
    "integer": (*_RANGE, "multipleOf"),
    "boolean": (),
    "null": (),
}
_SIZES = ("minItems", "maxItems", "minLength", "maxLength")
_WHOLE = ("$ref", "anyOf", "enum", "const")  # each says all there is to say of a value
_NOTES = {
    *("$schema", "$comment", "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
    *("$defs", "definitions"),
}
_FORMATS = (
    *("email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri", "uri-reference"),
    *("uri-template", "json-pointer", "relative-json-pointer"),
)
_TYPE_OF = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null", int: "integer"}


def checked_output(value: object, field: str = "structured_outputs") -> StructuredOutput:
    """The one thing that a caller asks the text to be: a StructuredOutput, or vLLM's mapping of one kind to its source.

    Raises RequestError, its param `field`: no or several kinds, a wrong type, or a schema that cannot be enforced.
    """
    if isinstance(value, StructuredOutput):
        kind, source, field = value.kind, value.source, value.field
        if kind not in get_args(StructuredKind) or not isinstance(source, str):
            raise _refused(field, f"is of kind {kind!r:.80}", f"one of {', '.join(get_args(StructuredKind))}")
        if kind in ("json", "choice"):
            return _checked(kind, _loaded(source, field), field)
        return _checked(kind, source, field)
    if not isinstance(value, Mapping):
        raise _refused(field, f"is {value!r:.80}", 'a mapping such as {"json": {...}}')
    unset = {"json_object": False}
    given = {str(name): item for name, item in value.items() if item is not None and item is not unset.get(name)}
    kinds = [name for name in get_args(StructuredKind) if name != "structural_tag"]
    if len(given) != 1 or not given.keys() <= {*kinds}:
        raise _refused(field, f"holds {sorted(value)!r:.200}", f"exactly one of {', '.join(kinds)}")
    wanted, source = next(iter(given.items()))
    if wanted == "json_object" and source is not True:
        raise _refused(f"{field}.json_object", f"is {source!r:.80}", "true")
    if wanted == "json" and isinstance(source, str):
        source = _loaded(source, field)
    return _checked(wanted, source, field)  # type: ignore[arg-type]


def checked_schema(schema: object, field: str) -> None:
    """Raises RequestError naming the keyword of a JSON schema that no grammar here enforces, and its place."""
    if not isinstance(schema, dict | bool):
        raise _refused(field, f"is {schema!r:.80}", "a JSON schema, which is an object")
    for place, part, depth in _parts(schema, "#", 0):
        if depth > MAX_DEPTH:
            raise _refused(field, f"is nested deeper than {MAX_DEPTH} at {place:.200}", "flatter")
        if isinstance(part, dict):
            _check_part(part, place, field)
        elif part is not True and not (part is False and place.endswith(("/additionalProperties", "/items"))):
            raise _refused(field, f"has {part!r:.80} for a schema at {place:.200}", "an object")


def _checked(kind: StructuredKind, source: Any, field: str) -> StructuredOutput:
    if kind == "json":
        checked_schema(source, field)
    elif kind == "choice":
        if not isinstance(source, list | tuple) or not source or not all(isinstance(x, str) and x for x in source):
            raise _refused(f"{field}.choice", f"is {source!r:.80}", "a list of texts that are not empty")
    elif kind == "json_object":
        source = "true"
    elif not isinstance(source, str) or not source:
        raise _refused(f"{field}.{kind}", f"is {source!r:.80}", "a text")
    elif kind == "regex":
        source = _regex(source, field)
    text = source if isinstance(source, str) else json.dumps(source)
    if len(text) > MAX_CHARACTERS:
        raise _refused(field, f"is {len(text)} characters", f"at most {MAX_CHARACTERS}")
    return StructuredOutput(kind=kind, source=text, field=field)


def _loaded(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refused(field, f"is no JSON ({error})", "JSON") from None


def _parts(schema: object, place: str, depth: int) -> Iterator[tuple[str, object, int]]:
    """Every schema within a schema, with its place as a JSON pointer."""
    yield place, schema, depth
    if not isinstance(schema, dict) or depth > MAX_DEPTH:
        return
    for keyword in ("properties", "$defs", "definitions"):
        found = schema.get(keyword)
        for name, part in found.items() if isinstance(found, dict) else ():
            yield from _parts(part, f"{place}/{keyword}/{name}", depth + 1)
    for keyword in ("items", "additionalProperties"):
        if keyword in schema:
            yield from _parts(schema[keyword], f"{place}/{keyword}", depth + 1)
    for keyword in ("anyOf", "prefixItems"):
        found = schema.get(keyword)
        for at, part in enumerate(found) if isinstance(found, list) else ():
            yield from _parts(part, f"{place}/{keyword}/{at}", depth + 1)


def _check_part(part: dict[str, Any], place: str, field: str) -> None:
    types = [part["type"]] if isinstance(part.get("type"), str) else part.get("type", [])
    known = isinstance(types, list) and all(isinstance(name, str) and name in _OF_TYPE for name in types)
    if not known or part.get("type") == []:
        raise _refused(field, f"has type {part['type']!r:.80} at {place:.200}", f"one of {', '.join(_OF_TYPE)}")
    whole = [name for name in _WHOLE if name in part]
    allowed = {"type", *(name for kind in types for name in _OF_TYPE[kind])}
    if whole:
        allowed = {whole[0]} | ({"type"} if whole[0] in ("enum", "const") else set())
    wrong = next((name for name in part if name not in allowed | _NOTES and not name.startswith("x-")), None)
    if wrong is not None:
        known = wrong in _WHOLE or any(wrong in names for names in _OF_TYPE.values()) or wrong == "type"
        must = f"alone beside {whole[0]!r}" if whole else "beside a type that it is of"
        raise _refused(
            field, f"has the keyword {wrong!r:.80} at {place:.200}", f"without, or {must}" if known else "without it"
        )
    _check_values(part, types, place, field)


def _check_values(part: dict[str, Any], types: list[str], place: str, field: str) -> None:
    """Raises RequestError for a keyword whose value would be read in another way than the schema's author's."""
    for keyword, kind in (("properties", dict), ("required", list), ("anyOf", list), ("enum", list), ("$ref", str)):
        if keyword in part and (not isinstance(part[keyword], kind) or (not part[keyword] and kind is not dict)):
            if keyword == "required" and part[keyword] == []:
                continue
            raise _refused(field, f"has {keyword} {part[keyword]!r:.80} at {place:.200}", f"a filled {kind.__name__}")
    named = list(part.get("properties", {}))
    absent = [name for name in part.get("required", ()) if name not in named]
    if absent:
        raise _refused(field, f"has required {absent[0]!r:.80} at {place:.200}", "names of properties alone")
    for keyword in _SIZES:  # of some of them -1 means no limit to xgrammar
        if keyword in part and (type(part[keyword]) is not int or part[keyword] < 0):
            raise _refused(field, f"has {keyword} {part[keyword]!r:.80} at {place:.200}", "a whole number from 0")
    trap = _trap(str(part.get("pattern", "")))
    if trap is not None:
        raise _refused(field, f"has pattern {part['pattern']!r:.80} at {place:.200}", f"without {trap!r:.20} there")
    if any(name in part for name in ("pattern", "format")) and any(name in part for name in ("minLength", "maxLength")):
        raise _refused(
            field, f"has the keyword 'minLength' or 'maxLength' at {place:.200}", "without beside such a text"
        )
    if "multipleOf" in part and (part["multipleOf"] not in range(1, 1025) or any(name in part for name in _RANGE)):
        raise _refused(
            field, f"has the keyword 'multipleOf' at {place:.200}", "at most 1024, without a range beside it"
        )
    if part.get("format", "email") not in _FORMATS:
        raise _refused(field, f"has format {part['format']!r:.80} at {place:.200}", f"one of {', '.join(_FORMATS)}")
    if not str(part.get("$ref", "#")).startswith("#"):
        raise _refused(field, f"has $ref {part['$ref']!r:.80} at {place:.200}", "a place within the schema")
    for value in (*part.get("enum", ()), *([part["const"]] if "const" in part else [])):
        found = _TYPE_OF.get(type(value), "number")
        if types and found not in types and not (found == "integer" and "number" in types):
            raise _refused(field, f"has the value {value!r:.80} of another type at {place:.200}", "of type")


def _regex(pattern: str, field: str) -> str:
    """A regular expression as xgrammar is to read it, to which `.` is a new line too. Raises RequestError."""
    trap = _trap(pattern, in_json=False)
    if trap is not None:
        raise _refused(f"{field}.regex", f"is {pattern!r:.80}", f"without {trap!r:.20} there")
    return "".join("[^\\n]" if word == "." else word for word in _words(pattern))


def _words(pattern: str) -> list[str]:
    return re.findall(r"\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{2}|\\.|\[(?:\\.|[^\]\\])*\]|\(\?:|\(\?|.", pattern, re.DOTALL)


def _trap(pattern: str, *, in_json: bool = True) -> str | None:
    """What of a regular expression xgrammar would read past, or otherwise than its author: assertions within, letters
    behind a backslash that mean nothing to it, classes that begin with their end. And what it would write into JSON as
    it is: quotes, backslashes and control characters outside of classes."""
    words = _words(pattern)
    depth = 0
    for at, word in enumerate(words):
        depth += (word in ("(", "(?:")) - (word == ")")
        code = int(word[2:], 16) if len(word) > 2 and word[:2] in ("\\u", "\\x") else ord(word[0])
        bare = word[0] != "\\" or len(word) > 2
        before, after = words[at - 1] if at else "|", words[at + 1] if at + 1 < len(words) else "|"
        if (
            (in_json and bare and (code < 32 or code in b'"\\'))
            or (word[0] == "\\" and (word[1] in "bBpPk123456789" or (in_json and word[1] in "\\cfnrtv0")))
            or (word[0] == "\\" and word[1].isalpha() and word[1] not in "dDwWsScfnrtvux")
            or word in ("(?", "[]", "[^]")
            or (word == "^" and (before != "|" or depth))
            or (word == "$" and (after != "|" or depth))
        ):
            return word
    return None


def _refused(field: str, found: str, must: str) -> RequestError:
    param = field.split(".")[0]
    return RequestError(
        f"{field} {found}, must be {must}. hint: see Structured output in deployments/README.md", param=param
    )
