"""Rate limits: a bucket that fills at so much a minute and holds a minute's worth.

Pure: `now` is any clock that never goes back (seconds); a `now` before the last one counts as that. Neighbours:
`serve.tenants` has one for requests and one for tokens of each API key.
"""

from __future__ import annotations

__all__ = ["TokenBucket"]


class TokenBucket:
    """Full at first. It may be overdrawn by who takes more than was foreseen, and is then waited for longer."""

    def __init__(self, per_minute: float, *, now: float) -> None:
        assert per_minute > 0, f"per_minute is {per_minute}, must be positive"
        self.per_minute, self._level, self._at = per_minute, per_minute, now

    def level(self, now: float) -> float:
        """What is there."""
        grown = max(0.0, now - self._at) * self.per_minute / 60
        self._level, self._at = min(self.per_minute, self._level + grown), max(self._at, now)
        return self._level

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` may be taken; more than the bucket ever holds may be when it is full."""
        return max(0.0, min(amount, self.per_minute) - self.level(now)) * 60 / self.per_minute

    def take(self, amount: float, now: float) -> None:
        """Less than 0 gives back."""
        self._level = min(self.per_minute, self.level(now) - amount)

    def resize(self, per_minute: float, now: float) -> None:
        """Another rate from now on; what was used stays used."""
        used = self.per_minute - self.level(now)
        self.per_minute, self._level = per_minute, per_minute - used
