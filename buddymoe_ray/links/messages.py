"""What workers say to each other: two questions and three answers.

    compute   rows through experts of a layer    -> answer | failed
    contents  which experts are resident         -> bytes  | failed

Question and answer carry the same number, `id`. Knows headers, not sockets. Invariant: every field is checked when
parsed; a wrong one is a `LinkError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from buddymoe_ray.errors import LinkError
from buddymoe_ray.links.arrays import ArraySpec, cut, parse_specs
from buddymoe_ray.links.wire import Frame

__all__ = ["CONTENTS", "Computation", "answer_of", "check_answer", "failure_of", "number_of", "parse_question"]

CONTENTS = {"kind": "contents"}
"""The header of the question for the table of contents."""

_MOST = 2**63 - 1
_MOST_TEXT = 300


@dataclass(frozen=True, kw_only=True)
class Computation:
    """Run the payload's rows through experts of `layer`. After `patience_ms` nobody waits for the answer any more."""

    layer: int
    patience_ms: int
    specs: tuple[ArraySpec, ...]

    def header(self) -> dict[str, object]:
        """As msgpack's map."""
        return {"kind": "compute", "layer": self.layer, "patience": self.patience_ms, "arrays": _packed(self.specs)}


def number_of(frame: Frame) -> int:
    """The number of the question. Raises LinkError where there is none."""
    return frame.field("id", int, most=_MOST)


def parse_question(frame: Frame) -> Computation | None:
    """What a client asks: None for the contents. Raises LinkError for anything else."""
    if frame.kind == "compute":
        layer, patience = (frame.field(name, int, most=_MOST) for name in ("layer", "patience"))
        return Computation(layer=layer, patience_ms=patience, specs=_specs(frame))
    if frame.kind == "contents" and not frame.payload_B.numel():
        return None
    raise LinkError(f"a client said {frame.kind}, must ask compute, or contents without a payload")


def answer_of(specs: Sequence[ArraySpec], asked: Sequence[ArraySpec]) -> dict[str, object]:
    """The header of the outputs of those experts that were run. Raises LinkError as `check_answer`."""
    _check(specs, asked)
    return {"kind": "answer", "arrays": _packed(specs)}


def check_answer(frame: Frame, asked: Sequence[ArraySpec]) -> dict[int, Tensor]:
    """The outputs of a frame; none where the peer is busy, has no such experts, or was too late.

    Raises:
        LinkError: an array is not of an expert that was asked, or has not its rows' shape and dtype.
    """
    specs = _specs(frame)
    _check(specs, asked)
    return cut(specs, frame.payload_B)


def failure_of(error: Exception) -> dict[str, object]:
    """The header that says what the service raised."""
    return {"kind": "failed", "message": f"{type(error).__name__}: {error}"[:_MOST_TEXT]}


def _packed(specs: Sequence[ArraySpec]) -> list[list[object]]:
    return [spec.packed() for spec in specs]


def _specs(frame: Frame) -> tuple[ArraySpec, ...]:
    return parse_specs(frame.field("arrays", list, most=_MOST))


def _check(specs: Sequence[ArraySpec], asked: Sequence[ArraySpec]) -> None:
    wanted = {spec.key: spec for spec in asked}
    for spec in specs:
        if wanted.get(spec.key) != spec:
            raise LinkError(f"expert {spec.key} was answered as {spec}, must be {wanted.get(spec.key)}")
