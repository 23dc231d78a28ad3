"""Decoder layers in one call: which are, that it changes no bit, and that what computes otherwise is left alone."""

from __future__ import annotations

import logging
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import build_checkpoint
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

from buddymoe_ray import LLM
from buddymoe_ray.cache import Glance
from buddymoe_ray.engine import build, one_call, plain_forward
from buddymoe_ray.engine.plain_forward import PlainForward
from buddymoe_ray.kernels import CpuRouter, DecoderLayers, cpu, expert_layer, paged_attention
from buddymoe_ray.models.row_kernels import SoftmaxRouter, rows_apart
from buddymoe_ray.moe import MoEBlock

WHOLE = ("mixtral", "olmoe", "qwen3_moe")
"""Families whose router and experts are in the call."""
HALF = ("dots1", "glm4_moe", "minimax_m2", "qwen2_moe")
"""Families whose feed-forward stays a module: shared experts, or another router."""
NEITHER = ("deepseek_v3", "ernie4_5_moe", "flex_olmo", "gpt_oss", "granitemoe", "hunyuan_v1_moe", "phimoe")
PROMPTS = [[5 + (7 * i + 3 * j) % 90 for j in range(n)] for i, n in enumerate((23, 3, 17))]

Bits = list[list[tuple[int, float]]]


def bits(model: str | Path, **options: Any) -> Bits:
    with LLM(str(model), **{"memory": "100%", "max_model_len": 64, **options}) as llm:
        results = llm.generate(PROMPTS, max_tokens=8, logprobs=0)
    return [[(item.token_id, item.logprob) for item in result.logprobs] for result in results]


def layers_in_one_call(model: Path, caplog: pytest.LogCaptureFixture, **options: Any) -> tuple[int, int]:
    """How many, and how many of them with router and experts, as the log says."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger=one_call.__name__):
        LLM(str(model), memory="100%", max_model_len=64, **options).close()
    [said] = [record for record in caplog.records if record.name == one_call.__name__]
    return said.args  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [*WHOLE, *HALF, *NEITHER])
def test_layers_that_compute_what_the_kernel_does(
    family: str, dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build_checkpoint(family, tmp_path, dtype=dtype)
    count, whole = layers_in_one_call(tmp_path, caplog)
    assert (count > 0, whole) == (family in WHOLE + HALF, count if family in WHOLE else 0)


@pytest.mark.parametrize("memory", ["100%", "40%"])
@pytest.mark.parametrize(
    ("family", "form"),
    [
        *((family, {"dtype": dtype}) for family in ("olmoe", "glm4_moe") for dtype in ("float32", "bfloat16")),
        ("qwen3_moe", {"expert_dtype": "int4", "dense_dtype": "int8"}),
        ("qwen2_moe", {"dtype": "bfloat16", "expert_dtype": "int8"}),
        ("mixtral", {"dtype": "bfloat16", "dense_dtype": "int4"}),
        ("minimax_m2", {}),
    ],
)
def test_one_call_gives_the_bits_of_the_modules(
    family: str, form: dict[str, str], memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_checkpoint(family, tmp_path)
    once = bits(tmp_path, memory=memory, **form)
    monkeypatch.setattr(one_call, "attach", lambda *_: 0)
    assert bits(tmp_path, memory=memory, **form) == once


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """Classes of the forward passes that were chosen."""
    found, choose = list[type](), build.choose_forward

    def choosing(*args: Any) -> Any:
        forward = choose(*args)
        found.append(type(forward))
        return forward

    monkeypatch.setattr(build, "choose_forward", choosing)
    return found


@pytest.mark.parametrize("family", [*WHOLE, *HALF, *NEITHER])
def test_the_forward_pass_is_the_plain_chain_where_all_layers_are_in_calls(
    family: str, tmp_path: Path, chosen: list[type]
) -> None:
    build_checkpoint(family, tmp_path)
    LLM(str(tmp_path), memory="100%", max_model_len=64).close()
    assert (chosen == [PlainForward]) == (family in WHOLE + HALF)


@pytest.mark.parametrize("what", ["scales what it embeds", "caps its logits", "is listened to", "has another part"])
def test_a_model_whose_forward_does_more_keeps_it(
    what: str, tmp_path: Path, chosen: list[type], monkeypatch: pytest.MonkeyPatch
) -> None:
    build_checkpoint("mixtral", tmp_path)
    attach = one_call.attach

    def changed(loaded: Any, *rest: Any) -> int:
        model = loaded.model
        embed, head = model.model.forward, model.forward
        if what == "scales what it embeds":
            vectors = model.model.embed_tokens
            model.model.forward = lambda input_ids, **more: embed(**more | {"inputs_embeds": 1.01 * vectors(input_ids)})
        elif what == "caps its logits":
            model.forward = lambda **more: SimpleNamespace(logits=torch.tanh(head(**more).logits))
        elif what == "is listened to":
            model.model.layers[1].register_forward_hook(lambda *_: None)
        else:
            model.model.add_module("adapter", torch.nn.Identity())
        return attach(loaded, *rest)

    monkeypatch.setattr(one_call, "attach", changed)
    kept = bits(tmp_path)
    assert len(chosen) == 1 and PlainForward not in chosen
    monkeypatch.setattr(plain_forward, "_chain", lambda _: None)
    assert bits(tmp_path) == kept


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("olmoe", {}),
        ("dots1", {"dtype": "bfloat16"}),
        ("qwen3_moe", {"expert_dtype": "int4", "dense_dtype": "int4"}),
    ],
)
def test_two_threads_give_the_bits_of_one(
    family: str, form: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However little there is to share."""
    build_checkpoint(family, tmp_path)
    one, shared = bits(tmp_path, threads=1, **form), set[str]()
    monkeypatch.setattr(paged_attention, "THREADED_ITEMS", 0)
    for module in (cpu, expert_layer):
        monkeypatch.setattr(module, "THREADED_WEIGHTS", 0)
    for module in (cpu, expert_layer, paged_attention):

        def counted(run: Any, shares: Any, name: str = module.__name__, in_threads: Any = module.in_threads) -> Any:
            shared.add(name)
            return in_threads(run, shares)

        monkeypatch.setattr(module, "in_threads", counted)
    assert bits(tmp_path, threads=2, **form) == one
    assert len(shared) == 3, "linears, experts and attention are shared"


