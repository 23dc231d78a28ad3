"""What is finished of a batch, beside its output: a killed run goes on from here, and the output is put in order from
it.

A header binds the journal to what its answers depend on; then come entries of one line each: position, status, CRC-32
and the bytes of an output line. Invariants: whoever has a Journal open holds its lock; what `sync` returned for
survives a power cut; a torn or damaged entry ends what is read, and the next one is written over it. Knows files, not
what entries say.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
import zlib
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from buddymoe_ray.errors import BuddyMoEError, ConfigError

__all__ = ["Journal", "JournalEntry", "folder_synced"]

_FORMAT = "buddymoe batch 1"


class JournalEntry(NamedTuple):
    """One output line: its position from 0, the status it was answered with (0: it could not be read), its bytes."""

    at: int
    status: int
    data: bytes


class Journal:
    """`count` entries at most, at `path`. Use `Journal.open`.

    Methods that write raise BuddyMoEError when the disk is full or fails; what was appended before stays usable.
    """

    def __init__(self, path: Path, fd: int, count: int, header: bytes) -> None:
        self.path = path
        self._fd, self._header = fd, header
        self._places = array("Q", bytes(8 * count))  # where each entry begins; the header is at 0, so 0 is nowhere
        self._end = 0
        self._synced_at, self._dirty = time.monotonic(), False
        self.finished = self.succeeded = 0
        self.found = False  # whether it was there

    @classmethod
    def open(cls, path: Path, binding: Mapping[str, object], *, count: int, restart: bool = False) -> Journal:
        """The journal at `path`, made if there is none, locked for this process.

        Args:
            binding: what the entries depend on, by name, in JSON's types; another one's journal is refused.
            count: entries of the finished batch.
            restart: forget what is there, whatever it is.

        Raises:
            ConfigError: another process has it open, it is of something else, or the path cannot be written.
        """
        fd = _locked(path)
        journal = cls(path, fd, count, _header(binding))
        try:
            if restart:
                os.ftruncate(fd, 0)
            journal._begin(binding)
        except BaseException:
            os.close(fd)
            raise
        return journal

    @property
    def size(self) -> int:
        """Bytes of all entries."""
        return self._end

    def has(self, at: int) -> bool:
        """Whether the entry of that position is there."""
        return self._places[at] > 0

    def append(self, entry: JournalEntry) -> None:
        """Add an entry, which is not there yet. It is durable after `sync`."""
        assert not self.has(entry.at), f"entry {entry.at} is there"
        data = _packed(entry)
        self._write(data, self._end)
        self._note(entry, self._end)
        self._end += len(data)
        self._dirty = True

    def sync(self, *, after: float = 0.0) -> None:
        """Make all entries durable; with `after` only if the last time was so many seconds ago."""
        if self._dirty and time.monotonic() - self._synced_at >= after:
            self._dirty = False  # before: in a thread, what is appended meanwhile waits for the next time
            try:
                with self._refusing():
                    os.fsync(self._fd)
            except BuddyMoEError:
                self._dirty = True
                raise
            self._synced_at = time.monotonic()

    def entries(self) -> Iterator[JournalEntry]:
        """All entries, in order of position. Raises BuddyMoEError when one is missing or was damaged meanwhile."""
        with open(os.dup(self._fd), "rb") as file:
            for at, place in enumerate(self._places):
                file.seek(place)
                entry = _unpacked(file.readline()) if place else None
                if entry is None or entry.at != at:
                    raise BuddyMoEError(f"{self.path} has no entry {at}, must have all. hint: run it again")
                yield entry

    def remove(self) -> None:
        """Delete the file, and give the lock up."""
        self.path.unlink()
        folder_synced(self.path.parent)
        self.close()

    def close(self) -> None:
        """Give the lock up; the file stays. Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _begin(self, binding: Mapping[str, object]) -> None:
        """Read what is there, or write the header."""
        with open(os.dup(self._fd), "rb") as file:
            file.seek(0)
            found = file.readline(1 << 20)
            self.found = found == self._header
            if self.found:
                self._read(file)
            elif not self._header.startswith(found):  # the beginning of a header is one that was never finished
                raise ConfigError(_difference(self.path, found, binding))
        if not self._end:
            self._write(self._header, 0)
            self._end, self._dirty = len(self._header), True
            self.sync()
            folder_synced(self.path.parent)
        os.ftruncate(self._fd, self._end)

    def _read(self, file: BinaryIO) -> None:
        self._end = len(self._header)
        for line in file:
            entry = _unpacked(line)
            if entry is None or entry.at >= len(self._places) or self.has(entry.at):
                return
            self._note(entry, self._end)
            self._end += len(line)

    def _note(self, entry: JournalEntry, place: int) -> None:
        self._places[entry.at] = place
        self.finished += 1
        self.succeeded += entry.status == 200

    def _write(self, data: bytes, place: int) -> None:
        rest = memoryview(data)
        with self._refusing():
            while rest:
                written = os.pwrite(self._fd, rest, place)
                rest, place = rest[written:], place + written

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._end)
            raise BuddyMoEError(
                f"{self.path} cannot be written ({error.strerror}), must be; {self.finished} finished requests are "
                "kept. hint: free some space and run the same command again"
            ) from error


def folder_synced(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _locked(path: Path) -> int:
    """A file of this name with its lock held: the file may be deleted by the lock's last holder while it is opened."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be opened ({error.strerror}), must be a file that can be written. hint: check the path"
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(fd)
            raise ConfigError(
                f"{path} is in use by another run, must be free. hint: wait for its end, or choose another output"
            ) from error
        os.close(fd)


def _header(binding: Mapping[str, object]) -> bytes:
    return json.dumps({"format": _FORMAT, **binding}, separators=(",", ":")).encode() + b"\n"


def _difference(path: Path, found: bytes, binding: Mapping[str, object]) -> str:
    """Why a journal is not the one wanted."""
    try:
        said = json.loads(found)
    except ValueError:
        said = None
    if not isinstance(said, dict) or said.get("format") != _FORMAT:
        return f"{path} is something else, must be the journal of this batch. hint: move it away, or --restart"
    name = next((name for name in binding if said.get(name) != binding[name]), "format")
    return (
        f"{path} was begun with {name} {said.get(name)!r}, must be with {binding.get(name)!r}. "
        "hint: repeat the command as it was to go on, or --restart to start over"
    )


def _packed(entry: JournalEntry) -> bytes:
    assert b"\n" not in entry.data, f"entry {entry.at} holds a line break"
    named = b"%d %d " % (entry.at, entry.status)
    return b"%s%08x %s\n" % (named, zlib.crc32(named + entry.data), entry.data)


def _unpacked(line: bytes) -> JournalEntry | None:
    """The entry of a line; None when it is torn or damaged."""
    parts = line[:-1].split(b" ", 3)
    if not line.endswith(b"\n") or len(parts) < 4 or not (parts[0].isdigit() and parts[1].isdigit()):
        return None
    entry = JournalEntry(int(parts[0]), int(parts[1]), parts[3])
    return entry if _packed(entry) == line else None
