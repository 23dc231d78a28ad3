"""The MoE layer as it runs here: route, resolve, ensure, matmul, combine. Start reading in `block`."""

from buddymoe_ray.moe.block import MoEBlock
from buddymoe_ray.moe.step import Phase, StepState

__all__ = ["MoEBlock", "Phase", "StepState"]
