"""Every table is what counting token by token gives."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from calibration_rig import opened, random_ids, traced, write_checkpoint
from torch import Tensor, nn

from buddymoe_ray.calibrate.tables import Tables, make_tables
from buddymoe_ray.calibrate.trace import Trace
from buddymoe_ray.models.router_hook import find_routers

L, T, K, E, D, WINDOW = 2, 60, 3, 7, 5, 12


class Router(nn.Module):
    def __init__(self, weight_ED: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_ED)


@dataclass(frozen=True, kw_only=True)
class Made:
    tables: Tables
    hidden: list[Tensor]
    ids: list[list[list[int]]]
    weights: list[list[list[float]]]
    router_ED: Tensor


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    generator = torch.Generator().manual_seed(1)
    hidden = [torch.randn(T, D, generator=generator) for _ in range(L)]
    popular_E = torch.tensor([8.0, 4, 2, 1, 1, 1, 0])  # the last expert is never used
    ids = [popular_E.expand(T, E).multinomial(K, generator=generator) for _ in range(L)]
    weights = [torch.rand(T, K, generator=generator).softmax(dim=1) * (0.5 + la) for la in range(L)]
    router_ED = torch.randn(E, D, generator=generator)
    folder = tmp_path_factory.mktemp("trace")
    with Trace(folder, layers=L, tokens=T, window=WINDOW, hidden=D, top_k=K, dtype=torch.float32) as trace:
        for layer in range(L):
            trace.observe(layer, hidden[layer], ids[layer], weights[layer])
        tables = make_tables(trace, E, [None, Router(router_ED)])
    yield Made(
        tables=tables,
        hidden=hidden,
        ids=[i.tolist() for i in ids],
        weights=[w.tolist() for w in weights],
        router_ED=router_ED,
    )


def test_counts_and_weights(made: Made) -> None:
    for layer in range(L):
        counted = Counter(e for row in made.ids[layer] for e in row)
        assert made.tables.counts_LE[layer].tolist() == [counted[e] for e in range(E)]
        for e in range(E):
            used = [
                w**2
                for row, weight in zip(made.ids[layer], made.weights[layer], strict=True)
                for i, w in zip(row, weight, strict=True)
                if i == e
            ]
            mean = sum(used) / len(used) if used else 0.0
            assert made.tables.weight2_LE[layer, e] == pytest.approx(mean, rel=1e-5)
    assert made.tables.counts_LE[0, 6] == 0, "an expert nobody named must count 0"


def test_coactivation(made: Made) -> None:
    for layer in range(L):
        for i in range(E):
            for j in range(E):
                together = sum(i in row and j in row for row in made.ids[layer]) if i != j else 0
                assert made.tables.coactivation_LEE[layer, i, j] == together


def test_entropy_and_margin_percentiles(made: Made) -> None:
    for layer in range(L):
        entropies, margins = [], []
        for weight in made.weights[layer]:
            p = sorted((w / sum(weight) for w in weight), reverse=True)
            entropies.append(-sum(x * math.log(x) for x in p) / math.log(K))
            margins.append(p[0] - p[1])
        at = np.arange(101)
        np.testing.assert_allclose(made.tables.tae_LP[layer], np.percentile(entropies, at), rtol=1e-5)
        np.testing.assert_allclose(made.tables.margin_LP[layer], np.percentile(margins, at), rtol=1e-4, atol=1e-7)
        assert made.tables.entropy_L[layer] == pytest.approx(np.mean(entropies), rel=1e-5)


def test_reuse_by_the_next_token_stops_at_a_window(made: Made) -> None:
    for layer in range(L):
        shares = [
            len(set(now) & set(after)) / K
            for t, (now, after) in enumerate(pairwise(made.ids[layer]))
            if (t + 1) % WINDOW
        ]
        assert len(shares) == T - T // WINDOW
        assert made.tables.reuse_L[layer] == pytest.approx(np.mean(shares), rel=1e-6)


def test_recall_of_the_next_layer_by_its_router(made: Made) -> None:
    found = 0
    for t in range(T):
        logits = [float(made.hidden[0][t] @ row) for row in made.router_ED]
        guess = sorted(range(E), key=lambda e: -logits[e])[:K]
        found += len(set(guess) & set(made.ids[1][t]))
    assert made.tables.next_layer_recall_L[0] == pytest.approx(found / (T * K), rel=1e-6)
    assert math.isnan(made.tables.next_layer_recall_L[1]), "the last layer has no next"


def test_routes_are_kept_as_they_were(made: Made) -> None:
    assert made.tables.routes_TLK.shape == (T, L, K)
    for layer in range(L):
        assert made.tables.routes_TLK[:, layer].tolist() == made.ids[layer]
        np.testing.assert_allclose(made.tables.route_weights_TLK[:, layer], made.weights[layer], rtol=1e-3)


def test_one_expert_per_token(tmp_path: Path) -> None:
    """Top-1 models have no margin and no entropy, and nothing divides by zero."""
    with Trace(tmp_path, layers=1, tokens=4, window=4, hidden=D, top_k=1, dtype=torch.float32) as trace:
        trace.observe(0, torch.zeros(4, D), torch.tensor([[0], [0], [1], [0]]), torch.ones(4, 1))
        tables = make_tables(trace, 2, [None])
    assert tables.counts_LE.tolist() == [[3, 1]] and tables.coactivation_LEE.sum() == 0
    assert np.isfinite(tables.tae_LP).all() and tables.tae_LP.max() == 0 and tables.reuse_L[0] == pytest.approx(1 / 3)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_models_own_routers_predict_better_than_chance(family: str, tmp_path: Path) -> None:
    """With the residual stream in between, the next router knows something of its layer's choice one layer early."""
    folder = write_checkpoint(family, tmp_path / "model")
    with opened(folder) as parts, traced(parts, random_ids(6 * 64), 64, tmp_path) as trace:
        counts = parts.experts.cache.layout.experts_per_layer
        routers = find_routers(parts.loaded.model, parts.loaded.experts, counts)
        tables = make_tables(trace, max(counts), routers)
        chance = trace.top_k / max(counts)
    assert np.isfinite(tables.next_layer_recall_L[:-1]).all()
    assert tables.next_layer_recall_L[:-1].mean() > chance
    assert tables.counts_LE.sum(axis=1).tolist() == [6 * 64 * trace.top_k] * len(counts)
