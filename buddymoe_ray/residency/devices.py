"""The GPUs of this node as NVML reports them: memory, PCIe and NVLink, NUMA node.

Uses nvidia-ml-py and no torch, so a plan can be made on a machine that could not run it. `nvml` is injected: tests hand
in a fake, everything else the real module. A node without NVIDIA's driver has no devices, which is not an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pynvml

from buddymoe_ray.config import parse_memory
from buddymoe_ray.errors import ConfigError

__all__ = ["GpuInfo", "list_gpus", "peers_nearer", "supposed_gpus"]

# bytes/s per lane and direction, after encoding, by PCIe generation
_PCIE_LANE = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
_MAX_NVLINKS, _NVLINK = 18, 25e9  # bytes/s of one and direction, from the third generation on
_MOST_GPUS, _DRIVERS_BYTES = 64, 512 << 20


@dataclass(frozen=True, kw_only=True)
class GpuInfo:
    """One GPU. `pcie_bytes_s` is the link's peak per direction; `numa_node` is None where the driver does not say."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int
    pcie_bytes_s: float
    nvlinks: int
    numa_node: int | None

    @property
    def peer_bytes_s(self) -> float:
        """Reads of another GPU's memory: by NVLink, else by PCIe."""
        return self.nvlinks * _NVLINK or self.pcie_bytes_s


def list_gpus(nvml: ModuleType | Any = pynvml) -> tuple[GpuInfo, ...]:
    """All GPUs in NVML's order; empty without driver or GPU."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return ()
    try:
        return tuple(_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount()))
    finally:
        nvml.nvmlShutdown()


def peers_nearer(gpus: Sequence[GpuInfo], otherwise: float) -> float:
    """log2 of how much faster GPUs read each other's memory than the host's; `otherwise` where that is not known."""
    known = [gpu.peer_bytes_s / gpu.pcie_bytes_s for gpu in gpus if gpu.pcie_bytes_s]
    return max(0.0, math.log2(min(known))) if known else otherwise


def supposed_gpus(text: str) -> tuple[GpuInfo, ...]:
    """`24GiB`, or `2x24GiB`: GPUs of that memory, on PCIe 4, less half a GiB for the driver. Raises ConfigError."""
    found = re.fullmatch(r"(?:(\d+)x)?(\d.*)", text)
    count, size = (int(found[1] or 1), found[2]) if found else (0, "0")
    nbytes = parse_memory(size, total_expert_bytes=0, name="gpus")
    if not 0 < count <= _MOST_GPUS or nbytes <= _DRIVERS_BYTES:
        raise ConfigError(f"gpus is {text!r}, must be like 24GiB or 2x24GiB. hint: say what a GPU's memory is")
    return tuple(
        GpuInfo(
            index=index,
            name="supposed",
            total_bytes=nbytes,
            free_bytes=nbytes - _DRIVERS_BYTES,
            pcie_bytes_s=16 * _PCIE_LANE[4],
            nvlinks=0,
            numa_node=None,
        )
        for index in range(count)
    )


def _gpu(nvml: Any, index: int) -> GpuInfo:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    name = nvml.nvmlDeviceGetName(handle)
    generation = _ask(nvml, "nvmlDeviceGetMaxPcieLinkGeneration", handle) or 0
    width = _ask(nvml, "nvmlDeviceGetMaxPcieLinkWidth", handle) or 0
    return GpuInfo(
        index=index,
        name=name.decode() if isinstance(name, bytes) else name,
        total_bytes=int(memory.total),
        free_bytes=int(memory.free),
        pcie_bytes_s=_PCIE_LANE.get(generation, 0.0) * width,
        nvlinks=sum(_ask(nvml, "nvmlDeviceGetNvLinkState", handle, link) == 1 for link in range(_MAX_NVLINKS)),
        numa_node=_ask(nvml, "nvmlDeviceGetNumaNodeId", handle),
    )


def _ask(nvml: Any, name: str, *args: Any) -> int | None:
    """One optional query; None where this GPU or driver does not answer it."""
    try:
        return int(getattr(nvml, name)(*args))
    except (nvml.NVMLError, AttributeError):
        return None
