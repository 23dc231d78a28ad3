"""What is kept of files and batches, in a folder of this user alone: a record and its bytes each.

Everything is read from the disk when it is asked for, so that a service that was killed goes on with what is there.
Invariants: a record is in place whole or not at all, and after its bytes; together they take at most `quota` bytes;
nobody sees what another owner keeps. Calls block: the routes make them in threads.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from buddymoe_ray.config import private_folder
from buddymoe_ray.errors import BuddyMoEError
from buddymoe_ray.serve.batches.journal import folder_synced
from buddymoe_ray.serve.batches.output import write_output
from buddymoe_ray.serve.batches.records import BatchObject, ExpiresAfter, FileObject
from buddymoe_ray.serve.refusals import Refused, absent
from buddymoe_ray.serve.work import Refusal

__all__ = ["MOST_FILES", "FileStore", "Kept", "no_room"]

MOST_FILES = 1000
MOST_BATCHES = 1000
_NAMES = {"file": re.compile(r"file-[0-9a-f]{32}"), "batch": re.compile(r"batch_[0-9a-f]{32}")}
_TORN_SECONDS = 3600.0  # bytes without a record are of an upload that was killed, when nobody can write them any more
_PIECE = 1 << 20

Record = TypeVar("Record", FileObject, BatchObject)


class Kept(BaseModel):
    """A file's or batch's record, whose it is, and what only the service reads."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    owner: str
    record: FileObject | BatchObject

    @property
    def over(self) -> bool:
        """Whether it is a file that is to be kept no more."""
        until = self.record.expires_at if isinstance(self.record, FileObject) else None
        return until is not None and until <= time.time()


