"""`deployments/mixtral.yaml` where ray counts eight GPUs: eight workers with real engines, a device and a shard each.

Two GPUs are in `test_cluster.py`; here eight processes share whatever cores there are.
"""

from __future__ import annotations

import pytest
from test_cluster import run


@pytest.mark.timeout(400)
def test_eight_gpus_are_eight_workers() -> None:
    [record] = run("fake_gpus.py", "--gpus", "8", seconds=380)
    assert sorted(record["devices"]) == [[str(gpu)] for gpu in range(8)]
    assert record["tokens"] == [8] * 16, "a streamed reply ended early"
    assert record["covered"] == record["experts"] == 16
    pins = [tuple(pin) for shard in record["shards"] for pin in shard]
    assert len(record["shards"]) == 8 and len(pins) == len(set(pins)) == 16
