"""The disk tier: reads expert pieces from the checkpoint's own files, several at once, past the page cache.

O_DIRECT into a fixed set of aligned bounce buffers, then a copy to where the bytes belong: no readahead, no second copy
in the page cache, and the bytes counted are the bytes the disk moved. A file system without O_DIRECT is read buffered,
its pages dropped after use; that is logged once and shown in `mode`. Knows paths and offsets, not experts.
"""

from __future__ import annotations

import logging
import mmap
import os
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from buddymoe_ray.errors import CacheError
from buddymoe_ray.types import ExpertPiece

__all__ = ["DiskReader", "ReadTicket", "Ticket"]

log = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]
_PAGE = 4096


class Ticket(Protocol):
    """Bytes on their way into one destination."""

    def done(self) -> bool:
        """Whether nothing is in flight any more, well or ill."""

    def wait(self) -> None:
        """Block until nothing is in flight, then raise CacheError if it failed."""

    def settle(self) -> None:
        """Block until nothing is in flight, whatever came of it: only then may the destination be used again."""


@dataclass(frozen=True)
class ReadTicket:
    """Reads in flight for one destination."""

    parts: tuple[Future[None], ...]

    def done(self) -> bool:
        """Whether nothing is in flight any more, well or ill."""
        return all(part.done() for part in self.parts)

    def wait(self) -> None:
        """Block until nothing is in flight, then raise CacheError if a read failed."""
        wait(self.parts)
        for part in self.parts:
            part.result()

    def settle(self) -> None:
        """Block until nothing is in flight, whatever came of it: only then may the destination be used again."""
        wait(self.parts)


class DiskReader:
    """`depth` reads at a time, each at most `buffer_bytes` (a multiple of the page).

    `bytes_requested` counts useful bytes, `bytes_read` what was asked of the disk, alignment included.
    """

    def __init__(self, *, depth: int = 4, buffer_bytes: int = 2 << 20, direct: bool = True) -> None:
        assert depth > 0, f"depth is {depth}, must be positive"
        whole = buffer_bytes >= _PAGE and buffer_bytes % _PAGE == 0
        assert whole, f"buffer_bytes is {buffer_bytes}, must be whole pages"
        self.depth, self.buffer_bytes = depth, buffer_bytes
        self.staging_bytes = depth * buffer_bytes
        self.bytes_requested = self.bytes_read = 0
        self._direct = direct and hasattr(os, "O_DIRECT")
        self._refused: set[int] = set()  # devices whose file system has no O_DIRECT
        self._lock = threading.Lock()
        self._files: dict[str, tuple[int, bool]] = {}
        self._memory = mmap.mmap(-1, self.staging_bytes)  # anonymous maps are page-aligned
        self._buffers: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        view = memoryview(self._memory)
        for at in range(depth):
            self._buffers.put(view[at * buffer_bytes : (at + 1) * buffer_bytes])
        self._pool = ThreadPoolExecutor(max_workers=depth, thread_name_prefix="disk")

    @property
    def mode(self) -> str:
        """`direct`, or `buffered` when a file system refused O_DIRECT."""
        return "direct" if self._direct and not self._refused else "buffered"

    def submit(self, pieces: Sequence[ExpertPiece], destination: Bytes) -> ReadTicket:
        """Start reading all pieces into `destination` (a slot's bytes, uint8)."""
        # one page of slack at either end lets any offset be read in whole pages
        most = max(_PAGE, self.buffer_bytes - 2 * _PAGE) if self.buffer_bytes > 2 * _PAGE else self.buffer_bytes // 2
        parts = list[Future[None]]()
        try:
            for piece in pieces:
                for start in range(0, piece.nbytes, most):
                    count = min(most, piece.nbytes - start)
                    target = destination[piece.slot_offset + start : piece.slot_offset + start + count]
                    parts.append(self._start(piece.path, piece.offset + start, target))
        except BaseException:
            wait(parts)  # nothing may land in a slot that has a new owner
            raise
        return ReadTicket(tuple(parts))

    def close(self) -> None:
        """Finish what is in flight and close all files. Safe to call twice."""
        self._pool.shutdown(wait=True)
        with self._lock:
            files, self._files = self._files, {}
        for fd, _ in files.values():
            os.close(fd)

    def _start(self, path: str, offset: int, target: Bytes) -> Future[None]:
        try:
            return self._pool.submit(self._read, path, offset, target)
        except RuntimeError as error:  # the pool was shut down
            raise CacheError("disk reader is closed, must be open. hint: the engine was closed") from error

    def _read(self, path: str, offset: int, target: Bytes) -> None:
        buffer = self._buffers.get()
        try:
            self._read_through(buffer, path, offset, target)
        except OSError as error:
            raise CacheError(
                f"{path} at byte {offset}: {error.strerror or error}. hint: check the disk and the checkpoint"
            ) from error
        finally:
            self._buffers.put(buffer)

    def _read_through(self, buffer: memoryview, path: str, offset: int, target: Bytes) -> None:
        fd, direct = self._open(path)
        done = 0
        while done < target.nbytes:
            at = offset + done
            begin = at // _PAGE * _PAGE
            span = min(len(buffer), -(-(at - begin + target.nbytes - done) // _PAGE) * _PAGE)
            got = os.preadv(fd, [buffer[:span]], begin)
            useful = min(got - (at - begin), target.nbytes - done)
            if useful <= 0:
                end = offset + target.nbytes
                raise CacheError(f"{path} ends before byte {at + 1}, must hold {end}. hint: copy it again")
            np.copyto(target[done : done + useful], np.frombuffer(buffer, np.uint8)[at - begin : at - begin + useful])
            done += useful
            with self._lock:
                self.bytes_requested += useful
                self.bytes_read += got
        if not direct:
            os.posix_fadvise(fd, offset, target.nbytes, os.POSIX_FADV_DONTNEED)

    def _open(self, path: str) -> tuple[int, bool]:
        with self._lock:
            if path not in self._files:
                self._files[path] = self._open_new(path)
            return self._files[path]

    def _open_new(self, path: str) -> tuple[int, bool]:
        fd = _open_direct(path) if self._direct else None
        if fd is not None:
            return fd, True
        # a path that cannot be opened at all says nothing about O_DIRECT: it raises here, before anything is concluded
        fd = os.open(path, os.O_RDONLY)
        device = os.fstat(fd).st_dev
        if self._direct and device not in self._refused:
            self._refused.add(device)
            log.warning("%s cannot be read with O_DIRECT: reading buffered, dropping pages after use", path)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return fd, False


def _open_direct(path: str) -> int | None:
    """A descriptor that has read a page with O_DIRECT; None when that did not work."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    try:
        with mmap.mmap(-1, _PAGE) as probe:  # some file systems accept the flag and refuse the read
            os.preadv(fd, [probe], 0)
    except OSError:
        os.close(fd)
        return None
    return fd
