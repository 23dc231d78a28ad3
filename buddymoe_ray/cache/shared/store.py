"""The shared-memory file of one node's experts: made once, attached by every worker, swept when nobody is left.

All pages are allocated when the file is made, so a full /dev/shm is an error then and never a bus error later. The file
outlives its makers: who attaches next finds it filled, unless the digest (layout, plan, checkpoint files) differs.
Does not know what is worth keeping: the plan is handed in.
Invariant: a file that anybody has attached is never unlinked or made anew.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import mmap
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from buddymoe_ray.cache.disk import stamp_of
from buddymoe_ray.cache.pool import slot_views
from buddymoe_ray.cache.shared.locks import (
    MAKER_BYTE,
    OWNER_BYTE,
    ROW_BYTE,
    ROWS,
    TABLES_BYTE,
    FileLocks,
    remove_unused,
    same_file,
)
from buddymoe_ray.cache.shared.pages import map_file, punch
from buddymoe_ray.cache.shared.shape import HeaderWord, StoreShape
from buddymoe_ray.cache.shared.tables import SharedTables
from buddymoe_ray.errors import BudgetError, CacheError
from buddymoe_ray.types import ExpertLayout, SlotPlan

__all__ = [
    "FOLDER",
    "SharedStore",
    "allocate",
    "open_locked",
    "store_digest",
    "store_path",
    "sweep",
]

log = logging.getLogger(__name__)

FOLDER = Path("/dev/shm")
_ALLOCATED_AT_ONCE = 64 << 20
_START_SECONDS, _MAKING_SECONDS = 10.0, 1800.0
"""Nobody has the tables for so long who is not stopped; nor, who makes the file."""


def store_digest(layout: ExpertLayout, plan: SlotPlan | None) -> bytes:
    """32 bytes that differ when slots, the plan (None is any) or the checkpoint's files (by `stamp_of`) do."""
    files = sorted({piece.path for pieces in layout.pieces.values() for piece in pieces})
    stamps = [(path, stamp_of(path)) for path in files]
    text = repr((layout.tensors, layout.slot_bytes, layout.experts_per_layer, plan, stamps))
    return hashlib.blake2b(text.encode(), digest_size=32).digest()


def store_path(digest: bytes, *, tag: str = "", folder: Path = FOLDER) -> Path:
    """The file's name: of this user, this content and, where a machine plays several nodes, this `tag`."""
    safe = re.sub(r"[^A-Za-z0-9]", "", tag)[:32]
    return folder / f"buddymoe-{os.geteuid()}-{digest.hex()[:20]}{'-' + safe if safe else ''}.experts"


