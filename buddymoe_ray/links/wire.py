"""Frames on a socket: a fixed prefix, a msgpack map, raw bytes. Nothing else is ever read from a peer.

    4 bytes magic and version · 4 bytes header length · 8 bytes payload length · header · payload   (big endian)

Every length is compared with `Limits` before anything is allocated. Knows bytes, neither sockets (`stream`) nor what a
frame asks for. Invariant: what does not fit the format to the letter is a `LinkError`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import msgpack

from buddymoe_ray.errors import LinkError

__all__ = ["KINDS", "PREFIX_BYTES", "Frame", "Limits", "pack_frame", "parse_header", "parse_prefix"]

KINDS = frozenset(
    {"hello", "challenge", "proof", "welcome", "refused"}  # auth
    | {"compute", "read", "echo"}  # questions
    | {"answer", "bytes", "declined", "failed"}  # answers
)

_MAGIC = b"BML\x01"
_PREFIX = struct.Struct(">4sIQ")
PREFIX_BYTES = _PREFIX.size


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Most bytes a peer may announce for a header and for a payload; more is a `LinkError`."""

    max_header: int = 1 << 20
    max_payload: int = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A frame's header, whose payload of `nbytes` is still to be read. `kind` is one of `KINDS`."""

    kind: str
    header: Mapping[str, object]
    nbytes: int

    def whole(self, name: str, *, most: int = 2**63 - 1) -> int:
        """The header's non-negative integer `name`. Raises LinkError where it is none, or above `most`."""
        value = self.header.get(name)
        if type(value) is not int or not 0 <= value <= most:
            raise LinkError(f"{name} of a {self.kind} frame is {value!r:.50}, must be an integer in 0..{most}")
        return value

    def text(self, name: str, *, most: int = 512) -> str:
        """The header's string `name`. Raises LinkError where it is none, or longer than `most`."""
        value = self.header.get(name)
        if not isinstance(value, str) or len(value) > most:
            raise LinkError(f"{name} of a {self.kind} frame is {value!r:.50}, must be a string of up to {most}")
        return value

    def raw(self, name: str, *, most: int = 64) -> bytes:
        """The header's bytes `name`. Raises LinkError where they are none, or more than `most`."""
        value = self.header.get(name)
        if not isinstance(value, bytes) or len(value) > most:
            raise LinkError(f"{name} of a {self.kind} frame is {value!r:.50}, must be up to {most} bytes")
        return value

    def several(self, name: str) -> list[object]:
        """The header's list `name`. Raises LinkError where it is none."""
        value = self.header.get(name)
        if not isinstance(value, list):
            raise LinkError(f"{name} of a {self.kind} frame is {value!r:.50}, must be a list")
        return value


def pack_frame(header: Mapping[str, object], nbytes: int) -> bytes:
    """Prefix and header of a frame whose payload has `nbytes`."""
    packed: bytes = msgpack.packb(header)
    return _PREFIX.pack(_MAGIC, len(packed), nbytes) + packed


def parse_prefix(prefix: bytes | bytearray, limits: Limits) -> tuple[int, int]:
    """Lengths of the header and the payload that follow. Raises LinkError for garbage and for more than `limits`."""
    magic, header_bytes, nbytes = _PREFIX.unpack(prefix)
    if magic != _MAGIC:
        raise LinkError(f"a frame begins with {bytes(magic)!r}, must begin with {_MAGIC!r}")
    if header_bytes > limits.max_header:
        raise LinkError(f"a frame announces a header of {header_bytes} bytes, must be <= {limits.max_header}")
    if nbytes > limits.max_payload:
        raise LinkError(f"a frame announces {nbytes} bytes, must be <= {limits.max_payload}")
    return header_bytes, nbytes


def parse_header(packed: bytes | bytearray, nbytes: int) -> Frame:
    """The frame of a header whose payload has `nbytes`. Raises LinkError unless it is a map with a known kind."""
    header = _unpack(packed)
    kind = header.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise LinkError(f"a frame's kind is {kind!r:.50}, must be one of {sorted(KINDS)}")
    return Frame(kind=kind, header=header, nbytes=nbytes)


def _unpack(packed: bytes | bytearray) -> dict[str, object]:
    try:
        header = msgpack.unpackb(packed, raw=False, strict_map_key=True)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise LinkError(f"a frame's header is not msgpack: {type(error).__name__}") from error
    if not isinstance(header, dict) or not all(isinstance(name, str) for name in header):
        raise LinkError(f"a frame's header is a {type(header).__name__}, must be a map of names")
    return header
