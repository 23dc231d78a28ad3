"""Files of cluster/: valid to Ray and to us, closed, without secrets, of the versions that pyproject names.

Ray's own schema checks aws.yaml. KubeRay's is not in any package we have: of kuberay.yaml the fields that matter are
checked here one by one. `tests/ray/test_cluster_up.py` runs `ray up`.
"""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from buddymoe_ray.serve.args import ServeArgs
from buddymoe_ray.serve.handles import APP_NAME

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
FILES = sorted(path for path in CLUSTER.iterdir() if path.is_file())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def aws() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    return config


def kuberay() -> tuple[dict[str, Any], dict[str, Any]]:
    service, policy = yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text())
    return service, policy


def pods() -> dict[str, dict[str, Any]]:
    cluster = kuberay()[0]["spec"]["rayClusterConfig"]
    [workers] = cluster["workerGroupSpecs"]
    return {"head": cluster["headGroupSpec"]["template"], "worker": workers["template"]}


def test_ray_accepts_the_launchers_file() -> None:
    validate_config(prepare_config(aws()))
    with pytest.raises(jsonschema.ValidationError, match="idle_minutes"):
        validate_config(prepare_config(aws() | {"idle_minutes": 3}))


def test_gpu_workers_come_and_go() -> None:
    config = aws()
    kinds = config["available_node_types"]
    assert config["head_node_type"] == "head" and kinds["head"]["resources"] == {"CPU": 0}
    assert 1 == kinds["gpu"]["min_workers"] < kinds["gpu"]["max_workers"] == config["max_workers"]
    assert config["idle_timeout_minutes"] > 0 and config["provider"]["cache_stopped_nodes"] is False


def test_what_is_mounted_is_here_and_is_what_the_install_needs() -> None:
    config = aws()
    for remote, local in config["file_mounts"].items():
        assert remote == f"~/buddymoe/{local}" and (ROOT / local).exists()
    wanted = {"pyproject.toml", "buddymoe_ray", PROJECT["readme"], *PROJECT["license-files"]}
    assert wanted <= set(config["file_mounts"].values())
    commands = [*config["head_setup_commands"], *config["worker_setup_commands"], *config["head_start_ray_commands"]]
    parts = {command.split()[-1] for command in commands if "node.sh" in command}
    assert parts == set(re.findall(r"^  ([a-z-]+)\) \w+ ;;$", (CLUSTER / "node.sh").read_text(), re.MULTILINE))


