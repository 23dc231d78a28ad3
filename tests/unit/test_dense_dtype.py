"""Dense weights in another precision: what is packed, that it computes as the spec does, and what it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import build_checkpoint

from buddymoe_ray import LLM
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.errors import ConfigError
from buddymoe_ray.kernels import CpuLinear, LowbitFormat, pack_plain
from buddymoe_ray.kernels.lowbit import dequantise
from buddymoe_ray.kernels.rowwise import rowwise_linear
from buddymoe_ray.models.dense_dtype import PackedLinear
from buddymoe_ray.models.hf_loading import experts_modules
from buddymoe_ray.models.load import load_model, on_kernels
from buddymoe_ray.models.resolve import resolve_model
from buddymoe_ray.models.router_hook import find_routers
from buddymoe_ray.residency.devices import GpuInfo
from buddymoe_ray.residency.plan import make_plan

PROMPTS = ["def add(a, b):\n", "import os\n", "The following example"]
FAMILIES = [
    "olmoe",
    "qwen2_moe",
    "deepseek_v2",
    "gpt_oss",
    "ernie4_5_moe",
    "jamba",
    "lfm2_moe",
    "minimax",
    "qwen3_next",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "N", "K"), [(4, 40, 72), (8, 16, 32), (8, 33, 40)])
def test_a_packed_matrix_is_the_spec_and_rows_do_not_see_each_other(
    bits: int, N: int, K: int, dtype: torch.dtype
) -> None:
    rng = torch.Generator().manual_seed(bits * N)
    fmt = LowbitFormat(bits=bits)
    packed = pack_plain(torch.randn(N, K, generator=rng), fmt)
    bias = torch.randn(N, generator=rng)
    x = torch.randn(9, K, generator=rng).to(dtype)
    linear = CpuLinear(packed, fmt, dtype, bias)
    found = linear(x)
    expected = rowwise_linear(x.float(), dequantise(packed, fmt), bias)
    error = (found.float() - expected).norm() / expected.norm()
    assert found.dtype == dtype and error < (1e-6 if dtype == torch.float32 else 4e-3)  # bfloat16 rounds the answer
    for count in (1, 2, 5):
        assert torch.equal(linear(x[:count]), found[:count])
    assert torch.equal(linear(x.flip(0)).flip(0), found)


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_threads_change_no_bit(rows: int) -> None:
    """Of outputs that are no whole blocks, in parts that are not equal."""
    rng = torch.Generator().manual_seed(rows)
    fmt, (N, K) = LowbitFormat(bits=4), (1127, 1024)
    packed = pack_plain(torch.randn(N, K, generator=rng), fmt)
    bias, x = torch.randn(N, generator=rng), torch.randn(rows, K, generator=rng)
    alone = CpuLinear(packed, fmt, torch.float32, bias)(x)
    for threads in (2, 3, 200):
        assert torch.equal(CpuLinear(packed, fmt, torch.float32, bias, threads=threads)(x), alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_and_hardly_differs(family: str, tmp_path: Path) -> None:
    """int8: the log probabilities of a prompt's next token move by less than a quarter; routers stay. The random
    qwen3_next sends a token to another expert at .3 % of noise on its weights, so of it most prompts count."""
    wide = {"mamba_dt_rank": 16} if family == "jamba" else {}  # as releases', so that its time steps could be packed
    build_checkpoint(family, tmp_path, **wide)
    chaotic = family == "qwen3_next"
    prompts = [[7, 11, 13, 17, 19, 23, 29], [5, 3, 8, 60, 41], [90, 12, 33, 34, 35, 36]][: 3 if chaotic else 1]
    seen: list[list[dict[int, float]]] = []
    for dense_dtype in ("native", "int8"):
        with LLM(str(tmp_path), memory="100%", dtype="float32", dense_dtype=dense_dtype) as llm:
            results = llm.generate(prompts, max_tokens=1, logprobs=20, temperature=0.0)
            seen.append([dict(result.logprobs[0].top) for result in results])
    both = [one.keys() & other.keys() for one, other in zip(*seen, strict=True)]
    moved = [max(abs(seen[0][i][token] - seen[1][i][token]) for token in both[i]) for i in range(len(prompts))]
    assert min(map(len, both)) >= (12 if chaotic else 15), both
    assert sorted(moved)[len(moved) // 2] < 0.25, moved
    model = on_kernels(load_model(tmp_path), "int8").model
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    experts = experts_modules(model)
    assert any(name.endswith("lm_head") for name in packed)
    assert not any(name.startswith(tuple(experts)) for name in packed)
    counts = [next(module.parameters()).shape[0] for module in experts.values()]
    for router in find_routers(model, tuple(experts.values()), counts):
        assert router is None or not any(isinstance(part, PackedLinear) for part in router.modules())


@pytest.mark.parametrize("dense_dtype", ["int8", "int4"])
def test_exact_is_exact_to_it_at_every_budget(dense_dtype: str) -> None:
    def tokens(memory: str, batch: int) -> list[tuple[int, ...]]:
        with LLM("builtin:tiny", memory=memory, dense_dtype=dense_dtype, max_running=batch) as llm:
            return [result.token_ids for result in llm.generate(PROMPTS, max_tokens=16)]

    assert tokens("25%", 3) == tokens("50%", 1) == tokens("100%", 3)


def test_the_plan_counts_what_will_be_there() -> None:
    folder, taken = resolve_model("builtin:tiny"), []
    for dense_dtype in ("native", "int8", "int4"):
        plan = make_plan(EngineConfig(dense_dtype=dense_dtype), folder, gpus=())
        assert plan.dense_bytes == on_kernels(load_model(folder), dense_dtype).dense_bytes
        assert plan.dense_dtype == dense_dtype
        taken.append(plan.dense_bytes)
    native, int8, int4 = taken
    embedding = load_model(folder).model.get_input_embeddings().weight.nbytes
    rest = native - embedding
    # what is packed is nearly all of the rest; the output head, tied to the embedding, has a copy of its own
    assert int4 < int8 and int8 - embedding < 0.27 * (rest + embedding) + 0.2 * rest


def test_other_words_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"dense_dtype is 'int5', must be native or int8 or int4. hint: did you mean"):
        EngineConfig(dense_dtype="int5")


def test_a_gpu_has_no_kernel_for_it() -> None:
    gpu = GpuInfo(
        index=0, name="H200", total_bytes=1 << 37, free_bytes=1 << 37, pcie_bytes_s=6e10, nvlinks=0, numa_node=None
    )
    with pytest.raises(ConfigError, match=r"dense_dtype is 'int8', must be native on cuda. hint: --device cpu"):
        make_plan(EngineConfig(dense_dtype="int8"), resolve_model("builtin:tiny"), gpus=(gpu,))
