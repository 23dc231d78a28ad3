"""What goes wrong between disk and slot: interrupts, refused O_DIRECT, vanished files, closed readers, wrong callers.

The rule under test: whatever happens, a lease never shows bytes that are not its expert's, and no slot is lost.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from experts_on_disk import expert_bytes_of, make_layout, plan_of

from buddymoe_ray.cache import DiskReader, ExpertCache, open_private
from buddymoe_ray.cache.disk import Bytes, ReadTicket
from buddymoe_ray.device import open_device
from buddymoe_ray.errors import CacheError
from buddymoe_ray.types import ExpertLayout, ExpertPiece


class InterruptedTicket(ReadTicket):
    """A ticket whose wait is cut short, as by Ctrl-C."""

    def wait(self) -> None:
        raise KeyboardInterrupt


class GatedReader(DiskReader):
    """Reads for real, but only once `gate` is open; while `interrupting`, waiting for a ticket is interrupted."""

    def __init__(self) -> None:
        super().__init__(depth=2, buffer_bytes=8192)
        self.gate, self.interrupting, self.tickets = threading.Event(), True, list[ReadTicket]()

    def submit(self, pieces: Sequence[ExpertPiece], destination: Bytes) -> ReadTicket:
        ticket = super().submit(pieces, destination)
        self.tickets.append(ticket)
        return InterruptedTicket(ticket.parts) if self.interrupting else ticket

    def _read(self, path: str, offset: int, target: Bytes) -> None:
        assert self.gate.wait(60), "the gate was never opened"
        super()._read(path, offset, target)


def open_cache(layout: ExpertLayout, slots: int, *, reader: DiskReader, host_slots: int = 0) -> ExpertCache:
    plan = plan_of(layout, slots)
    device = open_device("interpret" if host_slots >= 4 else "cpu")  # with the copies of a GPU
    return open_private(layout, plan, reader=reader, device=device, host_slots=host_slots)


def lend_all(cache: ExpertCache, truth: dict, layer: int, experts: list[int]) -> None:  # type: ignore[type-arg]
    for leases in cache.stream(layer, experts, protect_residency=False):
        for lease in leases:
            assert expert_bytes_of(dict(lease.tensors())) == truth[lease.key], f"{lease.key} is not as in its file"


@pytest.mark.parametrize("host_slots", [0, 3])
def test_an_interrupted_load_has_landed_before_its_slot_is_free(tmp_path: Path, host_slots: int) -> None:
    """Otherwise the late bytes would overwrite the next expert in that slot: wrong weights without any error."""
    layout, truth = make_layout(tmp_path)
    reader = GatedReader()
    with open_cache(layout, 2, reader=reader, host_slots=host_slots) as cache:
        opener = threading.Timer(0.2, reader.gate.set)
        opener.start()
        with pytest.raises(KeyboardInterrupt):
            lend_all(cache, truth, 0, [0, 1])
        in_flight = [ticket for ticket in reader.tickets if not ticket.done()]
        reader.gate.set()
        opener.join()
        assert not in_flight, f"{len(in_flight)} reads were in flight when their slots were given up"
        cache.check_integrity()
        reader.interrupting = False
        for layer in range(3):
            lend_all(cache, truth, layer, list(range(6)))
        cache.check_integrity()


@pytest.mark.parametrize("host_slots", [0, 1, 4])
def test_a_closed_cache_refuses_every_time(tmp_path: Path, host_slots: int) -> None:
    """The second refusal matters: the first must not leave a host slot that looks filled."""
    layout, truth = make_layout(tmp_path)
    cache = open_cache(layout, 4, reader=DiskReader(buffer_bytes=8192), host_slots=host_slots)
    cache.close()
    for _ in range(3):
        with pytest.raises(CacheError, match="closed"):
            lend_all(cache, truth, 0, [0, 1])
        cache.check_integrity()
    assert cache.stats().bytes_loaded_device == 0


def test_what_was_resident_is_still_lent_after_closing(tmp_path: Path) -> None:
    layout, truth = make_layout(tmp_path)
    cache = open_cache(layout, 18, reader=DiskReader(buffer_bytes=8192))
    cache.warm()
    cache.close()
    lend_all(cache, truth, 2, list(range(6)))
    cache.check_integrity()


def test_an_expert_named_twice_is_refused_and_costs_no_slot(tmp_path: Path) -> None:
    layout, truth = make_layout(tmp_path)
    with open_cache(layout, 2, reader=DiskReader(buffer_bytes=8192)) as cache:
        for _ in range(3):  # more often than there are slots
            with pytest.raises(AssertionError, match="once"):
                lend_all(cache, truth, 0, [4, 4])
        lend_all(cache, truth, 0, list(range(6)))
        cache.check_integrity()


def test_every_failed_wave_gives_its_slots_back(tmp_path: Path) -> None:
    layout, truth = make_layout(tmp_path)
    path = tmp_path / "layer1.bin"
    whole = path.read_bytes()
    with open_cache(layout, 3, reader=DiskReader(buffer_bytes=8192), host_slots=2) as cache:
        path.write_bytes(b"")
        for _ in range(20):
            with pytest.raises(CacheError, match="ends before byte"):
                lend_all(cache, truth, 1, list(range(6)))
            cache.check_integrity()
            lend_all(cache, truth, 0, [0, 5])
        path.write_bytes(whole)
        lend_all(cache, truth, 1, list(range(6)))


def test_a_missing_file_says_nothing_about_direct_reads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reader = DiskReader(buffer_bytes=8192)
    missing = ExpertPiece(path=str(tmp_path / "gone"), offset=0, nbytes=10, slot_offset=0)
    with pytest.raises(CacheError, match="gone"):
        reader.submit([missing], np.zeros(10, np.uint8)).wait()
    assert reader.mode == "direct" and "O_DIRECT" not in caplog.text
    reader.close()


@pytest.mark.parametrize("refuses", ["open", "preadv"])
def test_refused_direct_reads_fall_back_once_and_leak_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refuses: str
) -> None:
    """Some file systems refuse the flag, others take it and refuse the read; neither may be mounted here."""
    real_open, real_preadv, direct_fds, opened = os.open, os.preadv, set[int](), list[int]()

    def fake_open(path: str, flags: int) -> int:
        if flags & os.O_DIRECT and refuses == "open":
            raise OSError(errno.EINVAL, "Invalid argument")
        opened.append(fd := real_open(path, flags))
        (direct_fds.add if flags & os.O_DIRECT else direct_fds.discard)(fd)
        return fd

    def fake_preadv(fd: int, buffers: list, offset: int) -> int:  # type: ignore[type-arg]
        if fd in direct_fds:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_preadv(fd, buffers, offset)

    closed: list[int] = []
    real_close = os.close
    monkeypatch.setattr(os, "open", fake_open)
    monkeypatch.setattr(os, "preadv", fake_preadv)
    monkeypatch.setattr(os, "close", lambda fd: (closed.append(fd), real_close(fd)))
    layout, truth = make_layout(tmp_path)
    with open_cache(layout, 4, reader=DiskReader(buffer_bytes=8192)) as cache:
        for layer in range(3):
            lend_all(cache, truth, layer, list(range(6)))
        assert cache._reader.mode == "buffered"
    assert caplog.text.count("O_DIRECT") == 1, "one file system, one warning"
    assert sorted(closed) == sorted(opened), f"opened {opened}, closed {closed}"
