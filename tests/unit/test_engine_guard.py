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
from buddymoe_ray.types import GenerationRequest, SamplingParams

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


def test_later_requests_are_charged_what_earlier_ones_were_found_to_cost() -> None:
    """Code costs less than the shipped profile says; the factor is the guard's, told, and on every charge."""
    with LLM(memory="40%", mode="fast", guard_share=1.0, max_running=1) as llm:
        usages = []
        for prompt in PROMPTS[:8]:  # one after the other, each measured before the next
            usages.append(llm.generate(prompt, max_tokens=24, ignore_eos=True)[0].usage)
            llm.engine.drain()
        guard, before = llm.engine.snapshot().guard, llm.engine.snapshot().expected_rise
        assert before == pytest.approx(sum(usage.expected_rise for usage in usages))
        assert before == pytest.approx(guard.predicted * guard.sampled_tokens) and guard.sampled_tokens == 8 * 23
        assert 0.5 <= guard.factor < 0.9 and guard.factor * guard.predicted >= guard.measured_kl
        again = llm.generate(PROMPTS[0], max_tokens=24, ignore_eos=True)[0].usage
        assert again.expected_rise == pytest.approx(guard.factor * usages[0].expected_rise, rel=0.05)
        assert llm.engine.snapshot().expected_rise - before == pytest.approx(again.expected_rise)


def asked(llm: LLM, prompt: str, tokens: int) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    ids = tuple(llm.engine.encode(prompt))
    llm.engine.add(GenerationRequest(request_id=prompt[:40], prompt_token_ids=ids, sampling=sampling))


def test_samples_are_computed_in_one_pass_that_needs_each_expert_once_and_finds_what_single_ones_find() -> None:
    found = []
    for in_one in (True, False):
        with LLM(memory="25%", mode="fast", guard_share=1.0, max_running=4, prefix_cache="off") as llm:
            engine = llm.engine
            if not in_one:
                engine._runner.parts = None
            for prompt in PROMPTS[:4]:
                asked(llm, prompt, 40)
            while engine._scheduler.has_work():
                engine.step()
            assert engine._guard is not None and engine._guard.has_work()
            before = engine.snapshot().misses
            engine.drain()
            found.append((engine.snapshot().guard, engine.snapshot().misses - before))
            engine._scheduler.check_integrity()
            assert engine.snapshot().free_kv_blocks == engine.snapshot().total_kv_blocks
    (swept, swept_misses), (scored, scored_misses) = found
    assert swept == scored and swept.sampled_tokens == 4 * 39, f"{swept}, {scored}"
    assert 0 < swept_misses <= 4 * 32 < scored_misses


def test_steps_without_a_stand_in_are_found_to_cost_nothing() -> None:
    """To the last bit: the floor of what is measured is 0."""
    with LLM(memory="40%", mode="bounded", budget=1e-12, guard_share=1.0, max_running=2) as llm:
        results = llm.generate(PROMPTS[:2], max_tokens=30)
        guard = llm.engine.snapshot().guard
        assert all(result.usage.standins.total == 0 for result in results)
    assert guard.sampled_tokens > 30 and guard.measured_kl == 0.0


def test_beside_others_it_goes_on_as_far_as_its_share_of_the_time_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = False
    monkeypatch.setattr("buddymoe_ray.engine.guard.may_replay", lambda spent, elapsed, *, idle: idle or allowed)
    with LLM(memory="40%", mode="fast", guard_share=1.0, max_running=2) as llm:
        engine = llm.engine
        asked(llm, PROMPTS[0], 8)
        asked(llm, PROMPTS[1], 150)
        for _ in range(40):
            engine.step()
        assert engine._guard is not None and engine._guard.has_work() and engine.snapshot().free_kv_blocks
        assert engine.snapshot().guard.sampled_tokens == 0
        allowed, steps = True, 0
        while engine._scheduler.has_work() and not engine.snapshot().guard.sampled_tokens:
            engine.step()
            steps += 1
        assert engine._scheduler.has_work() and engine.snapshot().guard.sampled_tokens == 7
        assert steps > 1, "a sample was computed in one step that somebody waited for"


def test_cancelled_requests_leave_no_work_and_no_blocks() -> None:
    with LLM(memory="40%", mode="fast", guard_share=1.0) as llm:
        engine = llm.engine
        sampling = SamplingParams(temperature=0.0, max_tokens=64)
        engine.add(GenerationRequest(request_id="a", prompt_token_ids=(5, 6, 7), sampling=sampling))
        for _ in range(6):
            engine.step()
        engine.cancel("a")
        engine.drain()
        assert not engine.has_work() and engine.snapshot().free_kv_blocks == engine.snapshot().total_kv_blocks
