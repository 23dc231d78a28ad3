"""Choosing tokens against transformers' own warpers, the API's formulas and plain statistics.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from buddymoe_ray.engine.sampler import Sampled, SamplingState, sample
from buddymoe_ray.engine.validate import validate
from buddymoe_ray.errors import RequestError
from buddymoe_ray.types import GenerationRequest, SamplingParams

torch.set_num_threads(1)
V = 24
PROMPT = [3, 7, 7, 1]
PINNED = [82, 14, 442, 61, 454, 594]  # of seed 7 among 1000 equal tokens, at positions 1 to 6


def state(
    *, seed: int = 0, prompt: list[int] = PROMPT, output: list[int] | None = None, **params: Any
) -> SamplingState:
    return SamplingState(
        params=SamplingParams(**params), seed=seed, token_ids=[*prompt, *(output or [])], prompt_length=len(prompt)
    )


def random_logits(seed: int, rows: int = 1, scale: float = 2.0) -> Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * scale


def draw(logits_V: Tensor, count: int, first_seed: int = 0, **how: Any) -> Counter[int]:
    """Tokens of `count` seeds, in one batch."""
    states = [state(seed=first_seed + n, **how) for n in range(count)]
    return Counter(s.token_id for s in sample(logits_V.expand(count, -1), states))


def reference(logits_V: Tensor, tokens: list[int], p: SamplingParams) -> Tensor:
    """Probabilities by transformers' processors, in vLLM's order: biases first, and min-p before top-p."""
    chain = LogitsProcessorList()
    bias = torch.zeros_like(logits_V)
    for token, added in p.logit_bias.items():
        bias[token] = added
    if p.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    if p.temperature != 1.0:
        chain.append(TemperatureLogitsWarper(p.temperature))
    if p.top_k:
        chain.append(TopKLogitsWarper(p.top_k))
    if p.min_p:
        chain.append(MinPLogitsWarper(p.min_p))
    if p.top_p < 1.0:
        chain.append(TopPLogitsWarper(p.top_p))
    return chain(torch.tensor([tokens]), logits_V[None] + bias)[0].double().softmax(-1)


def far_from(seen: Counter[int], probs_V: Tensor) -> float:
    """Largest distance of a frequency from its probability, in standard deviations."""
    count = sum(seen.values())
    return max(
        abs(seen[token] / count - p) / math.sqrt(max(p * (1 - p), 1e-12) / count)
        for token, p in enumerate(probs_V.tolist())
        if p > 0
    )


# --- greedy


def test_greedy_is_the_largest_logit_alone_and_in_a_batch() -> None:
    logits_BV = random_logits(1, rows=16)
    want = logits_BV.argmax(-1).tolist()
    assert [s.token_id for s in sample(logits_BV, [state(temperature=0.0)] * 16)] == want
    mixed = [state(temperature=0.0) if row % 2 else state(temperature=1.0, seed=row) for row in range(16)]
    assert [s.token_id for s in sample(logits_BV, mixed)][1::2] == want[1::2]


def test_greedy_ignores_seed_top_k_and_top_p() -> None:
    logits_BV = random_logits(2)
    want = int(logits_BV.argmax())
    for how in ({"seed": 1}, {"seed": 2}, {"top_k": 3}, {"top_p": 0.1}):
        assert sample(logits_BV, [state(temperature=0.0, **how)])[0].token_id == want


def test_ties_are_broken_alike_whatever_is_beside() -> None:
    logits_BV = torch.zeros(5, V)
    logits_BV[:, [4, 9, 20]] = 3.0
    alone = sample(logits_BV[:1], [state(temperature=0.0)])[0].token_id
    beside = sample(logits_BV, [state(temperature=0.0)] * 4 + [state(seed=5)])
    assert {s.token_id for s in beside[:4]} == {alone} == {4}


@pytest.mark.parametrize("temperature", [1e-3, 1e-8, 1e-40, 5e-324])
def test_a_tiny_temperature_is_greedy_and_never_breaks(temperature: float) -> None:
    logits_V = random_logits(3, scale=20.0)[0]
    assert set(draw(logits_V, 20, temperature=temperature)) == {int(logits_V.argmax())}
    assert set(draw(-logits_V.abs() - 5, 20, temperature=temperature)) == {int((-logits_V.abs()).argmax())}


def test_no_rows_are_no_tokens() -> None:
    assert sample(torch.zeros(0, V), []) == []


# --- the distribution


PARAMS = [
    {"temperature": 0.5},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": V},
    {"top_k": 10 * V},
    {"top_p": 0.999},
    {"top_p": 0.7},
    {"top_p": 0.01},
    {"temperature": 0.8, "top_k": 8, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "repetition_penalty": 1.4},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.5},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"min_p": 0.05, "temperature": 1.6, "top_k": 10, "top_p": 0.8},
    {"logit_bias": {0: 3.0, 5: -2.5, V - 1: 0.5}},
    {"logit_bias": {7: 2.0, 1: -1.0, 4: 4.0}, "repetition_penalty": 1.5, "min_p": 0.02, "temperature": 0.9},
]


@pytest.mark.parametrize("how", PARAMS, ids=str)
def test_support_and_frequencies_are_those_of_transformers(how: dict[str, Any]) -> None:
    count = 1200
    logits_V = random_logits(10)[0]
    probs_V = reference(logits_V, [*PROMPT, 5, 5], SamplingParams(**how))
    seen = draw(logits_V, count, output=[5, 5], **how)
    allowed = {token for token, p in enumerate(probs_V.tolist()) if p > 0}
    assert set(seen) <= allowed, "a token was drawn that transformers would not draw"
    likely = {token for token, p in enumerate(probs_V.tolist()) if p > 12 / count}
    assert likely <= set(seen), "a token was never drawn that transformers draws often"
    assert far_from(seen, probs_V) < 4.5


@settings(max_examples=60)
@given(
    logits_seed=st.integers(0, 10_000),
    temperature=st.floats(0.3, 2.0),
    top_k=st.integers(0, V + 3),
    top_p=st.floats(0.05, 1.0),
    penalty=st.floats(0.5, 2.0),
    min_p=st.floats(0.0, 0.95),
    bias=st.dictionaries(st.integers(0, V - 1), st.floats(-100, 100), max_size=4),
)
def test_nothing_outside_the_support_is_drawn(
    logits_seed: int, temperature: float, top_k: int, top_p: float, penalty: float, min_p: float, bias: dict[int, float]
) -> None:
    how: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": penalty}
    how |= {"min_p": min_p, "logit_bias": bias}
    logits_V = random_logits(logits_seed)[0]
    probs_V = reference(logits_V, PROMPT, SamplingParams(**how))
    seen = draw(logits_V, 40, **how)
    assert all(probs_V[token] > 0 for token in seen)
    assert max(seen) < V


def test_ties_with_the_kth_stay_as_in_transformers() -> None:
    logits_V = torch.tensor([5.0, 1.0, 4.0, 4.0, 4.0, 0.0])
    probs_V = reference(logits_V, PROMPT[:0] or [0], SamplingParams(top_k=2))
    assert set(draw(logits_V, 300, prompt=[0], top_k=2)) == {i for i, p in enumerate(probs_V.tolist()) if p > 0}


def test_forbidden_tokens_are_never_drawn() -> None:
    logits_V = torch.full((V,), float("-inf"))
    logits_V[[2, 11]] = torch.tensor([0.3, 0.1])
    for how in ({}, {"top_p": 0.9}, {"top_k": 7}, {"repetition_penalty": 1.3}, {"temperature": 0.1}):
        assert set(draw(logits_V, 60, **how)) <= {2, 11}


def test_the_logits_are_left_as_they_were() -> None:
    logits_BV = random_logits(5)
    before_BV = logits_BV.clone()
    sample(logits_BV, [state(repetition_penalty=1.5, presence_penalty=1.0, top_k=3, output=[2], logprobs=3)])
    assert torch.equal(logits_BV, before_BV)


# --- penalties


def test_openai_penalties_by_formula() -> None:
    logits_V, presence, frequency = random_logits(6)[0], 0.7, -0.4
    output = [5, 5, 5, 9]
    want_V = logits_V.clone()
    for token in range(V):
        times = output.count(token)
        want_V[token] -= frequency * times + presence * (times > 0)
    seen = draw(logits_V, 2000, output=output, presence_penalty=presence, frequency_penalty=frequency)
    assert far_from(seen, want_V.double().softmax(-1)) < 4.5


def test_openai_penalties_leave_the_prompt_alone_and_repetition_does_not() -> None:
    logits_V = torch.zeros(V)
    logits_V[[3, 8]] = torch.tensor([2.0, 1.9])  # 3 is in the prompt, 8 is not
    greedy = {"temperature": 0.0}
    assert sample(logits_V[None], [state(**greedy, presence_penalty=1.0)])[0].token_id == 3
    assert sample(logits_V[None], [state(**greedy, presence_penalty=1.0, output=[3])])[0].token_id == 8
    assert sample(logits_V[None], [state(**greedy, frequency_penalty=0.06, output=[3])])[0].token_id == 3
    assert sample(logits_V[None], [state(**greedy, frequency_penalty=0.06, output=[3, 3])])[0].token_id == 8
    assert sample(logits_V[None], [state(**greedy, repetition_penalty=1.1)])[0].token_id == 8


def test_counts_follow_the_live_list() -> None:
    """Also past the first room for them; what only the prompt holds is seen, and was generated 0 times."""
    tokens, rng = list(PROMPT), random.Random(0)
    live = SamplingState(params=SamplingParams(), seed=0, token_ids=tokens, prompt_length=len(PROMPT))
    for _ in range(400):
        ids, often = live.seen()
        assert dict(zip(ids.tolist(), often.tolist(), strict=True)) == {
            token: tokens[len(PROMPT) :].count(token) for token in tokens
        }
        tokens += [rng.randrange(300) for _ in range(rng.randrange(3))]
    assert live.position == len(tokens)


# --- random numbers


def run(seed: int, steps: int, start: list[int] | None = None) -> list[int]:
    """A whole generation whose logits depend on the position."""
    output = list(start or [])
    while len(output) < steps:
        logits_BV = random_logits(100 + len(output))
        output.append(sample(logits_BV, [state(seed=seed, output=output)])[0].token_id)
    return output


def test_draws_do_not_depend_on_the_batch() -> None:
    rows = 12
    logits_BV = random_logits(7, rows=rows)
    hows: list[dict[str, Any]] = [{}, {"top_p": 0.8}, {"temperature": 0.0}, {"presence_penalty": 1.0, "output": [4]}]
    states = [state(seed=row, logprobs=2, **hows[row % len(hows)]) for row in range(rows)]
    together = sample(logits_BV, states)
    assert together == [sample(logits_BV[row : row + 1], [states[row]])[0] for row in range(rows)]
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = sample(logits_BV[order], [states[row] for row in order])
    assert shuffled == [together[row] for row in order]


def test_a_resumed_run_goes_on_as_the_whole_one() -> None:
    whole = run(seed=42, steps=30)
    for cut in (1, 13, 29):
        assert run(seed=42, steps=30, start=whole[:cut]) == whole


def test_seeds_and_positions_draw_differently() -> None:
    flat_BV = torch.zeros(1, 10_000)
    drawn = {
        (seed, length): sample(flat_BV, [state(seed=seed, prompt=[0] * length)])[0].token_id
        for seed in (0, 1, 2, -1, 2**63, 2**64 - 2)
        for length in range(1, 40)
    }
    assert len(set(drawn.values())) > 0.95 * len(drawn)


def test_neighbouring_positions_are_independent() -> None:
    flat_BV = torch.zeros(1, 2)
    bits = [sample(flat_BV, [state(seed=3, prompt=[0] * n)])[0].token_id for n in range(1, 1500)]
    assert abs(sum(bits) / len(bits) - 0.5) < 0.06
    same = sum(a == b for a, b in pairwise(bits)) / (len(bits) - 1)
    assert abs(same - 0.5) < 0.06


def test_the_draws_are_pinned() -> None:
    """A change of these breaks reproducibility across versions and must be deliberate."""
    flat_BV = torch.zeros(1, 1000)
    assert [sample(flat_BV, [state(seed=7, prompt=[0] * n)])[0].token_id for n in range(1, 7)] == PINNED


# --- log probabilities


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits_BV = random_logits(8, rows=3)
    want_BV = logits_BV.log_softmax(-1)
    how: dict[str, Any] = {"temperature": 1.8, "top_k": 4, "presence_penalty": 2.0, "output": [5]}
    for row, got in enumerate(sample(logits_BV, [state(seed=row, logprobs=5, **how) for row in range(3)])):
        assert got.logprob == pytest.approx(want_BV[row, got.token_id].item())
        values, ids = want_BV[row].topk(5)
        assert [t for t, _ in got.top] == ids.tolist()
        assert [p for _, p in got.top] == pytest.approx(values.tolist())


def test_a_bias_bans_and_forces_and_leaves_the_reported_distribution_alone() -> None:
    logits_BV = random_logits(14)
    best = int(logits_BV.argmax())
    banned = sample(logits_BV, [state(temperature=0.0, logit_bias={best: -100}, logprobs=1)])[0]
    assert banned.token_id == int(logits_BV.index_fill(1, torch.tensor([best]), -math.inf).argmax())
    assert banned.logprob == pytest.approx(logits_BV.log_softmax(-1)[0, banned.token_id].item())
    for seed in range(20):
        assert sample(logits_BV, [state(seed=seed, temperature=2.0, logit_bias={3: 100})])[0].token_id == 3


def test_the_chosen_token_is_among_its_alternatives() -> None:
    logits_BV = random_logits(15)
    want_V = logits_BV.log_softmax(-1)[0]
    worst = int(logits_BV.argmin())
    got = sample(logits_BV, [state(temperature=0.0, logit_bias={worst: 100}, logprobs=3)])[0]
    assert [t for t, _ in got.top] == [*want_V.topk(3).indices.tolist(), worst]
    assert got.top[-1] == (worst, got.logprob) and got.logprob == pytest.approx(want_V[worst].item())
    assert len({t for t, _ in sample(logits_BV, [state(temperature=0.0, logprobs=3)])[0].top}) == 3


@pytest.mark.parametrize("size", [1, 3, 24, 1003, 50_304])
def test_reported_numbers_are_bit_for_bit_those_of_the_row_alone(size: int) -> None:
    logits_BV = torch.randn(7, size, generator=torch.Generator().manual_seed(size)) * 3
    counts = [5, None, 0, 5, 20, 0, 5]
    states = [state(seed=row, prompt=[0], logprobs=count) for row, count in enumerate(counts)]
    for row, got in enumerate(sample(logits_BV, states)):
        count, want_V = counts[row], logits_BV[row].log_softmax(-1)
        values, ids = want_V.topk(min(count or 0, size))
        assert got.logprob == (None if count is None else want_V[got.token_id].item())
        assert got.top[: len(ids)] == tuple(zip(ids.tolist(), values.tolist(), strict=True))
        assert got.top[len(ids) :] in ((), ((got.token_id, got.logprob),))
        assert bool(got.top) == bool(count) and (not count or got.token_id in dict(got.top))


def test_how_many_alternatives() -> None:
    logits_BV = random_logits(9)
    want = int(logits_BV.argmax())
    assert sample(logits_BV, [state(temperature=0.0)])[0] == Sampled(token_id=want, logprob=None, top=())
    none = sample(logits_BV, [state(temperature=0.0, logprobs=0)])[0]
    assert none.logprob == pytest.approx(logits_BV.log_softmax(-1).max().item())
    assert none.top == ()
    assert len(sample(logits_BV, [state(temperature=0.0, logprobs=20)])[0].top) == 20
    assert len(sample(logits_BV[:, :6], [state(temperature=0.0, logprobs=20)])[0].top) == 6


# --- validation


def request(prompt: tuple[int, ...] = (1, 2), **params: Any) -> GenerationRequest:
    return GenerationRequest(request_id="r", prompt_token_ids=prompt, sampling=SamplingParams(**params))


NAN, INF = float("nan"), float("inf")
WRONG = [
    *[("temperature", v) for v in (-0.1, 2.1, NAN, INF)],
    *[("top_p", v) for v in (0.0, -0.5, 1.01, NAN)],
    *[("top_k", v) for v in (-2, -100)],
    *[("presence_penalty", v) for v in (-2.1, 2.1, NAN)],
    *[("frequency_penalty", v) for v in (-2.1, 2.1, NAN)],
    *[("repetition_penalty", v) for v in (0.0, -1.0, 1e-45, 1e9, NAN, INF)],
    *[("max_tokens", v) for v in (0, -3)],
    *[("logprobs", v) for v in (-1, 21)],
    *[("min_p", v) for v in (-0.1, 1.1, NAN)],
]


def test_all_tokens_are_top_k_0_or_as_vllm_writes_it() -> None:
    assert validate(request(top_k=-1), vocab_size=V).sampling.top_k == 0


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_parameters_without_meaning_are_refused(name: str, value: float) -> None:
    with pytest.raises(RequestError, match=rf"{name} is .*must be") as caught:
        validate(request(**{name: value}), vocab_size=V)
    assert caught.value.param == name
    assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("temperature", 2.0),
        ("top_p", 1.0),
        ("top_p", 1e-9),
        ("top_k", 0),
        ("top_k", 10**9),
        ("presence_penalty", -2.0),
        ("frequency_penalty", 2.0),
        ("repetition_penalty", 0.01),
        ("repetition_penalty", 10.0),
        ("max_tokens", 1),
        ("logprobs", 0),
        ("logprobs", 20),
        ("seed", -5),
        ("stop", ("x", " ")),
        ("stop", "x"),
        ("min_p", 1.0),
        ("logit_bias", {0: -100.0, V - 1: 100.0}),
        ("stop_token_ids", (0, V - 1)),
    ],
)
def test_the_edges_are_allowed_and_work(name: str, value: Any) -> None:
    validate(request(**{name: value}), vocab_size=V)
    got = sample(random_logits(12), [state(output=[1], **{name: value})])
    assert 0 <= got[0].token_id < V


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match="stop holds an empty string") as caught:
        validate(request(stop=("x", "")), vocab_size=V)
    assert caught.value.param == "stop"


@pytest.mark.parametrize("bad", [-1, V, V + 100])
def test_ids_past_the_vocabulary_would_have_no_effect_and_are_refused(bad: int) -> None:
    for name, value in (("stop_token_ids", (0, bad)), ("logit_bias", {0: 1.0, bad: 1.0})):
        with pytest.raises(RequestError, match=rf"{name} holds {bad}, must be in \[0, {V}\)") as caught:
            validate(request(**{name: value}), vocab_size=V)
        assert caught.value.param == name


@pytest.mark.parametrize("bias", [100.5, -101.0, NAN, INF])
def test_biases_are_bounded(bias: float) -> None:
    with pytest.raises(RequestError, match=r"logit_bias is .*must be a number from -100 to 100") as caught:
        validate(request(logit_bias={1: bias}), vocab_size=V)
    assert caught.value.param == "logit_bias"


@pytest.mark.parametrize("bad", [-1, V, V + 100])
def test_ids_past_the_vocabulary_are_refused(bad: int) -> None:
    validate(request((0, V - 1)), vocab_size=V)
    with pytest.raises(RequestError, match=rf"token id {bad}, must be in \[0, {V}\)") as caught:
        validate(request((0, bad)), vocab_size=V)
    assert caught.value.param == "prompt"


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="prompt is empty, must have at least one token") as caught:
        validate(request(()), vocab_size=V)
    assert caught.value.param == "prompt"
