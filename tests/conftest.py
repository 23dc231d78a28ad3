"""How tests share out over two processes: a file stays together, and all that need Ray stay with one Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

RAY = Path(__file__).parent / "ray"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        name = "ray" if RAY in item.path.parents else item.path.name
        item.add_marker(pytest.mark.xdist_group(name))
