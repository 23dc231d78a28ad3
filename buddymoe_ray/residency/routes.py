"""How often an expert will be found resident, from the routes that a profile keeps.

Legend: T tokens, L layers, K experts per token, E experts, C sizes of the cache (experts per layer), N = L x C.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from buddymoe_ray.cache.usage import Usage
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.errors import ProfileError
from buddymoe_ray.models.fingerprint import model_hash
from buddymoe_ray.models.profile import load_profile, profile_path
from buddymoe_ray.models.tensor_index import has_weights
from buddymoe_ray.types import SlotPlan

__all__ = ["expected_hits", "popularity_rank", "served_hits"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_MOST_STEPS = 16_384  # of layers: more change the third digit


def expected_hits(config: EngineConfig, folder: Path, slots: SlotPlan) -> float | None:
    """The share of decode's accesses that hit under a plan: of the pinned experts, or as the cache evicts; None where
    no profile says how the checkpoint in `folder` routes."""
    path = profile_path(config.profile, folder)
    if path is None or not has_weights(folder):
        return None
    try:
        profile = load_profile(path, model_hash=model_hash(folder))
    except ProfileError:
        return None  # whoever serves with it says why
    counts_LE: npt.NDArray[Any] = profile.counts_LE.astype(np.int64)
    if slots.pinned:
        pinned = sum(int(counts_LE[layer, list(named)].sum()) for layer, named in enumerate(slots.pinned))
        return pinned / max(1, int(counts_LE.sum()))
    routes_TLK = profile.routes_TLK[: max(1, _MOST_STEPS // len(counts_LE))].astype(np.int64)
    if not len(routes_TLK):
        return None
    sizes = tuple(sorted({*slots.layer_slots}))
    hits_LC = served_hits(routes_TLK, counts_LE, sizes)
    return float(np.mean([hits_LC[layer, sizes.index(size)] for layer, size in enumerate(slots.layer_slots)]))


def served_hits(routes_TLK: Ints, counts_LE: Ints, sizes: tuple[int, ...]) -> Floats:
    """Share of accesses that hit `[L, C]` as the expert cache evicts.

    After each token go those used least, of others than it asked for. Starts with the most frequent experts.
    """
    T, L, K = routes_TLK.shape
    C = len(sizes)
    size_N, layer_N = np.tile(np.array(sizes), L), np.repeat(np.arange(L), C)
    rank_LE, rows_N1 = popularity_rank(counts_LE), np.arange(L * C)[:, None]
    resident_NE = rank_LE[layer_N] < size_N[:, None]
    usage = Usage((-1e3 - rank_LE).astype(np.float64), np.zeros(L, np.int64))
    hits_N = np.zeros(L * C, dtype=np.int64)
    for t in range(T):
        ids_NK = routes_TLK[t][layer_N]
        for layer, ids_K in enumerate(routes_TLK[t]):
            usage.note(layer, ids_K)
        hits_N += resident_NE[rows_N1, ids_NK].sum(axis=1)
        resident_NE[rows_N1, ids_NK] = True
        usage_NE = np.where(resident_NE, usage.usage_LE[layer_N], np.inf)
        usage_NE[rows_N1, ids_NK] += T  # behind all others
        while (leaving := np.flatnonzero(resident_NE.sum(axis=1) > size_N)).size:
            least_N = usage_NE[leaving].argmin(axis=1)
            resident_NE[leaving, least_N], usage_NE[leaving, least_N] = False, np.inf
    return (hits_N / max(1, T * K)).reshape(L, C)


def popularity_rank(counts_LE: Ints) -> Ints:
    """0 for a layer's most frequent expert; ties by number."""
    return np.argsort(np.argsort(-counts_LE, axis=1, kind="stable"), axis=1)
