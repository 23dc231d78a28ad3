"""Big payloads between processes of one node: one file in /dev/shm per payload, written once, read once.

The sender writes a new 0600 file with a random name; the receiver opens it, unlinks it at once and reads. Knows names
and bytes, not what they mean. Invariant: a name from a peer can only be a regular file of ours in /dev/shm under our
prefix with exactly the announced size; what was never opened is removed when its connection closes, and what a killed
process left is told by its name and swept by the next start.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import stat
import threading
from collections.abc import Sequence
from pathlib import Path

from buddymoe_ray.errors import LinkError

__all__ = ["FOLDER", "PREFIX", "Mailbox", "open_file", "read_file", "sweep_leftovers", "write_file"]

FOLDER = "/dev/shm"
PREFIX = "buddymoe-link"

_NAME = re.compile(
    r"(?P<prefix>[A-Za-z0-9-]{1,64})\.(?P<space>[0-9]{1,20})\.(?P<pid>[0-9]{1,10})\.(?P<start>[0-9]{1,20})\.[0-9a-f]{32}"
)
"""Prefix, process namespace, process, when it started, and 128 random bits: no way out of the folder."""

_MOST_PARTS = 1024


class Mailbox:
    """The files one connection has sent and that may not have been opened yet. From any thread.

    Args:
        least_bytes: smaller payloads go over the socket.
        most_files, most_bytes: what may lie unread at once; beyond it payloads go over the socket, where a peer that
            does not read holds its sender up instead of filling the node's memory.
    """

    def __init__(self, *, least_bytes: int, most_files: int = 16, most_bytes: int = 1 << 30) -> None:
        self._least, self._most_files, self._most_bytes = least_bytes, most_files, most_bytes
        self._lock = threading.Lock()
        self._unread: dict[str, int] = {}
        self._closed = False

    def post(self, parts: Sequence[memoryview]) -> str | None:
        """Write the payload to a file and return its name; None when it must go over the socket."""
        nbytes = sum(part.nbytes for part in parts)
        if nbytes < self._least:
            return None
        with self._lock:
            for name in [name for name in self._unread if not os.path.exists(f"{FOLDER}/{name}")]:
                del self._unread[name]
            full = len(self._unread) >= self._most_files or sum(self._unread.values()) + nbytes > self._most_bytes
            if full or self._closed:
                return None
            posted = write_file(parts)
            if posted is not None:
                self._unread[posted] = nbytes
            return posted

    def withdraw(self, name: str) -> None:
        """Remove the file if nobody opened it."""
        with self._lock:
            if self._unread.pop(name, None) is not None:
                _unlink(name)

    def close(self) -> None:
        """Remove all that nobody opened. Safe to call twice."""
        with self._lock:
            self._closed = True
            for name in self._unread:
                _unlink(name)
            self._unread.clear()


def write_file(parts: Sequence[memoryview]) -> str | None:
    """A new file with the parts' bytes, by name; None where /dev/shm is full or missing."""
    name = f"{PREFIX}.{_process(os.getpid())}.{secrets.token_hex(16)}"
    try:
        fd = os.open(f"{FOLDER}/{name}", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        left = [part for part in parts if part.nbytes]
        while left:
            written = os.writev(fd, left[:_MOST_PARTS])
            while left and written >= left[0].nbytes:
                written -= left.pop(0).nbytes
            if written:
                left[0] = left[0][written:]
    except OSError:
        _unlink(name)
        return None
    finally:
        os.close(fd)
    return name


def open_file(name: str, nbytes: int) -> int | None:
    """Open a peer's file and unlink it.

    Returns:
        A descriptor that the caller closes; None when the sender withdrew the file.

    Raises:
        LinkError: the name is not of our making, or the file is not a regular one of ours of `nbytes`.
    """
    matched = _NAME.fullmatch(name)
    if matched is None or matched["prefix"] != PREFIX:
        raise LinkError(f"shared file {name!r:.80} must be named by this service")
    try:
        fd = os.open(f"{FOLDER}/{name}", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LinkError(f"shared file {name} cannot be opened: {error.strerror}") from error
    try:
        found = os.fstat(fd)
        if not _is_ours(found) or found.st_size != nbytes:
            raise LinkError(
                f"shared file {name} has mode {stat.filemode(found.st_mode)}, owner {found.st_uid} and {found.st_size} "
                f"bytes, must be a private regular file of user {os.geteuid()} with {nbytes}"
            )
        _unlink(name)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_file(name: str, into: memoryview) -> bool:
    """Fill `into` (uint8) from a peer's file, which is gone then.

    False when the sender withdrew it; raises as `open_file`.
    """
    fd = open_file(name, into.nbytes)
    if fd is None:
        return False
    try:
        at = 0
        while at < into.nbytes:
            count = os.preadv(fd, [into[at:]], at)
            if count == 0:
                raise LinkError(f"shared file {name} ends after {at} bytes, must have {into.nbytes}")
            at += count
    finally:
        os.close(fd)
    return True


def sweep_leftovers(prefix: str = PREFIX) -> int:
    """Remove files of this user whose process is dead; returns how many.

    Files of other process namespaces (containers that share /dev/shm) are left: their processes cannot be seen.
    """
    removed = 0
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(FOLDER):
            matched = _NAME.fullmatch(entry.name)
            if matched is None or matched["prefix"] != prefix or matched["space"] != _namespace():
                continue
            with contextlib.suppress(FileNotFoundError):
                ours = _is_ours(entry.stat(follow_symlinks=False))
                if ours and _started(int(matched["pid"])) != matched["start"]:
                    os.unlink(entry.path)
                    removed += 1
    return removed


def _is_ours(found: os.stat_result) -> bool:
    private = stat.S_ISREG(found.st_mode) and not found.st_mode & 0o077
    return private and found.st_uid == os.geteuid() and found.st_nlink <= 1


@functools.lru_cache(maxsize=1)
def _process(pid: int) -> str:
    return f"{_namespace()}.{pid}.{_started(pid)}"


def _namespace() -> str:
    return str(os.stat("/proc/self/ns/pid").st_ino)


def _started(pid: int) -> str | None:
    """When the process started, in clock ticks since boot; None when it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _unlink(name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{FOLDER}/{name}")
