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
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from buddymoe_ray.errors import CacheError
from buddymoe_ray.types import ExpertLayout, ExpertPiece

__all__ = ["READ_ON_THE_SPOT", "DiskReader", "ReadTicket", "Ticket", "largest_read", "stamp_of"]

log = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]
_PAGE, _SAMPLES = 4096, 16
_CLOSED = "disk reader is closed, must be open. hint: the engine was closed"
READ_ON_THE_SPOT = 128 << 10
"""Up to so many bytes of an expert are read on the spot, end to end what lies so in a file: to hand a read to a thread
and to be woken by it takes longer. With it and fewer reads a miss of builtin:tiny takes .42 ms instead of .86."""


class Ticket(Protocol):
    """Bytes on their way into one destination."""

    def done(self) -> bool:
        """Whether nothing is in flight any more, well or ill."""

    def landed(self) -> bool:
        """Whether nobody would wait for them: neither who calls `wait`, nor what a device computes behind it."""

    def wait(self) -> None:
        """Block until nothing is in flight, then raise CacheError if it failed."""

    def settle(self) -> None:
        """Block until nothing is in flight, whatever came of it: only then may the destination be used again."""

    def cancel(self) -> bool:
        """Give up what was not begun; whether there was any: then the bytes will not be there."""


class _Read(NamedTuple):
    """Bytes of a file from `offset` on, to fill `targets` one after the other."""

    path: str
    offset: int
    targets: tuple[Bytes, ...]


class _Run(NamedTuple):
    """Bytes of a file from `offset` on, and the parts of a destination that they fill one after the other."""

    path: str
    offset: int
    parts: tuple[slice, ...]

    def into(self, destination: Bytes) -> _Read:
        return _Read(self.path, self.offset, tuple([destination[part] for part in self.parts]))


class _Plan(NamedTuple):
    """How pieces are read: in these runs, `on_the_spot` or by threads."""

    pieces: Sequence[ExpertPiece]
    on_the_spot: bool
    runs: list[_Run]


@dataclass(frozen=True)
class ReadTicket:
    """Reads in flight for one destination; `error` is what reads on the spot failed with."""

    parts: tuple[Future[None], ...] = ()
    error: CacheError | None = None

    def done(self) -> bool:
        """Whether nothing is in flight any more, well or ill."""
        return all(part.done() for part in self.parts)

    landed = done

    def wait(self) -> None:
        """Block until nothing is in flight, then raise CacheError if a read failed or was cancelled."""
        self.settle()
        if self.error is not None:
            raise self.error
        for part in self.parts:
            if part.cancelled():
                raise CacheError("a read was cancelled, must be begun again. hint: nobody may wait for it")
            part.result()

    def settle(self) -> None:
        """Block until nothing is in flight, whatever came of it: only then may the destination be used again."""
        if self.parts:
            wait(self.parts)

    def cancel(self) -> bool:
        """Give up what was not begun; whether there was any."""
        return sum(part.cancel() for part in self.parts) > 0


