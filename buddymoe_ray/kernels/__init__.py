"""Arithmetic: one expert's feed-forward over the rows routed to it, and the sum over a token's experts.

Knows nothing of residency, slots or models: it gets tensors and returns tensors. `reference` is the spec.
"""

from buddymoe_ray.kernels.reference import ExpertMath, combine, expert_forward
from buddymoe_ray.kernels.upcast import UpcastScratch

__all__ = ["ExpertMath", "UpcastScratch", "combine", "expert_forward"]
