"""The CPU's twin of a GPU, and a GPU where there is one: the same copies, pins and promises."""

from __future__ import annotations

import ast
import ctypes
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_architecture import FILES, layer_of, parsed

from buddymoe_ray.device import Device, host, open_device
from buddymoe_ray.device.at_address import bytes_at
from buddymoe_ray.errors import CacheError, ConfigError

GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)


@pytest.fixture(params=["cpu", "interpret", GPU])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    yield open_device(request.param)


def test_copies_arrive_in_order_and_are_seen_by_what_comes_after(device: Device) -> None:
    source = torch.arange(4 << 20, dtype=torch.int32).view(4, -1)
    device.pin(source)
    target = torch.zeros(source.shape[1], dtype=torch.int32, device=device.torch)
    copies = [device.copy(target, row) for row in source]
    device.admit(copies[-1])
    seen = target.sum()  # without a look at whether they are done
    copies[-1].wait()
    assert all(copy.done() for copy in copies)
    assert int(seen) == int(source[-1].sum()) and torch.equal(target.cpu(), source[-1])
    device.unpin(source)


def test_a_copy_waits_for_what_reads_its_target(device: Device) -> None:
    target = torch.full((1 << 20,), 3, dtype=torch.int64, device=device.torch)
    before = target.sum()
    copy = device.copy(target, torch.zeros(1 << 20, dtype=torch.int64))
    device.admit(copy)
    assert int(before) == 3 << 20 and int(target.sum()) == 0


def test_shared_memory_is_what_its_owner_writes(device: Device) -> None:
    memory = device.share(4 << 20)
    memory.tensor.fill_(3)
    mapped = device.map(memory.fd, 4 << 20)
    os.close(memory.fd)
    assert mapped.device == device.torch and bool((mapped == 3).all())
    memory.tensor[7] = 9
    assert int(mapped[7]) == 9, "the same memory, and no copy of it"
    del memory
    assert int(mapped[7]) == 9, "it is there for as long as somebody maps it"


def test_what_is_not_shared_memory_of_that_size_is_not_mapped(device: Device, tmp_path: Path) -> None:
    memory = device.share(4096)
    with (tmp_path / "file").open("w+b") as file, pytest.raises(CacheError, match=r"\. hint: "):
        file.truncate(4096)  # of which somebody could take away what is read
        device.map(file.fileno(), 4096)
    if device.torch.type == "cpu":
        with pytest.raises(CacheError, match="no 8192 bytes of fixed size"):
            device.map(memory.fd, 8192)
    os.close(memory.fd)


def test_what_a_reader_of_the_twin_writes_stays_with_it() -> None:
    twin = open_device("interpret")
    memory = twin.share(4096)
    twin.map(memory.fd, 4096).fill_(5)
    assert int(memory.tensor.max()) == 0
    os.close(memory.fd)


def test_the_twin_copies_when_it_gets_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a slot read too early, or given back too early, is seen to be wrong."""
    may_go, moved = threading.Event(), host._move
    monkeypatch.setattr(host, "_move", lambda *args: may_go.wait(10) and moved(*args))
    twin, target = open_device("interpret"), torch.zeros(4)
    copy = twin.copy(target, torch.ones(4))
    assert not copy.done() and target.sum() == 0
    may_go.set()
    twin.admit(copy)
    assert copy.done() and target.sum() == 4 and copy.seconds() > 0


def test_memory_at_an_address_is_released_once_nothing_looks_at_it() -> None:
    memory, released = bytearray(range(16)), list[int]()
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    whole = bytes_at(address, 16, torch.device("cpu"), lambda: released.append(1))
    part = whole[4:8].view(torch.int32)
    assert whole.data_ptr() == address and whole.tolist() == list(range(16)) and whole.dtype == torch.uint8
    whole[4:8] = 0
    del whole
    assert memory[4:9] == b"\0\0\0\0\x08" and int(part) == 0 and not released
    del part
    assert released == [1]


def test_devices_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"device is 'cuda:99', must be one of \d+ CUDA devices or cpu"):
        open_device("cuda:99")
    assert open_device("interpret").apart and not open_device("cpu").apart


def test_cuda_is_named_in_one_package_only() -> None:
    for path in FILES:
        if layer_of(path) != "device":
            named = [n.attr for n in ast.walk(parsed(path)) if isinstance(n, ast.Attribute)]
            assert not {"cuda", "cudart", "is_cuda"} & {*named}, f"{path} names CUDA, must ask its device"
