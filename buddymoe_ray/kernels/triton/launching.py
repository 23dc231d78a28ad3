"""How a Triton kernel is launched, and where it runs: on a GPU, or in the interpreter on a CPU.

Imports triton when asked. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from buddymoe_ray.device import launch_on

__all__ = ["OPTIONS", "interpreted", "launch"]

OPTIONS: Mapping[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}
"""Of every kernel; named, because a default that changes would change bits."""


def interpreted() -> bool:
    """Whether this process runs Triton's kernels in the interpreter: TRITON_INTERPRET=1 when triton was imported."""
    from triton import JITFunction

    from buddymoe_ray.kernels.triton.programs import combine

    return not isinstance(combine, JITFunction)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any) -> None:
    """Run programs of a kernel where its first argument is."""
    launch_on(args[0].device, lambda: kernel[grid](*args, **OPTIONS))
