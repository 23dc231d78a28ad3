"""The guard on the real engine: honest stand-ins pass, a table that lies is caught, nobody else is disturbed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from buddymoe_ray import LLM
from buddymoe_ray.models.fingerprint import model_hash
from buddymoe_ray.models.profile import default_profile_path, load_profile, save_profile
from buddymoe_ray.models.resolve import resolve_model
from buddymoe_ray.models.standin_files import standins_folder

TEXT = (resolve_model("builtin:tiny") / "heldout" / "python.txt").read_text()
PROMPTS = [TEXT[at : at + 400] for at in range(0, 24 * 4000, 4000)]


@pytest.fixture(scope="module")
def lying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A profile whose buddies are shuffled and said to cost next to nothing."""
    folder = resolve_model("builtin:tiny")
    shipped = default_profile_path(folder)
    assert shipped is not None
    profile = load_profile(shipped, model_hash=model_hash(folder))
    rng = np.random.default_rng(0)
    shuffled = profile.pair_error_LEE.copy()
    for row in shuffled.reshape(-1, shuffled.shape[-1]):
        rng.shuffle(row)
    made = tmp_path_factory.mktemp("lying")
    scale = dict(profile.kind_scale) | {"buddy:output": 1e-6}
    save_profile(replace(profile, pair_error_LEE=shuffled, kind_scale=scale), made / "p.profile")
    (made / "p.standins").symlink_to(standins_folder(shipped))
    yield made / "p.profile"


def test_shuffled_buddies_trip_it_and_it_says_so(lying: Path) -> None:
    options = {"memory": "50%", "mode": "bounded", "standin": "buddy:output", "profile": str(lying), "guard_share": 1.0}
    with LLM(**options, max_running=4) as llm:  # type: ignore[arg-type]
        generated = 0
        for prompt in PROMPTS:
            result = llm.generate(prompt, max_tokens=64)[0]
            generated += len(result.token_ids)
            if result.usage.guard == "tripped":
                break
        after = llm.generate(PROMPTS[0], max_tokens=16)[0]
        guard = llm.engine.snapshot().guard
    assert guard.state == "tripped" and generated <= 512, f"{guard} after {generated} tokens"
    assert guard.measured_kl > 10 * guard.predicted and "limit 0.003" in guard.reason
    assert (after.usage.mode, after.usage.requested_mode, after.usage.guard) == ("exact", "bounded", "tripped")
    assert after.usage.standins.total == 0
    with LLM(memory="100%") as exact:
        assert exact.generate(PROMPTS[0], max_tokens=16)[0].token_ids == after.token_ids


def test_honest_stand_ins_stay_within_what_was_promised() -> None:
    with LLM(memory="25%", mode="bounded", guard_share=1.0, max_running=8) as llm:
        results = llm.generate(PROMPTS[:8], max_tokens=64)
        guard = llm.engine.snapshot().guard
        llm.engine.cache.check_integrity()
        llm.engine._scheduler.check_integrity()
        assert llm.engine.snapshot().free_kv_blocks == llm.engine.snapshot().total_kv_blocks
    assert guard.state == "ok" and guard.sampled_tokens >= 128, guard
    assert 0 < guard.measured_kl < 0.01 and 0 < guard.predicted <= 0.003
    assert all(r.usage.guard == "ok" and r.usage.mode == "bounded" for r in results)


def test_it_measures_the_divergence_of_the_sampled_steps() -> None:
    """Exact service under the guard's eye: nothing to find. Off: nothing is sampled."""
    with LLM(memory="40%", mode="fast", guard_share=1.0) as llm:
        llm.generate(PROMPTS[:2], mode="exact", max_tokens=16)
        assert llm.engine.snapshot().guard.sampled_tokens == 0
        llm.generate(PROMPTS[:2], max_tokens=16)
        assert llm.engine.snapshot().guard.sampled_tokens == 30
    with LLM(memory="40%", mode="fast", guard_share=0.0) as llm:
        llm.generate(PROMPTS[:2], max_tokens=16)
        assert llm.engine.snapshot().guard.state == "off"


def test_cancelled_requests_leave_no_work_and_no_blocks() -> None:
    with LLM(memory="40%", mode="fast", guard_share=1.0) as llm:
        engine = llm.engine
        from buddymoe_ray.types import GenerationRequest, SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=64)
        engine.add(GenerationRequest(request_id="a", prompt_token_ids=(5, 6, 7), sampling=sampling))
        for _ in range(6):
            engine.step()
        engine.cancel("a")
        engine.drain()
        assert not engine.has_work() and engine.snapshot().free_kv_blocks == engine.snapshot().total_kv_blocks
