"""Bytes that one process of a node writes once and all read: stand-in records, one copy per node.

A file like a store's, without tables: whoever comes first fills it under the lock, the rest wait and map it. Knows
bytes, not what they mean. Invariant: what is mapped is whole; a filler that dies leaves the file to the next.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from buddymoe_ray.cache.shared.locks import MAKER_BYTE, ROW_BYTE, ROWS, TABLES_BYTE, FileLocks, remove_unused
from buddymoe_ray.cache.shared.pages import map_file
from buddymoe_ray.cache.shared.store import allocate, open_locked
from buddymoe_ray.errors import CacheError

__all__ = ["Room", "open_room"]

_PAGE = 4096
_MAGIC = b"BuddyRm1"


class Room:
    """One attachment: `bytes` is a uint8 tensor that must not be written."""

    def __init__(self, path: Path, locks: FileLocks, memory: memoryview) -> None:
        self._path, self._locks, self._closed = path, locks, False
        self.bytes: Tensor = torch.from_numpy(np.frombuffer(memory, dtype=np.uint8)[_PAGE:])

    def close(self) -> None:
        """Let go; the last one out removes the file. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._locks.close()
            remove_unused([self._path])


def open_room(path: Path, nbytes: int, digest: bytes, fill: Callable[[Tensor], None]) -> Room:
    """Map the file, filled by `fill` if nobody has yet.

    Args:
        nbytes: size of the content.
        digest: 32 bytes that tell this content from any other.
        fill: writes all of a uint8 tensor `[nbytes]`.

    Raises:
        BudgetError: the file does not fit. CacheError: another content is in use there, or somebody stands still with
        it. And what `fill` raises.
    """
    fd, locks = open_locked(path)
    try:
        total = _PAGE + nbytes
        head = _MAGIC + digest
        made = os.fstat(fd).st_size != total or os.pread(fd, len(head), 0) != head
        if made:
            if locks.held_elsewhere(ROW_BYTE, ROWS):
                raise CacheError(f"{path} is in use for another content, must be free. hint: stop the other service")
            locks.lock(MAKER_BYTE)
            allocate(path, fd, total)
        memory = map_file(fd, total, huge=total if made else 0)
        if made:
            fill(torch.from_numpy(np.frombuffer(memory, dtype=np.uint8)[_PAGE:]))
            os.pwrite(fd, head, 0)  # last: a file without it is filled anew
        if not any(locks.try_lock(ROW_BYTE + row) for row in range(ROWS)):
            raise CacheError(f"{path} has {ROWS} users, must have fewer. hint: run fewer workers per node")
        if made:
            locks.unlock(MAKER_BYTE)
        locks.unlock(TABLES_BYTE)
        return Room(path, locks, memory)
    except BaseException:
        locks.close()
        remove_unused([path])
        raise
