"""When work that comes now would begin, by what the work before it freed lately.

Two things are waited for: a place among the sequences that run, and room in the KV cache. Each is freed at a rate that
is measured while somebody waits for it, so it holds what the machine, the model and missing experts make of it now:
where nothing may stand in for an expert, reading it is in the rate. A tenant waits for its share of that rate, whatever
others have in the queue (`policy.fair`). What was never measured is not foretold: nobody is refused on a guess. Pure;
`now` is a clock that never goes back (seconds).
"""

from __future__ import annotations

import math
from collections import Counter

__all__ = ["Forecast"]

MEMORY_SECONDS = 60.0
"""Of a rate, all but 1/e is of so many of the latest seconds with a queue."""


class Forecast:
    """Of one worker, which runs at most `places` sequences at once and has KV room for `tokens` in all."""

    def __init__(self, *, places: int, tokens: int) -> None:
        self._places, self._tokens = places, tokens
        self._running, self._most = Counter[str](), Counter[str]()  # by tenant: sequences, and what they may come to
        self._weights: dict[str, float] = {}
        self._ends = self._ended = self._used = 0.0  # sequences, what they might have come to, what they came to
        self._freed = self._freed_tokens = self._seconds = 0.0  # in so many seconds with a queue
        self._since: float | None = None

    def arrive(self, tenant: str, tokens: int, now: float, *, weight: float = 1.0) -> None:
        """A sequence that may come to so many tokens waits or runs."""
        self._look(now)
        self._weights[tenant] = weight
        self._running[tenant] += 1
        self._most[tenant] += tokens
        self._watch(now)

    def end(self, tenant: str, tokens: int, used: int, now: float) -> None:
        """It is gone, and came to `used`."""
        self._look(now)
        if self._since is not None:
            self._freed, self._freed_tokens = self._freed + 1, self._freed_tokens + used
        self._ends, self._ended, self._used = self._ends + 1, self._ended + tokens, self._used + used
        self._running -= Counter({tenant: 1})
        self._most -= Counter({tenant: tokens})
        self._weights = {name: weight for name, weight in self._weights.items() if name in self._running}
        self._watch(now)

    def seconds(self, tenant: str, sequences: int, tokens: int, now: float, *, weight: float = 1.0) -> float:
        """Until that many more, of at most so many tokens in all, have all begun; 0 where nothing is known."""
        self._look(now)
        if self._ends < self._places:  # their ends may come in one heap
            return 0.0
        shares = sum((self._weights | {tenant: weight}).values()) / weight
        own = self._wait(self._running[tenant] + sequences, self._most[tenant] + tokens, shares)
        return min(own, self._wait(self._running.total() + sequences, self._most.total() + tokens, 1))

    def _wait(self, sequences: int, tokens: int, shares: float) -> float:
        """Until all of these have a place and room, with one of so many shares."""
        places, room = self._excess(sequences, tokens, shares)
        waits = [0.0]
        if places > 0 and self._freed:
            waits.append(places * shares * self._seconds / self._freed)
        if room > 0 and self._freed_tokens:
            waits.append(room * shares * self._seconds / self._freed_tokens)
        return max(waits)

    def _excess(self, sequences: int, tokens: int, shares: float) -> tuple[float, float]:
        """Places and tokens that are wanted and not there."""
        used = self._used / self._ended if self._ended else 1.0  # few come to what they may
        return sequences - self._places / shares, used * tokens - self._tokens / shares

    def _look(self, now: float) -> None:
        """Time since the last look counts where there was a queue."""
        if self._since is not None and now > self._since:
            kept = math.exp((self._since - now) / MEMORY_SECONDS)
            self._freed, self._freed_tokens = self._freed * kept, self._freed_tokens * kept
            self._seconds = self._seconds * kept + now - self._since
            self._since = now

    def _watch(self, now: float) -> None:
        queue = max(self._excess(self._running.total(), self._most.total(), 1)) > 0
        self._since = (now if self._since is None else self._since) if queue else None
