"""`ray up cluster/aws.yaml`, whole, against an AWS that is a local moto server: what it asks of AWS, what reaches SSH.

`ssh` and `rsync` are stubs that note what they are told; rsync also copies, so that the head's home exists as a folder.
The head's own commands are then run for real in it: its setup, then Ray with the autoscaler, which launches the GPU
worker. What this cannot show: the image, the GPU, a login.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
import ray
import yaml
from serving import eventually

ROOT = Path(__file__).parents[2]
CLUSTER = "cluster/aws.yaml"
REGION, IMAGE = "us-west-2", "ami-0123456789abcdef0"

# Ray waits half a minute for IAM to tell all of AWS about a new role, which moto needs not
LAUNCHER = (
    "import time; wait = time.sleep; time.sleep = lambda seconds: wait(min(seconds, 0.2)); "
    "from ray.scripts.scripts import main; main()"
)
NOTE = """#!/bin/sh
printf '%s\\0' "${0##*/}" "$@" > "$STUB_LOG/$(date +%s%N).$$"
"""
COPY = """
for argument; do source=$last; last=$argument; done
home="$STUB_HOMES/$(echo "${last%%:*}" | sed 's/.*@//')"
path="${last#*:}"; path="$home/${path#\\~/}"
mkdir -p "$(dirname "$path")"
if [ -d "$source" ]; then mkdir -p "$path"; cp -r "$source". "$path"; else cp "$source" "$path"; fi
"""
CURL = f"""
case "$*" in *api/token*) echo session;; *ami-id*) echo {IMAGE};; *) exit 22;; esac
"""


@dataclass(frozen=True, kw_only=True)
class Cloud:
    """An AWS of its own, and a place where stubs write."""

    url: str
    folder: Path
    environment: dict[str, str]

    def ask(self, service: str) -> Any:
        keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
        return boto3.client(service, endpoint_url=self.url, region_name=REGION, **keys)

    def instances(self, *states: str) -> dict[str, list[dict[str, Any]]]:
        """Those in these states, by the cluster file's node type."""
        found: dict[str, list[dict[str, Any]]] = {}
        for reservation in self.ask("ec2").describe_instances()["Reservations"]:
            for instance in reservation["Instances"]:
                tags = {tag["Key"]: tag["Value"] for tag in instance.get("Tags", [])}
                if instance["State"]["Name"] in states:
                    found.setdefault(tags["ray-user-node-type"], []).append(instance | {"tags": tags})
        return found

    def told(self, program: str) -> list[list[str]]:
        """Arguments of every call of a stub, oldest first."""
        calls = [path.read_text().split("\0")[:-1] for path in sorted((self.folder / "log").iterdir())]
        return [arguments for name, *arguments in calls if name == program]

    def sent(self, target: str) -> list[str]:
        """Commands that reached this host by ssh, without ray's wrapping."""
        wrapped = [call[at + 1 :] for call in self.told("ssh") for at, word in enumerate(call) if word == target]
        commands = [re.search(r"&& \((.*)\)'$", words[-1], re.DOTALL) for words in wrapped]
        return [match[1].replace("'\"'\"'", "'") for match in commands if match]

    def copied(self, target: str) -> list[str]:
        return [call[-1].split(":", 1)[1] for call in self.told("rsync") if call[-1].startswith(target)]

    def ray(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", LAUNCHER, *arguments],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def answers(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    folder = tmp_path_factory.mktemp("aws")
    for name in ("log", "homes", "home", "tmp"):
        (folder / name).mkdir()
    for name, more in {"ssh": "", "rsync": COPY, "curl": CURL, "sudo": "", "python3.12": ""}.items():
        script(folder / "bin" / name, NOTE + more)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": REGION}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))} | keys
    environment |= {
        "AWS_ENDPOINT_URL": url,
        "HOME": str(folder / "home"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": os.pathsep.join([str(folder / "bin"), os.environ["PATH"]]),
        "STUB_LOG": str(folder / "log"),
        "STUB_HOMES": str(folder / "homes"),
        "TMPDIR": str(folder / "tmp"),
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        env=environment | {"MOTO_IAM_LOAD_MANAGED_POLICIES": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        eventually(lambda: answers(url), seconds=60)
        yield Cloud(url=url, folder=folder, environment=environment)
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def head(cloud: Cloud) -> dict[str, Any]:
    """The one instance after `ray up`."""
    cloud.ray("up", "-y", "--no-config-cache", CLUSTER)
    [[instance]] = cloud.instances("pending", "running").values()
    return instance


@pytest.fixture(scope="module")
def home(cloud: Cloud, head: dict[str, Any]) -> Path:
    """The head's home with its setup done: the commands that reached it, in their order, up to Ray's start."""
    folder = cloud.folder / "homes" / head["InstanceId"]
    for name in ("python", "ray"):
        script(folder / "venv/bin" / name, f'#!/bin/sh\nexec {Path(sys.executable).parent / name} "$@"\n')
    script(folder / "venv/bin/pip", NOTE)
    for command in cloud.sent(f"ubuntu@{head['InstanceId']}"):
        if "node.sh" in command:
            run_there(cloud, folder, command)
    return folder


def run_there(cloud: Cloud, home: Path, command: str) -> None:
    done = subprocess.run(
        ["bash", "-c", command],
        env=cloud.environment | {"HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_the_head_is_what_the_file_says(cloud: Cloud, head: dict[str, Any]) -> None:
    node = yaml.safe_load((ROOT / CLUSTER).read_text())["available_node_types"]["head"]["node_config"]
    assert (head["InstanceType"], head["ImageId"]) == (node["InstanceType"], node["ImageId"])
    assert head["MetadataOptions"]["HttpTokens"] == "required"
    volumes = cloud.ask("ec2").describe_volumes()["Volumes"]
    assert [(volume["Size"], volume["Encrypted"]) for volume in volumes] == [(150, True)]
    assert head["tags"]["ray-node-status"] == "up-to-date" and head["tags"]["ray-cluster-name"] == "buddymoe"


def test_the_head_may_launch_workers(cloud: Cloud, head: dict[str, Any]) -> None:
    iam = cloud.ask("iam")
    [profile] = iam.list_instance_profiles()["InstanceProfiles"]
    assert head["IamInstanceProfile"]["Arn"] == profile["Arn"]
    [role] = profile["Roles"]
    attached = iam.list_attached_role_policies(RoleName=role["RoleName"])["AttachedPolicies"]
    assert "AmazonEC2FullAccess" in {policy["PolicyName"] for policy in attached}


def test_nothing_is_open_to_the_world(cloud: Cloud, head: dict[str, Any]) -> None:
    """Ray would make a group with SSH from everywhere; it makes none, so the VPC's default group applies."""
    groups = cloud.ask("ec2").describe_security_groups()["SecurityGroups"]
    assert {group["GroupName"] for group in groups} == {"default"}
    assert not [rule for group in groups for rule in group["IpPermissions"] if rule["IpRanges"] or rule["Ipv6Ranges"]]
    assert not head["SecurityGroups"], "the VPC's default group was to apply"
    ways = {word for call in cloud.told("ssh") for word in call if word.startswith("ProxyCommand=")}
    assert ways == {f"ProxyCommand=aws ec2-instance-connect open-tunnel --region {REGION} --instance-id %h"}


def test_what_reached_the_head(cloud: Cloud, head: dict[str, Any]) -> None:
    target = f"ubuntu@{head['InstanceId']}"
    commands = [command.split("RAY_NODE_TYPE_NAME=head; ")[-1] for command in cloud.sent(target)]
    ours = [command for command in commands if "node.sh" in command or "ray " in command]
    assert ours == [
        "bash ~/buddymoe/cluster/node.sh prepare",
        "bash ~/buddymoe/cluster/node.sh secrets",
        "ray stop",
        "bash ~/buddymoe/cluster/node.sh pin-image",
        "ulimit -n 65536; . ~/.buddymoe/env; RAY_AUTH_MODE=token ray start --head --port=6379"
        " --object-manager-port=8076 --object-store-memory=1073741824 --dashboard-host=127.0.0.1"
        " --autoscaling-config=~/ray_bootstrap_config.yaml",
    ]
    copied = cloud.copied(target)
    package = ("pyproject.toml", "buddymoe_ray/", "deployments/", "cluster/")
    assert {f"~/buddymoe/{name}" for name in package} <= {*copied}
    assert not [path for path in copied if "token" in path or "api_key" in path], "secrets are made on the head"


def test_the_heads_setup(cloud: Cloud, home: Path) -> None:
    assert [f"{home}/buddymoe[gpu]", "boto3>=1.34,<2"] in [call[2:] for call in cloud.told("pip")]
    assert ["mount", "-o", "remount,size=80%", "/dev/shm"] in cloud.told("sudo")
    for name in (".ray/auth_token", ".buddymoe/api_key"):
        path = home / name
        assert len(path.read_text().strip()) >= 32 and path.stat().st_mode & 0o777 == 0o600
    bootstrap = yaml.safe_load((home / "ray_bootstrap_config.yaml").read_text())
    images = {kind["node_config"]["ImageId"] for kind in bootstrap["available_node_types"].values()}
    assert images == {IMAGE}, "workers were to launch from the head's own image"
    assert (home / ".bashrc").read_text().startswith(f". {home}/.buddymoe/env\n")


@dataclass(frozen=True, kw_only=True)
class Running:
    """The head's Ray and the worker that it launched. `status` asks it for its state, with a token of one's own."""

    worker: dict[str, Any]
    status: Callable[[str], str]
    dashboard_port: int


@pytest.fixture(scope="module")
def running(cloud: Cloud, head: dict[str, Any], home: Path) -> Iterator[Running]:
    """Ray on the head, by the very command that reached it but for its ports."""
    [*_, start] = [command for command in cloud.sent(f"ubuntu@{head['InstanceId']}") if "ray start" in command]
    gcs, dashboard, client = free_port(), free_port(), free_port()
    ports = {"--port=6379": f"--port={gcs}", "--object-manager-port=8076": "--object-manager-port=0"}
    for usual, here in ports.items():
        assert usual in start
        start = start.replace(usual, here)
    start += f" --block --dashboard-port={dashboard} --dashboard-agent-listen-port=0 --ray-client-server-port={client}"
    short = Path(f"/tmp/buddymoe-up-{os.getpid()}")  # ray's sockets have no room for pytest's long names
    environment = cloud.environment | {"HOME": str(home), "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    started = subprocess.Popen(
        ["bash", "-c", f"{start} --temp-dir={short}"],
        env=environment,
        stdout=(cloud.folder / "ray.log").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )

    def status(token: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "status", f"--address=127.0.0.1:{gcs}"],
            env=environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.stdout + done.stderr

    def up() -> bool:
        assert started.poll() is None, (cloud.folder / "ray.log").read_text()[-3000:]
        found = cloud.instances("running").get("gpu", [])
        return bool(found) and found[0]["tags"].get("ray-node-status") == "up-to-date"

    try:
        eventually(up, seconds=90)
        [instance] = cloud.instances("running")["gpu"]
        yield Running(worker=instance, status=status, dashboard_port=dashboard)
    finally:
        started.send_signal(signal.SIGTERM)
        end = time.monotonic() + 20
        while started.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
        shutil.rmtree(short, ignore_errors=True)


def test_the_head_launches_the_gpu_worker(cloud: Cloud, running: Running, home: Path) -> None:
    instance = running.worker
    node = yaml.safe_load((ROOT / CLUSTER).read_text())["available_node_types"]["gpu"]["node_config"]
    assert (instance["InstanceType"], instance["ImageId"]) == (node["InstanceType"], IMAGE)
    assert "IamInstanceProfile" not in instance, "a worker needs no rights of its own"
    target = f"ubuntu@{instance['PrivateIpAddress']}"
    ours = [command for command in cloud.sent(target) if "node.sh" in command or "ray " in command]
    assert [command.split("; ")[-1] for command in ours] == [
        "bash ~/buddymoe/cluster/node.sh prepare",
        "ray stop",
        "RAY_AUTH_MODE=token ray start --address=$RAY_HEAD_IP:6379 --object-manager-port=8076"
        " --object-store-memory=1073741824",
    ]
    assert "RAY_HEAD_IP=" in ours[-1] and '"GPU":4' in ours[-1].replace(" ", "")
    secrets = [path for path in cloud.copied(target) if path.endswith(("auth_token", "api_key"))]
    assert sorted(secrets) == [f"{home}/.buddymoe/api_key", f"{home}/.ray/auth_token"]


def test_ray_wants_the_token(running: Running, home: Path) -> None:
    assert "Autoscaler status" in running.status((home / ".ray/auth_token").read_text())
    refused = running.status("0" * 64)
    assert "Autoscaler status" not in refused and "authenticat" in refused.lower()


def test_probes_need_no_token_and_all_else_does(running: Running) -> None:
    dashboard = f"http://127.0.0.1:{running.dashboard_port}"
    eventually(lambda: answers(dashboard))
    assert httpx.get(f"{dashboard}/api/gcs_healthz").status_code == 200, "kuberay.yaml probes it"
    assert httpx.get(f"{dashboard}/nodes?view=summary").status_code == 401


def test_the_dashboard_is_on_the_loopback_only(running: Running) -> None:
    eventually(lambda: answers(f"http://127.0.0.1:{running.dashboard_port}"))
    address = ray.util.get_node_ip_address()
    if address == "127.0.0.1":
        pytest.skip("this machine has no other address")
    assert not answers(f"http://{address}:{running.dashboard_port}")


def test_ray_down_leaves_nothing(cloud: Cloud, running: Running) -> None:
    cloud.ray("down", "-y", CLUSTER)
    assert {kind: len(found) for kind, found in cloud.instances("terminated").items()} == {"head": 1, "gpu": 1}
    assert not cloud.instances("pending", "running", "stopping", "stopped")
