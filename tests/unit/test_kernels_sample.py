"""The sampler's machine code against its spec, which sorts; and the spec's own arithmetic.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from buddymoe_ray.kernels.sample import (
    SamplingState,
    choose_by_sort,
    choose_rows,
    choose_sorted,
    exponential_64,
    settings_of,
    uniform,
)
from buddymoe_ray.types import SamplingParams

torch.set_num_threads(1)
INF, NAN = float("inf"), float("nan")


def state(V: int, seed: int = 0, length: int = 5, **params: Any) -> SamplingState:
    rng = random.Random(seed)
    tokens = [rng.randrange(V) for _ in range(length)]
    return SamplingState(params=SamplingParams(**params), seed=seed, token_ids=tokens, prompt_length=length // 2)


def any_params(rng: random.Random, V: int) -> dict[str, Any]:
    """Settings of one row; each is left out about as often as not."""
    how: dict[str, Any] = {"temperature": rng.choice([0.0, 1e-40, 1e-3, 0.3, 0.7, 1.0, 1.0, 2.0, 30.0, 1e30])}
    choices: dict[str, Any] = {
        "top_p": rng.choice([1e-9, 0.1, 0.5, 0.9, 0.999]),
        "top_k": rng.choice([1, 2, 5, 50, V - 1, V, V + 1, 10**18]),
        "min_p": rng.choice([1e-30, 0.01, 0.3, 1.0]),
        "repetition_penalty": rng.choice([0.5, 1.3, 2.0]),
        "presence_penalty": rng.choice([-1.5, 0.7]),
        "frequency_penalty": rng.choice([-0.4, 1.1]),
        "logit_bias": {rng.randrange(V): rng.uniform(-100, 100) for _ in range(3)},
    }
    return how | {name: value for name, value in choices.items() if rng.random() < 0.35}


def logits(kind: str, B: int, V: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    x_BV = torch.randn(B, V, generator=rng) * 3
    if kind == "ties":
        x_BV = x_BV.round()
    elif kind == "equal":
        x_BV = torch.full((B, V), 2.5)
    elif kind == "forbidden":
        x_BV[torch.rand(B, V, generator=rng) < 0.7] = -INF
    elif kind == "wide":
        x_BV = x_BV.sinh() * 1e30 * torch.rand(B, V, generator=rng) ** 20
    elif kind == "zeros":
        x_BV = torch.where(x_BV > 0, 0.0, -0.0)
    elif kind == "odd":
        x_BV[torch.rand(B, V, generator=rng) < 1 / V] = [NAN, -NAN, INF, -INF][seed % 4]
    return x_BV


KINDS = ["normal", "ties", "equal", "forbidden", "wide", "zeros", "odd"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("V", [1, 2, 3, 127, 128, 129, 1000])
def test_the_machine_code_chooses_what_the_sort_chooses(kind: str, V: int) -> None:
    rng = random.Random(f"{kind}{V}")
    for seed in range(12):
        x_BV = logits(kind, 16, V, seed)
        states = [state(V, rng.getrandbits(64), rng.randrange(1, 200), **any_params(rng, V)) for _ in range(16)]
        want = [choose_by_sort(x_V, s) for x_V, s in zip(x_BV, states, strict=True)]
        assert choose_rows(x_BV, states) == want
        assert [choose_rows(x_BV[row:][:1], [s])[0] for row, s in enumerate(states)] == want


@pytest.mark.parametrize("kind", KINDS)
def test_so_it_does_in_a_large_vocabulary(kind: str) -> None:
    V, rng = 151_936, random.Random(kind)
    x_BV = logits(kind, 12, V, 1)
    states = [state(V, rng.getrandbits(64), rng.randrange(1, 99), **any_params(rng, V)) for _ in range(12)]
    assert choose_rows(x_BV, states) == [choose_by_sort(x_V, s) for x_V, s in zip(x_BV, states, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_sorted_side_by_side_on_a_device(kind: str) -> None:
    """Greedy ones beside others, for the next token and for the one behind it."""
    shifts, rng = ("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias"), random.Random(kind)
    for V in (1, 129, 1000):
        x_BV = logits(kind, 20, V, 3)
        how = [{k: v for k, v in any_params(rng, V).items() if k not in shifts} for _ in range(20)]
        states = [state(V, seed, 7, **params) for seed, params in enumerate(how)]
        ahead = settings_of(states, ahead=1)
        assert choose_sorted(x_BV, settings_of(states)).tolist() == choose_rows(x_BV, states)
        for one in states:
            one.token_ids.append(0)
        assert choose_sorted(x_BV, ahead).tolist() == choose_rows(x_BV, states)
    assert choose_sorted(x_BV.to("meta"), settings_of(states)).shape == (20,), "and nobody is asked"
    assert settings_of([state(V, temperature=0.0)]) is None and choose_sorted(x_BV.to("meta"), None).shape == (20,)


def test_rows_may_lie_anywhere() -> None:
    states = [state(50, seed) for seed in range(4)]
    x_BV = logits("normal", 50, 8, 3).t()[:4]
    want = choose_rows(logits("normal", 50, 8, 3).t().contiguous()[:4], [state(8, seed) for seed in range(4)])
    assert x_BV.stride(1) != 1
    assert choose_rows(x_BV, [state(8, seed) for seed in range(4)]) == want
    one_V = logits("normal", 1, 50, 4)[0]
    assert choose_rows(one_V.expand(4, -1), states) == [choose_by_sort(one_V, s) for s in states]


def by_float_sums(logits_V: Tensor, p: SamplingParams, number: float) -> int:
    """As it was before weights were integers: sums of float64 probabilities in falling order."""
    values_V, order_V = logits_V.sort(descending=True, stable=True)
    if 0 < p.top_k < len(values_V):
        values_V = values_V[values_V >= values_V[p.top_k - 1]]
    scaled_V = (values_V.double() - values_V[0].double()) / p.temperature
    if p.min_p:
        scaled_V = scaled_V[scaled_V.exp() >= p.min_p]
    probs_V = scaled_V.softmax(dim=-1)
    sums_V = probs_V.cumsum(dim=-1)
    if p.top_p < 1.0:
        sums_V = sums_V[: max(1, int((sums_V - probs_V < p.top_p).sum()))]
    return int(order_V[min(int(torch.searchsorted(sums_V, number * sums_V[-1].item(), right=True)), len(sums_V) - 1)])


@pytest.mark.parametrize("V", [2, 1000, 50_304])
def test_integer_weights_choose_what_float_sums_chose(V: int) -> None:
    rng = random.Random(V)
    for seed in range(40):
        how = {"temperature": rng.uniform(0.3, 2.0), "top_p": rng.uniform(0.3, 1.0), "min_p": rng.choice([0.0, 0.01])}
        one = state(V, seed, top_k=rng.choice([0, 40]), **how)
        x_V = logits("normal", 1, V, seed)[0]
        assert choose_rows(x_V[None], [one])[0] == by_float_sums(x_V, one.params, uniform(one.seed, one.position))


def test_what_is_no_distribution_gives_what_greedy_takes() -> None:
    for values, want in (
        ([1.0, NAN, 3.0, NAN], 1),
        ([1.0, -NAN, INF], 1),
        ([1.0, INF, INF], 1),
        ([-INF, -INF], 0),
    ):
        for how in ({}, {"top_p": 0.5}, {"top_k": 1}, {"min_p": 0.2}, {"temperature": 0.0}):
            assert choose_rows(torch.tensor([values]), [state(len(values), **how)]) == [want]


def test_a_token_past_the_vocabulary_is_refused() -> None:
    x_BV = torch.zeros(1, 4)
    with pytest.raises(IndexError):
        choose_rows(x_BV, [state(4, logit_bias={4: 1.0})])
    far = SamplingState(params=SamplingParams(presence_penalty=1.0), seed=0, token_ids=[9], prompt_length=0)
    with pytest.raises(IndexError):
        choose_rows(x_BV, [far])


def test_the_exponential_is_close_and_exact_where_it_must_be() -> None:
    s_V = torch.cat((-torch.rand(100_000, dtype=torch.float64) * 64, -torch.logspace(-300, 1, 999).double()))
    assert float((exponential_64(s_V) / s_V.exp() - 1).abs().max()) <= 2**-51
    assert exponential_64(torch.tensor([0.0, -0.0], dtype=torch.float64)).tolist() == [1.0, 1.0]
    assert exponential_64(torch.tensor([-INF], dtype=torch.float64)).item() < 2**-90


def test_both_twins_draw_the_same_numbers() -> None:
    """Of 8192 equal tokens the one chosen says what the number was."""
    rng, V = random.Random(0), 8192
    states = [state(V, rng.getrandbits(64), rng.randrange(1, 3000)) for _ in range(200)]
    drawn = choose_rows(torch.zeros(1, V).expand(200, -1), states)
    assert drawn == [int(uniform(s.seed, s.position) * V) for s in states]
