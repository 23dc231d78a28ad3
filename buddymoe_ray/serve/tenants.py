"""Who uses the service, by API key: what each may do now, did so far, and is told of it.

Knows neither HTTP nor workers. Kept by the one ingress of a service, in memory: limits hold for the service as a whole,
and begin anew with it. A request's tokens are foreseen when it begins, as OpenAI does it, and settled at its end.
Neighbours: `keys` knows which keys are good, `http` asks, `policy.fair` shares a worker's steps among tenants.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace

from buddymoe_ray.policy.rates import TokenBucket
from buddymoe_ray.serve.keys import SINGLE, ApiKey, KeyLimits, KeyRing
from buddymoe_ray.serve.refusals import unavailable
from buddymoe_ray.serve.work import Refusal, Reply, Work

__all__ = ["RATE_HEADERS", "STOPPING", "Foreseen", "Tenant", "TenantCounters", "Tenants", "Visit"]

log = logging.getLogger(__name__)

STOPPING = "the service is stopping"
LAST_SECONDS, RETRY_SECONDS, POLL_SECONDS = 1.0, 2, 0.1
BYTES_PER_TOKEN = 4
"""Of a body, before its tokens are known."""
HEADERS = ("limit", "remaining", "reset")
RATES = {"requests": "requests_per_minute", "tokens": "tokens_per_minute"}
"""What is limited by the minute, and the limits' names."""
RATE_HEADERS = tuple(f"x-ratelimit-{name}-{kind}" for kind in RATES for name in HEADERS)