def test_layers_that_do_something_else_keep_their_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a class whose others are in one call: what comes behind is told by its answer, not by its name."""
    build_checkpoint("mixtral", tmp_path)
    forward = MixtralDecoderLayer.forward

    def louder(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return forward(self, hidden_states, **kwargs) * (1.01 if self.self_attn.layer_idx == 1 else 1.0)

    monkeypatch.setattr(MixtralDecoderLayer, "forward", louder)
    count, whole = layers_in_one_call(tmp_path, caplog)
    assert count == whole == 2
    expected = bits(tmp_path)
    monkeypatch.setattr(one_call, "attach", lambda *_: 0)
    assert bits(tmp_path) == expected


def test_layers_between_which_something_happens_are_not_computed_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their own calls are what they were."""
    build_checkpoint("mixtral", tmp_path)
    enter = MixtralDecoderLayer.__call__

    def louder(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return enter(self, hidden_states * 1.01 if self.self_attn.layer_idx == 1 else hidden_states, *args, **kwargs)

    assert computed_together(tmp_path, monkeypatch) == {(0, 3)}
    monkeypatch.setattr(MixtralDecoderLayer, "__call__", louder)
    assert computed_together(tmp_path, monkeypatch) == {(0, 1), (0, 2)}
    expected = bits(tmp_path)
    monkeypatch.setattr(one_call, "attach", lambda *_: 0)
    assert bits(tmp_path) == expected


def computed_together(model: Path, monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, int]]:
    """The first layer of a call that went as far as it may, of its stretch, and how many layers it computed."""
    seen, call = set[tuple[int, int]](), DecoderLayers.__call__

    def watched(self: DecoderLayers, first: int, *args: Any) -> Any:
        routed = call(self, first, *args)
        seen.update([(first, routed.done)] if len(args) > 3 else [])
        return routed

    with monkeypatch.context() as patch:
        patch.setattr(DecoderLayers, "__call__", watched)
        bits(model)
    return seen


@pytest.mark.parametrize(
    "options", [{"mode": "exact", "memory": "100%"}, {"mode": "bounded", "memory": "50%"}], ids=str
)
def test_of_layers_computed_together_those_count_whose_experts_stayed(
    options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first that lost one is computed again, by its block, and a new call begins behind it."""
    again, words, call = list[int](), list[Any](), MoEBlock.__call__

    def counted(self: MoEBlock, *args: Any, **kwargs: Any) -> torch.Tensor:
        again.append(self.layer if kwargs.get("glanced") else -1)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(MoEBlock, "__call__", counted)

    def answered(lost: tuple[int, ...]) -> Any:
        with LLM("builtin:tiny", guard_share=0.0, **options) as llm:  # type: ignore[arg-type]
            cache: Any = llm.engine.cache
            for layer in lost:
                seen, word = cache.glance(layer), np.zeros(1, np.int64)
                moved = np.tile([[word.ctypes.data], [1]], len(seen.at_E))  # seen was 1, found is 0
                words.append(word)
                cache._glances[layer] = Glance(seen.at_E, seen.used, moved)
            results = llm.generate(["def add(a, b):", "import os"], max_tokens=12, temperature=0.0, logprobs=0)
            return [([(item.token_id, item.logprob) for item in r.logprobs], r.usage) for r in results]

    kept = answered(())
    before = again.count(1), again.count(2)
    assert answered((1, 2)) == kept
    assert again.count(1) >= before[0] + 11 and again.count(2) >= before[1] + 11, "in each step of decode"


def test_clipped_queries_keep_their_modules(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Which no trial need reach."""
    build_checkpoint("olmoe", tmp_path, clip_qkv=1e6)
    assert layers_in_one_call(tmp_path, caplog) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("E", "K", "normalised"), [(8, 2, True), (64, 8, False), (60, 4, True), (5, 5, False)])
