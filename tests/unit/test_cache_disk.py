"""The disk reader: any offset and length, both modes, exact counts, clear errors."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from buddymoe_ray.cache import DiskReader, largest_read, stamp_of
from buddymoe_ray.errors import CacheError
from buddymoe_ray.types import ExpertKey, ExpertLayout, ExpertPiece, SlotTensor

PAGE = 4096


def piece(path: Path, offset: int, nbytes: int, slot_offset: int = 0) -> ExpertPiece:
    return ExpertPiece(path=str(path), offset=offset, nbytes=nbytes, slot_offset=slot_offset)


@pytest.fixture
def blob(tmp_path: Path) -> tuple[Path, bytes]:
    data = np.random.default_rng(0).bytes(300_001)
    path = tmp_path / "blob"
    path.write_bytes(data)
    return path, data


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("buffer_bytes", [PAGE, 2 * PAGE, 4 * PAGE, 1 << 20])
@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [
        (0, 1),
        (0, PAGE),
        (1, PAGE),
        (4095, 2),
        (4096, 8192),
        (12345, 54321),
        (299_000, 1001),
        (0, 300_001),
        (7, 299_994),
    ],
)
def test_any_span_is_read_exactly(blob, direct: bool, buffer_bytes: int, offset: int, nbytes: int) -> None:
    path, data = blob
    reader = DiskReader(depth=2, buffer_bytes=buffer_bytes, direct=direct)
    out = np.zeros(nbytes + 20, np.uint8)
    reader.submit([piece(path, offset, nbytes, slot_offset=10)], out).wait()
    assert out[10 : 10 + nbytes].tobytes() == data[offset : offset + nbytes]
    assert not out[:10].any() and not out[10 + nbytes :].any()
    assert reader.bytes_requested == nbytes
    assert reader.bytes_read >= nbytes
    reader.close()


def test_many_reads_in_flight_do_not_mix(blob) -> None:
    path, data = blob
    reader = DiskReader(depth=4, buffer_bytes=2 * PAGE)
    large = (128 << 10) + 1  # smaller ones are there at once
    outs = [np.zeros(large if i % 5 else 5000, np.uint8) for i in range(50)]
    tickets = [reader.submit([piece(path, 997 * i, out.size)], out) for i, out in enumerate(outs)]
    for i, (ticket, out) in enumerate(zip(tickets, outs, strict=True)):
        ticket.wait()
        assert ticket.done() and out.tobytes() == data[997 * i : 997 * i + out.size]
    assert reader.staging_bytes == 4 * 2 * PAGE
    reader.close()


@pytest.mark.parametrize("buffer_bytes", [PAGE, 16 * PAGE])
def test_what_lies_end_to_end_is_read_at_once(blob, buffer_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of an expert that are neighbours in the file, in any order of the slot; others by themselves."""
    path, data = blob
    pieces = [
        piece(path, 20_000, 9_000),
        piece(path, 29_000, 1, slot_offset=9_100),
        piece(path, 12_345, 7_655, slot_offset=10_000),
        piece(path, 100_000, 300, slot_offset=20_000),
    ]
    reads, preadv = list[int](), os.preadv

    def counted(fd: int, buffers: list[memoryview], at: int) -> int:
        reads.append(len(buffers[0]))
        return preadv(fd, buffers, at)

    reader = DiskReader(depth=2, buffer_bytes=buffer_bytes)
    reader.submit([piece(path, 0, 1)], np.zeros(1, np.uint8)).wait()  # opens the file
    monkeypatch.setattr(os, "preadv", counted)
    out = np.zeros(20_400, np.uint8)
    reader.submit(pieces, out).wait()
    for one in pieces:
        expected = data[one.offset : one.offset + one.nbytes]
        assert out[one.slot_offset : one.slot_offset + one.nbytes].tobytes() == expected
    assert not out[9_000:9_100].any() and not out[20_300:].any()
    pages = 5  # from byte 12,288 to 32,768
    assert reads == ([PAGE] * (pages + 1) if buffer_bytes == PAGE else [pages * PAGE, PAGE])
    assert largest_read(make_layout_of(pieces)) == 16_656
    reader.close()


