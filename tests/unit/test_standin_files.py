"""Stand-in records on disk: byte for byte what was written, resumed after a kill, and never from another model."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from buddymoe_ray.cache import DiskReader
from buddymoe_ray.cache.pool import slot_views
from buddymoe_ray.cache.standin_pool import StandinPool
from buddymoe_ray.errors import ProfileError
from buddymoe_ray.models.standin_files import StandinWriter, standin_layouts, standins_folder, verify_standins
from buddymoe_ray.types import ExpertKey, SlotTensor

HASH = "a1" * 32
LAYOUT = (
    SlotTensor(name="w.codes", shape=(10, 12), dtype="uint8", offset=0, nbytes=120),
    SlotTensor(name="w.base", shape=(1,), dtype="float32", offset=128, nbytes=4),
    SlotTensor(name="bias", shape=(20,), dtype="bfloat16", offset=192, nbytes=40),
)
BYTES = 256


def writer(folder: Path, kind: str = "lowbit3", **changes: Any) -> StandinWriter:
    return StandinWriter(
        folder, kind, **({"layout": LAYOUT, "record_bytes": BYTES, "model_hash": HASH, "recipe": "r1"} | changes)
    )


def records(layer: int, experts: int = 5, nbytes: int = BYTES) -> np.ndarray:
    return np.random.default_rng(layer).integers(0, 256, (experts, nbytes), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three layers of lowbit3 and of mean."""
    made = tmp_path / "m.standins"
    for kind in ("lowbit3", "mean"):
        for layer in range(3):
            writer(made, kind).write(layer, records(layer))
    return made


