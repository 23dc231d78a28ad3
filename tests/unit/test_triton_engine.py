"""An engine whose experts take a GPU's path, on a GPU or else in the interpreter, has the CPU's tokens."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from coded_checkpoints import quantised
from torch import Tensor

from buddymoe_ray.engine.llm import LLM
from buddymoe_ray.errors import ConfigError
from buddymoe_ray.kernels.reference import ENTERED
from buddymoe_ray.residency.arithmetic import _check_triton
from buddymoe_ray.types import EngineResult

DEVICE = "cuda" if torch.cuda.is_available() else "interpret"
PROMPTS = ["def add(a, b):\n", "Convert 3 km to m."]

ENGINES: dict[str, dict[str, Any]] = {
    "resident": {"memory": "100%"},
    "resident beside stand-ins": {"memory": "100%", "mode": "fast"},
    "fetching": {"memory": "50%"},
    "served packed": {"memory": "50%", "expert_dtype": "int4"},
    "standing in": {"memory": "25%", "mode": "fast"},
    "buddies": {"memory": "37.5%", "mode": "fast", "policy": "buddymoe"},
}


def answers(
    device: str, options: dict[str, Any], *, new_tokens: int, model: str = "builtin:tiny", prompts: Any = PROMPTS
) -> tuple[list[EngineResult], Counter[str]]:
    """Of greedy requests, and the reference kernels entered by their decode steps."""
    before = ENTERED.copy()
    with LLM(model, dtype="float32", device=device, guard_share=0.0, max_running=2, **options) as llm:
        llm.generate(prompts, max_tokens=1)  # by the prompts alone, so to say
        entered = ENTERED - before
        assert device == "cpu" or entered or "expert_dtype" in options, "nothing would be seen if it were entered"
        results = llm.generate(prompts, max_tokens=new_tokens)
    return results, ENTERED - before - entered - entered


@pytest.mark.parametrize("name", ENGINES)
def test_tokens_are_the_cpus_and_no_reference_kernel_is_entered(name: str) -> None:
    options, prompts = ENGINES[name], PROMPTS[: 1 + (name in ("resident", "standing in"))]  # the interpreter is slow
    (expected, _), (got, entered) = (
        answers(device, options, new_tokens=3, prompts=prompts) for device in ("cpu", DEVICE)
    )
    assert [r.token_ids for r in got] == [r.token_ids for r in expected]
    assert not entered, f"decode steps entered {entered}"
    used = [r.usage for r in got]
    assert sum(u.hits + u.fetched + u.standins.total for u in used) == len(prompts) * 2 * 4 * 4
    assert (sum(u.fetched for u in used) > 0) is (name in ("fetching", "served packed", "buddies"))
    assert (sum(u.standins.total for u in used) > 0) is (name in ("standing in", "buddies"))


GPT_OSS = {"hidden_size": 64, "num_local_experts": 8}


@pytest.mark.parametrize(
    ("family", "scheme", "sizes"),
    [("qwen3_moe", "fp8", {}), ("gpt_oss", "mxfp4", GPT_OSS)],
)
def test_quantised_checkpoints_enter_none_either(
    family: str, scheme: str, sizes: dict[str, int], tmp_path: Path
) -> None:
    coded, _ = quantised(family, scheme, tmp_path, **sizes)
    options, prompts = {"memory": "75%"}, [[5, 17, 90], [44, 7, 31, 8]]
    (expected, _), (got, entered) = (
        answers(device, options, new_tokens=3, model=str(coded), prompts=prompts) for device in ("cpu", DEVICE)
    )
    assert [r.token_ids for r in got] == [r.token_ids for r in expected]
    assert not entered, f"decode steps entered {entered}"
    assert all(r.usage.fetched > 0 for r in got)


def test_kernels_for_the_wrong_machine_are_refused() -> None:
    """Addresses of one are not the other's."""
    elsewhere: Any = SimpleNamespace(torch=torch.device("cuda" if DEVICE == "interpret" else "cpu"))
    with pytest.raises(ConfigError, match=r"TRITON_INTERPRET is \d in this process, must be \d .* hint: set"):
        _check_triton(elsewhere)


class Watched:
    """A kernel that counts the accesses of records and of experts that it computes, in a replay as in a launch."""

    def __init__(self, kernel: Any, computed: Counter[str]) -> None:
        self._kernel, self._computed = kernel, computed

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(x: Tensor, records: Tensor | None, levels: Tensor | None, *args: Any, **options: Any) -> None:
            ids, at_E, *_ = args
            there = (ids >= 0) & (at_E[ids.clamp(min=0)] >= 0)
            self._computed["records" if records is not None else "experts"] += int(there.sum())
            self._kernel[grid](x, records, levels, *args, **options)

        return run


@pytest.mark.parametrize("recorded", [True, False])
def test_what_is_there_runs_before_the_host_knows_what_is_missing(
    recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not run again: in a step that misses something, every access is computed once, by two products."""
    from buddymoe_ray.kernels.triton import programs

    computed = Counter[str]()
    monkeypatch.setattr(programs, "project", Watched(programs.project, computed))
    for mode in ("exact", "fast"):
        computed.clear()
        with LLM("builtin:tiny", dtype="float32", device=DEVICE, guard_share=0.0, memory="50%", mode=mode) as llm:
            llm.engine._runner.recorded = llm.engine._runner.recorded if recorded else None
            [result] = llm.generate(PROMPTS[:1], max_tokens=3)
        assert computed.total() == 2 * 2 * 4 * 4, "of two products, two steps, four layers, four experts of a token"
        assert computed["records"] == 2 * result.usage.standins.total and result.usage.hits > 0
