"""JSON bodies to typed requests: fields that ask for nothing are left out, and the first thing that is wrong is named
by its path in the caller's own body.

Knows no endpoint. On the token path: body → `parse_body` → a request of `wire` or another API's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from buddymoe_ray.engine.validate import plain_text
from buddymoe_ray.errors import RequestError
from buddymoe_ray.serve.wire_parts import WireBody

__all__ = ["NEUTRAL", "NOTES", "checked", "parse_body"]

Model = TypeVar("Model", bound=WireBody)

# Standard fields that are not built, with the values that ask for nothing. Any other value is refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "echo": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "prompt_cache_options": (None, {}, {"mode": "implicit"}),
    "reasoning_effort": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None,),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}
# Standard fields that label a request, or say how long a cache may keep it at most; they change nothing in its answer.
NOTES = frozenset({"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "user"})


def parse_body(body: bytes, model: type[Model]) -> Model:
    """A request of that model, or RequestError naming the field."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"the body is not JSON ({error}). hint: send an object with Content-Type application/json"
        ) from None
    if not isinstance(fields, dict):
        raise RequestError(
            f"the body is a JSON {type(fields).__name__}, must be an object. hint: see the API's reference"
        )
    notes = (NOTES | NEUTRAL.keys()) - model.model_fields.keys() if model.takes_notes else ()
    for name in [name for name in fields if name in notes]:
        value = fields.pop(name)
        if name in NEUTRAL and not any(value == neutral and type(value) is type(neutral) for neutral in NEUTRAL[name]):
            raise _not_supported(name)
    text = json.dumps(fields)
    for name, value in fields.items() if "\\ud" in text else ():  # half characters may be among those
        plain_text(plain_text("the body", name), json.dumps(value, ensure_ascii=False))
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise _request_error(error) from None


def checked(fields: Mapping[str, Any], model: type[Model]) -> Model:
    """A request of fields that were read from another API's body, of which only those that may disagree can be wrong:
    RequestError."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _request_error(error) from None


def _request_error(error: ValidationError) -> RequestError:
    """The first thing wrong, named by its path in the body."""
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":  # to one reader, which goes less deep
        return RequestError(f"the body cannot be read ({first['msg']}). hint: nest it less")
    path = ""
    own = len(first["loc"]) - (first["type"] == "extra_forbidden")  # else the last is the caller's word
    for at, part in enumerate(first["loc"]):
        if at < own and str(part).startswith("#"):  # of `by_type`
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return RequestError(
            f"{path} is not a field of this service, must be left out. hint: check its spelling", param=path
        )
    if first["type"] == "union_tag_invalid":  # see `by_type`
        kind, known = first["ctx"]["tag"].removeprefix("#"), first["ctx"]["expected_tags"].replace("#", "")
        return RequestError(
            f"{path}.type is {kind!r:.80}, which is not supported, must be one of {known}. hint: see the API's "
            "reference",
            param=f"{path}.type",
        )
    if first["type"] == "unsupported":
        return _not_supported(path)
    if first["type"] == "missing":
        return RequestError(f"{path} is missing, must be given. hint: add it", param=path)
    if not path:  # two fields that disagree: the message begins with the first one's name
        return RequestError(f"{message}. hint: see deployments/README.md", param=message.split(" ", 1)[0])
    return RequestError(f"{path} is not usable: {message}. hint: see the API's reference", param=path)


def _not_supported(path: str) -> RequestError:
    return RequestError(f"{path} is not supported by this service, must be left out. hint: remove it", param=path)
