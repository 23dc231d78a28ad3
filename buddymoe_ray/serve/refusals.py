"""Refusals: built from errors, written as OpenAI's envelope or Anthropic's, turned back into errors for Python clients.

Knows neither HTTP frameworks nor ray.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from buddymoe_ray.errors import BuddyMoEError, CapacityError, ModelNotFound, RequestError
from buddymoe_ray.serve.replies import ErrorBody, ErrorEnvelope
from buddymoe_ray.serve.work import Delta, Refusal, Work

__all__ = [
    "STOPPED",
    "WORKER_LOST",
    "Refused",
    "absent",
    "coded",
    "envelope",
    "error_of",
    "failure",
    "in_terms_of",
    "in_words",
    "in_words_of",
    "message_error",
    "over_long",
    "overloaded",
    "refusal_of",
    "timed_out",
    "too_late",
    "too_slow",
    "unavailable",
    "worker_lost",
]

WORKER_LOST = "worker_lost"
"""`code` of a worker that cannot answer any more; its callers move on."""
STOPPED = "stopped"
"""`code` where no worker will come any more."""


def refusal_of(error: RequestError) -> Refusal:
    """A request that is not usable (400), or that names an unknown model (404)."""
    if isinstance(error, ModelNotFound):
        return Refusal(status=404, message=str(error), param=error.param, code="model_not_found")
    return Refusal(status=400, message=str(error), param=error.param)


def absent(what: str, name: str) -> Refusal:
    """There is nothing of that name, or it is somebody else's."""
    return Refusal(status=404, message=f"there is no {what} {name!r:.80}. hint: list them", code="not_found")


def in_terms_of(refusal: Refusal, work: Work) -> Refusal:
    """An engine's refusal as the caller knows the field: engines know prompts, not messages."""
    if refusal.param != "prompt":
        return refusal
    return replace(refusal, param=work.prompt_field, message=refusal.message.replace("prompt", work.prompt_field, 1))


def in_words_of(refusal: Refusal, words: Mapping[str, str]) -> Refusal:
    """A refusal of chat completions in another API's words, by those of chat."""
    if not words:
        return refusal
    known = re.compile(r"(?<![\w'\"])(?:" + "|".join(map(re.escape, words)) + r")(?![\w'\"])")  # quoted is the caller's

    def told(text: str) -> str:
        return known.sub(lambda found: words[found[0]], text)

    return replace(refusal, message=told(refusal.message), param=refusal.param and told(refusal.param))


class Refused(Exception):
    """A call that ends with `refusal`."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


@contextmanager
def in_words(words: Mapping[str, str]) -> Iterator[None]:
    """RequestErrors of chat completions leave it in another API's words."""
    try:
        yield
    except RequestError as error:
        told = in_words_of(refusal_of(error), words)
        raise RequestError(told.message, param=told.param) from None


def over_long(message: str, *, param: str) -> Refusal:
    """Prompt and output together do not fit; `message` names the limit."""
    return Refusal(status=400, message=message, param=param, code="context_length_exceeded")


def overloaded(*, calls: int, retry_after_seconds: int) -> Refusal:
    """As many answers are computed and wait as may."""
    return Refusal(
        status=503,
        kind="overloaded_error",
        code="overloaded",
        message=f"the service is full ({calls} requests run or wait). hint: retry after {retry_after_seconds} s",
        retry_after_seconds=retry_after_seconds,
    )


def too_late(seconds: float, *, within: float, retry_after_seconds: int) -> Refusal:
    """By what is measured it could not begin in time."""
    after = max(retry_after_seconds, math.ceil(seconds - within))
    return Refusal(
        status=429,
        kind="overloaded_error",
        code="overloaded",
        message=f"the request would wait about {seconds:.0f} s to begin, must begin within {within:g} s. "
        f"hint: retry after {after} s",
        retry_after_seconds=after,
    )


def unavailable(reason: str, *, retry_after_seconds: int) -> Refusal:
    """No worker can answer now."""
    return Refusal(
        status=503,
        kind="server_error",
        code="unavailable",
        message=f"{reason}. hint: retry after {retry_after_seconds} s, or see /health",
        retry_after_seconds=retry_after_seconds,
    )


def worker_lost(reason: str, *, retry_after_seconds: int) -> Refusal:
    """This worker's engine is dead or closed: another one may answer."""
    return replace(unavailable(reason, retry_after_seconds=retry_after_seconds), code=WORKER_LOST)


def timed_out(seconds: float) -> Refusal:
    """The request took longer than the service allows."""
    hint = "ask for fewer tokens, or raise buddymoe.timeout or the service's request_timeout_seconds"
    message = f"the request took more than {seconds:g} s. hint: {hint}"
    return Refusal(status=504, kind="server_error", code="timeout", message=message)


def coded(coding: str) -> Refusal:
    """A body that is compressed."""
    message = f"Content-Encoding is {coding!r:.80}, must be left out. hint: send the body as it is"
    return Refusal(status=415, message=message)


def too_slow(seconds: float) -> Refusal:
    """A body that is not whole in time."""
    return Refusal(status=408, message=f"the body took more than {seconds:g} s to come. hint: send it again")


def failure(delta: Delta | None = None) -> Refusal:
    """A choice that ended with an error or was cancelled by the service, or (None) an error nobody foresaw."""
    if delta is None:
        message = "internal error. hint: see the service's log"
    else:
        message = delta.error or f"the request ended as {delta.finish_reason}"
    return Refusal(status=500, kind="server_error", code="internal_error", message=message)


def envelope(refusal: Refusal) -> bytes:
    """OpenAI's error body."""
    body = ErrorBody(message=refusal.message, type=refusal.kind, param=refusal.param, code=refusal.code)
    return ErrorEnvelope(error=body).to_json()


def message_error(refusal: Refusal) -> bytes:
    """Anthropic's error body."""
    kinds = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error"}
    kinds |= {408: "timeout_error", 500: "api_error", 503: "overloaded_error", 504: "timeout_error"}
    error = {"type": kinds.get(refusal.status, "invalid_request_error"), "message": refusal.message}
    return json.dumps({"type": "error", "error": error}).encode()


def error_of(refusal: Refusal) -> BuddyMoEError:
    """The exception a Python client raises for a refusal."""
    if refusal.status == 404:
        return ModelNotFound(refusal.message, param=refusal.param)
    if refusal.status < 500 and refusal.status != 429:
        return RequestError(refusal.message, param=refusal.param)
    if refusal.status in (429, 503):
        return CapacityError(refusal.message)
    return BuddyMoEError(refusal.message)
