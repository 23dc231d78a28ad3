"""One light ray instance with Serve for all tests here; each module deploys its own applications into it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from serving import TEST_KEY, TEST_KEY_VARIABLE, Deploy

from buddymoe_ray.serve.app import OpenEngine, application, build_app
from buddymoe_ray.serve.args import ServeArgs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="session")
def http_port() -> Iterator[int]:
    """The port of a running Serve on this host; ray's processes inherit the test key and find `fakes`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    tests = Path(__file__).parents[1]
    ours = pytest.MonkeyPatch()
    ours.setenv(TEST_KEY_VARIABLE, TEST_KEY)
    ours.setenv("PYTHONPATH", os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]))
    # "local": never the cluster that another test has started on this machine
    ray.init(address="local", num_cpus=8, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield port
    serve.shutdown()
    ray.shutdown()
    ours.undo()


@pytest.fixture(scope="module")
def deploy(http_port: int) -> Iterator[Deploy]:
    """Deploys an application under its name and returns its base URL; all are deleted with the module."""
    names: list[str] = []

    def run(name: str, *, open_engine: OpenEngine | None = None, **args: Any) -> str:
        names.append(name)
        options = ServeArgs(**args)
        app = build_app(options) if open_engine is None else application(options, open_engine=open_engine)
        serve.run(app, name=name, route_prefix=f"/{name}", _local_testing_mode=False)
        return f"http://127.0.0.1:{http_port}/{name}"

    yield run
    for name in names:
        serve.delete(name)
