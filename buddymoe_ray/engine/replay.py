"""A request's record: which accesses stand-ins answered, so that the same tokens can be computed again.

Only substitutions are kept: an access that is not named was answered by the expert itself. The text form is base64 of
msgpack and carries what it is bound to. Never executes or unpickles anything.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from buddymoe_ray.errors import RequestError
from buddymoe_ray.moe import Substitution
from buddymoe_ray.policy import Action
from buddymoe_ray.residency.standin_setup import StandinSetup
from buddymoe_ray.types import ExpertKey, GenerationRequest

__all__ = ["Recorder", "Replay", "decode_record", "open_recorder", "open_replay"]

MAX_RECORDED = 1 << 20
"""Most accesses of one record: 15 MiB. A request that could come to more is refused before it begins."""

_VERSION = 1
_FIELDS = ("step", "layer", "slot", "action", "expert", "weight", "kind")
_ROW = np.dtype(list(zip(_FIELDS, ("<u4", "<u2", "u1", "u1", "<u2", "<f4", "u1"), strict=True)))
_MOST_BYTES = MAX_RECORDED * _ROW.itemsize

Replay = Mapping[int, npt.NDArray[np.void]]
"""Substitutions by decode step: rows of a record, as they are stored but for the kind."""


class Recorder:
    """A request's record while it grows: compressed as it comes, so that it is small and no step waits for its end.

    `binding` names the model and its stand-ins, `prompt` are the request's tokens.
    """

    def __init__(self, *, binding: str, prompt: Sequence[int]) -> None:
        self._head = {"version": _VERSION, "binding": binding, "prompt": _digest(prompt)}
        self._kinds: dict[str, int] = {}
        self._squeeze = zlib.compressobj()
        self._rows = bytearray()

    def add(self, step: int, accesses: Sequence[Substitution]) -> None:
        """Note what stand-ins answered in a decode step (0 is the one after prefill)."""
        rows = [
            (step, u.layer, u.slot, u.action, u.expert, u.weight, self._kinds.setdefault(u.kind, len(self._kinds)))
            for u in accesses
        ]
        self._rows += self._squeeze.compress(np.array(rows, _ROW).tobytes())

    def text(self) -> str:
        """The record; it ends here."""
        body = self._head | {"kinds": list(self._kinds), "rows": bytes(self._rows) + self._squeeze.flush()}
        return base64.b64encode(msgpack.packb(body)).decode("ascii")


def open_recorder(request: GenerationRequest, setup: StandinSetup | None, tokens: int) -> Recorder | None:
    """What keeps the record of a request of at most `tokens` tokens, if it asks for one. Raises RequestError."""
    if not request.record:
        return None
    each = 0 if setup is None else len(setup.plan.layer_slots) * setup.top_k
    if tokens * each > MAX_RECORDED:
        raise RequestError(
            f"record is asked of up to {tokens} tokens, must be of at most {MAX_RECORDED // each} for this model. "
            f"hint: lower max_tokens to {MAX_RECORDED // each}",
            param="buddymoe.record",
        )
    return Recorder(binding="" if setup is None else setup.binding, prompt=request.prompt_token_ids)


def decode_record(text: str, *, binding: str, prompt: Sequence[int]) -> tuple[npt.NDArray[np.void], list[str]]:
    """A record's rows and the kinds that they number. Raises RequestError when it is damaged or of another model,
    stand-ins or prompt."""
    body = _body(text)
    for name, expected, what in (
        ("binding", binding, "this model and its stand-ins"),
        ("prompt", _digest(prompt), "this prompt"),
    ):
        if body[name] != expected:
            raise _refused(f"made with another {name}", f"a record of {what}")
    rows, kinds = np.frombuffer(body["rows"], _ROW), body["kinds"]
    if (rows["kind"] >= len(kinds)).any() or not np.isfinite(rows["weight"]).all():
        raise _refused("damaged", "as the service wrote it")
    return rows, kinds


def open_replay(request: GenerationRequest, setup: StandinSetup | None) -> Replay:
    """The substitutions a request must repeat; none when it brings no record. Raises RequestError."""
    if request.replay is None:
        return {}
    if setup is None:
        raise _refused("of a service with stand-ins", "sent to one: no stand-ins are loaded")
    rows, kinds = decode_record(request.replay, binding=setup.binding, prompt=request.prompt_token_ids)
    limits = {"layer": len(setup.plan.layer_slots), "expert": setup.experts, "slot": setup.top_k}
    known = all((rows[name] < limit).all() for name, limit in limits.items())
    known = known and bool(np.isin(rows["action"], (Action.OWN, Action.BUDDY, Action.DROP)).all())
    own = rows[rows["action"] == Action.OWN][["layer", "expert", "kind"]] if known else rows[:0]
    for layer, expert, kind in np.unique(own).tolist() if len(own) else ():
        known = known and setup.kind_of.get(ExpertKey(layer, expert)) == kinds[kind]
    if not known:
        raise _refused("damaged", "as the service wrote it")
    ordered = rows[rows["step"].argsort(kind="stable")]
    steps, starts = np.unique(ordered["step"], return_index=True)
    return dict(zip(steps.tolist(), np.split(ordered, starts[1:]), strict=True)) if len(steps) else {}


def _body(text: str) -> dict[str, Any]:
    if len(text) > _MOST_BYTES:
        raise _refused(f"{len(text)} characters", f"at most {_MOST_BYTES}")
    try:
        body = msgpack.unpackb(base64.b64decode(text, validate=True), strict_map_key=True)
        known = isinstance(body, dict) and body["version"] == _VERSION
        shaped = known and isinstance(body["rows"], bytes) and isinstance(body["kinds"], list)
        shaped = shaped and all(isinstance(kind, str) for kind in body["kinds"])
        if shaped:
            body["rows"] = _inflated(body["rows"])
        shaped = shaped and len(body["rows"]) % _ROW.itemsize == 0 and {"binding", "prompt"} <= set(body)
    except (binascii.Error, ValueError, KeyError, TypeError, zlib.error, msgpack.exceptions.UnpackException) as error:
        raise _refused("damaged", "as the service wrote it") from error
    if not shaped:
        raise _refused("damaged", "as the service wrote it")
    return body  # type: ignore[no-any-return]


def _inflated(data: bytes) -> bytes:
    inflater = zlib.decompressobj()
    rows = inflater.decompress(data, _MOST_BYTES)
    if not inflater.eof:
        raise ValueError("rows are cut short or too many")
    return rows


def _refused(what: str, must: str) -> RequestError:
    return RequestError(
        f"replay is {what}, must be {must}. hint: send back usage.buddymoe.record unchanged", param="buddymoe.replay"
    )


def _digest(prompt: Sequence[int]) -> str:
    return hashlib.sha256(b"".join(struct.pack("<I", token) for token in prompt)).hexdigest()