@pytest.mark.parametrize("key", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_ray_starts_with_its_token_and_a_small_object_store(key: str) -> None:
    *_, start = aws()[key]
    assert "RAY_AUTH_MODE=token ray start" in start and "--object-store-memory=1073741824" in start
    assert ("--dashboard-host=127.0.0.1" in start) == ("--head" in start)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_secret_and_no_open_door(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"AKIA[0-9A-Z]{16}|sk-[0-9a-f]{8}|hf_\w{20}|BEGIN [A-Z ]*PRIVATE KEY|[0-9a-f]{32}", text)
    if path.name != "kuberay.yaml":
        assert "0.0.0.0" not in text


def test_versions_are_pyprojects() -> None:
    pythons = SpecifierSet(PROJECT["requires-python"])
    node, docker = (CLUSTER / "node.sh").read_text(), (CLUSTER / "Dockerfile").read_text()
    named = [*re.findall(r"python(\d+\.\d+)", node), *re.findall(r"FROM python:(\d+\.\d+)", docker)]
    assert len(named) >= 4 and all(version in pythons for version in named)
    for install in (node, docker):  # the package itself with its extra, so that pyproject's pins are the only ones
        [extra] = re.findall(r"(?:buddymoe|/src)\[(\w+)\]", install)
        assert extra in PROJECT["optional-dependencies"]
    [boto3] = [line for line in PROJECT["optional-dependencies"]["test"] if line.startswith("boto3")]
    assert re.findall(r"'(\w+[><=][^']*)'", node) == [boto3], "ray up was tested with this one"
    [ray] = [found for found in map(Requirement, PROJECT["dependencies"]) if found.name == "ray"]
    assert kuberay()[0]["spec"]["rayClusterConfig"]["rayVersion"] in ray.specifier
    images = {container["image"] for pod in pods().values() for container in pod["spec"]["containers"]}
    assert images == {f"{PROJECT['name']}:{PROJECT['version']}"} and images.pop() in docker


def kuberay_args() -> ServeArgs:
    schema = ServeDeploySchema.model_validate(yaml.safe_load(kuberay()[0]["spec"]["serveConfigV2"]))
    [application] = schema.applications
    assert (application.name, application.import_path) == (APP_NAME, "buddymoe_ray.serve.app:build_app")
    assert schema.http_options.port == 8000
    return ServeArgs.model_validate(application.args)


def test_the_embedded_application_is_the_shipped_one_behind_a_key() -> None:
    args = kuberay_args()
    shipped = yaml.safe_load((ROOT / "deployments/qwen3-30b-a3b.yaml").read_text())["applications"][0]["args"]
    ours = {"workers": 1, "max_workers": 4, "require_api_key": True}
    assert args == ServeArgs.model_validate(shipped | ours)


def test_pods_scale_with_the_applications_workers() -> None:
    cluster, args = kuberay()[0]["spec"]["rayClusterConfig"], kuberay_args()
    [group] = cluster["workerGroupSpecs"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert (group["minReplicas"], group["maxReplicas"]) == (args.workers, args.max_workers)
    [container] = pods()["worker"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == args.num_gpus
    assert int(container["resources"]["requests"]["cpu"]) >= args.num_cpus
    assert pods()["worker"]["spec"]["terminationGracePeriodSeconds"] > args.drain_seconds


def bytes_of(quantity: str) -> int:
    return int(quantity.removesuffix("B").removesuffix("Gi")) << 30


@pytest.mark.parametrize("name", ["head", "worker"])
def test_shared_memory_of_a_pod(name: str) -> None:
    spec = pods()[name]["spec"]
    [container] = spec["containers"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    shm = mounts["/dev/shm"]["emptyDir"]
    cluster = kuberay()[0]["spec"]["rayClusterConfig"]
    group = cluster["headGroupSpec"] if name == "head" else cluster["workerGroupSpecs"][0]
    needs = int(group["rayStartParams"]["object-store-memory"])
    needs += bytes_of(kuberay_args().host_memory) if name == "worker" else 0
    assert shm["medium"] == "Memory" and needs < bytes_of(shm["sizeLimit"])
    assert bytes_of(shm["sizeLimit"]) < bytes_of(container["resources"]["limits"]["memory"])


@pytest.mark.parametrize("name", ["head", "worker"])
def test_a_pod_runs_as_nobody_and_is_probed(name: str) -> None:
    spec = pods()[name]["spec"]
    [container] = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] > 0
    assert f"--uid {spec['securityContext']['runAsUser']}" in (CLUSTER / "Dockerfile").read_text()
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["path"].endswith("healthz")
    key = next(entry for entry in container["env"] if entry["name"] == kuberay_args().api_key_env)
    assert key["valueFrom"]["secretKeyRef"] == {"name": "buddymoe-api-key", "key": "api_key"}


def test_rays_token_is_a_secret_by_name() -> None:
    service, _ = kuberay()
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    auth = service["spec"]["rayClusterConfig"]["authOptions"]
    assert auth == {"mode": "token", "secretName": "buddymoe-ray-token"}
    assert f"secret generic {auth['secretName']} --from-literal=auth_token=" in (CLUSTER / "kuberay.yaml").read_text()


def test_only_named_pods_reach_the_pods() -> None:
    _, policy = kuberay()
    selected = policy["spec"]["podSelector"]["matchLabels"]
    assert all(pod["metadata"]["labels"] == selected for pod in pods().values())
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    for rule in policy["spec"]["ingress"]:
        [source] = rule["from"]
        assert source["podSelector"]["matchLabels"], "a rule without labels lets everybody in"
        ports = {port["port"] for port in rule.get("ports", [])}
        assert ports or source["podSelector"]["matchLabels"] == selected, "only the pods themselves reach every port"


class Node:
    """A home in a folder, and stubs for what only root or an EC2 instance has; they note their arguments."""

    def __init__(self, folder: Path, *, disk: str = "", mounted: str = "", gpu: bool = False, cuda: bool = True):
        self.home, self._bin, self.log = folder / "home", folder / "bin", folder / "log"
        say = f'#!/bin/sh\necho "${{0##*/}} $*" >> {self.log}\n'
        note = {
            "sudo": f'case "$*" in "mount /dev/"*) echo "$3" >> {folder}/mounted;; esac\n',
            "mountpoint": f'grep -qx "$2" {folder}/mounted\n',
            "lsblk": f'echo "/dev/nvme0n1 Amazon Elastic Block Store"\necho "{disk}"\n',
            "blkid": "exit 2\n",
            "python3.12": "",
            "nvidia-smi": f"exit {int(not gpu)}\n",
        }
        for name, rest in note.items():
            self._write(self._bin / name, say + rest)
        self._write(self.home / "venv/bin/pip", say)
        self._write(self.home / "venv/bin/python", say + f"exit {int(not cuda)}\n")
        (folder / "mounted").write_text(mounted + "\n")
        (self.home / ".bashrc").write_text("# the user's own\n")

    @staticmethod
    def _write(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {"HOME": str(self.home), "PATH": f"{self._bin}{os.pathsep}{os.environ['PATH']}"}
        script = ["bash", str(CLUSTER / "node.sh"), *arguments]
        return subprocess.run(script, env=environment, capture_output=True, text=True, timeout=60, check=False)

    def did(self) -> list[str]:
        return self.log.read_text().splitlines()

    def variable(self, name: str) -> str:
        command = f'. {self.home}/.buddymoe/env; printf %s "${name}"'
        return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout


INSTANCE_DISK = "/dev/nvme1n1 Amazon EC2 NVMe Instance Storage"


@pytest.mark.parametrize(
    ("disk", "mounted", "folder", "formatted"),
    [
        (INSTANCE_DISK, "/opt/dlami/nvme", "/opt/dlami/nvme", False),
        (INSTANCE_DISK, "", "/mnt/nvme", True),
        (INSTANCE_DISK, "/mnt/nvme", "/mnt/nvme", False),
        ("", "", "~/.cache", False),
    ],
    ids=["by-the-image", "found", "again", "none"],
)
def test_checkpoints_go_to_the_fast_disk(tmp_path: Path, disk: str, mounted: str, folder: str, formatted: bool) -> None:
    node = Node(tmp_path, disk=disk, mounted=mounted)
    done = node.run("prepare")
    assert done.returncode == 0, done.stderr
    assert node.variable("HF_HOME") == folder.replace("~", str(node.home)) + "/huggingface"
    assert ("sudo mkfs.ext4 -q /dev/nvme1n1" in node.did()) == formatted
    assert not [line for line in node.did() if "nvme0n1" in line], "the root disk was touched"


def test_a_node_may_be_prepared_again(tmp_path: Path) -> None:
    node = Node(tmp_path)
    for _ in range(2):
        assert node.run("prepare").returncode == 0
    assert (node.home / ".bashrc").read_text() == f". {node.home}/.buddymoe/env\n# the user's own\n"
    assert "sudo mount -o remount,size=80% /dev/shm" in node.did()
    assert (node.variable("RAY_AUTH_MODE"), node.variable("BUDDYMOE_API_KEY")) == ("token", "")
    (node.home / ".buddymoe/api_key").write_text("a key\n")
    assert node.variable("BUDDYMOE_API_KEY") == "a key"


def test_a_torch_that_the_driver_cannot_run_is_said(tmp_path: Path) -> None:
    done = Node(tmp_path / "bad", gpu=True, cuda=False).run("prepare")
    assert done.returncode == 1 and "newer than the driver" in done.stderr and "hint: " in done.stderr
    assert Node(tmp_path / "good", gpu=True).run("prepare").returncode == 0


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    done = Node(tmp_path).run("everything")
    assert done.returncode == 2 and "usage" in done.stderr
