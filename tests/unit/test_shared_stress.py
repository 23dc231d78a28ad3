"""The shared store under processes that are stopped and killed, and the same without a check: `store_stress.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "store_stress.py"


def test_stopped_and_killed_processes_read_no_wrong_byte_and_leave_nothing() -> None:
    command = [sys.executable, str(SCRIPT), "8", "unchanged", "generation", "leased"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    whole, *weaker = [json.loads(line) for line in done.stdout.splitlines()]
    assert (whole["wrong"], whole["waited"], whole["hung"]) == (0, 0, 0), f"{whole} {done.stderr}"
    assert whole["left"] == "", f"{whole} {done.stderr}"
    assert whole["right"] > 500 and whole["kills"] > 5 and whole["stops"] > 50, whole
    assert [found["check"] for found in weaker if found["wrong"]] == ["unchanged", "generation", "leased"], weaker
