"""Where the measurements of a machine are kept: a JSON file in the cache folder, by what the figures depend on."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

import buddymoe_ray.kernels
from buddymoe_ray.config import cache_folder

__all__ = ["kept_at", "read_kept", "write_kept"]


_METHOD = "4: CPU time of one thread, prompts of two lengths, softmax"


def kept_at(threads: int) -> Path:
    """By what the figures depend on."""
    kernels = hashlib.sha256(
        b"".join(map(Path.read_bytes, sorted(Path(buddymoe_ray.kernels.__file__).parent.glob("*.py"))))
    )
    versions = [_METHOD, kernels.hexdigest(), torch.__version__, platform.machine(), _cpu_name()]
    key = hashlib.sha256(json.dumps([*versions, os.cpu_count(), threads]).encode()).hexdigest()[:16]
    return cache_folder() / f"speed-{key}.json"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def read_kept(path: Path) -> dict[str, Any]:
    """What was measured before; what cannot be read is measured again."""
    try:
        known = json.loads(path.read_text())
        rates = [rate for found in known["weights"].values() for rate in found.values()]
        if all(rate > 0 for rate in rates) and all(seconds >= 0 for seconds in known["overhead"].values()):
            return dict(known)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    return {}


def write_kept(path: Path, known: dict[str, Any]) -> None:
    """Whole or not at all; where it cannot be kept it is measured again the next time."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(known, file)
        os.replace(file.name, path)
    except OSError:
        return