class DiskReader:
    """`depth` reads at a time, each at most `buffer_bytes` (a multiple of the page). One of `files` that holds
    other bytes since that was noted (`stamp_of`) is not read any more.

    `bytes_requested` counts useful bytes, `bytes_read` what was asked of the disk, alignment included; in
    `busy_seconds` at least one read was under way.
    """

    def __init__(
        self,
        *,
        depth: int = 4,
        buffer_bytes: int = 2 << 20,
        direct: bool = True,
        files: Mapping[str, tuple[int, int, bytes]] | None = None,
    ) -> None:
        assert depth > 0, f"depth is {depth}, must be positive"
        whole = buffer_bytes >= _PAGE and buffer_bytes % _PAGE == 0
        assert whole, f"buffer_bytes is {buffer_bytes}, must be whole pages"
        self.depth, self.buffer_bytes = depth, buffer_bytes
        self.staging_bytes = depth * buffer_bytes
        self.bytes_requested = self.bytes_read = self._reading = 0
        self.busy_seconds = self._since = 0.0
        self._direct = direct and hasattr(os, "O_DIRECT")
        self._refused: set[int] = set()  # devices whose file system has no O_DIRECT
        self._lock = threading.Lock()
        self._known, self._files = files or {}, dict[str, tuple[int, bool]]()
        self._plans: dict[int, _Plan] = {}  # by the id of their pieces
        self._memory = mmap.mmap(-1, self.staging_bytes)  # anonymous maps are page-aligned
        self._buffers: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        view = memoryview(self._memory)
        for at in range(depth):
            self._buffers.put(view[at * buffer_bytes : (at + 1) * buffer_bytes])
        self._closed = False
        self._pool = ThreadPoolExecutor(max_workers=depth, thread_name_prefix="disk")

    @property
    def mode(self) -> str:
        """`direct`, or `buffered` when a file system refused O_DIRECT."""
        return "direct" if self._direct and not self._refused else "buffered"

    def seconds(self, nbytes: int) -> float:
        """What `nbytes` take, by what was read so far; 0 before."""
        return self.busy_seconds / self.bytes_read * nbytes if self.bytes_read else 0.0

    def submit(self, pieces: Sequence[ExpertPiece], destination: Bytes) -> ReadTicket:
        """Start reading all pieces into `destination` (a slot's bytes, uint8); few bytes are there when it returns.

        How a tuple of them is read is remembered. Raises CacheError when the reader is closed; all else that goes wrong
        is told by the ticket.
        """
        if self._closed:
            raise CacheError(_CLOSED)
        plan = self._plans.get(id(pieces))
        if plan is None:
            plan = _Plan(pieces, _is_small(pieces), self._cut(pieces))
            if isinstance(pieces, tuple):
                self._plans[id(pieces)] = plan  # and so the pieces live, and nothing else has their id
        if plan.on_the_spot:
            return self._now(plan.runs, destination)
        parts = list[Future[None]]()
        try:
            for run in plan.runs:
                parts.append(self._start(run.into(destination)))
        except BaseException:
            wait(parts)  # nothing may land in a slot that has a new owner
            raise
        return ReadTicket(tuple(parts))

    def close(self) -> None:
        """Finish what is in flight and close all files. Safe to call twice."""
        self._closed = True
        self._pool.shutdown(wait=True)
        with self._lock:
            files, self._files = self._files, {}
        for fd, _ in files.values():
            os.close(fd)

    def _cut(self, pieces: Sequence[ExpertPiece]) -> list[_Run]:
        """Reads that pieces take: one of what lies end to end and is small, more of a large piece."""
        if _is_small(pieces):
            return [_run_of(group) for group in _end_to_end(pieces)]
        # one page of slack at either end lets any offset be read in whole pages
        most, runs = max(_PAGE, self.buffer_bytes - 2 * _PAGE), list[_Run]()
        for group in _end_to_end(pieces):
            if _is_small(group):  # scales of matrices, one behind the other
                runs.append(_run_of(group))
                continue
            for piece in group:
                for start in range(0, piece.nbytes, most):
                    at = piece.slot_offset + start
                    part = slice(at, at + min(most, piece.nbytes - start))
                    runs.append(_Run(piece.path, piece.offset + start, (part,)))
        return runs

    def _now(self, runs: Sequence[_Run], destination: Bytes) -> ReadTicket:
        """Read here."""
        try:
            for run in runs:
                self._run(run.into(destination))
        except CacheError as error:
            return ReadTicket(error=error)
        return ReadTicket()

    def _start(self, read: _Read) -> Future[None]:
        try:
            return self._pool.submit(self._run, read)
        except RuntimeError as error:  # the pool was shut down
            raise CacheError(_CLOSED) from error

    def _run(self, read: _Read) -> None:
        buffer = self._buffers.get()
        with self._lock:
            if not self._reading:
                self._since = time.perf_counter()
            self._reading += 1
        try:
            self._read_through(buffer, *read)
        except OSError as error:
            raise CacheError(
                f"{read.path} at byte {read.offset}: {error.strerror or error}. hint: check the disk and the checkpoint"
            ) from error
        finally:
            self._buffers.put(buffer)
            with self._lock:
                self._reading -= 1
                if not self._reading:
                    self.busy_seconds += time.perf_counter() - self._since

    def _read_through(self, buffer: memoryview, path: str, offset: int, targets: Sequence[Bytes]) -> None:
        fd, direct = self._open(path)
        known = self._known.get(path)
        before = os.fstat(fd).st_mtime_ns if known else 0
        done, nbytes = 0, sum([target.nbytes for target in targets])
        while done < nbytes:
            at = offset + done
            begin = at // _PAGE * _PAGE
            span = min(len(buffer), -(-(at - begin + nbytes - done) // _PAGE) * _PAGE)
            got = os.preadv(fd, [buffer[:span]], begin)
            useful = min(got - (at - begin), nbytes - done)
            if useful <= 0:
                raise CacheError(f"{path} ends before byte {at + 1}, must hold {offset + nbytes}. hint: copy it again")
            _scatter(np.frombuffer(buffer, np.uint8)[at - begin : at - begin + useful], targets, done)
            done += useful
            with self._lock:
                self.bytes_requested += useful
                self.bytes_read += got
        if known:
            _check_stamp(path, fd, before, known)
        if not direct:
            os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def _open(self, path: str) -> tuple[int, bool]:
        found = self._files.get(path)
        if found is None:
            with self._lock:
                found = self._files.get(path)
                if found is None:
                    found = self._files[path] = self._open_new(path)
        return found

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


def stamp_of(path: str) -> tuple[int, int, bytes]:
    """Size in bytes, time (ns) of the last write, and some bytes of a file: an image of a container gives all files one
    time."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        some = b"".join([os.pread(file.fileno(), 64, size * at // _SAMPLES) for at in range(1, _SAMPLES)])
        return size, os.fstat(file.fileno()).st_mtime_ns, some


def _check_stamp(path: str, fd: int, before: int, known: tuple[int, int, bytes]) -> None:
    """That what was read is of a file as it is known, last written at `before`; one that was repaired is so again."""
    now = os.fstat(fd)
    if (now.st_size, now.st_mtime_ns) == known[:2]:
        return
    size, time_ns, some = stamp_of(f"/proc/self/fd/{fd}")
    if (size, some) != (known[0], known[2]) or time_ns != before:
        raise CacheError(
            f"{path} was written or replaced, must stay as it was when the model was loaded. hint: load it again"
        )


def largest_read(layout: ExpertLayout) -> int:
    """Bytes of the longest read that an expert is made of; of a layout that does not say where experts are, those of
    the largest matrix."""
    reads = (
        sum(piece.nbytes for piece in run)
        for pieces in layout.pieces.values()
        for run in (_end_to_end(pieces) if _is_small(pieces) else ([piece] for piece in pieces))
    )
    return max(reads, default=max(tensor.nbytes for tensor in layout.tensors))


def _is_small(pieces: Sequence[ExpertPiece]) -> bool:
    return sum(piece.nbytes for piece in pieces) <= READ_ON_THE_SPOT


def _end_to_end(pieces: Sequence[ExpertPiece]) -> list[list[ExpertPiece]]:
    """Pieces in the order of their files, those together that lie end to end."""
    runs = list[list[ExpertPiece]]()
    for piece in sorted(pieces, key=lambda piece: (piece.path, piece.offset)):
        last = runs[-1][-1] if runs else None
        if last is not None and (last.path, last.offset + last.nbytes) == (piece.path, piece.offset):
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs


def _run_of(group: Sequence[ExpertPiece]) -> _Run:
    """Of pieces that lie end to end; those that do so in the destination too are one part of it."""
    parts = list[slice]()
    for piece in group:
        begin = parts.pop().start if parts and parts[-1].stop == piece.slot_offset else piece.slot_offset
        parts.append(slice(begin, piece.slot_offset + piece.nbytes))
    return _Run(group[0].path, group[0].offset, tuple(parts))


def _scatter(source: Bytes, targets: Sequence[Bytes], done: int) -> None:
    """Copy what comes after `done` bytes to where it belongs."""
    for target in targets:
        count = min(target.nbytes - done, source.nbytes)
        if count > 0:
            np.copyto(target[done : done + count], source[:count])
            source = source[count:]
        done = max(0, done - target.nbytes)


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