class FileStore:
    """Files and batches in `folder`, which is made; `quota` bytes in all. `problem` says why nothing can be kept."""

    def __init__(self, folder: Path | None, *, quota: int) -> None:
        self._folder = folder or Path()
        self._quota = quota
        self.problem = "this service keeps no files" if folder is None or quota == 0 else private_folder(folder)
        self._seen: dict[Path, tuple[tuple[int, int], Kept]] = {}
        if not self.problem:
            self._sweep()

    def check(self) -> None:
        """Raises Refused where nothing can be kept."""
        if self.problem:
            raise Refused(Refusal(status=404, message=f"{self.problem}. hint: see files_mb", code="not_found"))

    def room(self) -> int:
        """Bytes that may be added."""
        return self._quota - sum(found.st_size for found in map(_stat, os.scandir(self._folder)) if found)

    def data(self, name: str) -> Path:
        """Where the bytes of a file are, or the journal of a batch."""
        return self._folder / f"{name}.data"

    def add(self, source: BinaryIO, *, filename: str, owner: str, expiry: ExpiresAfter | None = None) -> FileObject:
        """Keep what `source` holds, durably. Raises Refused when there is no room."""
        if sum(1 for _ in self._records("file")) >= MOST_FILES:
            raise Refused(no_room(f"{MOST_FILES} files are kept"))
        name, room, size = f"file-{secrets.token_hex(16)}", self.room(), 0
        path = self.data(name)
        try:
            with open(path, "xb") as file:
                while piece := source.read(_PIECE):
                    size += len(piece)
                    if size > room:
                        raise Refused(no_room("its share of the disk is used up"))
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
        except BaseException as error:
            path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise Refused(no_room(str(error.strerror))) from error
            raise
        return self._register(name, filename, "batch", owner, expiry)

    def add_output(
        self, name: str, lines: Iterable[bytes], *, owner: str, expiry: ExpiresAfter | None
    ) -> FileObject | None:
        """Keep lines under a name, which may be there: then they are the same. None, and no file, if there are none."""
        write_output(self.data(name), lines)
        if self.data(name).stat().st_size == 0:
            self.data(name).unlink()
            return None
        return self._register(name, f"{name}.jsonl", "batch_output", owner, expiry)

    def save(self, name: str, kept: Kept) -> None:
        """Put a record in place, durably. Raises BuddyMoEError."""
        write_output(self._folder / f"{name}.json", [kept.model_dump_json().encode()])

    def find(self, kind: type[Record], name: str, owner: str | None) -> Record:
        """A file or batch of `owner`, or (None) of anybody. Raises Refused when there is none."""
        what = "file" if kind is FileObject else "batch"
        kept = self._read(self._folder / f"{name}.json") if _NAMES[what].fullmatch(name) else None
        if kept is None or owner not in (None, kept.owner) or not isinstance(kept.record, kind) or kept.over:
            raise Refused(absent(what, name))
        return kept.record

    def owner(self, name: str) -> str:
        """Whose a file or batch is, that is there."""
        kept = self._read(self._folder / f"{name}.json")
        return "" if kept is None else kept.owner

    def records(self, kind: type[Record], owner: str | None) -> list[Record]:
        """Those of `owner`, or of everybody, the latest first."""
        found = self._records("file" if kind is FileObject else "batch")
        mine = [kept for kept in found if owner in (None, kept.owner) and not kept.over]
        own = [kept.record for kept in mine if isinstance(kept.record, kind)]
        return sorted(own, key=lambda record: (record.created_at, record.id), reverse=True)

    def delete(self, name: str) -> None:
        """Keep a file, or a batch that is finished, no more."""
        (self._folder / f"{name}.json").unlink(missing_ok=True)
        self.data(name).unlink(missing_ok=True)
        folder_synced(self._folder)

    def expire(self) -> None:
        """Delete the files whose time is over, but for those that a batch still reads."""
        read = {batch.input_file_id for batch in self.records(BatchObject, None) if not batch.finished}
        for name in [kept.record.id for kept in self._records("file") if kept.over]:
            if name not in read:
                self.delete(name)

    def begin(self, batch: BatchObject, owner: str) -> None:
        """Keep a new batch; of those that are finished the oldest makes room."""
        finished = [each for each in self.records(BatchObject, None) if each.finished]
        for old in finished[MOST_BATCHES - 1 :]:
            self.delete(old.id)
        self.save(batch.id, Kept(owner=owner, record=batch))

    def _register(self, name: str, filename: str, purpose: str, owner: str, expiry: ExpiresAfter | None) -> FileObject:
        size, now = self.data(name).stat().st_size, int(time.time())
        made = {"id": name, "bytes": size, "created_at": now, "filename": filename, "purpose": purpose}
        record = FileObject.model_validate(made | {"expires_at": None if expiry is None else now + expiry.seconds})
        try:
            self.save(name, Kept(owner=owner, record=record))
        except BuddyMoEError:
            self.data(name).unlink(missing_ok=True)
            raise
        return record

    def _records(self, kind: str) -> Iterable[Kept]:
        for entry in os.scandir(self._folder):
            stem, _, ending = entry.name.rpartition(".")
            if ending == "json" and _NAMES[kind].fullmatch(stem) and (kept := self._read(Path(entry.path))):
                yield kept

    def _read(self, path: Path) -> Kept | None:
        """A record, which is read once as long as it stays; None if it is not there, or is none."""
        try:
            found = path.stat()
            place, seen = (found.st_ino, found.st_mtime_ns), self._seen.get(path)
            if seen is None or seen[0] != place:
                seen = self._seen[path] = place, Kept.model_validate_json(path.read_bytes())
            return seen[1]
        except (OSError, ValidationError):
            self._seen.pop(path, None)
            return None

    def _sweep(self) -> None:
        """Delete what was torn, and nobody writes any more; and journals of batches that are finished."""
        for batch in self.records(BatchObject, None):
            if batch.finished:
                self.data(batch.id).unlink(missing_ok=True)
        for entry in os.scandir(self._folder):
            stem, _, ending = entry.name.rpartition(".")
            torn = ending == "part" or (ending == "data" and not (self._folder / f"{stem}.json").exists())
            found = _stat(entry)
            if torn and found is not None and time.time() - found.st_mtime > _TORN_SECONDS:
                Path(entry.path).unlink(missing_ok=True)


def _stat(entry: os.DirEntry[str]) -> os.stat_result | None:
    try:
        return entry.stat()
    except FileNotFoundError:  # deleted meanwhile
        return None


def no_room(reason: str) -> Refusal:
    """A file that cannot be kept."""
    message = f"the file cannot be kept ({reason}). hint: delete files, or raise files_mb"
    return Refusal(status=413, message=message, param="file", code="files_full")