def edit(path: Path, **changes: Any) -> None:
    """Rewrite a file's header; metadata by name, `entry` for the tensor's."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header["experts"].update(changes.pop("entry", {}))
    header["__metadata__"].update(changes)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def refused(folder: Path) -> str:
    with pytest.raises(ProfileError) as caught:
        standin_layouts(folder, HASH)
    text = str(caught.value)
    assert str(folder) in text and "must be" in text and text.count("hint: ") == 1, text
    return text


def test_the_folder_lies_beside_the_profile() -> None:
    assert standins_folder(Path("/x/buddymoe.profile")) == Path("/x/buddymoe.standins")
    assert standins_folder(Path("y")) == Path("y.standins")


def test_records_come_back_through_the_disk_reader(folder: Path) -> None:
    layouts = standin_layouts(folder, HASH)
    assert set(layouts) == {"lowbit3", "mean"}
    layout = layouts["lowbit3"]
    assert layout.tensors == LAYOUT and layout.slot_bytes == layout.expert_bytes == BYTES
    assert layout.layers == 3 and layout.experts_per_layer == (5, 5, 5) and len(layout.pieces) == 15
    reader = DiskReader(depth=2, buffer_bytes=8192)
    for key, pieces in layout.pieces.items():
        buffer = np.zeros(BYTES, np.uint8)
        reader.submit(pieces, buffer).wait()
        assert buffer.tobytes() == records(key.layer)[key.expert].tobytes(), key
    reader.close()


def test_the_pool_reads_what_was_written(folder: Path) -> None:
    layouts = standin_layouts(folder, HASH)
    kind_of = {ExpertKey(0, 1): "mean", ExpertKey(2, 4): "lowbit3", ExpertKey(1, 0): "mean"}
    pool = StandinPool(layouts, kind_of, torch.device("cpu"))
    reader = DiskReader()
    pool.load(reader)
    reader.close()
    for key in kind_of:
        wanted = slot_views(torch.from_numpy(records(key.layer)[key.expert].copy()), layouts["mean"])
        for name, tensor in pool.tensors(key).items():
            assert tensor.dtype == wanted[name].dtype and tensor.shape == wanted[name].shape
            assert tensor.view(torch.uint8).equal(wanted[name].view(torch.uint8)), (key, name)


def test_files_are_safetensors_with_aligned_records(folder: Path) -> None:
    path = folder / "lowbit3-01.safetensors"
    assert (load_file(path)["experts"] == records(1)).all()
    piece = standin_layouts(folder, HASH)["lowbit3"].pieces[ExpertKey(1, 2)][0]
    assert piece.offset % 64 == 0 and Path(piece.path).is_absolute()
    assert path.read_bytes()[piece.offset : piece.offset + BYTES] == records(1)[2].tobytes()


def test_layers_may_differ_in_experts_and_be_more_than_a_hundred(tmp_path: Path) -> None:
    for layer in range(101):
        writer(tmp_path).write(layer, records(layer, experts=1 + layer % 3))
    layout = standin_layouts(tmp_path, HASH)["lowbit3"]
    assert layout.layers == 101 and layout.experts_per_layer[:4] == (1, 2, 3, 1)
    assert (tmp_path / "lowbit3-100.safetensors").exists()


def test_a_slice_is_written_as_it_reads(tmp_path: Path) -> None:
    wide = records(0, nbytes=2 * BYTES)
    writer(tmp_path).write(0, wide[:, ::2])
    assert (load_file(tmp_path / "lowbit3-00.safetensors")["experts"] == wide[:, ::2]).all()


def test_nothing_there_is_no_layout(tmp_path: Path) -> None:
    assert standin_layouts(tmp_path / "none", HASH) == {} == standin_layouts(tmp_path, HASH)
    verify_standins(tmp_path / "none")


def test_other_files_are_left_alone(folder: Path) -> None:
    (folder / "notes.txt").write_text("x")
    (folder / "lowbit3-02.safetensors.part").write_bytes(b"half")
    (folder / "Model-00001-of-2.safetensors").write_bytes(b"x")
    assert set(standin_layouts(folder, HASH)) == {"lowbit3", "mean"}
    verify_standins(folder)


def test_finished_layers_are_kept(folder: Path) -> None:
    made = writer(folder)
    assert [made.has(layer) for layer in range(4)] == [True, True, True, False]
    assert not writer(folder, "lowbit4").has(0)


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": "r2"},
        {"model_hash": "b2" * 32},
        {"layout": LAYOUT[:2]},
        {"record_bytes": 320},
    ],
)
def test_a_layer_made_otherwise_is_made_again(folder: Path, changes: dict[str, Any]) -> None:
    other = writer(folder, **changes)
    assert not other.has(0)
    other.write(0, records(9, nbytes=other._bytes))
    assert other.has(0) and not writer(folder).has(0)


def test_a_damaged_layer_is_made_again(folder: Path) -> None:
    made = writer(folder)
    for size in (0, 7, 100, 1000):
        os.truncate(made.path(1), size)
        assert not made.has(1)
        made.write(1, records(1))
        assert made.has(1)
    verify_standins(folder)


KILLED = """
import os, signal, sys
from pathlib import Path
from test_standin_files import records, writer
import buddymoe_ray.models.standin_files as files
made = writer(Path(sys.argv[1]))
made.write(0, records(0))
made.write(1, records(1))
files.os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
made.write(2, records(2))
"""


def test_a_kill_in_the_middle_of_a_layer_loses_that_layer_alone(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=env, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert (tmp_path / "lowbit3-02.safetensors.part").exists()
    made = writer(tmp_path)
    assert [made.has(layer) for layer in range(3)] == [True, True, False]
    assert standin_layouts(tmp_path, HASH, layers=3) == {}
    made.write(2, records(2))
    assert standin_layouts(tmp_path, HASH, layers=3)["lowbit3"].layers == 3
    verify_standins(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".safetensors"] * 3


def test_a_kind_with_a_layer_missing_is_left_out_and_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "mean-01.safetensors").unlink()
    with caplog.at_level(logging.WARNING):
        assert set(standin_layouts(folder, HASH)) == {"lowbit3"}
    assert "no mean records of layer 1" in caplog.text
    assert standin_layouts(folder, HASH, layers=4) == {}


def test_kinds_that_are_not_wanted_are_not_looked_at(folder: Path) -> None:
    (folder / "mean-01.safetensors").write_bytes(b"broken")
    assert set(standin_layouts(folder, HASH, kinds=("lowbit3", "lowbit4"))) == {"lowbit3"}
    assert standin_layouts(folder, HASH, kinds=()) == {}
    with pytest.raises(ProfileError, match="mean-01"):
        standin_layouts(folder, HASH, kinds=["mean"])


def test_more_layers_than_the_model_has_are_refused(folder: Path) -> None:
    with pytest.raises(ProfileError, match="is of layer 2, must be of a layer below 2"):
        standin_layouts(folder, HASH, layers=2)


def test_another_models_records_are_refused(folder: Path) -> None:
    with pytest.raises(
        ProfileError, match=r"is of another model \(a1a1a1a1a1a1\), must be of this one \(b{12}\)\. hint: "
    ):
        standin_layouts(folder, "b" * 64)


@pytest.mark.parametrize("size", [0, 5, 8, 30, 500, -1])
def test_truncated_files_are_refused(folder: Path, size: int) -> None:
    path = folder / "mean-02.safetensors"
    os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
    assert "mean-02" in refused(folder) and "bytes long" in refused(folder)


def test_a_file_that_is_too_long_is_refused(folder: Path) -> None:
    with (folder / "mean-00.safetensors").open("ab") as file:
        file.write(b"x")
    assert "too long" in refused(folder)


def test_a_header_that_claims_gigabytes_is_refused(folder: Path) -> None:
    (folder / "mean-00.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}" * 100)
    assert "with a header of 1152921504606846976" in refused(folder)


@pytest.mark.parametrize(
    "text", [b"{", b"[]", b"{}", b"null", b'{"experts":1,"__metadata__":{}}', b"\xff\xfe", b"[" * 5000]
)
def test_a_header_that_is_none_is_refused(folder: Path, text: bytes) -> None:
    (folder / "mean-00.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    assert "damaged in its header" in refused(folder)


def layout_with(**changes: Any) -> str:
    from dataclasses import asdict

    first = asdict(LAYOUT[0]) | changes
    return json.dumps([first, *(asdict(tensor) for tensor in LAYOUT[1:])])


@pytest.mark.parametrize(
    "changes",
    [
        {"entry": {"dtype": "I8"}},
        {"entry": {"shape": [5, 255]}},
        {"entry": {"shape": [1280]}},
        {"entry": {"shape": ["5", 256]}},
        {"entry": {"shape": [-5, -256]}},
        {"entry": {"data_offsets": [64, 1344]}},
        {"layer": "1"},
        {"layer": "x"},
        {"kind": "lowbit3"},
        {"layout": "[]"},
        {"layout": "nonsense"},
        {"layout": layout_with(offset=-64)},
        {"layout": layout_with(offset=1)},
        {"layout": layout_with(offset=192)},
        {"layout": layout_with(nbytes=121)},
        {"layout": layout_with(shape=[10, 13])},
        {"layout": layout_with(shape=[-10, -12])},
        {"layout": layout_with(shape=[120], nbytes=120, offset=64)},
        {"layout": layout_with(shape=[1000], nbytes=1000, offset=256)},
        {"layout": layout_with(dtype="object")},
        {"layout": layout_with(dtype="float32")},
        {"layout": layout_with(name="bias")},
        {"layout": layout_with(colour=1)},
    ],
)
def test_a_header_that_lies_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder / "mean-00.safetensors", **changes)
    assert "mean-00" in refused(folder)


def test_layers_of_different_layouts_are_refused(folder: Path) -> None:
    writer(folder, layout=LAYOUT[:2]).write(1, records(1))
    assert "another record layout than layer 0" in refused(folder)


@pytest.mark.parametrize("at", [0, 500, -1])
def test_corrupt_bytes_are_found(folder: Path, at: int) -> None:
    verify_standins(folder)
    path = folder / "lowbit3-02.safetensors"
    raw = bytearray(path.read_bytes())
    start = len(raw) - 5 * BYTES
    raw[start + at if at >= 0 else at] ^= 64
    path.write_bytes(raw)
    assert standin_layouts(folder, HASH)["lowbit3"].layers == 3  # headers alone do not show it
    with pytest.raises(ProfileError, match=r"lowbit3-02.safetensors is corrupt .*, must be as it was written. hint: "):
        verify_standins(folder)


def test_a_full_disk_is_said_before_writing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(
        ProfileError, match=r"free, must have .* hint: free some space .* layers that are finished are kept"
    ):
        writer(folder).write(0, records(5))
    assert (load_file(folder / "lowbit3-00.safetensors")["experts"] == records(0)).all()


@pytest.mark.parametrize(("code", "hint"), [(errno.ENOSPC, "free some space"), (errno.EIO, "choose another --out")])
def test_a_disk_that_fails_leaves_the_old_layer(
    folder: Path, code: int, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ProfileError, match=rf"cannot be written \({os.strerror(code)}\), must be. hint: {hint}"):
        writer(folder).write(0, records(5))
    assert (load_file(folder / "lowbit3-00.safetensors")["experts"] == records(0)).all()
    assert not list(folder.glob("*.part"))


def test_a_really_full_disk(tmp_path: Path) -> None:
    """A file size limit stands for the disk: the write itself fails in the middle."""
    script = KILLED.partition("made.write(0")[0] + "import resource\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    script += "resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))\nmade.write(0, records(0))\n"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=env, capture_output=True, check=False)
    assert b"ProfileError" in done.stderr and b"File too large" in done.stderr, done.stderr.decode()
    assert b"free some space" in done.stderr and list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ProfileError, match="cannot be written"):
        writer(tmp_path / "file").write(0, records(0))


def test_programmers_are_told() -> None:
    with pytest.raises(AssertionError, match="kind is 'buddy:output'"):
        writer(Path("x"), "buddy:output")
    with pytest.raises(AssertionError, match="multiple of 64"):
        writer(Path("x"), record_bytes=250)
    with pytest.raises(AssertionError, match="tensors end at byte 232"):
        writer(Path("x"), record_bytes=192)
    with pytest.raises(AssertionError, match="records are uint8"):
        writer(Path("x")).write(0, records(0, nbytes=64))
