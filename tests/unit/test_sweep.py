"""Windows and variants that are scored together: as if each were alone, with fewer passes over the experts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine import sweep
from buddymoe_ray.engine.build import build_parts
from buddymoe_ray.engine.evaluate import WINDOW, EvalResult, Totals, cut_windows
from buddymoe_ray.models.resolve import resolve_model
from buddymoe_ray.models.tokenizer import load_tokenizer


def test_windows_and_variants_side_by_side_cost_less_and_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve_model("builtin:tiny")
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    text = sorted(Path(folder / "heldout").glob("*.txt"))[0].read_text(encoding="utf-8")
    windows = cut_windows(tokenizer.encode(text, add_special_tokens=False, verbose=False), tokens=4 * 192)
    base = EngineConfig(memory="25%", mode="fast", max_model_len=WINDOW)
    layers = [EngineConfig(memory="25%", mode="fast", max_model_len=WINDOW, standin_layers=at) for at in ("0", "2,3")]
    parts = build_parts(base.exactly(memory="12%", max_model_len=2 * WINDOW, max_running=2), text=False)
    cache = parts.experts.cache

    def scored(most: int, room: int) -> tuple[list[object], int]:
        monkeypatch.setattr(sweep, "_SIDE_BY_SIDE", most)
        before = cache.stats().bytes_loaded_device
        found = sweep.Sweep(parts, room).run(
            [base, *layers],
            windows,
            progress=lambda items, **_: items,
            what="",
        )
        return list(found), cache.stats().bytes_loaded_device - before

    alone, read_alone = scored(1, 1)
    together, read_together = scored(4, 1)  # variants of equal records need no more room than one
    for ours, spec in zip(together, alone, strict=True):
        assert isinstance(ours, EvalResult) and isinstance(spec, EvalResult)
        got, wanted = asdict(ours), asdict(spec)
        assert got.pop("expected_by_kind") == pytest.approx(wanted.pop("expected_by_kind"), rel=1e-5)
        assert got == pytest.approx(wanted, rel=1e-5), "sums may be rounded otherwise"
    assert len(windows) == 4
    assert read_together < 0.5 * read_alone, "one exact pass over all windows serves all variants"
    parts.experts.close()


def test_a_token_that_neither_engine_would_say_adds_nothing_to_the_divergence() -> None:
    totals, target = Totals(), torch.tensor([0])
    exact, ours = (torch.tensor([[one, 0.0, -torch.inf]]).log_softmax(dim=1) for one in (1.0, 0.5))
    totals.compare([(["w"], exact, target)], [(["w"], ours, target)])
    both = torch.nn.functional.kl_div(ours[:, :2], exact[:, :2], reduction="sum", log_target=True)
    assert totals.result().kl == pytest.approx(float(both), rel=1e-6)
