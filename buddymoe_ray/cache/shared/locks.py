"""Byte-range locks on an open file (Linux "open file description" locks), and files that nobody holds any more.

They belong to the descriptor, so threads that opened the file themselves exclude each other, and the kernel releases
them when the process dies, even by kill -9: a lock that is held proves that its holder lives, whatever became of its
process id. Standard library alone, for the janitor loads this file by its path.
Invariant: a file is unlinked only under the lock on its tables, while no row and no owner holds it.
"""

from __future__ import annotations

import fcntl
import functools
import os
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["MAKER_BYTE", "OWNER_BYTE", "ROWS", "ROW_BYTE", "TABLES_BYTE", "FileLocks", "remove_unused", "same_file"]

ROWS = 64
"""Most processes and threads that may be attached to one file."""

TABLES_BYTE, OWNER_BYTE, MAKER_BYTE, ROW_BYTE = 0, 1, 2, 64
"""Which byte of the file each lock is on: the tables, the file's owner, whoever makes the file and holds its tables for
long, and one per row from ROW_BYTE on."""

_POLL_SECONDS, _POLL_SHARE, _LONGEST_WAIT_SECONDS = 50e-6, 1 / 64, 2.0
_FLOCK = struct.Struct("hhxxxxqqixxxx")  # struct flock of 64-bit Linux: type, whence, start, length, pid (0)


class FileLocks:
    """Locks on the bytes of the file open as `fd`; not for use by two threads at once."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def lock(self, at: int, seconds: float | None = None) -> bool:
        """Take the byte, waiting for whoever has it, so long at most; whether it was had."""
        if seconds is None:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLKW, _flock(fcntl.F_WRLCK, at))
            return True
        began = 0.0
        while not self.try_lock(at):
            now = time.monotonic()
            began = began or now
            if now >= began + seconds:
                return False
            time.sleep(max(_POLL_SECONDS, _POLL_SHARE * (now - began)))
        return True

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

    def close(self) -> None:
        """Let go of every byte and close the file. The locks first: a mapping keeps a copy of the descriptor."""
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, 0, 0))
        os.close(self._fd)

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


def remove_unused(paths: Iterable[Path], *, dry: bool = False, empty: bool = True) -> list[Path]:
    """Unlink those of the files that no living process uses, and return them; with `dry` only say which they are.

    Without `empty` an empty file stays: somebody may have made it just now, and be about to lock it. One whose tables
    somebody holds without end is in use.
    """
    unused = []
    for path in paths:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        locks = FileLocks(fd)
        try:
            if not dry and not locks.lock(TABLES_BYTE, _LONGEST_WAIT_SECONDS):  # whoever makes or attaches holds it
                continue
            used = locks.held_elsewhere(OWNER_BYTE) or locks.held_elsewhere(ROW_BYTE, ROWS)
            if not used and same_file(path, fd) and (empty or os.fstat(fd).st_size):
                unused.append(path)
                if not dry:
                    os.unlink(path)
        finally:
            locks.close()
    return unused


def same_file(path: Path, fd: int) -> bool:
    """Whether the path still leads to the open file: it may have been unlinked, and made anew, since."""
    try:
        return os.stat(path).st_ino == os.fstat(fd).st_ino
    except FileNotFoundError:
        return False


@functools.cache
def _flock(kind: int, at: int, count: int = 1) -> bytes:
    return _FLOCK.pack(kind, 0, at, count, 0)
