"""Pure decisions: no torch, no ray, no clock, no I/O. Each returns what was decided, for others to do."""

from buddymoe_ray.policy.eviction import LRU
from buddymoe_ray.policy.memory import Staging, parse_memory, plan_staging, split_slots

__all__ = ["LRU", "Staging", "parse_memory", "plan_staging", "split_slots"]
