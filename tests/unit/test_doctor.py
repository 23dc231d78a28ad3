"""`buddymoe doctor`: each trouble is found, with what mends it; what is well is told so; the last word is how fast."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from buddymoe_ray.cli import main
from buddymoe_ray.commands import doctor
from buddymoe_ray.commands.doctor import Finding, Patient, examine, word
from buddymoe_ray.models.resolve import resolve_model
from buddymoe_ray.serve.keys import add_key

TINY = """
http_options: {host: 127.0.0.1, port: PORT}
applications:
- name: m
  import_path: buddymoe_ray.serve.app:build_app
  args: {memory: 50%, mode: bounded}
"""


@pytest.fixture(scope="module")
def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])


def yaml_at(folder: Path, text: str) -> str:
    path = folder / "m.yaml"
    path.write_text(text)
    return str(path)


def by_name(patient: Patient) -> dict[str, Finding]:
    found = list(examine(patient))
    assert len({finding.name for finding in found}) == len(found)
    assert all(finding.hint for finding in found if finding.state == "fault"), "a fault without a hint"
    return {finding.name: finding for finding in found}


def test_a_healthy_deployment_is_told_how_fast_it_would_be(
    tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    what = yaml_at(tmp_path, TINY.replace("PORT", str(free_port)))
    assert main(["doctor", what, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert not [line for line in lines[:-1] if line["state"] == "fault"]
    assert main(["plan", "--memory", "50%", "--mode", "bounded", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert lines[-1]["verdict"].startswith("fast: ") and lines[-1]["decode_tok_s"] > 20
    assert lines[-1]["decode_tok_s"] == pytest.approx(plan["predicted_decode_tok_s"], rel=0.5)  # the disk is asked anew


def test_what_is_in_the_way_is_found_and_named(tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    shutil.copytree(resolve_model("builtin:tiny"), folder, ignore=shutil.ignore_patterns("*.profile", "*.standins"))
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    root = tmp_path / "root"
    for place, text in (("proc/77/comm", "raylet"), ("sys/kernel/mm/transparent_hugepage/enabled", "always [never]")):
        (root / place).parent.mkdir(parents=True)
        (root / place).write_text(text + "\n")
    shutil.copy("/proc/meminfo", root / "proc/meminfo")
    (root / "dev/shm").mkdir(parents=True)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=1, f_frsize=4096))
    monkeypatch.delenv("BUDDYMOE_API_KEY", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    text = TINY.replace("PORT", str(free_port)).replace("127.0.0.1", "0.0.0.0")
    options = f"model: {folder}, calibrate: off, num_gpus: 64, device: cpu, "
    found = by_name(Patient(what=yaml_at(tmp_path, text.replace("args: {", "args: {" + options)), root=root))
    assert {name for name, finding in found.items() if finding.state == "fault"} == {
        "key",
        "GPUs",
        "/dev/shm",
        "stand-ins",
    }
    assert {name for name, finding in found.items() if finding.state == "note"} >= {"ray", "template", "huge pages"}
    assert "BUDDYMOE_API_KEY" in found["key"].hint and "--shm-size" in found["/dev/shm"].hint
    assert word(list(found.values()), None) == "not ready: 4 to mend"


def test_a_port_that_is_taken_and_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        door.listen()
        add_key(tmp_path / "keys.toml", "alice", {})
        options = f"args: {{model: /nowhere, api_keys: {tmp_path}/keys.toml, "
        text = TINY.replace("PORT", str(door.getsockname()[1])).replace("args: {", options)
        found = by_name(Patient(what=yaml_at(tmp_path, text)))
    assert found["key"].state == "ok" and "1 named" in found["key"].said
    assert found["port"].state == "fault" and "another" in found["port"].hint
    assert found["checkpoint"].state == "fault" and "memory" not in found
    assert main(["doctor", "/nowhere"]) == 1


def test_a_misspelt_option_ends_the_examination_with_its_name(tmp_path: Path) -> None:
    found = by_name(Patient(what=yaml_at(tmp_path, TINY.replace("PORT", "8000").replace("memory", "memroy"))))
    assert found["deployment"].state == "fault" and "memory" in found["deployment"].hint
    assert set(found) == {"deployment", "ray"}


def test_words_go_by_tokens_a_second() -> None:
    plan = SimpleNamespace(predicted_decode_tok_s=0.0)
    for rate, expected in ((1e3, "fast"), (8.0, "good"), (7.9, "usable"), (0.1, "slow")):
        plan.predicted_decode_tok_s = rate
        assert word([], plan).startswith(expected + ": ")  # type: ignore[arg-type]
    assert doctor.SPEEDS[-1][1] == 0
