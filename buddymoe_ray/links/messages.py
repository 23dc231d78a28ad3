"""What workers say to each other: three questions and four answers, as records.

    compute  rows through experts of a layer    -> answer | declined | failed
    read     the bytes of an expert's segment   -> bytes  | declined | failed
    echo     a payload back, to measure a link  -> bytes

Knows headers, not sockets. Invariant: every field is checked when parsed; a wrong one is a `LinkError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from buddymoe_ray.errors import LinkError
from buddymoe_ray.links.arrays import ArraySpec, parse_specs
from buddymoe_ray.links.wire import Frame

__all__ = [
    "Answer",
    "BytesAnswer",
    "ComputeQuestion",
    "Declined",
    "EchoQuestion",
    "Failed",
    "Question",
    "ReadQuestion",
    "Reply",
    "parse_question",
    "parse_reply",
]

_MOST_EXPERTS = 1 << 20
_MOST_TEXT = 300


@dataclass(frozen=True, kw_only=True)
class ComputeQuestion:
    """Run the payload's rows through experts of `layer`. After `patience_ms` nobody waits for the answer any more."""

    number: int
    layer: int
    patience_ms: int
    specs: tuple[ArraySpec, ...]

    def header(self) -> dict[str, object]:
        """As msgpack's map."""
        arrays = [spec.packed() for spec in self.specs]
        layer, patience = self.layer, self.patience_ms
        return {"kind": "compute", "id": self.number, "layer": layer, "patience": patience, "arrays": arrays}


@dataclass(frozen=True, kw_only=True)
class ReadQuestion:
    """Send the bytes of a segment, `size` of them."""

    number: int
    layer: int
    expert: int
    segment: int
    size: int

    def header(self) -> dict[str, object]:
        """As msgpack's map."""
        where = {"layer": self.layer, "expert": self.expert, "segment": self.segment}
        return {"kind": "read", "id": self.number, **where, "want": self.size}


@dataclass(frozen=True, kw_only=True)
class EchoQuestion:
    """Send the payload back."""

    number: int

    def header(self) -> dict[str, object]:
        """As msgpack's map."""
        return {"kind": "echo", "id": self.number}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The payload has the outputs of some experts; `declined` were not run."""

    number: int
    specs: tuple[ArraySpec, ...]
    declined: tuple[int, ...]

    def header(self) -> dict[str, object]:
        """As msgpack's map."""
        arrays = [spec.packed() for spec in self.specs]
        return {"kind": "answer", "id": self.number, "arrays": arrays, "declined": list(self.declined)}

    def check(self, asked: Sequence[ArraySpec]) -> None:
        """Raises LinkError unless each array is of an expert that was asked, with its rows' shape and dtype."""
        wanted = {spec.key: spec for spec in asked}
        for spec in self.specs:
            if wanted.get(spec.key) != spec:
                raise LinkError(f"expert {spec.key} was answered as {spec}, must be {wanted.get(spec.key)}")


@dataclass(frozen=True, kw_only=True)
class BytesAnswer:
    """The payload is what was asked for."""

    number: int

    def header(self) -> dict[str, object]:
        """As msgpack's map."""
        return {"kind": "bytes", "id": self.number}


@dataclass(frozen=True, kw_only=True)
class Declined:
    """Nothing was done: `busy`, `late` (nobody waits any more), `withdrawn` or `absent`."""

    number: int
    reason: str

    def header(self) -> dict[str, object]:
        """As msgpack's map."""
        return {"kind": "declined", "id": self.number, "reason": self.reason}


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The service raised; `message` says what."""

    number: int
    message: str

    def header(self) -> dict[str, object]:
        """As msgpack's map."""
        return {"kind": "failed", "id": self.number, "message": self.message[:_MOST_TEXT]}


Question = ComputeQuestion | ReadQuestion | EchoQuestion
Reply = Answer | BytesAnswer | Declined | Failed


def parse_question(frame: Frame) -> Question:
    """What a client asks. Raises LinkError for anything else."""
    number = frame.whole("id")
    if frame.kind == "compute":
        specs = parse_specs(frame.several("arrays"))
        patience = frame.whole("patience")
        return ComputeQuestion(number=number, layer=frame.whole("layer"), patience_ms=patience, specs=specs)
    if frame.kind == "read":
        layer, expert = frame.whole("layer"), frame.whole("expert", most=_MOST_EXPERTS)
        segment, size = frame.whole("segment", most=_MOST_EXPERTS), frame.whole("want")
        return ReadQuestion(number=number, layer=layer, expert=expert, segment=segment, size=size)
    if frame.kind == "echo":
        return EchoQuestion(number=number)
    raise LinkError(f"a client said {frame.kind}, must ask compute, read or echo")


def parse_reply(frame: Frame) -> Reply:
    """What a server answers. Raises LinkError for anything else."""
    number = frame.whole("id")
    if frame.kind == "answer":
        declined = frame.several("declined")
        if not all(type(expert) is int for expert in declined):
            raise LinkError("declined of an answer must list experts")
        specs = parse_specs(frame.several("arrays"))
        return Answer(number=number, specs=specs, declined=tuple(e for e in declined if type(e) is int))
    if frame.kind == "bytes":
        return BytesAnswer(number=number)
    if frame.kind == "declined":
        return Declined(number=number, reason=frame.text("reason"))
    if frame.kind == "failed":
        return Failed(number=number, message=frame.text("message"))
    raise LinkError(f"a server said {frame.kind}, must answer")