@dataclass(kw_only=True)
class TenantCounters:
    """What a key was used for since the ingress started."""

    requests: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Foreseen:
    """Tokens that a request may take, before those of its prompt are counted."""

    prompt: int
    output: int

    @classmethod
    def of(cls, work: Work, body: bytes, *, default_max_tokens: int) -> Foreseen:
        """Of a request by its body, and what it asks of a worker."""
        output = default_max_tokens if work.max_tokens is None else work.max_tokens
        return cls(prompt=len(body) // BYTES_PER_TOKEN, output=work.choices * output)

    @property
    def total(self) -> int:
        """Both."""
        return self.prompt + self.output


class Tenant:
    """Who brings one key; without a name nobody in particular, who has no limits."""

    def __init__(self, name: str, limits: KeyLimits, clock: Callable[[], float]) -> None:
        self.name, self.limits, self.counters = name, limits, TenantCounters()
        self._clock, self.running, self.over = clock, 0, False
        self._buckets = {kind: TokenBucket(most, now=clock()) for kind, most in _rates(limits).items()}

    def follow(self, limits: KeyLimits) -> None:
        """They are these from now on."""
        if limits != self.limits:
            self.limits, held, now = limits, self._buckets, self._clock()
            self._buckets = {}
            for kind, most in _rates(limits).items():
                self._buckets[kind] = held.get(kind) or TokenBucket(most, now=now)
                self._buckets[kind].resize(most, now)

    def own(self, work: Work) -> Work:
        """Work as this tenant's: it shares what was computed of a beginning with no other."""
        salt = f"{self.name}/{work.cache_salt}" if self.name else work.cache_salt
        return replace(work, tenant=self.name, cache_salt=salt, weight=self.limits.weight)

    def ask(self) -> Refusal | None:
        """A request comes; counts as one."""
        self.counters.requests += 1
        return self._take("requests", 1)

    def begin(self, tokens: Foreseen) -> Visit | Refusal:
        """It is understood, and will take about so many tokens; what is returned must be ended."""
        most = self.limits.concurrent_requests
        if most is not None and self.running >= most:
            return self._refuse("concurrent_requests", f"{self.running} of {most} run", 1.0)
        refusal = self._take("tokens", tokens.total)
        if refusal is not None:
            return refusal
        self.running += 1
        return Visit(self, tokens)

    async def turn(self, tokens: Foreseen, *, again: bool = False) -> Visit:
        """The same for what can wait, once there is room within the limits; half of them, and a place, are left to who
        waits for an answer. What comes `again` was counted as a request."""
        wanted = {"requests": 0 if again else 1, "tokens": tokens.total}
        while (seconds := self._wait(wanted)) > 0:
            await asyncio.sleep(min(seconds, LAST_SECONDS))
        for kind, bucket in self._buckets.items():
            bucket.take(wanted[kind], self._clock())
        self.counters.requests += wanted["requests"]
        self.running += 1
        return Visit(self, tokens)

    def headers(self) -> dict[str, str]:
        """OpenAI's `x-ratelimit-*` of what is limited by the minute."""
        told: dict[str, str] = {}
        for kind, bucket in self._buckets.items():
            level, full = bucket.level(self._clock()), bucket.wait(math.inf, self._clock())
            values = (f"{bucket.per_minute:g}", f"{max(0, math.floor(level))}", f"{full:.3f}s")
            told |= {f"x-ratelimit-{name}-{kind}": value for name, value in zip(HEADERS, values, strict=True)}
        return told

    def settle(self, visit: Visit) -> None:
        """It is over, and took what it took."""
        self.running -= 1
        self.counters.prompt_tokens += visit.prompt_tokens
        self.counters.generated_tokens += visit.generated_tokens
        used = visit.prompt_tokens + visit.generated_tokens
        if "tokens" in self._buckets:
            self._buckets["tokens"].take(used - visit.foreseen.total, self._clock())
        if self.name and used:
            counts = visit.prompt_tokens, visit.generated_tokens
            log.info("key %s: %d prompt and %d generated tokens", self.name, *counts)

    def _wait(self, wanted: Mapping[str, int]) -> float:
        """Seconds until so much may be taken by what can wait, as far as is known."""
        most = self.limits.concurrent_requests
        if most is not None and self.running >= max(1, most - 1):
            return POLL_SECONDS
        now, buckets = self._clock(), self._buckets.items()
        return max((bucket.wait(wanted[kind] + bucket.per_minute / 2, now) for kind, bucket in buckets), default=0.0)

    def _take(self, kind: str, amount: int) -> Refusal | None:
        bucket, now = self._buckets.get(kind), self._clock()
        if bucket is None:
            return None
        wait = bucket.wait(amount, now)
        if wait > 0:
            left = f"{max(0, math.floor(bucket.level(now)))} of {bucket.per_minute:g} are left, this takes {amount}"
            return self._refuse(RATES[kind], left, wait)
        bucket.take(amount, now)
        return None

    def _refuse(self, limit: str, reason: str, seconds: float) -> Refusal:
        self.counters.refused += 1
        log.info("key %s: refused, %s: %s", self.name, limit, reason)
        seconds = math.ceil(seconds)
        return Refusal(
            status=429,
            kind="rate_limit_error",
            code="rate_limit_exceeded",
            message=f"{limit} of this key: {reason}. hint: retry after {seconds} s",
            retry_after_seconds=seconds,
        )


class Visit:
    """One request of a tenant while it is answered."""

    def __init__(self, tenant: Tenant, foreseen: Foreseen) -> None:
        self._tenant, self.foreseen = tenant, foreseen
        self.prompt_tokens = self.generated_tokens = 0
        self._known = self._ended = False

    async def metered(self, replies: AsyncGenerator[Reply, None], work: Work) -> AsyncGenerator[Reply, None]:
        """The replies, counted; the visit ends with the last choice. A prompt counts once for its answers."""
        open_choices = work.choices
        try:
            async with aclosing(replies):
                async for reply in replies:
                    if self._tenant.over:
                        yield unavailable(STOPPING, retry_after_seconds=RETRY_SECONDS)
                        return
                    open_choices -= self._note(reply, work.n)
                    if not open_choices:
                        self.end()
                    yield reply
        finally:
            self.end()

    def end(self) -> None:
        """Nothing more comes. Who leaves before the prompt's tokens are told pays what was foreseen of it."""
        if not self._ended:
            self._ended = True
            self.prompt_tokens = self.prompt_tokens if self._known else self.foreseen.prompt
            self._tenant.settle(self)

    def _note(self, reply: Reply, n: int) -> int:
        """Count a reply; how many choices ended with it."""
        if isinstance(reply, Refusal):
            self._known = reply.status != 504 and not self.generated_tokens  # else the prompt was worked on
            return 0
        for delta in reply.deltas:
            self.generated_tokens += len(delta.token_ids)
            if delta.usage is not None:
                self._known = True
                self.prompt_tokens += 0 if delta.choice % n else delta.usage.prompt_tokens
        return sum(delta.finish_reason is not None for delta in reply.deltas)


class Tenants:
    """All of a service, as `ring` knows them."""

    def __init__(self, ring: KeyRing, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._ring, self._clock = ring, clock
        self._nobody = Tenant("", KeyLimits(), clock)
        self._known: dict[str, Tenant] = {}
        self.closed = False

    async def close(self, seconds: float) -> int:
        """Nobody may begin any more. Returns when all requests have ended, or so many seconds are over: how many had no
        time to end. Those are told so with their next tokens."""
        self.closed, until = True, self._clock() + seconds
        while self.running and self._clock() < until:
            await asyncio.sleep(POLL_SECONDS)
        left = self.running
        if left:
            for tenant in (self._nobody, *self._known.values()):
                tenant.over = True
            await asyncio.sleep(LAST_SECONDS)
        return left

    @property
    def running(self) -> int:
        """Requests that have begun and not ended."""
        return sum(tenant.running for tenant in (self._nobody, *self._known.values()))

    def find(self, given: Iterable[bytes]) -> Tenant | None:
        """Who brings one of these keys; None when a key is needed and none is good."""
        key = self._ring.find(given)
        if key is None:
            return self._nobody if self._ring.open else None
        return self._of(key) if self._ring.has_names else self._nobody

    def named(self, name: str) -> Tenant:
        """Who has, or had, a key of that name; nobody in particular without one."""
        key = next((key for key in self._ring.keys if key.name == name), None) if name else None
        if key is not None:
            return self._of(key)
        return self._known.setdefault(name, Tenant(name, KeyLimits(), self._clock)) if name else self._nobody

    def revoked(self, name: str) -> bool:
        """Whether keys have names and none has that one any more."""
        self._ring.refresh()
        return bool(name) and self._ring.has_names and all(key.name != name for key in self._ring.keys)

    def counters(self, reader: Tenant) -> Mapping[str, TenantCounters]:
        """By name, of the keys that are good now, where they have names: of all for the environment's, else its own."""
        keys = self._ring.keys if self._ring.has_names else ()
        return {key.name: self._of(key).counters for key in keys if reader.name in (SINGLE, key.name)}

    def _of(self, key: ApiKey) -> Tenant:
        if key.name not in self._known:
            self._known[key.name] = Tenant(key.name, key.limits, self._clock)
        self._known[key.name].follow(key.limits)
        return self._known[key.name]


def _rates(limits: KeyLimits) -> dict[str, int]:
    """What is limited by the minute, and to what."""
    return {kind: most for kind, name in RATES.items() if (most := getattr(limits, name)) is not None}
