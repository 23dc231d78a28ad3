"""Picks a resident expert for each miss: no token gets one expert twice, earlier slots choose first.

Knows scores, not where they come from, nor budgets. Neighbours: `standins` and `buddymoe` rank the candidates.

Legend: T rows, K slots, E experts, H candidates.
"""

from __future__ import annotations

import numpy as np

from buddymoe_ray.policy.misses import Bools, Floats, Ints, Misses

__all__ = ["free_residents", "pick_unique"]


def pick_unique(misses: Misses, candidates_TKH: Ints, score_TKH: Floats) -> tuple[Ints, Bools]:
    """For each missing use the resident candidate of highest score that its token does not use yet, slot by slot.

    Returns `(expert_TK, found_TK)`; where nothing is found the expert is the router's own. Candidates below 0 are none.
    Ties go to the earlier candidate.
    """
    ids_TK, resident_E = misses.ids_TK, misses.resident_E
    T, K = ids_TK.shape
    row_T1, slot_K = np.arange(T)[:, None], np.arange(K)
    free_TKH = free_residents(misses)[row_T1[:, :, None], candidates_TKH] & (candidates_TKH >= 0)
    offered_TKH = np.where(free_TKH, score_TKH, -np.inf)
    best_TK = offered_TKH.argmax(axis=2)
    found_TK = free_TKH[row_T1, slot_K, best_TK] & ~resident_E[ids_TK]
    expert_TK = np.where(found_TK, candidates_TKH[row_T1, slot_K, best_TK], ids_TK)
    ordered_TK = np.sort(expert_TK, axis=1)
    clash_T = (ordered_TK[:, 1:] == ordered_TK[:, :-1]).any(axis=1)
    for t in np.flatnonzero(clash_T).tolist():  # two slots of a token chose one expert: they choose in turn
        _in_turn(candidates_TKH[t], offered_TKH[t], ids_TK[t], found_TK[t], expert_TK[t])
    return expert_TK, found_TK


def free_residents(misses: Misses) -> Bools:
    """Residents `[T, E]` that a token does not use itself; its missing experts cannot answer anyway."""
    T, E = len(misses.ids_TK), len(misses.resident_E)
    free_TE = np.broadcast_to(misses.resident_E, (T, E)).copy()
    free_TE[np.arange(T)[:, None], misses.ids_TK] = False
    return free_TE


def _in_turn(candidates_KH: Ints, offered_KH: Floats, ids_K: Ints, found_K: Bools, expert_K: Ints) -> None:
    """Choose again, slot by slot, into `found_K` and `expert_K`; `offered_KH` is -inf for who cannot answer."""
    taken: list[int] = []
    for k in np.flatnonzero(found_K).tolist():
        left_H = offered_KH[k].copy()
        for expert in taken:
            left_H[candidates_KH[k] == expert] = -np.inf
        best = int(left_H.argmax())
        found_K[k] = left_H[best] > -np.inf
        expert_K[k] = candidates_KH[k, best] if found_K[k] else ids_K[k]
        taken.append(int(expert_K[k]))
