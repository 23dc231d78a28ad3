"""What tests of a deployed service share: waiting for a state, counting what runs, the key ray processes inherit."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from buddymoe_ray.client import Client

__all__ = ["TEST_KEY", "TEST_KEY_VARIABLE", "Deploy", "alone", "eventually", "running"]

TEST_KEY_VARIABLE = "BUDDYMOE_TEST_KEY"
TEST_KEY = "sk-test-key"

Deploy = Callable[..., str]  # (application name, open_engine=..., **fields of ServeArgs) -> base URL


@contextmanager
def alone() -> Iterator[None]:
    """Programs that start clusters of their own take turns: side by side on two cores each would time out."""
    with (Path(tempfile.gettempdir()) / f"buddymoe-tests-{os.geteuid()}.lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield


def eventually(condition: Callable[[], bool], *, seconds: float = 60) -> None:
    """Wait for a state; the limit is only so that a failure ends."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not reached within {seconds} s"
        time.sleep(0.02)


def running(client: Client) -> int:
    """Sequences in the slots of all workers."""
    return sum(snapshot.running + snapshot.waiting for snapshot in client.snapshots())
