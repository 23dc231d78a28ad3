"""The disk reader: any offset and length, both modes, exact counts, clear errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from buddymoe_ray.cache import DiskReader
from buddymoe_ray.errors import CacheError
from buddymoe_ray.types import ExpertPiece

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
    outs = [np.zeros(5000, np.uint8) for _ in range(50)]
    tickets = [reader.submit([piece(path, 997 * i, 5000)], out) for i, out in enumerate(outs)]
    for i, (ticket, out) in enumerate(zip(tickets, outs, strict=True)):
        ticket.wait()
        assert ticket.done() and out.tobytes() == data[997 * i : 997 * i + 5000]
    assert reader.staging_bytes == 4 * 2 * PAGE
    reader.close()


def test_a_read_past_the_end_names_file_and_byte(blob) -> None:
    path, _ = blob
    reader = DiskReader()
    ticket = reader.submit([piece(path, 299_990, 100)], np.zeros(100, np.uint8))
    with pytest.raises(CacheError, match="ends before byte"):
        ticket.wait()
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
