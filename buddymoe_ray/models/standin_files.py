"""Stand-in records on disk: per kind and layer one safetensors file that holds one record per expert, end to end.

    P.standins/lowbit3-00.safetensors     tensor "experts" uint8 [E, record bytes], metadata: layout, hashes

A record lies as in the device's pool, so reading one is one read. Files are written whole under another name and then
renamed: what is there is complete, so an interrupted run goes on where it stopped. Knows no arithmetic.
Neighbours: `calibrate` makes records, `cache.StandinPool` reads them through the layouts found here.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from buddymoe_ray.errors import CheckpointError, ProfileError
from buddymoe_ray.models.shard_writer import check_space
from buddymoe_ray.models.tensor_index import DTYPE_BYTES
from buddymoe_ray.types import ExpertKey, ExpertLayout, ExpertPiece, SlotTensor

__all__ = ["StandinWriter", "standin_layouts", "standins_folder", "verify_standins"]

log = logging.getLogger(__name__)

_FILE = re.compile(r"([a-z]+\d*)-(\d{2,})\.safetensors")
_TENSOR = "experts"
_ALIGNMENT = 64
_MOST_HEADER_BYTES = 1 << 24
_CHUNK_BYTES = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def standins_folder(profile: Path) -> Path:
    """Where the records of a profile are: `P.profile` has `P.standins` beside it."""
    return profile.with_name(profile.name.removesuffix(".profile") + ".standins")


class StandinWriter:
    """Writes the records of one kind, layer by layer.

    Args:
        kind: letters and a number, such as `lowbit3`.
        layout: tensors of one record; their offsets are multiples of 64.
        record_bytes: bytes of a record, a multiple of 64.
        model_hash: what the records are bound to.
        recipe: how they were made; a layer made otherwise is made again.
    """

    def __init__(
        self,
        folder: Path,
        kind: str,
        *,
        layout: Sequence[SlotTensor],
        record_bytes: int,
        model_hash: str,
        recipe: str = "",
    ) -> None:
        assert _FILE.fullmatch(f"{kind}-00.safetensors"), f"kind is {kind!r}, must be letters and a number"
        why = _layout_fault(layout, record_bytes)
        assert why is None, f"layout of {kind}: {why}"
        self._folder, self.kind, self._bytes = folder, kind, record_bytes
        self._meta = {"kind": kind, "model_hash": model_hash, "recipe": recipe}
        self._meta["layout"] = json.dumps([asdict(tensor) for tensor in layout])

    def path(self, layer: int) -> Path:
        """The file of a layer."""
        return self._folder / f"{self.kind}-{layer:02d}.safetensors"

    def has(self, layer: int) -> bool:
        """Whether the layer is already there, whole, from the same model by the same recipe."""
        try:
            header = _read_header(self.path(layer))
        except ProfileError:
            return False
        same = all(header.meta.get(name) == value for name, value in self._meta.items())
        return same and header.nbytes == self._bytes

    def read(self, layer: int) -> npt.NDArray[np.uint8] | None:
        """The layer's records `[E, record bytes]` if `has` says so and their checksum holds, else None."""
        if not self.has(layer):
            return None
        header = _read_header(self.path(layer))
        data = np.fromfile(self.path(layer), dtype=np.uint8, offset=header.start).reshape(header.experts, header.nbytes)
        return data if hashlib.sha256(data.data).hexdigest() == header.meta.get("sha256") else None

    def write(self, layer: int, records_EB: npt.NDArray[np.uint8]) -> None:
        """Write all records of a layer. Raises ProfileError when the disk is full; no half file stays."""
        assert records_EB.dtype == np.uint8 and records_EB.ndim == 2 and records_EB.shape[1] == self._bytes, (
            f"records are {records_EB.dtype} {records_EB.shape}, must be uint8 [E, {self._bytes}]"
        )
        data = np.ascontiguousarray(records_EB).data
        meta = {**self._meta, "layer": str(layer), "sha256": hashlib.sha256(data).hexdigest()}
        entry = {"dtype": "U8", "shape": list(records_EB.shape), "data_offsets": [0, records_EB.nbytes]}
        text = json.dumps({"__metadata__": meta, _TENSOR: entry}, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % _ALIGNMENT)
        path = self.path(layer)
        temporary = path.with_name(path.name + ".part")
        with _naming_trouble(path, temporary):
            self._folder.mkdir(parents=True, exist_ok=True)
            check_space(self._folder, len(text) + records_EB.nbytes)
            with temporary.open("wb") as file:
                file.write(struct.pack("<Q", len(text)) + text)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # a name must never stand for bytes that a power cut took
            os.replace(temporary, path)


