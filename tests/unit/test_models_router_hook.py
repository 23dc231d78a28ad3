"""Router scores are those that the router's own top-k was taken from, in every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import build_checkpoint
from tiny_configs import TINY_CONFIGS

from buddymoe_ray.errors import UnsupportedModel
from buddymoe_ray.models.experts_hook import attach
from buddymoe_ray.models.load import load_model, on_kernels
from buddymoe_ray.models.router_hook import attach_router_scores, router_choices


@pytest.mark.parametrize("family", sorted(TINY_CONFIGS))
def test_the_top_k_is_taken_from_the_scores(family: str, tmp_path: Path) -> None:
    build_checkpoint(family, tmp_path / family)
    loaded = load_model(tmp_path / family, dtype=torch.float32)
    names = " ".join(loaded.model.state_dict())
    passed_over = (
        "correction_bias" in names or "expert_bias" in names or (getattr(loaded.config, "n_group", 1) or 1) > 1
    )
    scores: dict[int, torch.Tensor] = {}
    chosen: dict[int, torch.Tensor] = {}

    def block(layer: int, module: torch.nn.Module):  # type: ignore[no-untyped-def]
        def run(hidden_TD: torch.Tensor, ids_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
            chosen[layer] = ids_TK
            assert scores[layer].shape == (len(hidden_TD), loaded.layout.experts_per_layer[layer])
            return torch.zeros_like(hidden_TD)

        return run

    attach(loaded.experts, block)
    if family == "zaya":  # its routers are no experts' neighbours
        with pytest.raises(UnsupportedModel, match="no router beside its experts"):
            attach_router_scores(
                loaded.model, loaded.experts, loaded.layout.experts_per_layer, model_type=family, into=scores
            )
        return
    attach_router_scores(
        loaded.model,
        loaded.experts,
        loaded.layout.experts_per_layer,
        model_type=loaded.family.model_type,
        into=scores,
    )
    with torch.inference_mode():
        loaded.model(input_ids=torch.randint(3, 150, (1, 12)))
    assert sorted(chosen) == list(range(len(loaded.experts)))
    for layer, ids_TK in chosen.items():
        score_TE = scores[layer]
        assert bool(((score_TE > 0) & (score_TE < 1)).all())
        for row, named in zip(score_TE, ids_TK, strict=True):
            best = int(row.argmax())
            # group limits and choice biases may pass over the best score, but never over all of the best
            assert len(set(named.tolist())) == len(named)
            if not passed_over:
                assert best in named.tolist()


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_what_the_next_layer_wants_is_guessed_from_rows_alone(family: str, tmp_path: Path) -> None:
    loaded = on_kernels(load_model(build_checkpoint(family, tmp_path), dtype=torch.float32), "native")
    K, counts = loaded.experts_per_token, loaded.layout.experts_per_layer
    choices = router_choices(loaded.model, loaded.experts, counts, experts_per_token=K)
    assert len(choices) == (0 if family == "zaya" else len(counts))
    for choose, experts in zip(choices, counts, strict=False):
        ids_TK = choose(torch.randn(5, loaded.hidden_size))
        assert ids_TK.shape == (5, K) and int(ids_TK.max()) < experts


def test_a_layer_without_router_is_refused() -> None:
    parent = torch.nn.Module()
    parent.experts = torch.nn.Linear(4, 4)
    parent.norm = torch.nn.LayerNorm(4)
    model = torch.nn.Module()
    model.mlp = parent
    with pytest.raises(UnsupportedModel, match="no router beside its experts"):
        attach_router_scores(model, [parent.experts], [6], model_type="mixtral", into={})
