"""Expert bytes and where they are: disk, host, device, and one node's shared memory. Plans are handed in."""

from buddymoe_ray.cache.disk import READ_ON_THE_SPOT, DiskReader, largest_read, stamp_of
from buddymoe_ray.cache.expert_cache import ExpertCache, open_private
from buddymoe_ray.cache.host import HostTier
from buddymoe_ray.cache.pool import CacheStats, Glance, Lease, slot_views
from buddymoe_ray.cache.slot_peers import NVLINK_NEARER, SlotPeers
from buddymoe_ray.cache.standin_pool import StandinPool

__all__ = [
    "NVLINK_NEARER",
    "READ_ON_THE_SPOT",
    "CacheStats",
    "DiskReader",
    "ExpertCache",
    "Glance",
    "HostTier",
    "Lease",
    "SlotPeers",
    "StandinPool",
    "largest_read",
    "open_private",
    "slot_views",
    "stamp_of",
]
