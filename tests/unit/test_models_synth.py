"""Synthetic checkpoints: real shapes, stock transformers routes them as the skew says, memory stays bounded."""

from __future__ import annotations

import errno
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import stock_logits
from safetensors.torch import load_file
from slot_oracle import SlotBuffer, attach_oracle
from torch import Tensor
from transformers import AutoModelForCausalLM

from buddymoe_ray.errors import CheckpointError, ConfigError
from buddymoe_ray.kernels import decoded
from buddymoe_ray.models import shard_writer
from buddymoe_ray.models.hf_loading import experts_modules
from buddymoe_ray.models.load import load_model
from buddymoe_ray.models.quantised import CodedTensor, find_coded
from buddymoe_ray.models.shape import describe
from buddymoe_ray.models.synth import SHAPES, Popularity, popularity_ranks, synth_checkpoint
from buddymoe_ray.models.synth_weights import SynthWeights
from buddymoe_ray.models.tensor_index import TensorLocation, read_index

TINY = sorted(name for name in SHAPES if name.endswith("-tiny"))
REAL_PARAMETERS = {  # as the models' own cards and files count them
    "olmoe-1b-7b": 6_919_161_856,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "deepseek-v2-lite": 15_706_484_224,
    "gpt-oss-20b": 20_914_757_184,
}
IDS = torch.randint(3, 500, (4, 64), generator=torch.Generator().manual_seed(3))


