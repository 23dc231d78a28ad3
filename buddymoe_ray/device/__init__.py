"""Where an engine computes: a GPU, this CPU, or a GPU's path on this CPU. The only package that names CUDA.

`Device` is the seam; `gpu` is its CUDA half, `host` its twin of shared memory and threads, which passes the same tests.
Knows bytes, not what they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from buddymoe_ray.device.gpu import Gpu, current, download, upload
from buddymoe_ray.device.host import Host
from buddymoe_ray.device.host_recording import noted
from buddymoe_ray.device.interface import Copy, Device, Recording, SharedMemory
from buddymoe_ray.errors import ConfigError

__all__ = ["Copy", "Device", "Recording", "SharedMemory", "download", "launch_on", "open_device", "upload"]


def launch_on(where: torch.device, run: Callable[[], None]) -> None:
    """Run what launches a kernel there that torch does not know of; a recording in progress has it too."""
    with current(where):
        noted(run)


def open_device(name: str) -> Device:
    """By its name in `EngineConfig.device`: `auto` is cuda when there is one, else cpu. Raises ConfigError for a device
    that is not there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name in ("cpu", "interpret") or (name == "auto" and not count):
        return Host(apart=name == "interpret")
    wanted = torch.device("cuda" if name == "auto" else name)
    if (wanted.index or 0) >= count:
        raise ConfigError(f"device is {name!r}, must be one of {count} CUDA devices or cpu. hint: use device auto")
    return Gpu(wanted)
