"""What tests of a deployed service share: waiting for a state, counting what runs, the key ray processes inherit."""

from __future__ import annotations

import time
from collections.abc import Callable

from buddymoe_ray.client import Client

__all__ = ["TEST_KEY", "TEST_KEY_VARIABLE", "Deploy", "eventually", "running"]

TEST_KEY_VARIABLE = "BUDDYMOE_TEST_KEY"
TEST_KEY = "sk-test-key"

Deploy = Callable[..., str]  # (application name, open_engine=..., **fields of ServeArgs) -> base URL


def eventually(condition: Callable[[], bool], *, seconds: float = 60) -> None:
    """Wait for a state; the limit is only so that a failure ends."""
    end, pause = time.monotonic() + seconds, 0.02
    while not condition():
        assert time.monotonic() < end, f"not reached within {seconds} s"
        time.sleep(pause)
        pause = min(0.25, 1.5 * pause)  # whoever asks all the time takes the cores of those that it waits for


def running(client: Client) -> int:
    """Sequences in the slots of all workers."""
    return sum(snapshot.running + snapshot.waiting for snapshot in client.snapshots())
