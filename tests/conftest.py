"""How a run's tests are spread over its processes: Ray's in one of them, for one Ray, and begun first.

Ray's tests wait more than they compute, so there is a process more than the two cores that a run is made for, and all
but Ray's are niced: what starts a replica or waits for one comes first. Files that compute longest come next, lest one
process is left with one of them at the end, then those of the most tests.
"""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from interpreter import quicken_interpreter
from xdist.scheduler import LoadFileScheduling

OWN_RAY = "tests/ray/test_cluster_up.py"  # `ray up` starts one on fixed ports: before the others' is there
LONGEST = (
    *("triton_engine", "triton_ahead_of_time", "self_calibration", "family_switches", "recorded_decode", "quantised"),
    *("states", "exactness", "row_bits", "batch", "kernels_triton", "standin_engine", "calibrate_run", "commands"),
    *("shared_stress", "kernels_memory", "moe_on_device", "kernels_cache"),
)
FIRST = ("ray", *(f"tests/unit/test_{name}.py" for name in LONGEST))

gc.disable()  # until all is imported

settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)  # cores are shared: no test is timed
settings.load_profile("untimed")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes share the cores: a second thread of one spins, waiting

if not Path("/dev/nvidiactl").exists():  # read when triton is imported, which torch does: kernels run without a GPU
    os.environ["TRITON_INTERPRET"] = "1"


def group(test: str) -> str:
    """What one process does as a whole: a file, or all that start Ray."""
    file = test.split("::", 1)[0]
    return "ray" if file.startswith("tests/ray/") else file


class Groups(LoadFileScheduling):
    """Hands out groups, in the order of the tests."""

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Groups:
    return Groups(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    sizes = Counter(group(item.nodeid) for item in items)
    ranks = {name: (FIRST.index(name) if name in FIRST else len(FIRST), -sizes[name], name) for name in sizes}
    items.sort(key=lambda item: (ranks[group(item.nodeid)], not item.nodeid.startswith(OWN_RAY)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if "torch" in sys.modules:
        quicken_interpreter()
    if group(item.nodeid) != "ray" and "PYTEST_XDIST_WORKER" in os.environ and not os.nice(0):
        os.nice(5)


def pytest_collection_finish() -> None:
    """What is imported by now stays: walking it again and again took a tenth of all tests' time."""
    gc.enable()
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()
