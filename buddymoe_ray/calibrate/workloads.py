"""Expert accesses over time, to replay placements on: made up (zipf, drifting, bursty) or counted from recorded routes.

A routes file is msgpack: magic, version, experts_per_layer, top_k, and int16 routes [T, L, K] compressed; nothing is
unpickled. Knows no placement. Invariant: equal arguments give equal counts; no expert is used more than once per token.

Legend: W windows, T tokens, L MoE layers, E experts of the widest layer, K experts per token.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from buddymoe_ray.errors import ConfigError

__all__ = ["KINDS", "Routes", "Workload", "load_routes", "replayed", "save_routes", "synthetic"]

Floats = npt.NDArray[np.float64]

KINDS = ("zipf", "drifting", "bursty")
_MAGIC, _VERSION = "buddymoe-routes", 1
_MOST_ACCESSES = 1 << 30
_BURST, _BURST_SHARE, _BURST_CHANCE = 8.0, 1 / 32, 0.3


@dataclass(frozen=True, kw_only=True, eq=False)
class Workload:
    """Accesses `[W, L, E]` of `tokens` tokens per window; `transition_LEE`, where known: the chance that a token which
    used expert i of layer l uses expert j of layer l + 1 (a row adds up to K)."""

    counts_WLE: Floats
    tokens: int
    top_k: int
    experts_per_layer: tuple[int, ...]
    transition_LEE: Floats | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Routes:
    """Which experts each token used: `routes_TLK`, in the order of the text."""

    routes_TLK: npt.NDArray[np.int16]
    experts_per_layer: tuple[int, ...]


def synthetic(
    kind: str, *, experts_per_layer: tuple[int, ...], top_k: int, windows: int, tokens: int, skew: float, seed: int
) -> Workload:
    """A made-up workload: popularity falls as rank^-skew, in an order of each layer's own; layers are of one size.

    `zipf` keeps that order; `drifting` slides to another order in the middle third of the run; in `bursty` a few
    experts become eight times as popular for one to three windows at a time.
    """
    rng, layers, experts = np.random.default_rng(seed), len(experts_per_layer), max(experts_per_layer)
    rank_E = np.arange(1, experts + 1, dtype=np.float64) ** -skew
    now_LE, then_LE = (np.stack([rng.permutation(rank_E) for _ in range(layers)]) for _ in range(2))
    boost_LE, left = np.ones_like(now_LE), 0
    counts_WLE = np.zeros((windows, layers, experts))
    for w in range(windows):
        share = float(np.clip((w / max(1, windows - 1) - 1 / 3) * 3, 0, 1)) if kind == "drifting" else 0.0
        if kind == "bursty":
            left -= 1
            if left <= 0:
                hot_LE = rng.random(now_LE.shape) < _BURST_SHARE
                begins = rng.random() < _BURST_CHANCE
                boost_LE, left = np.where(hot_LE & begins, _BURST, 1.0), int(rng.integers(1, 4)) if begins else 1
        weight_LE = (now_LE * (1 - share) + then_LE * share) * boost_LE
        counts_WLE[w] = rng.binomial(tokens, _inclusion(weight_LE, top_k))
    return Workload(counts_WLE=counts_WLE, tokens=tokens, top_k=top_k, experts_per_layer=experts_per_layer)


def _inclusion(weight_LE: Floats, top_k: int) -> Floats:
    """Chance that a token uses each expert, in proportion to weight, at most 1, K in all."""
    chance_LE = np.minimum(1.0, weight_LE * top_k / weight_LE.sum(axis=1, keepdims=True))
    for _ in range(50):
        full_LE = chance_LE >= 1.0
        rest_LE = np.where(full_LE, 0.0, weight_LE)
        missing = top_k - full_LE.sum(axis=1, keepdims=True)
        chance_LE = np.where(full_LE, 1.0, rest_LE * missing / np.maximum(rest_LE.sum(axis=1, keepdims=True), 1e-300))
        if (chance_LE <= 1.0).all():
            break
        chance_LE = np.minimum(1.0, chance_LE)
    return chance_LE


def replayed(routes: Routes, *, windows: int, tokens: int) -> Workload:
    """The recorded tokens cut into `windows` parts in their order, each scaled to `tokens` tokens.

    Raises ConfigError when there are fewer tokens than windows.
    """
    T, L, K = routes.routes_TLK.shape
    if windows > T:
        raise ConfigError(f"--windows is {windows}, must be at most {T}, the trace's tokens. hint: record more text")
    E = max(routes.experts_per_layer)
    edges, layer_1L1 = np.linspace(0, T, windows + 1).astype(int), np.arange(L)[None, :, None]
    counts_WLE = np.zeros((windows, L, E))
    for w, (a, b) in enumerate(pairwise(edges)):
        accesses = (layer_1L1 * E + routes.routes_TLK[a:b]).ravel()
        counts_WLE[w] = np.bincount(accesses, minlength=L * E).reshape(L, E) * (tokens / (b - a))
    return Workload(
        counts_WLE=counts_WLE,
        tokens=tokens,
        top_k=K,
        experts_per_layer=routes.experts_per_layer,
        transition_LEE=_transitions(routes.routes_TLK, E),
    )


def _transitions(routes_TLK: npt.NDArray[np.int16], E: int) -> Floats:
    L = routes_TLK.shape[1]
    chance_LEE = np.zeros((L, E, E))
    for layer in range(L - 1):
        here_TK, then_TK = routes_TLK[:, layer].astype(np.int64), routes_TLK[:, layer + 1].astype(np.int64)
        pairs = (here_TK[:, :, None] * E + then_TK[:, None, :]).ravel()
        accesses_E = np.bincount(here_TK.ravel(), minlength=E)
        chance_LEE[layer] = np.bincount(pairs, minlength=E * E).reshape(E, E) / np.maximum(accesses_E, 1)[:, None]
    return chance_LEE


def save_routes(routes: Routes, path: Path) -> None:
    """Write atomically. Raises ConfigError when the place cannot be written."""
    whole = {
        "magic": _MAGIC,
        "version": _VERSION,
        "experts_per_layer": routes.experts_per_layer,
        "shape": routes.routes_TLK.shape,
        "routes": zlib.compress(np.ascontiguousarray(routes.routes_TLK, dtype="<i2").tobytes(), 6),
    }
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_bytes(msgpack.packb(whole))
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(
            f"--out {path} cannot be written ({error.strerror}), must be. hint: choose another file"
        ) from error


def load_routes(path: Path) -> Routes:
    """Read what `save_routes` wrote. Raises ConfigError for a missing or damaged file."""
    try:
        whole = msgpack.unpackb(path.read_bytes())
        if whole["magic"] != _MAGIC or whole["version"] != _VERSION:
            raise ValueError(f"it is {whole['magic']} version {whole['version']}")
        return _checked(whole)
    except OSError as error:
        raise ConfigError(
            f"--trace {path} cannot be read ({error.strerror}), must be a file. hint: buddymoe simulate --record MODEL"
        ) from error
    except (KeyError, TypeError, ValueError, zlib.error, msgpack.exceptions.UnpackException) as error:
        raise ConfigError(
            f"--trace {path} is no routes file of version {_VERSION} ({type(error).__name__}: {error}), must be one. "
            "hint: buddymoe simulate --record MODEL writes one"
        ) from error


def _checked(whole: dict[str, Any]) -> Routes:
    T, L, K = (int(n) for n in whole["shape"])
    per_layer = tuple(int(n) for n in whole["experts_per_layer"])
    if not (T >= 1 and K >= 1 and len(per_layer) == L >= 1 and min(per_layer) >= K and 2 * T * L * K <= _MOST_ACCESSES):
        raise ValueError(f"shape {T, L, K} does not fit {per_layer} experts per layer")
    inflater = zlib.decompressobj()
    raw = inflater.decompress(whole["routes"], 2 * T * L * K + 1)
    if len(raw) != 2 * T * L * K:
        raise ValueError(f"routes are {len(raw)} bytes")
    routes_TLK = np.frombuffer(raw, dtype="<i2").reshape(T, L, K)
    if (routes_TLK < 0).any() or (routes_TLK >= np.array(per_layer)[None, :, None]).any():
        raise ValueError("an expert is out of range")
    return Routes(routes_TLK=routes_TLK, experts_per_layer=per_layer)
