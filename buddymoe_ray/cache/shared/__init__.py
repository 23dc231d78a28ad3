"""One node's experts in one shared-memory file, used by every worker of the node at once.

locks     byte-range locks that the kernel releases when a process dies
shape     where every table lies in the file
interface what a cache asks of a store, a node's or a private one
tables    who holds what: slots, leases, rows; every change under one lock
store     the file itself: create, attach, sweep
calls     one `stream` in progress; a slot of one's own, for when others stand still
mover     background migration: experts in and out while others compute
janitor   removes files when every process was killed
lending   slots whose memory is reserved for others, and given back to them
room      bytes written once and read by all (stand-in records)
"""

from buddymoe_ray.cache.shared.janitor import watch
from buddymoe_ray.cache.shared.lending import Lender
from buddymoe_ray.cache.shared.mover import Move, Moved, Mover
from buddymoe_ray.cache.shared.room import Room, open_room
from buddymoe_ray.cache.shared.store import FOLDER, SharedStore, store_digest, store_path, sweep

__all__ = [
    "FOLDER",
    "Lender",
    "Move",
    "Moved",
    "Mover",
    "Room",
    "SharedStore",
    "open_room",
    "store_digest",
    "store_path",
    "sweep",
    "watch",
]
