"""Who is next when several tenants wait, and how much of a queue one of them may fill.

Virtual token counters: a tenant's counter grows with what is computed for it, divided by its weight, and of those who
wait the one with the least is next (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, algorithm 2).
No capacity is kept for anybody: who is alone has all of it. Pure: knows neither sequences nor a clock, nor how a tenant
is known.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["GENERATED_WEIGHT", "FairShare", "may_queue"]

GENERATED_WEIGHT = 2
"""What a generated token counts, of a prompt 1 (the paper's weights): a decode step reads experts for few rows."""
QUEUE_SHARE = 4


class FairShare:
    """Counters of tenants, by name."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = {}

    def join(self, tenant: str, present: Iterable[str]) -> None:
        """A request of `tenant` comes while those `present` wait or run. Who was away has no credit for it: it begins
        where the least of them stands."""
        if self.alone and tenant in self._spent:  # 128 that begin together need not look at each other
            return
        there = set(present)
        if not there:
            self._spent = {tenant: 0.0}
        elif tenant not in there:
            self._spent[tenant] = max(self.spent(tenant), min(map(self.spent, there)))

    @property
    def alone(self) -> bool:
        """Whether there was one tenant only since nobody was there."""
        return len(self._spent) < 2

    def charge(self, tenant: str, tokens: int, weight: float = 1.0) -> None:
        """So much was, or is going to be, computed for it; one of weight 2 has twice as much of what others have."""
        self._spent[tenant] = self.spent(tenant) + tokens / weight

    def spent(self, tenant: str) -> float:
        """The counter."""
        return self._spent.get(tenant, 0)

    def next(self, waiting: Iterable[str]) -> str:
        """Whose turn it is; of equals the first."""
        return next(iter(waiting)) if self.alone else min(waiting, key=self.spent)


def may_queue(wanted: int, *, own: int, total: int, most: int) -> bool:
    """Whether a tenant that has `own` answers in a queue of `total` may add `wanted`.

    A dynamic threshold (Choudhury and Hahne, 1998): it has at most four times what is then free, so one takes up to
    four fifths of the queue, two take four ninths each, and whoever comes next finds room.
    """
    return own + wanted <= QUEUE_SHARE * (most - total - wanted)
