"""Profiles as a calibration would make them: skewed routing, ranked stand-ins, every table filled, any size."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from buddymoe_ray.models.profile import BudgetPoint, ComparisonRow, Profile

MODEL_HASH = "0123456789abcdef" * 4
ERROR_OF = {"lowbit2": 0.2, "lowbit3": 0.05, "lowbit4": 0.01, "lowrank": 0.6, "mean": 0.9, "drop": 1.0}
RISE_OF = {"lowbit4": 0.2, "lowbit3": 1.1, "lowbit2": 4.2, "lowrank": 130.0, "buddy:output": 590.0, "drop": 940.0}


def make_profile(
    *, layers: int = 4, experts: int = 32, top_k: int = 4, tokens: int = 512, seed: int = 0, **changes: Any
) -> Profile:
    rng = np.random.default_rng(seed)
    popularity_LE = np.stack([rng.permutation(1 / np.arange(1, experts + 1) ** 0.8) for _ in range(layers)])
    # the k largest of popularity times exponential noise: k different experts, the popular ones more often
    race_TLE = rng.exponential(size=(tokens, layers, experts)) / popularity_LE
    routes_TLK = np.argsort(race_TLE, axis=2)[:, :, :top_k]
    raw_TLK = np.sort(rng.dirichlet(np.ones(top_k), size=(tokens, layers)))[:, :, ::-1]
    accesses_TLE = np.zeros((tokens, layers, experts), dtype=np.int64)
    np.put_along_axis(accesses_TLE, routes_TLK, 1, axis=2)
    energy_LE = rng.uniform(0.5, 2.0, (layers, experts))
    pair_LEE = np.repeat(energy_LE[:, :, None], experts, axis=2) * rng.uniform(0.93, 0.98, (layers, experts, experts))
    recall_L = rng.uniform(0.5, 0.7, layers)
    recall_L[-1] = np.nan
    values: dict[str, Any] = {
        "model_hash": MODEL_HASH,
        "model": "builtin:tiny",
        "corpus_sha": "c" * 64,
        "created_by": "0.1.0",
        "calibration_tokens": tokens,
        "layers": layers,
        "experts": experts,
        "top_k": top_k,
        "norm_topk": True,
        "counts_LE": accesses_TLE.sum(axis=0),
        "weight2_LE": rng.uniform(0.02, 0.2, (layers, experts)),
        "energy_LE": energy_LE,
        "coactivation_LEE": np.einsum("tle,tlf->lef", accesses_TLE, accesses_TLE),
        "tae_LP": np.sort(rng.uniform(0, 1, (layers, 101))),
        "margin_LP": np.sort(rng.uniform(0, 1, (layers, 101))),
        "entropy_L": rng.uniform(0.4, 0.8, layers),
        "reuse_L": rng.uniform(0.2, 0.3, layers),
        "next_layer_recall_L": recall_L,
        "errors": {kind: energy_LE * share for kind, share in ERROR_OF.items()},
        "pair_error_LEE": pair_LEE,
        "pair_scale_LEE": rng.normal(0, 0.2, (layers, experts, experts)),
        "record_bytes": {"lowbit2": 8_768, "lowbit3": 12_608, "lowbit4": 16_448, "lowrank": 5_440, "mean": 320},
        "sensitivity_L": rng.uniform(0.01, 0.05, layers),
        "kind_scale": {"lowbit3": 1.1, "lowbit4": 0.9, "drop": 0.4},
        "routes_TLK": routes_TLK,
        "route_weights_TLK": raw_TLK,
        "comparison": comparison(),
        "budget_curve": budget_curve(),
        "recommended": "lowbit3",
        "reason": "rises perplexity by 1.10 % at 25 %, the least of all that fit",
    }
    return Profile(**(values | changes))


def comparison(memories: tuple[float, ...] = (75.0, 50.0, 25.0)) -> tuple[ComparisonRow, ...]:
    return tuple(
        ComparisonRow(
            standin=kind,
            memory_percent=memory,
            dppl_percent=rise * (1.2 - memory / 100),
            dppl_se=rise / 20 + 0.02,
            kl=rise / 100,
            top1_agreement=max(40.0, 100 - 10 * rise),
            miss_rate=100 - memory,
            tokens=16_384,
        )
        for kind, rise in RISE_OF.items()
        for memory in memories
    )


def budget_curve() -> tuple[BudgetPoint, ...]:
    return tuple(
        BudgetPoint(
            memory_percent=memory,
            budget=budget,
            dppl_percent=(40 + memory / 3) * budget,
            dppl_se=0.05,
            fetched_fraction=(125 - memory) / (1 + 2000 * budget),
            expected_rise=0.8 * budget,
            tokens=16_384,
        )
        for memory in (75.0, 50.0, 25.0)
        for budget in (0.001, 0.003, 0.01, 0.03)
    )


def arrays_of(profile: Profile) -> dict[str, np.ndarray]:
    """Every array of a profile by name, those in `errors` included."""
    found = {f.name: getattr(profile, f.name) for f in dataclasses.fields(profile)}
    plain = {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
    return plain | {f"errors[{kind}]": table for kind, table in profile.errors.items()}
