"""Requests as callers write them, checked and in plain Python: the one place that tells types and ranges.

Every way in (LLM, Client, HTTP, what a worker is sent) comes through here. What numpy or torch hold counts as what
`tolist` gives; a list and a tuple are the same, a string is one stop string. Nothing else is converted: no float is an
integer (2.0 neither), no bool a number, no bytes a text. Knows neither engines nor HTTP nor torch.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

from buddymoe_ray.engine.json_schema import checked_output
from buddymoe_ray.errors import RequestError
from buddymoe_ray.types import GenerationRequest, Mode, SamplingParams

__all__ = ["checked_sampling", "checked_terms", "plain_text", "plain_tokens", "validate", "whole"]

MAX_LOGPROBS = 20
MAX_STOPS, MAX_STOP_CHARACTERS, MAX_STOP_IDS = 64, 1024, 4096
_LARGEST, _MOST_IDS = 2**63, 2**32  # no tokenizer reads a larger id

# least and largest value; those of the integers that may be None are last
_INTEGERS = {"top_k": (-1, _LARGEST), "max_tokens": (1, _LARGEST)}
_OPTIONAL_INTEGERS = {
    "seed": (-_LARGEST, 2 * _LARGEST - 1),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
}
_NUMBERS = {
    "temperature": (0.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.01, 100.0),
    "top_p": (5e-324, 1.0),  # more than 0
    "min_p": (0.0, 1.0),
}


def validate(request: GenerationRequest, *, vocab_size: int) -> GenerationRequest:
    """The same request in plain types. Raises RequestError naming the field that has no meaning."""
    prompt = plain_tokens("prompt", request.prompt_token_ids, vocab_size)
    resumed = plain_tokens("resumed_token_ids", request.resumed_token_ids, vocab_size, least=0)
    mode, budget, record, replay = checked_terms(request.mode, request.budget, request.record, request.replay)
    if resumed and (record or replay is not None):
        raise RequestError(
            "resumed_token_ids are given with record or replay, must be alone: the record of those tokens is lost. "
            "hint: ask again from the start",
            param="resumed_token_ids",
        )
    return replace(
        request,
        request_id=plain_text("request_id", request.request_id),
        prompt_token_ids=prompt,
        sampling=checked_sampling(request.sampling, vocab_size=vocab_size),
        mode=mode,
        budget=budget,
        record=record,
        replay=replay,
        resumed_token_ids=resumed,
        cache_salt=plain_text("cache_salt", request.cache_salt),
        tenant=plain_text("tenant", request.tenant),
    )


def checked_sampling(sampling: object, *, vocab_size: int = _MOST_IDS) -> SamplingParams:
    """Sampling parameters in plain types. Raises RequestError naming the parameter."""
    if not isinstance(sampling, SamplingParams):
        raise _refused("sampling", sampling, "SamplingParams", "give keywords such as max_tokens=64")
    given: dict[str, Any] = {name: _plain(value) for name, value in vars(sampling).items()}
    for name, (low, high) in _NUMBERS.items():
        given[name] = _number(name, given[name], low, high)
    for name, (least, most) in _INTEGERS.items():
        given[name] = whole(name, given[name], least * (name != "max_tokens" or given["prompt_logprobs"] is None), most)
    given["top_k"] = max(0, given["top_k"])  # vLLM and some checkpoints write -1 for all
    for name, (least, most) in _OPTIONAL_INTEGERS.items():
        given[name] = None if given[name] is None else whole(name, given[name], least, most)
    for name in ("ignore_eos", "skip_special_tokens"):
        given[name] = _flag(name, given[name])
    if given["structured_outputs"] is not None:
        given["structured_outputs"] = checked_output(given["structured_outputs"])
    given["stop"] = _stops(given["stop"])
    given["logit_bias"] = _biases(given["logit_bias"], vocab_size)
    ids = given["stop_token_ids"]
    given["stop_token_ids"] = plain_tokens("stop_token_ids", ids, vocab_size, least=0)
    if len(given["stop_token_ids"]) > MAX_STOP_IDS:
        raise _refused("stop_token_ids", ids, f"at most {MAX_STOP_IDS} ids", "name fewer")
    return SamplingParams(**given)


def checked_terms(
    mode: object, budget: object, record: object, replay: object
) -> tuple[Mode | None, float | None, bool, str | None]:
    """How missing experts are answered, in plain types. Raises RequestError naming the parameter."""
    if mode is not None and (not isinstance(mode, str) or mode not in get_args(Mode)):
        raise _refused("mode", mode, " or ".join(get_args(Mode)), "leave it out for the service's own", "buddymoe.mode")
    return (
        mode,  # type: ignore[return-value]
        None if budget is None else _number("budget", _plain(budget), 0.0, 1.0, "buddymoe.budget"),
        _flag("record", _plain(record), "buddymoe.record"),
        None if replay is None else plain_text("replay", replay, "buddymoe.replay"),
    )


def plain_tokens(name: str, ids: object, vocab_size: int = _MOST_IDS, *, least: int = 1) -> tuple[int, ...]:
    """Token ids below `vocab_size`, at least so many. Raises RequestError."""
    listed = _plain(ids)
    if not isinstance(listed, list | tuple):
        raise _refused(name, ids, "a list of token ids", "give integers")
    if len(listed) < least:
        raise RequestError(f"{name} is empty, must have at least one token. hint: send some text", param=name)
    plain = tuple(_plain(item) for item in listed)
    bad = next((item for item in plain if not _is_whole(item) or not 0 <= item < vocab_size), None)
    if bad is not None:
        raise RequestError(
            f"{name} holds {'token id ' * (name == 'prompt')}{_shown(bad)}, must be in [0, {vocab_size}). "
            "hint: give integers",
            param=name,
        )
    return tuple(map(int, plain))


def plain_text(name: str, value: object, param: str | None = None) -> str:
    """Text that can be encoded. Raises RequestError for other types and for half characters (lone surrogates)."""
    if not isinstance(value, str):
        raise _refused(name, value, "text", "decode bytes first", param)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _refused(name, value[error.start], "whole characters", "drop lone surrogates", param) from None
    return str(value)


def whole(name: str, value: object, least: int, most: int = _LARGEST) -> int:
    """An integer in a range. Raises RequestError."""
    value = _plain(value)
    if not _is_whole(value):
        raise _refused(name, value, "an integer", "write 2, not 2.0 or true")
    if not least <= value <= most:  # type: ignore[operator]
        below = value < least  # type: ignore[operator]
        must = f"at least {least}" if most == _LARGEST and below else f"in [{least}, {most}]"
        raise _refused(name, value, must, "see the API's range")
    return int(value)  # type: ignore[call-overload, no-any-return]


def _stops(given: object) -> tuple[str, ...]:
    stops = (given,) if isinstance(given, str) else given
    if not isinstance(stops, list | tuple):
        raise _refused("stop", given, "a string or a list of strings", "call tuple() on it")
    if len(stops) > MAX_STOPS:
        raise RequestError(
            f"stop holds {len(stops)} strings, must hold at most {MAX_STOPS}. hint: send fewer", param="stop"
        )
    if "" in stops:
        raise RequestError("stop holds an empty string, must be text. hint: drop it", param="stop")
    longest = max((len(plain_text("stop", stop)) for stop in stops), default=0)
    if longest > MAX_STOP_CHARACTERS:
        raise RequestError(
            f"stop holds a string of {longest} characters, must be at most {MAX_STOP_CHARACTERS}. hint: shorten it",
            param="stop",
        )
    return tuple(stops)


def _biases(given: object, vocab_size: int) -> dict[int, float]:
    if not isinstance(given, Mapping):
        raise _refused("logit_bias", given, "a mapping of token ids to numbers", "write {42: -100}")
    ids = plain_tokens("logit_bias", list(given), vocab_size, least=0)
    biases = [_number("logit_bias", _plain(bias), -100.0, 100.0) for bias in given.values()]
    return dict(zip(ids, biases, strict=True))


def _number(name: str, value: object, low: float, high: float, param: str | None = None) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        must = f"a number in (0, {high:g}]" if 0 < low < 1e-300 else f"a number from {low:g} to {high:g}"
        raise _refused(name, value, must, "see the API's range", param)
    return float(value)


def _flag(name: str, value: object, param: str | None = None) -> bool:
    if not isinstance(value, bool):
        raise _refused(name, value, "true or false", "leave it out for false", param)
    return value


def _plain(value: object) -> Any:
    """What numpy and torch hold, as Python's own."""
    tolist = getattr(value, "tolist", None)
    return tolist() if callable(tolist) else value


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refused(name: str, value: object, must: str, hint: str, param: str | None = None) -> RequestError:
    return RequestError(f"{name} is {_shown(value)}, must be {must}. hint: {hint}", param=param or name)


def _shown(value: object) -> str:
    try:
        return reprlib.repr(value)
    except Exception:  # an integer of 5000 digits, say
        return f"a {type(value).__name__}"
