"""`cluster/*.yaml`: accepted by ray's own schemas, closed, without secrets, and installing what pyproject says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from buddymoe_ray.serve.args import ServeArgs

ROOT = Path(__file__).parents[2]
AWS, KUBERAY = ROOT / "cluster/aws.yaml", ROOT / "cluster/kuberay.yaml"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def aws() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(AWS.read_text())
    return loaded


@pytest.fixture(scope="module")
def kuberay() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(KUBERAY.read_text())
    return loaded


def containers(kuberay: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every group's pod and its one container."""
    spec = kuberay["spec"]["rayClusterConfig"]
    pods = [spec["headGroupSpec"]["template"]["spec"]]
    pods += [group["template"]["spec"] for group in spec["workerGroupSpecs"]]
    return [(pod, pod["containers"][0]) for pod in pods]


def test_ray_accepts_the_launcher_file(aws: dict[str, Any]) -> None:
    validate_config(prepare_config(aws))
    assert aws["available_node_types"]["gpu"]["max_workers"] <= aws["max_workers"]
    assert aws["available_node_types"]["gpu"]["min_workers"] >= 1 and aws["idle_timeout_minutes"] > 0


def test_every_start_asks_for_the_token_and_the_dashboard_stays_home(aws: dict[str, Any]) -> None:
    starts = [c for key in ("head", "worker") for c in aws[f"{key}_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0] and not any("0.0.0.0" in command for command in starts)
    assert aws["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_no_door_is_opened_beside_those_ray_needs(aws: dict[str, Any]) -> None:
    """What ray makes of it is asserted where it is brought up, in tests/ray/test_cluster_up.py."""
    assert set(aws["provider"]["security_group"]) == {"GroupName"}


def test_what_is_installed_is_this_project_with_extras_it_has(aws: dict[str, Any]) -> None:
    commands = " ".join(aws["setup_commands"])
    extras = re.findall(r"buddymoe_ray\[(\w+)\]", commands)
    assert extras == ["gpu"] and "gpu" in PYPROJECT["optional-dependencies"]
    boto3 = next(line for line in PYPROJECT["optional-dependencies"]["test"] if line.startswith("boto3"))
    assert f'"{boto3}"' in " ".join(aws["head_setup_commands"])
    assert any(line.startswith("torch") and "<=2.13.0" in line for line in PYPROJECT["dependencies"])
    assert "/dev/shm" in commands


def test_kuberays_ray_is_pyprojects(kuberay: dict[str, Any]) -> None:
    pinned = next(line for line in PYPROJECT["dependencies"] if line.startswith("ray[serve]"))
    version = kuberay["spec"]["rayClusterConfig"]["rayVersion"]
    assert pinned == f"ray[serve]>={version.rsplit('.', 1)[0]},<2.61"
    assert f"rayproject/ray:{version}-" in KUBERAY.read_text()
    assert all(c["image"].endswith(f":{PYPROJECT['version']}") for _, c in containers(kuberay))


def test_the_service_config_is_one_that_serve_and_the_app_accept(kuberay: dict[str, Any]) -> None:
    assert (kuberay["apiVersion"], kuberay["kind"]) == ("ray.io/v1", "RayService")
    schema = ServeDeploySchema(**yaml.safe_load(kuberay["spec"]["serveConfigV2"]))
    [application] = schema.applications
    assert application.import_path == "buddymoe_ray.serve.app:build_app"
    args = ServeArgs(**application.args)
    assert args.require_api_key and args.num_gpus == 1
    most = kuberay["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["maxReplicas"]
    assert args.max_workers == most, "serve must not ask for more workers than there may be GPUs"


def test_every_pod_has_shared_memory_of_a_stated_size_within_its_own(kuberay: dict[str, Any]) -> None:
    for pod, container in containers(kuberay):
        [mount] = [m for m in container["volumeMounts"] if m["mountPath"] == "/dev/shm"]
        [volume] = [v for v in pod["volumes"] if v["name"] == mount["name"]]
        assert volume["emptyDir"]["medium"] == "Memory"
        size, limit = (
            int(text.removesuffix("Gi"))
            for text in (volume["emptyDir"]["sizeLimit"], container["resources"]["limits"]["memory"])
        )
        assert size < limit


def test_pods_are_not_root_and_ask_for_the_token(kuberay: dict[str, Any]) -> None:
    for pod, container in containers(kuberay):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        env = {entry["name"]: entry for entry in container["env"]}
        assert env["RAY_AUTH_MODE"]["value"] == "token"
        for name in ("RAY_AUTH_TOKEN", "BUDDYMOE_API_KEY"):
            assert "secretKeyRef" in env[name]["valueFrom"] and "value" not in env[name]


@pytest.mark.parametrize("path", [AWS, KUBERAY], ids=lambda path: path.name)
def test_no_secret_is_written_down(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"AKIA[0-9A-Z]{16}|[0-9a-f]{32,}|-----BEGIN", text)
