"""`ray up cluster/aws.yaml` and `ray down`, whole, against a simulated AWS (moto) with an ssh that only takes notes.

Shows the machines, the doors and the commands; not the machine images, nor that a real machine would run them.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
import yaml

ROOT = Path(__file__).parents[2]
REGION = "us-west-2"
NOTES = """#!/bin/sh
printf '%s\\n' "$0 $*" >> "$SSH_NOTES"
exit 0
"""


@dataclass
class Cloud:
    """A simulated AWS, and a home without anything of the user's."""

    endpoint: str
    home: Path
    notes: Path

    def env(self) -> dict[str, str]:
        scripts = Path(sys.executable).parent
        return os.environ | {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": REGION,
            "HOME": str(self.home),
            "PATH": os.pathsep.join([str(self.home / "bin"), str(scripts), os.environ["PATH"]]),
            "SSH_NOTES": str(self.notes),
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def ray(self, *arguments: str) -> str:
        command = [str(Path(sys.executable).parent / "ray"), *arguments]
        done = subprocess.run(
            command, env=self.env(), cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    def client(self, service: str) -> Any:
        return boto3.client(
            service,
            region_name=REGION,
            endpoint_url=self.endpoint,
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
        )

    def running(self) -> list[dict[str, Any]]:
        found = self.client("ec2").describe_instances()["Reservations"]
        machines = [machine for reservation in found for machine in reservation["Instances"]]
        return [machine for machine in machines if machine["State"]["Name"] in ("pending", "running")]


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    home = tmp_path_factory.mktemp("home")
    for folder in ("bin", ".ssh", ".ray"):
        (home / folder).mkdir()
    (home / ".ray/auth_token").write_text("a-token-of-this-test")
    for name in ("ssh", "rsync", "scp"):
        stub = home / "bin" / name
        stub.write_text(NOTES)
        stub.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    moto = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        env=os.environ | {"MOTO_IAM_LOAD_MANAGED_POLICIES": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    made = Cloud(endpoint=f"http://127.0.0.1:{port}", home=home, notes=home / "notes")
    try:
        end = time.monotonic() + 60
        while True:
            try:
                httpx.get(made.endpoint, timeout=5)
                break
            except httpx.TransportError:
                assert moto.poll() is None and time.monotonic() < end, "moto does not answer"
                time.sleep(0.1)
        yield made
    finally:
        moto.send_signal(signal.SIGTERM)
        try:
            moto.wait(10)
        except subprocess.TimeoutExpired:
            moto.kill()


@pytest.fixture(scope="module")
def up(cloud: Cloud) -> str:
    """What `ray up` said."""
    return cloud.ray("up", "-y", "cluster/aws.yaml", "--no-config-cache")


def test_the_head_is_the_machine_of_the_file(cloud: Cloud, up: str) -> None:
    config = yaml.safe_load((ROOT / "cluster/aws.yaml").read_text())
    [head] = cloud.running()
    assert head["InstanceType"] == config["available_node_types"]["head"]["node_config"]["InstanceType"]
    tags = {tag["Key"]: tag["Value"] for tag in head["Tags"]}
    assert tags["ray-node-type"] == "head" and tags["ray-cluster-name"] == "buddymoe"
    assert "IamInstanceProfile" in head, "the head starts workers, so it needs a role"


def test_only_ssh_comes_in_from_outside(cloud: Cloud, up: str) -> None:
    [head] = cloud.running()
    ids = [group["GroupId"] for group in head["SecurityGroups"]]
    [group] = cloud.client("ec2").describe_security_groups(GroupIds=ids)["SecurityGroups"]
    outside = {(rule["FromPort"], rule["ToPort"]) for rule in group["IpPermissions"] if rule["IpRanges"]}
    assert outside == {(22, 22)}
    inside = [rule for rule in group["IpPermissions"] if rule["UserIdGroupPairs"]]
    assert {pair["GroupId"] for rule in inside for pair in rule["UserIdGroupPairs"]} == set(ids)


def test_the_commands_that_reached_the_head(cloud: Cloud, up: str) -> None:
    notes = cloud.notes.read_text()
    [start] = [line for line in notes.splitlines() if "ray start --head" in line]
    assert "RAY_AUTH_MODE=token" in start and "--dashboard-host=127.0.0.1" in start and "0.0.0.0" not in start
    assert "buddymoe_ray[gpu]" in notes and "/dev/shm" in notes
    assert any("rsync" in line and ".ray/auth_token" in line for line in notes.splitlines())
    assert "a-token-of-this-test" not in notes


def test_down_leaves_nothing(cloud: Cloud, up: str) -> None:
    cloud.ray("down", "-y", "cluster/aws.yaml")
    assert cloud.running() == []
