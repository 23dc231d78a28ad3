"""The engine that serves, with builtin:tiny's own calibration: modes, budgets, isolation, replay, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from buddymoe_ray import LLM
from buddymoe_ray.cli import main
from buddymoe_ray.config import STANDINS, EngineConfig
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.errors import BudgetError, ConfigError, ProfileError, RequestError
from buddymoe_ray.models.fingerprint import model_hash
from buddymoe_ray.models.profile import default_profile_path, load_profile, save_profile
from buddymoe_ray.models.resolve import resolve_model
from buddymoe_ray.models.standin_files import standins_folder
from buddymoe_ray.residency.standin_setup import find_profile
from buddymoe_ray.serve.args import ServeArgs
from buddymoe_ray.types import EngineResult, GenerationRequest, SamplingParams

PROMPTS = ["def add(a, b):\n", "import os\nimport sys\n", "class Queue:\n    def __init__(self):\n", "The following"]


def served(**options: object) -> LLM:
    return LLM(**({"memory": "25%", "mode": "bounded", "guard_share": 0.0} | options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def exact_tokens() -> list[tuple[int, ...]]:
    with LLM(memory="100%") as llm:
        return [r.token_ids for r in llm.generate(PROMPTS, max_tokens=24)]


def test_fast_reads_nothing_in_decode_and_says_what_it_cost() -> None:
    with served(mode="fast") as llm:
        engine = llm.engine
        engine.add(GenerationRequest(request_id="a", prompt_token_ids=tuple(engine.encode(PROMPTS[0]))))
        engine.step()  # prefill
        before = engine.snapshot().bytes_read_disk
        usage = engine.drain()[-1].usage
        assert engine.snapshot().bytes_read_disk == before
    assert usage is not None and usage.mode == usage.requested_mode == "fast" and usage.budget is None
    assert usage.fetched == 0 and usage.standins.lowbit > 100
    assert usage.hits + usage.standins.total == 15 * 4 * 4, "15 decode steps, 4 layers, top-4"
    assert 0 < usage.expected_rise < 0.5


@pytest.mark.parametrize("budget", [0.0, 0.001, 0.003, 0.03])
def test_bounded_never_charges_more_than_its_budget(budget: float) -> None:
    with served(budget=budget, max_running=4) as llm:
        results = llm.generate(PROMPTS, max_tokens=32, logprobs=0)
    for result in results:
        usage, by_token = result.usage, [entry.standins for entry in result.logprobs]
        assert sum(by_token) == usage.standins.total and by_token[0] == 0, "a prompt is computed exactly"
        assert usage.expected_rise <= budget * len(result.token_ids)
        assert usage.budget == budget and usage.mode == "bounded"
        assert usage.hits + usage.fetched + usage.standins.total == (len(result.token_ids) - 1) * 16
    if budget == 0.0:
        assert all(r.usage.standins.total == 0 for r in results)


def test_more_budget_means_fewer_fetches() -> None:
    fetched = []
    with served(max_running=4) as llm:
        for budget in (0.0005, 0.001, 0.003, 0.01, 1.0):
            results = llm.generate(PROMPTS, budget=budget, max_tokens=32)
            fetched.append(sum(r.usage.fetched for r in results))
    assert fetched == sorted(fetched, reverse=True) and fetched[0] > fetched[-1]


def test_exact_requests_do_not_feel_other_tenants(exact_tokens: list[tuple[int, ...]]) -> None:
    with served(max_running=8) as llm:
        engine = llm.engine
        sampling = SamplingParams(temperature=0.0, max_tokens=24)
        for at, prompt in enumerate(PROMPTS):
            ids = tuple(engine.encode(prompt))
            engine.add(GenerationRequest(request_id=f"e{at}", prompt_token_ids=ids, sampling=sampling, mode="exact"))
            other = tuple(
                engine.encode(f"# {at}\nwhile True:\n    print({at}, ")
            )  # the same text would be fetched for both
            engine.add(GenerationRequest(request_id=f"f{at}", prompt_token_ids=other, sampling=sampling, mode="fast"))
        tokens: dict[str, list[int]] = {}
        usages = {}
        for event in engine.drain():
            tokens.setdefault(event.request_id, []).extend(event.token_ids)
            usages[event.request_id] = event.usage or usages.get(event.request_id)
        engine.cache.check_integrity()
    assert [tuple(tokens[f"e{at}"]) for at in range(len(PROMPTS))] == exact_tokens
    assert all(usages[f"e{at}"].standins.total == 0 for at in range(len(PROMPTS)))
    assert sum(usages[f"f{at}"].standins.total for at in range(len(PROMPTS))) > 100


def replayed(llm: LLM, prompt: str, first: EngineResult, **options: object) -> EngineResult:
    return llm.generate(prompt, replay=first.usage.record, max_tokens=40, **options)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["bounded", "fast"])
def test_a_record_gives_the_same_tokens_again(mode: str) -> None:
    with served(max_running=8) as llm:
        together = llm.generate(PROMPTS, mode=mode, record=True, max_tokens=40)  # type: ignore[arg-type]
        for prompt, first in zip(PROMPTS, together, strict=True):
            assert first.usage.record is not None
            again = replayed(llm, prompt, first)
            assert again.token_ids == first.token_ids and again.usage.mode == "exact"
        assert llm.generate(PROMPTS[0], max_tokens=4)[0].usage.record is None


def test_a_record_belongs_to_its_prompt_model_and_stand_ins(tmp_path: Path) -> None:
    with served() as llm:
        first = llm.generate(PROMPTS[0], record=True, max_tokens=8)[0]
        with pytest.raises(RequestError, match="replay is made with another prompt"):
            replayed(llm, PROMPTS[1], first)
    with served(memory="60%") as llm, pytest.raises(RequestError, match="replay is made with another binding"):
        replayed(llm, PROMPTS[0], first)
    with LLM(memory="25%") as llm, pytest.raises(RequestError, match="no stand-ins are loaded"):
        replayed(llm, PROMPTS[0], first)
    own, folder = tmp_path / "my.profile", resolve_model("builtin:tiny")
    made = load_profile(default_profile_path(folder), model_hash=model_hash(folder))
    save_profile(replace(made, corpus_sha="d" * 64), own)
    standins_folder(own).symlink_to(standins_folder(default_profile_path(folder)))
    with served(profile=str(own)) as llm, pytest.raises(RequestError, match="replay is made with another binding"):
        replayed(llm, PROMPTS[0], first)


@pytest.mark.parametrize("memory", ["20%", "37.5%", "75%"])
@pytest.mark.parametrize("standin", [name for name in STANDINS if name not in ("lowbit3", "lowbit8")])  # not shipped
def test_every_stand_in_keeps_the_memory_budget(standin: str, memory: str) -> None:
    try:
        engine = Engine.from_config(
            EngineConfig(memory=memory, mode="fast", standin=standin, guard_share=0.0), text=False
        )
    except BudgetError as error:
        assert standin in ("lowbit3", "lowbit34", "lowbit4", "lowbit48") and memory == "20%" and "hint:" in str(error)
        return
    plan = engine.cache.plan
    held = engine.cache.device_bytes + engine.standin_bytes
    assert held <= plan.slots_total * plan.slot_bytes + plan.overhead_bytes <= plan.budget_bytes
    engine.add(GenerationRequest(request_id="a", prompt_token_ids=(5, 6, 7, 8)))
    usage = engine.drain()[-1].usage
    assert usage is not None and usage.fetched == 0
    engine.cache.check_integrity()
    engine.close()


def test_all_of_the_memory_needs_no_stand_ins(exact_tokens: list[tuple[int, ...]]) -> None:
    with served(memory="100%") as llm:
        results = llm.generate(PROMPTS, max_tokens=24)
    assert [r.token_ids for r in results] == exact_tokens
    assert all(r.usage.standins.total == 0 and r.usage.expected_rise == 0 for r in results)


def test_stand_ins_stay_in_the_layers_they_are_allowed_in() -> None:
    with served(mode="fast", standin_layers="1,3") as llm:
        usage = llm.generate(PROMPTS[0], max_tokens=9)[0].usage
    assert usage.standins.total <= 8 * 2 * 4 and usage.fetched >= 8 * 4


def test_the_paper_whole_fetches_what_its_gates_forbid() -> None:
    with served(mode="fast", policy="buddymoe", memory="50%") as llm:
        usages = [r.usage for r in llm.generate(PROMPTS, max_tokens=24)]
    assert sum(u.standins.buddy for u in usages) > 0 and sum(u.fetched for u in usages) > 0
    assert all(u.standins.total == u.standins.buddy for u in usages)


def test_one_sequence_at_a_time_gives_the_same_tokens() -> None:
    answers = []
    for batching in ("packed", "solo"):
        with served(mode="fast", batching=batching) as llm:
            answers.append([r.token_ids for r in llm.generate(PROMPTS[:2], max_tokens=16)])
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "bounded"}, "mode is bounded, must be exact: no stand-ins are loaded"),
        ({"mode": "fast"}, "mode is fast, must be exact: no stand-ins are loaded"),
        ({"mode": "exact", "budget": 0.01}, "budget is set for mode exact"),
    ],
)
def test_what_an_exact_service_cannot_give_is_refused(options: dict, said: str) -> None:  # type: ignore[type-arg]
    with LLM(memory="25%") as llm, pytest.raises(RequestError, match=said):
        llm.generate(PROMPTS[0], **options)


def test_bad_modes_and_budgets_are_refused() -> None:
    with served() as llm:
        with pytest.raises(RequestError, match="mode is 'quick', must be exact or bounded or fast"):
            llm.generate(PROMPTS[0], mode="quick")  # type: ignore[arg-type]
        with pytest.raises(RequestError, match=r"budget is '0.1', must be a number"):
            llm.generate(PROMPTS[0], budget="0.1")  # type: ignore[arg-type]
        for budget in (-0.1, 2.0, float("nan")):
            with pytest.raises(RequestError, match="budget is"):
                llm.generate(PROMPTS[0], budget=budget)
    with pytest.raises(ConfigError, match="budget is -1"):
        EngineConfig(budget=-1)
    with pytest.raises(ConfigError, match="standin_layers is 'a'"):
        EngineConfig(standin_layers="a")
    with pytest.raises(ConfigError, match="standin_layers is '1,4', must be below 4"):
        served(standin_layers="1,4")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("policy", "buddymoe"),
        ("standin", "lowbit3"),
        ("standin_layers", "0,2"),
        ("profile", "x.profile"),
        ("budget", 0.01),
        ("guard_share", 0.5),
    ],
)
def test_options_that_exact_would_ignore_are_refused(name: str, value: Any, capsys: pytest.CaptureFixture[str]) -> None:
    doors: list[Any] = [EngineConfig, EngineConfig.from_options, ServeArgs]
    for make in doors:
        with pytest.raises(ValueError, match=rf"{name} is {value!r}, must be left out in mode exact"):
            make(**{name: value})
        given = make(mode="bounded", **{name: value})
        assert getattr(given, name) == value
    inexact: Any = {"mode": "fast", name: value}
    assert EngineConfig(**inexact).exactly(memory="100%") == EngineConfig(memory="100%")
    if name != "guard_share":
        assert main(["plan", "--mode", "exact", f"--{name.replace('_', '-')}", str(value)]) == 2
        assert f"buddymoe plan: {name} is {value!r}, must be left out" in capsys.readouterr().err
    assert EngineConfig(guard_share=0.0).mode == "exact"


def test_profiles_that_cannot_be_used(tmp_path: Path) -> None:
    from families import build_checkpoint

    from buddymoe_ray.models.profile import default_profile_path

    build_checkpoint("qwen3_moe", tmp_path / "other")
    shipped = default_profile_path(resolve_model("builtin:tiny"))
    assert shipped is not None
    with pytest.raises(ProfileError, match=r"mode is fast, must be exact or bounded.*hint: run buddymoe profile"):
        served(model=str(tmp_path / "other"), mode="fast")
    with served(model=str(tmp_path / "other")) as llm:  # exact keeps every budget, and says that it is exact
        usage = llm.generate([[5, 6, 7]], max_tokens=4)[0].usage
        assert (usage.mode, usage.requested_mode, usage.standins.total) == ("exact", "bounded", 0)
        with pytest.raises(RequestError, match="memory is too little for stand-ins of all experts"):
            llm.generate([[5, 6, 7]], mode="fast")
    with (
        served(model=str(tmp_path / "other"), calibrate="off") as llm,
        pytest.raises(RequestError, match="no stand-ins are loaded"),
    ):
        llm.generate([[5, 6, 7]], mode="fast")
    with pytest.raises(ProfileError, match="of this checkpoint"):
        served(model=str(tmp_path / "other"), profile=str(shipped))
    (tmp_path / "cut.profile").write_bytes(shipped.read_bytes()[:-100])
    with pytest.raises(ProfileError, match="hint:"):
        served(profile=str(tmp_path / "cut.profile"))
    (tmp_path / "alone.profile").write_bytes(shipped.read_bytes())
    with pytest.raises(ProfileError, match="has no records of"):
        served(profile=str(tmp_path / "alone.profile"))


def test_records_that_a_profile_does_not_know_are_left_alone(tmp_path: Path) -> None:
    """Those of an earlier calibration in the same folder; asked for by name they are refused."""
    from buddymoe_ray.models.fingerprint import model_hash
    from buddymoe_ray.models.profile import default_profile_path, load_profile, save_profile
    from buddymoe_ray.models.standin_files import standins_folder

    folder = resolve_model("builtin:tiny")
    shipped = default_profile_path(folder)
    assert shipped is not None
    profile = load_profile(shipped, model_hash=model_hash(folder))
    path = tmp_path / "p.profile"
    save_profile(replace(profile, errors={k: e for k, e in profile.errors.items() if k != "lowbit2"}), path)
    (tmp_path / "p.standins").symlink_to(standins_folder(shipped))
    with served(profile=str(path), mode="fast", memory="50%") as llm:
        setup = llm.engine._setup
        assert setup is not None and {*setup.kind_of.values()} == {f"lowbit{bits}" for bits in (23, 24, 34, 4, 48)}
    with pytest.raises(ProfileError, match="stand-in is 'lowbit2'"):
        served(profile=str(path), mode="fast", standin="lowbit2")


def test_where_nothing_is_within_the_budget_bounded_is_exact(
    tmp_path: Path, exact_tokens: list[tuple[int, ...]]
) -> None:
    from buddymoe_ray.models.fingerprint import model_hash
    from buddymoe_ray.models.profile import default_profile_path, load_profile, save_profile
    from buddymoe_ray.models.standin_files import standins_folder

    folder = resolve_model("builtin:tiny")
    shipped = default_profile_path(folder)
    assert shipped is not None
    hopeless = replace(load_profile(shipped, model_hash=model_hash(folder)), recommended=None, reason="nothing does")
    save_profile(hopeless, tmp_path / "p.profile")
    (tmp_path / "p.standins").symlink_to(standins_folder(shipped))
    with served(profile=str(tmp_path / "p.profile")) as llm:
        results = llm.generate(PROMPTS, max_tokens=24)
    assert [r.token_ids for r in results] == exact_tokens
    assert {(r.usage.mode, r.usage.requested_mode) for r in results} == {("exact", "bounded")}


def test_a_profile_in_ones_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = EngineConfig(mode="fast", profile="~/own.profile")
    assert find_profile(config, tmp_path) == tmp_path / "own.profile"