@contextlib.contextmanager
def _naming_trouble(path: Path, temporary: Path) -> Iterator[None]:
    """Turn errors of writing into ProfileError and leave no half file."""
    try:
        yield
    except CheckpointError as error:  # `check_space`, whose message has the hint
        raise ProfileError(f"{path} cannot be written: {error}; layers that are finished are kept") from error
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        hint = "free some space; layers that are finished are kept" if error.errno in _FULL else "choose another --out"
        raise ProfileError(f"{path} cannot be written ({error.strerror}), must be. hint: {hint}") from error


def standin_layouts(
    folder: Path, model_hash: str, *, kinds: Collection[str] | None = None, layers: int | None = None
) -> dict[str, ExpertLayout]:
    """Per kind, how records lie and where each expert's is. Reads headers only; see `verify_standins`.

    Args:
        kinds: those wanted; None is all there are. Files of others are not looked at.
        layers: number of MoE layers; None takes the most that any kind has. Kinds with a layer missing (an interrupted
            calibration) are left out, with a warning.

    Raises ProfileError: a file is damaged or of another model.
    """
    found: dict[str, dict[int, _Header]] = {}
    for path in _files(folder, kinds):
        header = _read_header(path)
        if header.meta.get("model_hash") != model_hash:
            raise ProfileError(
                f"{path} is of another model ({header.meta.get('model_hash', 'unknown')[:12]}), must be of this one "
                f"({model_hash[:12]}). hint: run buddymoe profile on this checkpoint, or delete {folder}"
            )
        found.setdefault(header.kind, {})[header.layer] = header
    count = max((len(held) for held in found.values()), default=0) if layers is None else layers
    layouts: dict[str, ExpertLayout] = {}
    for kind, held in found.items():
        missing = set(range(count)) - set(held)
        if missing:
            log.warning("%s has no %s records of layer %d: %s is left out", folder, kind, min(missing), kind)
        elif len(held) > count:
            raise _damaged(held[max(held)].path, f"of layer {max(held)}", f"of a layer below {count}")
        else:
            layouts[kind] = _layout(held)
    return layouts


def verify_standins(folder: Path) -> None:
    """Compare every file's bytes with its checksum. Raises ProfileError naming the file."""
    for path in _files(folder):
        header = _read_header(path)
        digest = hashlib.sha256()
        try:
            with path.open("rb") as file:
                file.seek(header.start)
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
        except OSError as error:
            raise _damaged(path, f"unreadable ({error.strerror})") from error
        if digest.hexdigest() != header.meta.get("sha256"):
            raise _damaged(path, "corrupt (its checksum differs)")


def _files(folder: Path, kinds: Collection[str] | None = None) -> list[Path]:
    if not folder.is_dir():
        return []
    named = ((path, _FILE.fullmatch(path.name)) for path in folder.iterdir())
    return sorted(path for path, match in named if match and (kinds is None or match.group(1) in kinds))


@dataclass(frozen=True, kw_only=True)
class _Header:
    """What a file says of itself: `experts` records of `nbytes` each from byte `start` on."""

    path: Path
    kind: str
    layer: int
    meta: Mapping[str, str]
    tensors: tuple[SlotTensor, ...]
    experts: int
    nbytes: int
    start: int


