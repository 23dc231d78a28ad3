"""Real experts behind real sockets, for tests of links: a service that computes, and a server in another process.

Run as a script it serves until it is killed: `python link_rig.py ADDRESS`.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from buddymoe_ray.links import LinkServer

SECRET = b"a secret of the cluster, for tests"
HIDDEN, EXPERTS, CONTENTS_BYTES = 16, 8, 3 << 20
SOON = 20.0
"""Seconds after which a wait in a test has failed."""


class Experts:
    """Layer 0 gives rows back as they are, layer 1 multiplies in float32, layer 2 fails, layer 3 answers wrongly.

    `missing` experts are not run; while `open` is clear computing waits.
    """

    def __init__(self, *, missing: frozenset[int] = frozenset()) -> None:
        generator = torch.Generator().manual_seed(7)
        self.weights_EDD = torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=generator)
        stored = torch.randint(0, 256, (CONTENTS_BYTES,), generator=generator, dtype=torch.uint8)
        self.stored = stored.numpy().tobytes()
        self.missing = missing
        self.open = threading.Event()
        self.open.set()
        self.lock = threading.Lock()
        self.running = self.most_running = self.calls = 0

    def compute(self, layer: int, expert_rows: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
        with self.lock:
            self.calls += 1
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            assert self.open.wait(SOON), "a test forgot to open the experts"
            return {e: self.expert(layer, e, rows) for e, rows in expert_rows.items() if e not in self.missing}
        finally:
            with self.lock:
                self.running -= 1

    def expert(self, layer: int, expert: int, rows_RD: Tensor) -> Tensor:
        if layer == 2:
            raise ValueError("layer 2 has no experts")
        if layer == 3:
            return rows_RD[:1]
        return rows_RD @ self.weights_EDD[expert] if layer == 1 else rows_RD

    def contents(self) -> bytes:
        return self.stored


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """No thread or descriptor of a link outlives the test that closed it."""
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith(("link-", "proxy"))]
    assert not left, f"threads {left} are left"
    assert len(os.listdir("/proc/self/fd")) <= len(before), "descriptors are left"


def eventually(check, what: str) -> None:  # type: ignore[no-untyped-def]
    """Wait until `check()`; a failure ends after `SOON`."""
    end = time.monotonic() + SOON
    while not check():
        assert time.monotonic() < end, f"{what} did not come true"
        time.sleep(0.002)


@contextlib.contextmanager
def other_process(address: str) -> Iterator[subprocess.Popen[str]]:
    """A server in a process of its own, that may be stopped and killed."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, __file__, address]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None and child.stdout.readline().strip() == "ready"
            yield child
        finally:
            child.kill()


if __name__ == "__main__":
    server = LinkServer(Experts(), secret=SECRET, address=sys.argv[1])
    print("ready", flush=True)
    sys.stdin.read()  # until the test ends, whatever becomes of it
