"""Exchanges between two pools, for what no pool can do alone: trade experts, or hand one on and take another in.

Exact in its values (the two rows are taken out before they are priced), greedy in its order; P^2 N work a round, so the
solver uses it on small problems. Invariant: the objective falls with every exchange; coverage, slots and replicas hold.

Legend: P pools (a, b the two), N experts of all MoE layers end to end.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np

from buddymoe_ray.policy.placement.problem import Bools
from buddymoe_ray.policy.placement.search import Search

__all__ = ["exchange"]

_NEVER = -1e300
"""Stands for -inf in differences."""


def exchange(search: Search) -> bool:
    """Try all ordered pairs of pools once; whether anything changed."""
    changed = False
    values = search.values
    for a, b in permutations(range(len(search.problem.pools)), 2):
        cost = search.cost() if search.affine else 0.0
        while True:
            row_a, row_b = values.held_PN[a].copy(), values.held_PN[b].copy()
            if not _best_exchange(search, a, b):
                break
            if search.affine:  # its bonuses are hints that do not add up: ask the objective
                now = search.cost()
                if cost - now <= 1e-9 * abs(cost):
                    values.put(a, row_a)
                    values.put(b, row_b)
                    break
                cost = now
            changed = True
    return changed


def _best_exchange(search: Search, a: int, b: int) -> bool:
    """Hand one expert of a on to b: b gives another in return, or drops one (or has room) and a takes a new one in.

    Whether an exchange gained and was made.
    """
    values = search.values
    row_a, row_b = values.held_PN[a].copy(), values.held_PN[b].copy()
    leave_b_N = search.score_N(b)  # what b loses by dropping its own; inf for a last copy that must stay
    enter_a_N = search.score_N(a)
    only_a, only_b = row_a & ~row_b, row_b & ~row_a
    nothing = np.zeros_like(row_a)
    values.put(a, row_a & ~only_a)
    values.put(b, row_b & ~only_b)
    alone_a_N, alone_b_N = search.score_N(a), search.score_N(b)
    alone_a_N, alone_b_N = np.maximum(alone_a_N, _NEVER), np.maximum(alone_b_N, _NEVER)
    values.put(a, row_a)
    values.put(b, row_b)
    move_N, back_N = np.full(len(row_a), -np.inf), np.full(len(row_a), -np.inf)
    move_N[only_a] = (alone_b_N - alone_a_N)[only_a]  # from a to b
    back_N[only_b] = (alone_a_N - alone_b_N)[only_b]
    drop_N = np.where(row_b, -leave_b_N, -np.inf)
    take_N = np.where(~row_a, enter_a_N, -np.inf)
    n = int(move_N.argmax())
    if not np.isfinite(move_N[n]):
        return False
    least = 1e-9 * float(alone_a_N.max(initial=0.0))
    m = int(back_N.argmax())
    swap = float(move_N[n] + back_N[m])
    room = search.problem.slots_P[b] > row_b.sum()
    d = int(drop_N.argmax())
    if not room:
        take_N[d] = -np.inf  # what b drops and a takes is the swap
    c = int(take_N.argmax())
    lost, taken = (0.0 if room else float(drop_N[d])), max(0.0, float(take_N[c]))
    chain = float(move_N[n]) + lost + taken
    if max(swap, chain) <= least:
        return False
    new_a, new_b = row_a & ~_one(nothing, n), row_b | _one(nothing, n)
    if swap >= chain:
        new_a, new_b = new_a | _one(nothing, m), new_b & ~_one(nothing, m)
    else:
        new_b = new_b if room else new_b & ~_one(nothing, d)
        new_a = new_a | _one(nothing, c) if taken > 0 else new_a
    values.put(a, new_a)
    values.put(b, new_b)
    return True


def _one(nothing: Bools, at: int) -> Bools:
    row_N = nothing.copy()
    row_N[at] = True
    return row_N
