"""How often an expert would be found resident, by how many are kept: what a memory budget buys before any stand-in.

Four rules: the most frequent experts for good, any experts at all (the null), what the expert cache keeps, and the
best possible choice by one who knows the future. Pure numpy; knows no bytes. Neighbour: `report` plots them.

Legend: T tokens, L layers, K experts per token, E experts, C sizes of the cache (experts per layer), N = L x C.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from buddymoe_ray.residency.routes import popularity_rank, served_hits

__all__ = ["HitRates", "hit_rates", "oracle_hits", "static_hits"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_MOST_SIZES = 16
_MOST_STEPS = 32_768


@dataclass(frozen=True, kw_only=True)
class HitRates:
    """Share of accesses found resident, `[L, C]` per rule and `[C]` for the null; `sizes` in experts per layer.

    `served_LC` and `oracle_LC` need a trace and are None without one.
    """

    sizes: tuple[int, ...]
    experts: int
    uniform_C: Floats
    static_LC: Floats
    served_LC: Floats | None
    oracle_LC: Floats | None


def hit_rates(counts_LE: npt.NDArray[Any], routes_TLK: npt.NDArray[Any]) -> HitRates:
    """All rules at up to 16 sizes; `routes_TLK` may have no tokens. Simulates at most 32,768 layer steps."""
    L, E = counts_LE.shape
    sizes = tuple(int(c) for c in np.unique(np.linspace(1, E, min(E, _MOST_SIZES)).round().astype(int)))
    counts, routes = counts_LE.astype(np.int64), routes_TLK[: max(1, _MOST_STEPS // L)].astype(np.int64)
    return HitRates(
        sizes=sizes,
        experts=E,
        uniform_C=np.array(sizes) / E,
        static_LC=static_hits(counts, sizes),
        served_LC=served_hits(routes, counts, sizes) if len(routes) else None,
        oracle_LC=oracle_hits(routes, counts, sizes) if len(routes) else None,
    )


def static_hits(counts_LE: Ints, sizes: tuple[int, ...]) -> Floats:
    """Share of accesses that go to a layer's most frequent experts `[L, C]`."""
    mass_LE = np.sort(counts_LE, axis=1)[:, ::-1].cumsum(axis=1)
    return mass_LE[:, np.array(sizes) - 1] / np.maximum(mass_LE[:, -1:], 1)


def oracle_hits(routes_TLK: Ints, counts_LE: Ints, sizes: tuple[int, ...]) -> Floats:
    """The same for the best possible choice `[L, C]`: after each token keep the experts needed again soonest.

    Belady (1966), with the freedom not to keep what was just fetched. Starts with the most frequent experts.
    """
    T, L, K = routes_TLK.shape
    C, E = len(sizes), counts_LE.shape[1]
    size_N = np.tile(np.array(sizes), L)
    layer_N1 = np.repeat(np.arange(L), C)[:, None]
    rows_N1 = np.arange(L * C)[:, None]
    resident_NE = (popularity_rank(counts_LE)[:, None, :] < np.array(sizes)[None, :, None]).reshape(L * C, E)
    next_TLE = _next_accesses(routes_TLK, E)
    hits_N = np.zeros(L * C, dtype=np.int64)
    for t in range(T):
        ids_NK = routes_TLK[t][layer_N1[:, 0]]
        hits_N += resident_NE[rows_N1, ids_NK].sum(axis=1)
        resident_NE[rows_N1, ids_NK] = True
        over_N = resident_NE.sum(axis=1) - size_N
        while (over_N > 0).any():
            farthest_N = np.where(resident_NE, next_TLE[t][layer_N1[:, 0]], -1).argmax(axis=1)
            leaving = np.flatnonzero(over_N > 0)
            resident_NE[leaving, farthest_N[leaving]] = False
            over_N[leaving] -= 1
    return (hits_N / max(1, T * K)).reshape(L, C)


def _next_accesses(routes_TLK: Ints, E: int) -> npt.NDArray[np.int32]:
    """`[T, L, E]`: the token after t that uses an expert next, T for never."""
    T, L, _ = routes_TLK.shape
    next_TLE = np.full((T, L, E), T, dtype=np.int32)
    rows_L1 = np.arange(L)[:, None]
    for t in range(T - 2, -1, -1):
        next_TLE[t] = next_TLE[t + 1]
        next_TLE[t][rows_L1, routes_TLK[t + 1]] = t + 1
    return next_TLE
