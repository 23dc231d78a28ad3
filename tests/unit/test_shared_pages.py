"""Files in shared memory mapped for huge pages: where they begin, what they hold, and that they go with their view."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from buddymoe_ray.cache.shared import pages
from buddymoe_ray.cache.shared.pages import map_file

NBYTES = (6 << 20) + 4096


@pytest.fixture
def file() -> Iterator[tuple[Path, int]]:
    path = Path(f"/dev/shm/buddymoe-test-{os.getpid()}")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(fd, 0, NBYTES)
        yield path, fd
    finally:
        os.close(fd)
        path.unlink()


def mapped(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


@pytest.mark.parametrize("beside", [pages._BESIDE, 0])
def test_who_makes_a_file_and_who_comes_later_see_the_same_bytes(
    file: tuple[Path, int], monkeypatch: pytest.MonkeyPatch, beside: int
) -> None:
    monkeypatch.setattr(pages, "_BESIDE", beside)
    path, fd = file
    first = np.frombuffer(map_file(fd, NBYTES, huge=NBYTES), dtype=np.uint8)
    first[:] = np.arange(NBYTES) % 251
    second = np.frombuffer(map_file(fd, NBYTES, huge=0), dtype=np.uint8)
    for view in (first, second):
        assert view.ctypes.data % (2 << 20) == 0 and len(view) == NBYTES
    second[-1] = 7
    assert first[-1] == 7 and (first[:-1] == np.arange(NBYTES - 1) % 251).all()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.daemon and "_collapse" in thread.name:
            thread.join()
    assert mapped(path) == 2
    del first, second, view
    gc.collect()
    assert mapped(path) == 0


def test_small_files_and_files_that_cannot_be_mapped(file: tuple[Path, int]) -> None:
    path, fd = file
    small = map_file(fd, 4096, huge=4096)
    small[:4] = b"abcd"
    assert os.pread(fd, 4, 0) == b"abcd" and mapped(path) == 1
    readonly = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="Permission denied"):
            map_file(readonly, NBYTES, huge=NBYTES)
    finally:
        os.close(readonly)
