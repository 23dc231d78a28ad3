"""The service over real addresses: every node in a network namespace of its own, one of them cut off under load.

A program for root: `python namespaces.py [--nodes 3] [--delay-ms 0]`. The head runs here, on a bridge; the other nodes
reach it through virtual cables, which `tc` may delay. Then `cluster_scenario.py` runs on it and prints its records.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

from cluster_scenario import leftovers

TESTS = Path(__file__).parent
BRIDGE, HEAD, PORT = "bm-bridge", "10.77.0.254", 6399
RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
NODE = ["--num-cpus=1", "--object-store-memory=104857600", "--disable-usage-stats"]
SECONDS_TO_START = 8


def sh(command: str, *, check: bool = True) -> None:
    subprocess.run(command.split(), check=check, stderr=None if check else subprocess.DEVNULL)


def ip(at: int) -> str:
    return f"10.77.0.{at}"


def connect(at: int, delay_ms: float) -> str:
    """A namespace on the bridge; returns its name."""
    name = f"bm-n{at}"
    sh(f"ip netns add {name}")
    sh(f"ip link add bm-v{at} type veth peer name eth0 netns {name}")
    sh(f"ip link set bm-v{at} master {BRIDGE} up")
    for command in (f"addr add {ip(at)}/24 dev eth0", "link set eth0 up", "link set lo up"):
        sh(f"ip -n {name} {command}")
    if delay_ms:
        sh(f"tc -n {name} qdisc add dev eth0 root netem delay {delay_ms}ms")
    return name


def disconnect(nodes: int) -> None:
    for at in range(1, nodes):
        sh(f"ip netns del bm-n{at}", check=False)
    sh(f"ip link del {BRIDGE}", check=False)


def start(command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
    """A node, which ends with its process."""
    node = subprocess.Popen(command, env=env, stdout=sys.stderr)
    time.sleep(SECONDS_TO_START)
    assert node.poll() is None, f"{command} ended"
    return node


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--delay-ms", type=float, default=0.0, help="of every packet that leaves a node but the head")
    args = parser.parse_args()
    env = os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    disconnect(args.nodes)
    nodes = []
    try:
        sh(f"ip link add {BRIDGE} type bridge")
        sh(f"ip addr add {HEAD}/24 dev {BRIDGE}")
        sh(f"ip link set {BRIDGE} up")
        at_head = ["--head", f"--node-ip-address={HEAD}", f"--port={PORT}", "--include-dashboard=false"]
        nodes.append(start([*RAY, *at_head, *NODE], env))
        for at in range(1, args.nodes):
            there = ["ip", "netns", "exec", connect(at, args.delay_ms)]
            nodes.append(start([*there, *RAY, f"--address={HEAD}:{PORT}", f"--node-ip-address={ip(at)}", *NODE], env))
        scenario = [sys.executable, str(TESTS / "cluster_scenario.py"), "--address", f"{HEAD}:{PORT}"]
        shape = ["--nodes", str(args.nodes), "--workers", str(args.nodes), "--tokens", str(args.tokens)]
        cut = ["--cut", f"ip link set bm-v{args.nodes - 1} down"]
        subprocess.run([*scenario, *shape, *cut], env=env, check=True)
    finally:
        for node in reversed(nodes):
            node.terminate()
        for node in nodes:
            node.wait(timeout=60)
        disconnect(args.nodes)
    print(json.dumps({"leftovers": leftovers()}), flush=True)


if __name__ == "__main__":
    main()