def _read_header(path: Path) -> _Header:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 0 < length <= min(_MOST_HEADER_BYTES, size - 8):
                raise _damaged(path, f"{size} bytes long with a header of {length}")
            text = file.read(length)
    except OSError as error:
        raise ProfileError(
            f"{path} cannot be read ({error.strerror}), must be there. hint: run buddymoe profile again"
        ) from error
    try:
        header = _parsed(path, json.loads(text), 8 + length)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"damaged in its header ({error})") from error
    end = header.start + header.experts * header.nbytes
    if size != end:
        raise _damaged(path, f"{size} bytes long ({'truncated' if size < end else 'too long'})", f"{end} bytes long")
    return header


def _parsed(path: Path, whole: dict[str, Any], start: int) -> _Header:
    """The header's content. Raises ValueError, KeyError, TypeError or AttributeError for anything unexpected."""
    meta, entry = whole["__metadata__"], whole[_TENSOR]
    experts, nbytes = entry["shape"]
    if {type(n) for n in (experts, nbytes)} != {int} or min(experts, nbytes) < 1:
        raise ValueError(f"shape is {entry['shape']}")
    if entry["dtype"] != "U8" or entry["data_offsets"] != [0, experts * nbytes] or len(whole) != 2:
        raise ValueError("not one uint8 tensor from end to end")
    match = _FILE.fullmatch(path.name)
    if match is None or (meta["kind"], int(meta["layer"])) != (match.group(1), int(match.group(2))):
        raise ValueError(f"it is of {meta['kind']} in layer {meta['layer']}")
    tensors = tuple(SlotTensor(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in json.loads(meta["layout"]))
    if fault := _layout_fault(tensors, nbytes):
        raise ValueError(fault)
    return _Header(
        path=path,
        kind=match.group(1),
        layer=int(match.group(2)),
        meta=meta,
        tensors=tensors,
        experts=experts,
        nbytes=nbytes,
        start=start,
    )


def _layout_fault(tensors: Sequence[SlotTensor], record_bytes: int) -> str | None:
    """What keeps `tensors` from lying side by side, aligned, in a record; None when they do."""
    if not tensors or record_bytes % _ALIGNMENT:
        return f"{len(tensors)} tensors in {record_bytes} bytes, must be some, in a multiple of {_ALIGNMENT} bytes"
    end = 0
    for tensor in sorted(tensors, key=lambda t: t.offset):
        nbytes = math.prod(tensor.shape) * DTYPE_BYTES.get(tensor.dtype, -1)
        if tensor.nbytes != nbytes or nbytes < 0 or any(type(n) is not int or n < 0 for n in tensor.shape):
            return f"{tensor.name} of {tensor.nbytes} bytes, must be {tensor.dtype} {list(tensor.shape)}"
        if type(tensor.offset) is not int or tensor.offset % _ALIGNMENT or tensor.offset < end:
            return f"{tensor.name} at byte {tensor.offset}, must be aligned and behind byte {end}"
        end = tensor.offset + nbytes
    if end > record_bytes:
        return f"tensors end at byte {end}, must be within {record_bytes}"
    names = {tensor.name for tensor in tensors}
    return None if len(names) == len(tensors) else f"names {sorted(t.name for t in tensors)}, must differ"


def _damaged(path: Path, how: str, wanted: str = "as it was written") -> ProfileError:
    return ProfileError(f"{path} is {how}, must be {wanted}. hint: run buddymoe profile again")


def _layout(layers: Mapping[int, _Header]) -> ExpertLayout:
    first = layers[0]
    for header in layers.values():
        if (header.tensors, header.nbytes) != (first.tensors, first.nbytes):
            raise _damaged(header.path, "of another record layout than layer 0", "of the same")
    pieces = dict[ExpertKey, tuple[ExpertPiece, ...]]()
    for layer, header in layers.items():
        path = str(header.path.resolve())
        for expert in range(header.experts):
            offset = header.start + expert * header.nbytes
            piece = ExpertPiece(path=path, offset=offset, nbytes=header.nbytes, slot_offset=0)
            pieces[ExpertKey(layer, expert)] = (piece,)
    return ExpertLayout(
        tensors=first.tensors,
        slot_bytes=first.nbytes,
        expert_bytes=first.nbytes,
        layers=len(layers),
        experts_per_layer=tuple(layers[layer].experts for layer in range(len(layers))),
        pieces=pieces,
    )
