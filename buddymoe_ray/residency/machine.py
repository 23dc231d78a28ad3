"""What this machine has: memory that is really available, cgroup limits included.

Reads /proc and /sys only. Does not decide anything; `build` and `plan` do.
"""

from __future__ import annotations

from pathlib import Path

import torch

from buddymoe_ray.config import EngineConfig
from buddymoe_ray.errors import ConfigError

__all__ = ["available_memory_bytes", "cgroup_limit_bytes", "refuse_dense_dtype", "torch_dtype"]

_UNLIMITED = 1 << 60


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Host bytes this process may still take: the kernel's MemAvailable, or what its memory cgroup leaves if less."""
    meminfo = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    limit, used = cgroup_limit_bytes(root)
    return available if limit is None else max(0, min(available, limit - used))


def cgroup_limit_bytes(root: Path = Path("/")) -> tuple[int | None, int]:
    """Limit of the tightest memory cgroup this process is in (None: no limit) and the unreclaimable bytes charged to
    it.

    Understands cgroup v1 and v2; page cache is reclaimable and not counted as used.
    """
    tightest: int | None = None
    used = 0
    for folder, limit_file, stat_file in _memory_cgroups(root):
        limit = _number(folder / limit_file)
        if limit is not None and limit < _UNLIMITED and (tightest is None or limit < tightest):
            tightest, used = limit, _anonymous(folder / stat_file)
    return tightest, used


def refuse_dense_dtype(config: EngineConfig, *, apart: bool) -> None:
    """Raise ConfigError where packed dense weights have no kernel: on a device apart."""
    if config.dense_dtype != "native" and apart:
        where = "cuda" if config.device == "auto" else config.device
        raise ConfigError(f"dense_dtype is {config.dense_dtype!r}, must be native on {where}. hint: --device cpu")


def torch_dtype(name: str) -> torch.dtype | None:
    """The compute dtype by its name; None for `auto`."""
    return None if name == "auto" else getattr(torch, name)


def _memory_cgroups(root: Path) -> list[tuple[Path, str, str]]:
    found = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit_file = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            base, limit_file = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        folder = base / path.lstrip("/")
        found += [(at, limit_file, "memory.stat") for at in (folder, *folder.parents) if at.is_relative_to(base)]
    return found


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _anonymous(path: Path) -> int:
    try:
        stat = dict(line.split() for line in path.read_text().splitlines())
    except OSError:
        return 0
    total = int(stat.get("total_rss", stat.get("anon", 0)))
    return total + int(stat.get("total_shmem", stat.get("shmem", 0)))
