"""One light Ray with Serve for all tests here; each module deploys its own applications into it.

It has two GPUs that are none, or as many as `FAKE_GPUS` says. Nodes may join it and be killed; its head, where Serve's
own processes are, stays until the last of these tests: idle it takes a fifth of a core from all that follow.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster
from serving import TEST_KEY, TEST_KEY_VARIABLE, Deploy

from buddymoe_ray.serve.app import OpenEngine, application, build_app
from buddymoe_ray.serve.args import ServeArgs

FAKE_GPUS = int(os.environ.get("FAKE_GPUS", "2"))
_running = ExitStack()  # Ray and Serve, ended when the next test is not one of these


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _is_here(item):
            item.add_marker(pytest.mark.ray)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> Iterator[None]:
    yield
    if nextitem is None or not _is_here(nextitem):
        _running.close()


def pytest_sessionfinish() -> None:
    _running.close()  # a run that was interrupted


def _is_here(item: pytest.Item) -> bool:
    return item.path.is_relative_to(os.path.dirname(__file__))


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    """Ray's processes inherit the test key and find `fakes`."""
    tests = Path(__file__).parents[1]
    head = {"num_cpus": 8, "num_gpus": FAKE_GPUS, "include_dashboard": False, "object_store_memory": 200 << 20}
    head |= {"include_log_monitor": False}  # nobody reads what it collects
    ours = _running.enter_context(pytest.MonkeyPatch.context())
    ours.setenv(TEST_KEY_VARIABLE, TEST_KEY)
    ours.setenv("RAY_worker_niceness", "0")  # Ray's 15 starves its workers beside tests that compute
    ours.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # on a busy machine it takes longer than Ray's 5
    ours.setenv("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.3")  # each turn of .1 costs a twentieth of a core
    ours.setenv("PYTHONPATH", os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]))
    started = Cluster(initialize_head=True, head_node_args=head)
    _running.callback(started.shutdown)
    ray.init(address=started.address, log_to_driver=False)
    _running.callback(ray.shutdown)
    return started


@pytest.fixture(scope="session")
def http_port(cluster: Cluster) -> int:
    """The port of a running Serve on this host."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    _running.callback(serve.shutdown)
    return port


@pytest.fixture(scope="module")
def deploy(http_port: int) -> Iterator[Deploy]:
    """Deploys an application under its name and returns its base URL; all are deleted with the module."""
    names: list[str] = []

    def run(name: str, *, open_engine: OpenEngine | None = None, **args: Any) -> str:
        names.append(name)
        return _deployed(http_port, name, open_engine, ServeArgs(**args))

    yield run
    for name in names:
        serve.delete(name)


@pytest.fixture(scope="session")
def tiny(http_port: int) -> str:
    """The base URL of `tiny`: two workers that serve `builtin:tiny` exactly at a quarter of its experts."""
    return _deployed(
        http_port, "tiny", None, ServeArgs(model="builtin:tiny", memory="25%", workers=2, num_cpus=1, seed=3)
    )


def _deployed(port: int, name: str, open_engine: OpenEngine | None, args: ServeArgs) -> str:
    app = build_app(args) if open_engine is None else application(args, open_engine=open_engine)
    serve.run(app, name=name, route_prefix=f"/{name}", _local_testing_mode=False)
    return f"http://127.0.0.1:{port}/{name}"
