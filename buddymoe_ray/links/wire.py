"""Frames on a socket: a fixed prefix, a msgpack map, raw bytes. Nothing else is ever read from a peer.

    4 bytes magic and version · 4 bytes header length · 8 bytes payload length · header · payload   (big endian)

Every length is compared with `FrameLimits` before anything is allocated. Knows bytes, neither sockets (`stream`) nor
what a frame asks for. Invariant: what does not fit the format to the letter is a `LinkError`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import msgpack
from torch import Tensor

from buddymoe_ray.errors import LinkError

__all__ = ["KINDS", "PREFIX_BYTES", "Frame", "FrameLimits", "pack_frame", "parse_frame", "parse_prefix"]

KINDS = frozenset(
    {"hello", "challenge", "proof", "welcome", "refused"}  # auth
    | {"compute", "contents"}  # questions
    | {"answer", "bytes", "failed"}  # answers
)

_MAGIC = b"BML\x01"
_PREFIX = struct.Struct(">4sIQ")
PREFIX_BYTES = _PREFIX.size

Field = TypeVar("Field", int, str, bytes, list[object])


@dataclass(frozen=True, kw_only=True)
class FrameLimits:
    """Most bytes a peer may announce for a header and for a payload; more is a `LinkError`."""

    max_header: int = 1 << 20
    max_payload: int = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One frame; `kind` is one of `KINDS`, `payload_B` uint8 in host memory."""

    kind: str
    header: Mapping[str, object]
    payload_B: Tensor

    def field(self, name: str, kind: type[Field], *, most: int) -> Field:
        """The header's `name`: an integer in 0..`most`, or text, bytes or a list of at most that length.

        Raises:
            LinkError: it is none.
        """
        value = self.header.get(name)
        if type(value) is not kind or not 0 <= (value if isinstance(value, int) else len(value)) <= most:  # type: ignore[arg-type]
            raise LinkError(
                f"{name} of a {self.kind} frame is {value!r:.50}, must be {kind.__name__} of at most {most}"
            )
        return value


def pack_frame(header: Mapping[str, object], nbytes: int) -> bytes:
    """Prefix and header of a frame whose payload has `nbytes`."""
    packed: bytes = msgpack.packb(header)
    return _PREFIX.pack(_MAGIC, len(packed), nbytes) + packed


def parse_prefix(prefix: bytes | bytearray, limits: FrameLimits) -> tuple[int, int]:
    """Lengths of the header and the payload that follow. Raises LinkError for garbage and for more than `limits`."""
    magic, header_bytes, nbytes = _PREFIX.unpack(prefix)
    if magic != _MAGIC:
        raise LinkError(f"a frame begins with {bytes(magic)!r}, must begin with {_MAGIC!r}")
    if header_bytes > limits.max_header:
        raise LinkError(f"a frame announces a header of {header_bytes} bytes, must be <= {limits.max_header}")
    if nbytes > limits.max_payload:
        raise LinkError(f"a frame announces {nbytes} bytes, must be <= {limits.max_payload}")
    return header_bytes, nbytes


def parse_frame(packed: bytes | bytearray, payload_B: Tensor) -> Frame:
    """The frame of a header and a payload. Raises LinkError unless the header is a map with a known kind."""
    header = _unpack(packed)
    kind = header.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise LinkError(f"a frame's kind is {kind!r:.50}, must be one of {sorted(KINDS)}")
    return Frame(kind=kind, header=header, payload_B=payload_B)


def _unpack(packed: bytes | bytearray) -> dict[str, object]:
    try:
        header = msgpack.unpackb(packed, raw=False, strict_map_key=True)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise LinkError(f"a frame's header is not msgpack: {type(error).__name__}") from error
    if not isinstance(header, dict) or not all(isinstance(name, str) for name in header):
        raise LinkError(f"a frame's header is a {type(header).__name__}, must be a map of names")
    return header