def all_tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def routed(folder: Path) -> dict[int, tuple[Tensor, Tensor]]:
    """Router logits `[T, E]` and choices `[T, K]` of stock transformers, by layer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def spy(name: str) -> Callable[..., None]:
        block = model.get_submodule(name.rsplit(".", 1)[0])
        router = getattr(block, "gate", None) or block.router

        def hook(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[int(name.split("layers.")[1].split(".")[0])] = (args[0] @ router.weight.T, args[1])

        return hook

    for name, module in experts_modules(model).items():
        module.register_forward_pre_hook(spy(name))
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    return seen


@pytest.mark.parametrize("shape", TINY)
def test_stock_and_ours_agree_on_a_synthetic_checkpoint(shape: str, tmp_path: Path) -> None:
    folder = synth_checkpoint(shape, tmp_path / "m", popularity=Popularity(skew=1.0), seed=1)
    loaded = load_model(folder, dtype=torch.float32)
    attach_oracle(loaded)
    with torch.inference_mode():
        got = loaded.model(input_ids=IDS, use_cache=False).logits
    want = stock_logits(folder, IDS)
    assert torch.equal(got, want)
    assert 0.5 < want.std() < 2, "logits of a random model are of the order of one"
    assert want.argmax(-1).unique().numel() > 50, "tokens must differ by context and input"


@pytest.mark.parametrize("shape", TINY)
@pytest.mark.parametrize("skew", [0.0, 1.0, 2.0])
def test_skew_is_the_slope_of_router_logits_over_log_rank(shape: str, skew: float, tmp_path: Path) -> None:
    folder = synth_checkpoint(shape, tmp_path / "m", popularity=Popularity(skew=skew), seed=3)
    for layer, (logits_TE, _) in routed(folder).items():
        E = logits_TE.shape[1]
        log_rank_E = torch.tensor(popularity_ranks(E, layer=layer, seed=3)).double().log()
        mean_E = logits_TE.double().mean(0).detach()
        centred_E = log_rank_E - log_rank_E.mean()
        slope = ((mean_E - mean_E.mean()) * centred_E).sum() / centred_E.square().sum()
        noise = (logits_TE - logits_TE.mean(0)).std()
        assert slope == pytest.approx(-skew, abs=0.12), f"layer {layer}"
        assert noise == pytest.approx(0.9, rel=0.15), f"layer {layer}: tokens must still disagree"


def test_skew_concentrates_the_choices_and_zero_does_not(tmp_path: Path) -> None:
    share = {}
    for skew in (0.0, 1.0):
        folder = synth_checkpoint("olmoe-tiny", tmp_path / str(skew), popularity=Popularity(skew=skew))
        for layer, (_, ids_TK) in routed(folder).items():
            ranks = torch.tensor(popularity_ranks(32, layer=layer, seed=0))
            share[skew, layer] = (ranks[ids_TK] <= 8).float().mean().item()
    assert all(0.15 < share[0.0, layer] < 0.36 for layer in range(3)), share
    assert all(share[1.0, layer] > 0.55 for layer in range(3)), share


def test_ranks_are_a_permutation_of_their_own_in_each_layer() -> None:
    ranks = [popularity_ranks(64, layer=layer, seed=0) for layer in range(4)]
    assert all(sorted(r) == list(range(1, 65)) for r in ranks)
    assert len(set(ranks)) == 4
    assert popularity_ranks(64, layer=0, seed=0) == ranks[0] != popularity_ranks(64, layer=0, seed=1)


@pytest.mark.parametrize("shape", TINY)
def test_constant_channel_is_built_as_specified(shape: str, tmp_path: Path) -> None:
    tensors = all_tensors(synth_checkpoint(shape, tmp_path / "m", popularity=Popularity(skew=1.0)))
    embedding = next(t for key, t in tensors.items() if key.endswith("embed_tokens.weight"))
    assert (embedding[:, 0] == 1).all() and embedding[:, 1:].abs().max() < 0.1
    outs = [
        key for key in tensors if key.endswith(("o_proj.weight", "down_proj.weight", ".w2.weight", "experts.down_proj"))
    ]
    assert len(outs) > 3
    for key in outs:
        zero = tensors[key][..., 0] if key.endswith("experts.down_proj") else tensors[key][0]
        assert (zero == 0).all(), key
        assert tensors[key].count_nonzero() > 0.9 * (tensors[key].numel() - zero.numel()), key
    assert all((t == 0).all() for key, t in tensors.items() if key.endswith("bias"))


@pytest.mark.parametrize("shape", TINY)
def test_no_two_experts_are_equal(shape: str, tmp_path: Path) -> None:
    loaded = load_model(synth_checkpoint(shape, tmp_path / "m"))
    buffer = SlotBuffer(loaded.layout)
    for entry in loaded.layout.tensors:
        if entry.name.endswith("bias"):
            continue
        runs = {
            bytes(buffer.tensor(key, entry.name).view(torch.uint8).flatten()[:4096].tolist()) for key in buffer.slot_of
        }
        assert len(runs) == len(buffer.slot_of), entry.name


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path) -> None:
    a, b, c = (
        synth_checkpoint("qwen3-tiny", tmp_path / n, popularity=Popularity(skew=1.0), seed=s)
        for n, s in (("a", 5), ("b", 5), ("c", 6))
    )
    first, second, third = (next(p.glob("*.safetensors")).read_bytes() for p in (a, b, c))
    assert first == second != third


def test_shards_are_split_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as small:
        small.setattr(shard_writer, "SHARD_BYTES", 300_000)
        folder = synth_checkpoint("mixtral-tiny", tmp_path / "m")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 5 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    one = synth_checkpoint("mixtral-tiny", tmp_path / "one")
    split, whole = all_tensors(folder), all_tensors(one)
    assert split.keys() == whole.keys() and all(torch.equal(split[key], whole[key]) for key in whole)


@pytest.mark.parametrize("shape", sorted(REAL_PARAMETERS))
def test_real_shapes_have_the_real_number_of_parameters(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def refuse(folder: Path, nbytes: int) -> None:
        asked.append(nbytes)
        raise CheckpointError("enough")

    monkeypatch.setattr("buddymoe_ray.models.synth.check_space", refuse)
    with pytest.raises(CheckpointError, match="enough"):
        synth_checkpoint(shape, tmp_path / "m")
    assert asked == [2 * REAL_PARAMETERS[shape]]
    assert not (tmp_path / "m").exists()


def test_layers_cut_the_model(tmp_path: Path) -> None:
    shape = describe(synth_checkpoint("deepseek-v2-tiny", tmp_path / "m", layers=2))
    assert (shape.num_layers, shape.moe_layers, shape.has_weights) == (2, 1, True)
    assert (shape.expert_dtype, shape.compute_dtype) == ("bfloat16", "bfloat16")


@pytest.mark.parametrize("layers", [0, -1, 1, 4])
def test_layers_that_leave_no_experts_or_exceed_the_shape_are_refused(layers: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be 2 to 3 for deepseek-v2-tiny"):
        synth_checkpoint("deepseek-v2-tiny", tmp_path / "m", layers=layers)


@pytest.mark.parametrize("skew", [-1.0, math.nan, math.inf])
def test_unusable_skew_is_refused(skew: float, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="skew is"):
        synth_checkpoint("olmoe-tiny", tmp_path / "m", popularity=Popularity(skew=skew))


def test_unknown_shape_is_refused_with_the_list(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'olmo', must be one of olmoe-1b-7b, mixtral-8x7b"):
        synth_checkpoint("olmo", tmp_path / "m")


def test_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        synth_checkpoint("olmoe-tiny", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(ConfigError, match="is not empty"):
        synth_checkpoint("olmoe-tiny", tmp_path / "mine.txt")


def test_too_small_a_disk_is_refused_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(CheckpointError, match=r"has 0.00 GB free, must have .* GB. hint"):
        synth_checkpoint("olmoe-tiny", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_disk_that_fills_up_on_the_way_leaves_no_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "SHARD_BYTES", 20)
    tensors = [shard_writer.StoredTensor(key=f"t{i}", shape=(10,), nbytes=20) for i in range(4)]

    def content(tensor: shard_writer.StoredTensor) -> list[memoryview]:
        if tensor.key == "t2":
            raise OSError(errno.ENOSPC, "No space left on device")
        return [memoryview(bytes(20))]

    with pytest.raises(CheckpointError, match="is full after 40 bytes, must take 80"):
        shard_writer.write_shards(tmp_path, tensors, content)
    assert list(tmp_path.iterdir()) == []


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    folder = synth_checkpoint("gpt-oss-tiny", tmp_path / "m", progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] == 2 * sum(
        t.numel() for t in all_tensors(folder).values()
    )


def test_a_large_tensor_is_written_in_small_pieces() -> None:
    weights = SynthWeights(Popularity(skew=1.0), hidden=64, layers=2, seed=0, tiny=True)
    shapes = {"model.embed_tokens.weight": (200_000, 64), "lm_head.weight": (200_000, 64)}
    for key, shape in shapes.items():
        tensor = shard_writer.StoredTensor(key=key, shape=shape, nbytes=2 * math.prod(shape))
        sizes = [len(piece) for piece in weights(tensor)]
        assert sum(sizes) == tensor.nbytes and max(sizes) <= 1 << 23, key


def test_memory_stays_far_below_the_checkpoint(tmp_path: Path) -> None:
    """One layer of the real OLMoE shape, 1.2 GB: peak memory grows by a few blocks, not by the file."""
    code = (
        "import sys, resource; from pathlib import Path; from buddymoe_ray.models.synth import synth_checkpoint\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); synth_checkpoint('olmoe-1b-7b', Path(sys.argv[1]), layers=1); print(peak() - before)"
    )
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", code, str(tmp_path / "m")]
    done = subprocess.run(command, env={"PYTHONPATH": root}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 600_000, f"grew by {done.stdout} KiB"
    assert describe(tmp_path / "m").total_expert_bytes == 64 * 3 * 2048 * 1024 * 2
    shutil.rmtree(tmp_path / "m")


@pytest.mark.parametrize(
    ("shape", "fmt", "stored"),
    [
        ("olmoe-tiny", "fp8", "fp8/128x128"),
        ("deepseek-v2-tiny", "fp8", "fp8/128x128"),
        ("mixtral-tiny", "int4", "int4/g32"),
        ("mixtral-tiny", "nvfp4", "nvfp4"),
        ("gpt-oss-tiny", "mxfp4", "mxfp4"),
    ],
)
def test_formats_hold_weights_like_the_plain_ones(tmp_path: Path, shape: str, fmt: str, stored: str) -> None:
    """The same ones within the steps of their codes."""
    plain = synth_checkpoint(shape, tmp_path / "plain", popularity=Popularity(skew=1.0))
    coded = synth_checkpoint(shape, tmp_path / "coded", popularity=Popularity(skew=1.0), fmt=fmt)
    found = describe(coded)
    assert found.expert_dtype == stored and found.as_stored
    assert found.total_expert_bytes < 0.55 * describe(plain).total_expert_bytes
    config = json.loads((coded / "config.json").read_text())
    weights = find_coded(config, read_index(coded), "config.json")
    exact, checked = all_tensors(plain), 0
    for key, weight in weights.items():
        if not isinstance(weight, CodedTensor) or "experts" not in key:
            continue
        checked += 1
        if fmt != "mxfp4":
            wanted = exact[key].float()
            error = (_decoded(weight, *wanted.shape) - wanted).square().mean() / wanted.square().mean()
            assert float(error) < {"fp8": 1e-3, "int4": 2e-2, "nvfp4": 3e-2}[fmt], key
            continue
        wanted = exact[key][1].float().T  # other numbers of the same distribution
        places = {part: _second(place) for part, place in weight.places.items()}
        got = _decoded(replace(weight, places=places), *wanted.shape)
        assert 0.9 < float(got.std() / wanted.std()) < 1.1
        assert bool((got[0] == 0).all()) == bool((wanted[0] == 0).all()), "what is constant stays so"
    assert checked > 4


def _second(place: TensorLocation) -> TensorLocation:
    """Of a stack."""
    nbytes = place.nbytes // place.shape[0]
    return replace(place, shape=place.shape[1:], offset=place.offset + nbytes, nbytes=nbytes)


def _decoded(weight: CodedTensor, N: int, K: int) -> Tensor:
    read = weight.read(N, K)
    return decoded(read.named(), read.matrix)


@pytest.mark.parametrize(
    ("shape", "fmt", "match"),
    [
        ("olmoe-tiny", "gguf", "format is 'gguf', must be one of bf16, fp8"),
        ("olmoe-tiny", "mxfp4", "must be mxfp4 for gpt-oss and for nothing else"),
        ("gpt-oss-tiny", "fp8", "must be mxfp4 for gpt-oss"),
        ("qwen3-tiny", "int4", "48 inputs, must be a multiple of 32"),
    ],
)
def test_formats_that_no_model_of_the_shape_has_are_refused(tmp_path: Path, shape: str, fmt: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        synth_checkpoint(shape, tmp_path / "m", fmt=fmt)
    assert not (tmp_path / "m").exists()
