"""Expert bytes and where they are: disk, host, device. Decides nothing: plans and eviction orders are handed in."""

from buddymoe_ray.cache.disk import DiskReader
from buddymoe_ray.cache.expert_cache import CacheStats, Eviction, ExpertCache
from buddymoe_ray.cache.pool import Lease

__all__ = ["CacheStats", "DiskReader", "Eviction", "ExpertCache", "Lease"]
