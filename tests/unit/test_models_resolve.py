"""Names become folders: builtin, local, and hub ids against a local server that answers like the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build_checkpoint, stock_logits
from hub_server import HubServer, hub_server
from huggingface_hub import constants
from safetensors.torch import save_file
from slot_oracle import attach_oracle

from buddymoe_ray.errors import CheckpointError, UnsupportedModel
from buddymoe_ray.models.load import load_model
from buddymoe_ray.models.resolve import is_builtin, resolve_model
from buddymoe_ray.models.tensor_index import SINGLE_NAME, read_index
from buddymoe_ray.models.tiny import path as tiny_path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    repo = tmp_path / "hub" / "someone" / "small-moe"
    build_checkpoint("olmoe", repo, max_shard_size="100KB")
    (repo / "tokenizer_config.json").write_text("{}")
    (repo / "modeling_evil.py").write_text("raise SystemExit")
    (repo / "pytorch_model.bin").write_bytes(b"pickle")
    (repo / "consolidated.safetensors").write_bytes(b"the same weights again")
    (repo / "original").mkdir()
    (repo / "original" / "params.json").write_text("{}")
    (repo / "additional_chat_templates").mkdir()
    (repo / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    with hub_server(tmp_path / "hub") as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


def test_builtin_names_the_shipped_folder() -> None:
    assert is_builtin(tiny_path())
    assert not is_builtin(tiny_path().parent)
    with pytest.raises(CheckpointError, match="must be builtin:tiny"):
        resolve_model("builtin:huge")


def test_local_folder_is_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("m") == (tmp_path / "m").resolve()


@pytest.mark.parametrize("name", ["./nothing", "/no/such/folder", "a/b/c", "justaname", "", "a//b"])
def test_what_is_neither_folder_nor_id_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="hint:"):
        resolve_model(name, cache_dir=tmp_path / "cache")


def test_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="must be the folder around it"):
        resolve_model(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("name", ["model-Q4_K_M.gguf", "."])
def test_gguf_is_refused_with_what_else_to_take(name: str, tmp_path: Path) -> None:
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(
        UnsupportedModel, match=r"is GGUF, must be a folder of safetensors\. hint: use a release .* fp8"
    ):
        resolve_model(str(tmp_path / name))
    (tmp_path / "model.safetensors").touch()
    assert resolve_model(str(tmp_path)) == tmp_path, "other weights count where there are some"


def test_hub_id_downloads_what_is_needed_and_runs(hub: HubServer, tmp_path: Path) -> None:
    folder = resolve_model("someone/small-moe", cache_dir=tmp_path / "cache")
    names = {p.name for p in folder.iterdir()}
    shards = {n for n in names if n.endswith(".safetensors")}
    assert len(shards) > 1 and "config.json" in names and "tokenizer_config.json" in names
    assert (folder / "additional_chat_templates" / "tool_use.jinja").exists()
    assert not {"modeling_evil.py", "pytorch_model.bin", "consolidated.safetensors", "original"} & names
    loaded = load_model(folder)
    attach_oracle(loaded)
    ids = torch.arange(3, 20)[None]
    assert torch.equal(loaded.model(input_ids=ids, use_cache=False).logits, stock_logits(folder, ids))


def test_endpoint_comes_from_the_environment_and_torch_is_not_needed(hub: HubServer, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from buddymoe_ray.models.resolve import resolve_model;"
        "print(resolve_model('someone/small-moe', cache_dir=Path(sys.argv[1]))); assert 'torch' not in sys.modules"
    )
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "config.json").exists()
    assert "it/s" not in done.stderr and "B/s" not in done.stderr, "bars were drawn without progress=True"


def test_second_time_downloads_nothing(hub: HubServer, tmp_path: Path) -> None:
    first = resolve_model("someone/small-moe", cache_dir=tmp_path / "cache")
    hub.gets.clear()
    assert resolve_model("someone/small-moe", cache_dir=tmp_path / "cache") == first
    assert not hub.gets


def test_download_that_broke_goes_on_where_it_stopped(hub: HubServer, tmp_path: Path) -> None:
    shards = sorted(p.name for p in (hub.root / "someone" / "small-moe").glob("model-*.safetensors"))
    hub.broken = {shards[-1]}
    with pytest.raises(CheckpointError, match=r"refused a file \(.*403.*hint"):
        resolve_model("someone/small-moe", cache_dir=tmp_path / "cache")
    had = {name for name in hub.gets if name.endswith(".safetensors")}
    hub.broken = set()
    hub.gets.clear()
    folder = resolve_model("someone/small-moe", cache_dir=tmp_path / "cache")
    assert {p.name for p in folder.glob("*.safetensors")} == set(shards)
    assert not had & set(hub.gets) and shards[-1] in hub.gets


def test_broken_download_is_not_mistaken_for_a_model_offline(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.broken = {p.name for p in (hub.root / "someone" / "small-moe").glob("model-*.safetensors")}
    with pytest.raises(CheckpointError):
        resolve_model("someone/small-moe", cache_dir=tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"hint"):
        resolve_model("someone/small-moe", cache_dir=tmp_path / "cache")


def test_cached_model_resolves_offline(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve_model("someone/small-moe", cache_dir=tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model("someone/small-moe", cache_dir=tmp_path / "cache") == first


def test_offline_without_cache_names_the_remedy(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"cannot be reached.*HF_HUB_OFFLINE"):
        resolve_model("someone/small-moe", cache_dir=tmp_path / "cache")


def test_unreachable_hub_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError, match="cannot be reached"):
        resolve_model("someone/small-moe", cache_dir=tmp_path / "cache")


def test_unknown_id_is_reported(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"someone/else is unknown to .*hint"):
        resolve_model("someone/else", cache_dir=tmp_path / "cache")


def test_gated_repository_is_reported(hub: HubServer, tmp_path: Path) -> None:
    hub.gated.add("someone/small-moe")
    with pytest.raises(CheckpointError, match=r"gated.*HF_TOKEN"):
        resolve_model("someone/small-moe", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("file", "said", "match"),
    [
        ("config.json", {"model_type": "llama"}, "llama"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "W4A8_AWQ"}}, "quant_algo 'W4A8_AWQ', must be"),
    ],
)
def test_what_is_unsupported_downloads_no_weights(
    hub: HubServer, tmp_path: Path, file: str, said: dict[str, Any], match: str
) -> None:
    (hub.root / "someone" / "small-moe" / file).write_text(json.dumps(said))
    with pytest.raises(UnsupportedModel, match=match):
        resolve_model("someone/small-moe", cache_dir=tmp_path / "cache")
    assert not any(name.endswith(".safetensors") for name in hub.gets)


def test_full_disk_is_refused_before_the_first_byte(hub: HubServer, tmp_path: Path) -> None:
    hub.inflate = {f"model-{i:05d}-of-{n:05d}.safetensors": 1 << 60 for n in range(2, 12) for i in range(1, n + 1)}
    with pytest.raises(CheckpointError, match=r"GB free, must have \d{10}"):
        resolve_model("someone/small-moe", cache_dir=tmp_path / "cache")
    assert not any(name.endswith(".safetensors") for name in hub.gets)


def test_repository_without_safetensors_is_refused(hub: HubServer, tmp_path: Path) -> None:
    for path in (hub.root / "someone" / "small-moe").glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"must have safetensors"):
        resolve_model("someone/small-moe", cache_dir=tmp_path / "cache")


def test_single_file_is_downloaded_rather_than_the_shards_of_an_index_beside_it(hub: HubServer, tmp_path: Path) -> None:
    remote = hub.root / "someone" / "small-moe"
    save_file({"new": torch.ones(2)}, remote / SINGLE_NAME)
    folder = resolve_model("someone/small-moe", cache_dir=tmp_path / "cache")
    assert {path.name for path in folder.glob("*.safetensors")} == {SINGLE_NAME}
    assert set(read_index(folder)) == {"new"}


@pytest.mark.parametrize("name", ["./nope", "../nope", "nope/", "a/b/c"])
def test_a_path_that_is_not_there_is_no_hub_id(name: str) -> None:
    with pytest.raises(CheckpointError, match="a folder that exists, or a hub id"):
        resolve_model(name)
