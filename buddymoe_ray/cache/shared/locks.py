"""Byte-range locks on an open file (Linux "open file description" locks).

They belong to the descriptor, so threads that opened the file themselves exclude each other, and the kernel releases
them when the process dies, even by kill -9: a lock that is held proves that its holder lives, whatever became of its
process id. Knows offsets, not what they stand for.
"""

from __future__ import annotations

import fcntl
import struct
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["FileLocks"]

_FLOCK = struct.Struct("hhxxxxqqixxxx")  # struct flock of 64-bit Linux: type, whence, start, length, pid (0)


class FileLocks:
    """Locks on the bytes of the file open as `fd`; not for use by two threads at once."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def lock(self, at: int) -> None:
        """Take the byte, waiting for whoever has it."""
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLKW, _flock(fcntl.F_WRLCK, at))

    def try_lock(self, at: int) -> bool:
        """Take the byte unless somebody else has it."""
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK, at))
        except (BlockingIOError, PermissionError):
            return False
        return True

    def unlock(self, at: int) -> None:
        """Let go of the byte."""
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, at))

    def held_elsewhere(self, at: int, count: int = 1) -> bool:
        """Whether another descriptor holds any of `count` bytes."""
        found = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, at, count))
        kind: int = _FLOCK.unpack(found)[0]
        return kind != fcntl.F_UNLCK

    @contextmanager
    def locked(self, at: int) -> Iterator[None]:
        """Hold the byte for a block."""
        self.lock(at)
        try:
            yield
        finally:
            self.unlock(at)


def _flock(kind: int, at: int, count: int = 1) -> bytes:
    return _FLOCK.pack(kind, 0, at, count, 0)