def test_scales_behind_one_another_are_one_read_of_a_large_expert(blob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its codes, which are also neighbours, are read side by side."""
    path, data = blob
    codes = [piece(path, 60_000 * at, 60_000, slot_offset=60_000 * at) for at in range(3)]
    scales = [piece(path, 200_000 + 300 * at, 300, slot_offset=180_000 + 512 * at) for at in range(3)]
    started, reader = list[int](), DiskReader(depth=2)
    start = reader._start
    monkeypatch.setattr(reader, "_start", lambda read: started.append(len(read.targets)) or start(read))
    out = np.zeros(182_000, np.uint8)
    reader.submit([*codes, *scales], out).wait()
    assert sorted(started) == [1, 1, 1, 3]
    for one in (*codes, *scales):
        assert out[one.slot_offset :][: one.nbytes].tobytes() == data[one.offset :][: one.nbytes]
    reader.close()


def make_layout_of(pieces: list[ExpertPiece]) -> ExpertLayout:
    tensor = SlotTensor(name="x", shape=(20_400,), dtype="uint8", offset=0, nbytes=20_400)
    return ExpertLayout(
        tensors=(tensor,),
        slot_bytes=20_416,
        expert_bytes=20_400,
        layers=1,
        experts_per_layer=(1,),
        pieces={ExpertKey(0, 0): tuple(pieces)},
    )


def test_a_read_past_the_end_names_file_and_byte(blob) -> None:
    path, _ = blob
    reader = DiskReader()
    ticket = reader.submit([piece(path, 299_990, 100)], np.zeros(100, np.uint8))
    with pytest.raises(CacheError, match="ends before byte"):
        ticket.wait()
    reader.close()


@pytest.mark.parametrize("change", ["written", "replaced", "replaced before it was opened"])
def test_another_checkpoint_at_the_same_place_is_not_read(blob, change: str) -> None:
    """Its experts beside this one's dense weights would be wrong tokens."""
    path, data = blob
    files, out = {str(path): stamp_of(path)}, np.zeros(200_000, np.uint8)
    reader = DiskReader(files=files)
    if "before" not in change:
        reader.submit([piece(path, 0, 10)], out).wait()
    if "replaced" in change:
        (path.parent / "new").write_bytes(data[::-1])
        (path.parent / "new").replace(path)
    else:
        path.write_bytes(data[::-1])
    reads = [reader.submit([piece(path, 0, nbytes)], out) for nbytes in (10, 200_000)]
    if change == "replaced":  # the file that was opened is there as it was
        for read in reads:
            read.wait()
        assert out.tobytes() == data[:200_000]
    else:
        for read in reads:
            with pytest.raises(CacheError, match="was written or replaced, must stay"):
                read.wait()
        path.write_bytes(data)
        if change == "written":  # and repaired
            reader.submit([piece(path, 0, 200_000)], out).wait()
            assert out.tobytes() == data[:200_000]
    reader.close()


def test_a_file_system_without_direct_reads_is_read_buffered_and_says_so(tmp_path, caplog) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        pytest.skip("no /dev/shm: no file system here that refuses O_DIRECT")
    import tempfile

    with tempfile.TemporaryDirectory(dir=shm) as folder:
        path = Path(folder) / "x"
        path.write_bytes(b"abc" * 5000)
        reader = DiskReader(buffer_bytes=2 * PAGE)
        out = np.zeros(10, np.uint8)
        reader.submit([piece(path, 3, 10)], out).wait()
        assert out.tobytes() == b"abcabcabca"
        # newer kernels let tmpfs take O_DIRECT; where it is refused the reader says so
        assert reader.mode == "direct" or "O_DIRECT" in caplog.text
        reader.close()
