"""The Triton remap against a brute-force twin, on a GPU or in Triton's interpreter.

The interpreter must be chosen before triton's first import, so the kernel runs in a process of its own: cases go in and
results come out as tensors in a file.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from math import exp, isnan
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from buddymoe_ray.policy.buddymoe import BuddyMoE, BuddyParams
from buddymoe_ray.policy.misses import Action, Misses, RowBudgets

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]

HIT, FETCH, BUDDY = int(Action.HIT), int(Action.FETCH), int(Action.BUDDY)

DRIVER = """
import sys, torch
from buddymoe_ray.kernels.triton_remap import remap
device = "cuda" if torch.cuda.is_available() else "cpu"
results = []
for case in torch.load(sys.argv[1], weights_only=True):
    tensors = [case.pop(name).to(device) for name in ("logits_TE", "slot_of_E", "candidate_EH")]
    got = remap(*tensors, **case)
    results.append((got.expert_TK.cpu(), got.action_TK.cpu(), got.weight_TK.cpu()))
torch.save(results, sys.argv[2])
"""

COMPILER = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from buddymoe_ray.kernels.triton_remap import _remap_kernel
sizes = dict(E=60, H=16, K=8, SIGMOID=False, RENORMALISE=True, PAD_E=64, PAD_H=16, PAD_K=8)
kinds = dict(logits_ptr="*fp32", slot_ptr="*i32", candidate_ptr="*i32", expert_ptr="*i32", action_ptr="*i32")
kinds |= dict(weight_ptr="*fp32", most="i32") | dict.fromkeys(sizes, "constexpr")
source = ASTSource(fn=_remap_kernel, signature=kinds, constexprs=sizes)
print(".target sm_90" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    logits_TE: Tensor
    slot_of_E: Tensor
    candidate_EH: Tensor
    top_k: int
    score: str = "softmax"
    renormalise: bool = False
    most: int | None = None


Answer = tuple[list[list[int]], list[list[int]], list[list[float]]]


def by_hand(case: Case) -> Answer:
    """The semantics in plain python, one token and one slot at a time."""
    answer: Answer = ([], [], [])
    resident = [slot >= 0 for slot in case.slot_of_E.tolist()]
    for logits in case.logits_TE.tolist():
        logits = [float("-inf") if isnan(value) else value for value in logits]
        wanted = sorted(range(len(logits)), key=lambda e: (-logits[e], e))[: case.top_k]
        if case.score == "sigmoid":
            scores = [1 / (1 + exp(-value)) for value in logits]
        else:
            scores = [exp(value - max(logits)) for value in logits]
            scores = [score / sum(scores) for score in scores]
        weights = [scores[e] for e in wanted]
        if case.renormalise:
            weights = [weight / sum(weights) for weight in weights]
        used = {e for e in wanted if resident[e]}
        experts, actions = [], []
        for e in wanted:
            action, most = HIT if resident[e] else FETCH, case.top_k if case.most is None else case.most
            if not resident[e] and actions.count(BUDDY) < most:
                free = [c for c in case.candidate_EH[e].tolist() if c >= 0 and resident[c] and c not in used]
                if free:
                    used.add(free[0])
                    e, action = free[0], BUDDY
            experts.append(e)
            actions.append(action)
        for column, row in zip(answer, (experts, actions, weights), strict=True):
            column.append(row)
    return answer


def random_case(seed: int, T: int, E: int, K: int, H: int, share: float, **options: object) -> Case:
    rng = torch.Generator().manual_seed(seed)
    slots = torch.randperm(E, generator=rng).to(torch.int32)
    slots[torch.rand(E, generator=rng) >= share] = -1
    candidates = torch.stack([torch.randperm(E, generator=rng) for _ in range(E)])[:, :H].to(torch.int32)
    candidates[torch.rand(E, H, generator=rng) < 0.1] = -1
    logits = torch.randn(T, E, generator=rng) * 2
    return Case(logits_TE=logits, slot_of_E=slots, candidate_EH=candidates, top_k=K, **options)  # type: ignore[arg-type]


def tied_case() -> Case:
    """Logits of four values only: nearly every choice is a tie."""
    case = random_case(20, 16, 32, 6, 8, 0.5)
    return Case(**{**vars(case), "logits_TE": case.logits_TE.round().clamp(-1, 2)})


def odd_logits_case() -> Case:
    case = random_case(21, 6, 12, 4, 6, 0.5)
    logits = case.logits_TE.clone()
    logits[0, 3] = float("nan")
    logits[1, :10] = float("-inf")
    logits[2] = 0.0
    logits[3] *= 1e4
    return Case(**{**vars(case), "logits_TE": logits})


CASES = {
    "half resident": random_case(1, 9, 32, 4, 8, 0.5),
    "a quarter resident, renormalised": random_case(2, 9, 32, 4, 16, 0.25, renormalise=True),
    "sigmoid": random_case(3, 7, 24, 6, 8, 0.5, score="sigmoid"),
    "sigmoid renormalised": random_case(4, 7, 60, 8, 5, 0.6, score="sigmoid", renormalise=True),
    "everything resident": random_case(5, 5, 16, 4, 4, 1.1),
    "nothing resident": random_case(6, 5, 16, 4, 4, 0.0),
    "few resident, so buddies run out": random_case(7, 9, 16, 8, 16, 0.3),
    "one substitution per token": random_case(8, 9, 16, 6, 12, 0.5, most=1),
    "no substitution": random_case(9, 4, 16, 6, 12, 0.5, most=0),
    "one token, one slot, one candidate": random_case(10, 1, 3, 1, 1, 0.5),
    "all experts chosen": random_case(11, 3, 7, 7, 7, 0.5),
    "ties": tied_case(),
    "odd logits": odd_logits_case(),
    "no tokens": random_case(12, 0, 8, 2, 2, 0.5),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    folder: Path = tmp_path_factory.mktemp("triton")
    torch.save([vars(case) for case in CASES.values()], folder / "cases.pt")
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    run = [sys.executable, "-c", DRIVER, str(folder / "cases.pt"), str(folder / "results.pt")]
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(CASES, torch.load(folder / "results.pt", weights_only=True), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_one_launch_is_the_slow_twin(name: str, answers: dict[str, tuple[Tensor, Tensor, Tensor]]) -> None:
    case, (expert_TK, action_TK, weight_TK) = CASES[name], answers[name]
    experts, actions, weights = by_hand(case)
    assert expert_TK.tolist() == experts
    assert action_TK.tolist() == actions
    expected = torch.tensor(weights).view(weight_TK.shape)
    torch.testing.assert_close(weight_TK, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("no tokens", "odd logits")])
def test_one_launch_is_the_policy(name: str, answers: dict[str, tuple[Tensor, Tensor, Tensor]]) -> None:
    """BuddyMoE with its gates open and candidates in falling q: the code that engines without the kernel run."""
    case, (expert_TK, action_TK, weight_TK) = CASES[name], answers[name]
    ids_TK = case.logits_TE.sort(dim=1, descending=True, stable=True).indices[:, : case.top_k]
    (T, E), H = case.logits_TE.shape, case.candidate_EH.shape[1]
    falling_H = np.linspace(1.0, 0.1, H, dtype=np.float32)
    policy = BuddyMoE(
        candidates_LEH=case.candidate_EH.long().numpy()[None],
        q_LEH=np.broadcast_to(falling_H, (1, E, H)),
        tau_L=np.array([-1.0], np.float32),
        params=BuddyParams(rho=case.top_k if case.most is None else case.most, eta=0.0, search=H),
    )
    fast = RowBudgets(
        mode_T=np.full(T, 2, np.int8),
        allowance_T=np.full(T, np.inf, np.float32),
        price_T=np.full(T, np.inf, np.float32),
    )
    misses = Misses(
        layer=0,
        ids_TK=ids_TK.numpy(),
        weight_TK=weight_TK.numpy(),
        resident_E=(case.slot_of_E >= 0).numpy(),
        score_TE=None,
        rows=fast,
    )
    resolution = policy.resolve(misses)
    assert np.array_equal(resolution.expert_TK, expert_TK.numpy())
    assert np.array_equal(resolution.action_TK, action_TK.numpy())
    assert np.array_equal(resolution.weight_TK, weight_TK.numpy())


@pytest.mark.parametrize("name", CASES)
def test_a_token_never_gets_an_expert_twice(name: str, answers: dict[str, tuple[Tensor, Tensor, Tensor]]) -> None:
    """And hits and buddies are resident, slots to be fetched are not."""
    case, (expert_TK, action_TK, _) = CASES[name], answers[name]
    for row in expert_TK.tolist():
        assert len(set(row)) == len(row), row
    resident_TK = case.slot_of_E[expert_TK.long()] >= 0
    assert torch.equal(resident_TK, action_TK != FETCH)


def test_the_cases_cover_every_action(answers: dict[str, tuple[Tensor, Tensor, Tensor]]) -> None:
    seen = torch.cat([action_TK.flatten() for _, action_TK, _ in answers.values()])
    assert set(seen.tolist()) == {HIT, FETCH, BUDDY}


def test_torch_topk_agrees_where_there_is_no_tie(answers: dict[str, tuple[Tensor, Tensor, Tensor]]) -> None:
    """Torch promises no order of ties; a stable sort has the kernel's."""
    case, (expert_TK, action_TK, _) = CASES["half resident"], answers["half resident"]
    ids_TK = case.logits_TE.topk(case.top_k).indices
    assert torch.equal(ids_TK[action_TK != BUDDY], expert_TK[action_TK != BUDDY].long())
    tied, (expert_TK, action_TK, _) = CASES["ties"], answers["ties"]
    ids_TK = tied.logits_TE.sort(dim=1, descending=True, stable=True).indices[:, : tied.top_k]
    assert torch.equal(ids_TK[action_TK != BUDDY], expert_TK[action_TK != BUDDY].long())


def test_it_compiles_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    """The interpreter takes more than the compiler does; ahead-of-time compilation needs no device."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", COMPILER], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "True", done.stderr[-2000:]