def test_the_router_chooses_as_torch(E: int, K: int, normalised: bool, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(E)
    weight_ED = torch.randn(E, 32, generator=rng).to(dtype)
    router = CpuRouter(weight_ED, K, normalised=normalised, weight_dtype=torch.float32)
    logits_TE, weight_TK, ids_TK = router(torch.randn(40, 32, generator=rng).to(dtype))
    shares_TE = logits_TE.float().softmax(dim=-1)
    expected_TK, _ = shares_TE.topk(K)
    torch.testing.assert_close(shares_TE.gather(1, ids_TK), expected_TK)
    assert all(len({*row}) == K for row in ids_TK.tolist())
    if normalised:
        expected_TK = expected_TK / expected_TK.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(weight_TK, expected_TK)


def test_of_equal_logits_the_first_experts_are_chosen_and_nonsense_chooses_experts() -> None:
    router = CpuRouter(torch.ones(6, 4), 3, normalised=True, weight_dtype=torch.bfloat16)
    x_TD = torch.tensor([[1.0, 2.0, 3.0, 4.0], [float("nan"), 0.0, 0.0, 0.0], [float("inf"), 0.0, 0.0, 0.0]])
    _, weight_TK, ids_TK = router(x_TD)
    assert ids_TK[0].tolist() == [0, 1, 2] and torch.allclose(weight_TK[0].float(), torch.tensor(1 / 3), rtol=4e-3)
    assert ids_TK.min() >= 0 and ids_TK.max() < 6 and weight_TK[1].isnan().all()


class Router(torch.nn.Module):
    """As transformers' routers; what it makes of the logits is asked."""

    def __init__(self, choose: Any) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(2)
        self.weight, self.choose = torch.nn.Parameter(torch.randn(8, 64, generator=rng)), choose

    def forward(self, hidden_states: torch.Tensor) -> Any:
        logits_TE = torch.nn.functional.linear(hidden_states, self.weight)
        return (logits_TE, *self.choose(logits_TE).topk(2))


def all_but_one_group(logits_TE: torch.Tensor, groups: int) -> torch.Tensor:
    """Shares, none in the group whose two best are worth least together (Mistral 4, DeepSeek)."""
    shares_TGe = logits_TE.softmax(dim=-1).unflatten(1, (groups, -1))
    worth_TG = shares_TGe.topk(min(2, shares_TGe.shape[2])).values.sum(dim=-1)
    last_T = worth_TG.argmin(dim=1)
    return (shares_TGe * (torch.arange(groups) != last_T[:, None]).unsqueeze(-1)).flatten(1)


def test_only_a_softmaxs_top_k_is_taken_for_one() -> None:
    cases = {
        "softmax": (lambda logits_TE: logits_TE.softmax(dim=-1), True),
        "sigmoid": (lambda logits_TE: logits_TE.sigmoid(), False),
        "tempered": (lambda logits_TE: (logits_TE / 2).softmax(dim=-1), False),
        "a half per cent more": (lambda logits_TE: logits_TE.softmax(dim=-1) * 1.005, False),
        "the last expert never": (lambda logits_TE: logits_TE.softmax(dim=-1) * (torch.arange(8) < 7), False),
        "two of all but the last": (lambda logits_TE: all_but_one_group(logits_TE, 8), True),
        "two of the three best of four groups": (lambda logits_TE: all_but_one_group(logits_TE, 4), False),
    }
    for (name, (choose, taken)), dtype in product(cases.items(), (torch.float32, torch.bfloat16)):
        model = torch.nn.Module()
        model.gate, model.device = Router(choose).to(dtype), torch.device("cpu")
        rows_apart(model, [model.gate])
        assert isinstance(model.gate.forward, SoftmaxRouter) == taken, f"{name} in {dtype}"
