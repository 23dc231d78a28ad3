"""Counts of a trace: who is used, with whom, how decided the router is, how predictable. Numbers only.

Knows neither weights of experts nor stand-ins. Neighbours: trace.py gives the rows, run.py makes the profile.

Legend: T tokens, K slots, L layers, E experts, P percentiles, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from buddymoe_ray.calibrate.trace import Trace
from buddymoe_ray.policy import normalised_entropy

__all__ = ["Tables", "make_tables"]

_SAMPLE = 4096
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Tables:
    """See `models.profile.Profile` for each."""

    counts_LE: npt.NDArray[np.int64]
    weight2_LE: Floats
    coactivation_LEE: npt.NDArray[np.int32]
    tae_LP: Floats
    margin_LP: Floats
    entropy_L: Floats
    reuse_L: Floats
    next_layer_recall_L: Floats
    routes_TLK: npt.NDArray[np.int16]
    route_weights_TLK: npt.NDArray[np.float16]


def make_tables(trace: Trace, experts: int, routers: Sequence[nn.Module | None]) -> Tables:
    """`routers[l]` is layer l's router (None where it shows no logits), for the next layer's predictability."""
    layers = len(routers)
    columns = [_layer(trace, layer, experts) for layer in range(layers)]
    sample = slice(0, min(_SAMPLE, trace.tokens))
    recall = [_recall(trace, layer, routers[layer + 1]) for layer in range(layers - 1)] + [float("nan")]
    return Tables(
        counts_LE=np.stack([c["counts"] for c in columns]).astype(np.int64),
        weight2_LE=np.stack([c["weight2"] for c in columns]).astype(np.float32),
        coactivation_LEE=np.stack([c["together"] for c in columns]).astype(np.int32),
        tae_LP=np.stack([c["tae"] for c in columns]).astype(np.float32),
        margin_LP=np.stack([c["margin"] for c in columns]).astype(np.float32),
        entropy_L=np.array([c["entropy"] for c in columns], dtype=np.float32),
        reuse_L=np.array([c["reuse"] for c in columns], dtype=np.float32),
        next_layer_recall_L=np.array(recall, dtype=np.float32),
        routes_TLK=np.stack([trace.ids(la)[sample].numpy() for la in range(layers)], axis=1).astype(np.int16),
        route_weights_TLK=np.stack([trace.weights(la)[sample].numpy() for la in range(layers)], axis=1).astype(
            np.float16
        ),
    )


def _layer(trace: Trace, layer: int, E: int) -> dict[str, npt.NDArray[np.floating]]:
    ids_TK, weight_TK = trace.ids(layer), trace.weights(layer)
    counts_E = torch.bincount(ids_TK.reshape(-1), minlength=E)
    weight2_E = torch.zeros(E, dtype=torch.float64)
    weight2_E.scatter_add_(0, ids_TK.reshape(-1), weight_TK.reshape(-1).double().square())
    used_TE = torch.zeros(len(ids_TK), E).scatter_(1, ids_TK, 1.0)
    together_EE = used_TE.T @ used_TE
    together_EE.fill_diagonal_(0)
    tae_T = normalised_entropy(weight_TK.numpy())
    p_TK = weight_TK / weight_TK.sum(dim=1, keepdim=True).clamp_min(1e-20)
    top_T2 = p_TK.topk(min(2, p_TK.shape[1]), dim=1).values
    same_window = torch.arange(1, len(ids_TK)) % trace.window != 0
    again_T = used_TE[1:].gather(1, ids_TK[:-1]).mean(dim=1)[same_window]
    at = np.linspace(0, 100, 101)
    return {
        "counts": counts_E.numpy(),
        "weight2": (weight2_E / counts_E.clamp_min(1)).numpy(),
        "together": together_EE.numpy(),
        "tae": np.percentile(tae_T, at),
        "margin": np.percentile((top_T2[:, 0] - top_T2[:, -1]).numpy(), at),
        "entropy": np.float64(tae_T.mean()),
        "reuse": np.float64(again_T.mean() if len(again_T) else 0.0),
    }


def _recall(trace: Trace, layer: int, router: nn.Module | None) -> float:
    """Share of the next layer's top-k that its router names on this layer's input."""
    if router is None:
        return float("nan")
    rows = slice(0, min(_SAMPLE, trace.tokens))
    weight = next((p for p in router.parameters() if p.ndim == 2), None)
    hidden_TD = trace.hidden(layer)[rows]
    if weight is None or weight.shape[1] != hidden_TD.shape[1]:
        return float("nan")
    guess_TK = (hidden_TD.float() @ weight.detach().float().cpu().T).topk(trace.top_k, dim=1).indices
    wanted_TK = trace.ids(layer + 1)[rows]
    return float((guess_TK[:, :, None] == wanted_TK[:, None, :]).any(dim=2).float().mean())