class SharedStore:
    """One attachment to a node's store: its memory, its tables, a row of its own. Use it from one thread.

    `before_making` is called when the file has to be made, while nobody else makes it; it may raise.

    Raises:
        BudgetError: the file does not fit the folder's file system.
        CacheError: the file belongs to somebody else, or every row is taken.
    """

    alone = False

    def __init__(
        self,
        path: Path,
        layout: ExpertLayout,
        plan: SlotPlan,
        digest: bytes,
        *,
        progress: Callable[..., Iterable[int]] = lambda items, **_: items,
        before_making: Callable[[], None] = lambda: None,
    ) -> None:
        self.path, self.layout, self.plan = path, layout, plan
        self.shape = StoreShape.of(layout, plan)
        self._digest = digest
        self._fd, self._locks = open_locked(path)
        try:
            self.made = not self._fits()
            if self.made:
                self._locks.lock(MAKER_BYTE)
                before_making()
                allocate(path, self._fd, self.shape.total_bytes, progress)
            self._memory = map_file(self._fd, self.shape.total_bytes, huge=self._huge if self.made else 0)
            self._array = np.frombuffer(self._memory, dtype=np.uint8)
            self.tables = SharedTables(self._array, self.shape, self._locks)
            if self.made:
                self.shape.digest(self._array)[:] = np.frombuffer(digest, dtype=np.uint8)
                self.tables.initialise(plan)
                self._write_head()
            self.tables.join()  # before the lock goes: a sweeper that waits for it must find a living row
        except BaseException:
            self._locks.close()
            remove_unused([path])
            raise
        if self.made:
            self._locks.unlock(MAKER_BYTE)
        self._locks.unlock(TABLES_BYTE)
        self.bytes_C, self.generation = self.shape.slot_bytes_of(self._array), self.tables.generation
        self.tensor_C = torch.from_numpy(self.bytes_C)
        self._begin = self.tensor_C.data_ptr()
        self._views: list[Mapping[str, Tensor] | None] = [None] * self.shape.slots

    def tensors(self, slot: int) -> Mapping[str, Tensor]:
        """The slot's parameters by name, as views in their stored dtype."""
        views = self._views[slot]
        if views is None:
            views = self._views[slot] = slot_views(self.tensor_C[slot], self.layout)
        return views

    def address(self, slot: int) -> int:
        """Where the slot's bytes begin in this process."""
        return self._begin + slot * self.shape.slot_bytes

    def again(self) -> SharedStore:
        """Another attachment to the same file, for another thread. Raises CacheError."""
        return SharedStore(self.path, self.layout, self.plan, self._digest)

    def give_back(self, first: int) -> None:
        """Give the kernel back the memory of all slots from this one on, which hold nothing and are nobody's."""
        begin = -(-self.shape.span(first, first)[0] // mmap.PAGESIZE) * mmap.PAGESIZE
        if begin < self.shape.total_bytes:
            punch(self._fd, begin, self.shape.total_bytes)

    def take_back(self, slot: int) -> None:
        """Have memory for a slot again. Raises OSError: there is none left."""
        begin, end = self.shape.span(slot, slot + 1)
        try:
            os.posix_fallocate(self._fd, begin, end - begin)
        except OSError:
            sweep(self.path.parent)  # what a killed process left has the same memory
            os.posix_fallocate(self._fd, begin, end - begin)

    def own(self) -> bool:
        """Become the store's owner, who keeps the file while no worker is attached; False when there is one."""
        return self._locks.try_lock(OWNER_BYTE)

    def close(self) -> None:
        """Give the row back: whoever looks next finds that nobody holds it. The last one out removes the file. Safe to
        call twice."""
        if self._fd < 0:
            return
        self._locks.close()
        self._fd = self.tables.row = -1
        remove_unused([self.path])

    def _fits(self) -> bool:
        """Whether the file is a finished store of this digest. Raises CacheError when another is in use there."""
        if os.fstat(self._fd).st_size == self.shape.total_bytes:
            with mmap.mmap(self._fd, self.shape.data_offset, prot=mmap.PROT_READ) as memory:
                array = np.frombuffer(memory, dtype=np.uint8)
                head, same = self.shape.head(array), bytes(self.shape.digest(array)) == self._digest
                known = (int(head[HeaderWord.MAGIC]), int(head[HeaderWord.VERSION])) == (
                    HeaderWord.MAGIC_WORD,
                    HeaderWord.VERSION_WORD,
                )
                ready = bool(head[HeaderWord.READY])
                del array, head
            if known and ready and same:
                return True
        if self._locks.held_elsewhere(ROW_BYTE, ROWS):
            raise CacheError(f"{self.path} is another store in use, must be free. hint: stop the other service first")
        return False

    @property
    def _huge(self) -> int:
        """So many bytes may be in huge pages: of those the kernel keeps what is given back."""
        return self.shape.span(self.shape.slots - self.shape.lent, 0)[0] if self.shape.lent else self.shape.total_bytes

    def _write_head(self) -> None:
        head = self.tables.head
        head[HeaderWord.CLOCK] = head[HeaderWord.DIRTY] = head[HeaderWord.EPOCH] = 0
        head[HeaderWord.MAGIC], head[HeaderWord.VERSION] = HeaderWord.MAGIC_WORD, HeaderWord.VERSION_WORD
        head[HeaderWord.READY] = 1  # last: a file without it is made anew


def allocate(
    path: Path, fd: int, total: int, progress: Callable[..., Iterable[int]] = lambda items, **_: items
) -> None:
    """Empty the file and allocate every page of its new size. Raises BudgetError, and the file is empty then."""
    os.ftruncate(fd, 0)
    os.ftruncate(fd, total)
    begins = range(0, total, _ALLOCATED_AT_ONCE)
    try:
        for begin in progress(begins, total=len(begins), desc="shared memory"):
            os.posix_fallocate(fd, begin, min(_ALLOCATED_AT_ONCE, total - begin))
    except OSError as error:
        os.ftruncate(fd, 0)
        if error.errno not in (errno.ENOSPC, errno.ENOMEM):
            raise
        free = os.statvfs(path.parent)
        raise BudgetError(
            f"{path.parent} has {free.f_bavail * free.f_frsize} bytes free, must have {total} for the shared experts. "
            f"hint: lower --memory, or start the container with --shm-size={-(-total // (1 << 30)) + 1}g"
        ) from error


def sweep(folder: Path = FOLDER) -> list[Path]:
    """Remove this user's files that no living process uses, left by killed ones; returns what was removed."""
    mine = sorted(folder.glob(f"buddymoe-{os.geteuid()}-*"))
    removed = remove_unused((path for path in mine if path.suffix in (".experts", ".records")), empty=False)
    if removed:
        log.warning("removed %d shared files that a killed process left behind", len(removed))
    return removed


def open_locked(path: Path) -> tuple[int, FileLocks]:
    """The file, made if need be, with its tables' lock held; retries when it is removed in between. Who makes what is
    in it takes MAKER_BYTE too, and may take long; raises CacheError where somebody else does."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            found = os.fstat(fd)
            if found.st_uid != os.geteuid() or not stat.S_ISREG(found.st_mode):
                raise CacheError(f"{path} is of user {found.st_uid}, must be this user's own file. hint: remove it")
            locks = FileLocks(fd)
            _lock_tables(path, locks)
            if same_file(path, fd):
                return fd, locks
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _lock_tables(path: Path, locks: FileLocks) -> None:
    end = time.monotonic() + _MAKING_SECONDS
    while not locks.lock(TABLES_BYTE, _START_SECONDS):
        if not locks.held_elsewhere(MAKER_BYTE) or time.monotonic() > end:
            raise CacheError(
                f"{path} is held by a process that stands still, must be let go of. hint: continue it, or end it: "
                f"`fuser {path}` names who has the file"
            )
