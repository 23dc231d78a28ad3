"""Stand-in records: the bytes on disk are the bytes in the pool, and only the experts that need one have one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from experts_on_disk import expert_bytes_of, make_layout

from buddymoe_ray.cache import DiskReader, StandinPool
from buddymoe_ray.errors import CacheError
from buddymoe_ray.types import ExpertKey


def opened(tmp_path: Path, depth: int = 2):
    small, small_truth = make_layout(tmp_path / "a", rows=4, cols=8, seed=1)
    large, large_truth = make_layout(tmp_path / "b", rows=12, cols=20, seed=2)
    kind_of = {ExpertKey(la, e): "small" if (la + e) % 2 else "large" for la in range(3) for e in range(6) if e != 3}
    pool = StandinPool({"small": small, "large": large}, kind_of, torch.device("cpu"))
    truth = {key: (small_truth if kind == "small" else large_truth)[key] for key, kind in kind_of.items()}
    return pool, truth, DiskReader(depth=depth, buffer_bytes=8192)


@pytest.fixture(autouse=True)
def folders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()


def test_every_record_has_its_bytes(tmp_path: Path) -> None:
    pool, truth, reader = opened(tmp_path)
    pool.load(reader)
    reader.close()
    for key, expected in truth.items():
        assert expert_bytes_of(dict(pool.tensors(key))) == expected, f"{key} is wrong"
    with pytest.raises(KeyError):
        pool.tensors(ExpertKey(0, 3))


def test_its_bytes_are_those_of_the_records(tmp_path: Path) -> None:
    pool, truth, reader = opened(tmp_path)
    reader.close()
    sizes = {"small": 192, "large": 1472}  # padded to 64 bytes
    assert pool.nbytes == sum(sizes[pool.kind_of[key]] for key in truth) == pool.bytes.untyped_storage().nbytes()
    assert all(offset % 64 == 0 for offset in pool.offset_of.values())


def test_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    pool, _, reader = opened(tmp_path)
    path = tmp_path / "b" / "layer2.bin"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CacheError, match=r"layer2\.bin"):
        pool.load(reader)
    reader.close()


def test_progress_is_told_of_every_record(tmp_path: Path) -> None:
    pool, truth, reader = opened(tmp_path)
    seen = []

    def watch(items, *, total, desc):
        assert (total, desc) == (len(truth), "stand-ins")
        for item in items:
            seen.append(item)
            yield item

    pool.load(reader, progress=watch)
    reader.close()
    assert seen == list(truth)
