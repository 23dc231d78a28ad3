"""A request's record: which uses stand-ins answered, so that the same tokens can be computed again.

Only substitutions are kept: a use that is not named was answered by the expert itself. The text form is base64 of
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

from buddymoe_ray.engine.account import RecordedUse
from buddymoe_ray.errors import RequestError
from buddymoe_ray.moe import Substitution
from buddymoe_ray.policy import Action
from buddymoe_ray.residency.standin_setup import StandinSetup
from buddymoe_ray.types import ExpertKey, GenerationRequest

__all__ = ["Replay", "decode_record", "encode_record", "open_replay"]

_VERSION = 1
_ROW = struct.Struct("<IHBBHfB")  # step, layer, slot, action, expert, weight, kind
_MOST_BYTES = 64 << 20

Replay = Mapping[int, tuple[Substitution, ...]]
"""Substitutions by decode step."""


def encode_record(uses: Sequence[RecordedUse], *, binding: str, prompt: Sequence[int]) -> str:
    """The record as text. `binding` names the model and its stand-ins."""
    kinds = sorted({recorded.use.kind for recorded in uses})
    rows = b"".join(
        _ROW.pack(r.step, r.use.layer, r.use.slot, r.use.action, r.use.expert, r.use.weight, kinds.index(r.use.kind))
        for r in uses
    )
    body = {
        "version": _VERSION,
        "binding": binding,
        "prompt": _digest(prompt),
        "kinds": kinds,
        "rows": zlib.compress(rows),
    }
    return base64.b64encode(msgpack.packb(body)).decode("ascii")


def decode_record(text: str, *, binding: str, prompt: Sequence[int]) -> Replay:
    """Read a record back. Raises RequestError when it is damaged or of another model, stand-ins or prompt."""
    body = _body(text)
    for name, expected, what in (
        ("binding", binding, "this model and its stand-ins"),
        ("prompt", _digest(prompt), "this prompt"),
    ):
        if body[name] != expected:
            raise _refused(f"made with another {name}", f"a record of {what}")
    uses: dict[int, list[Substitution]] = {}
    for step, layer, slot, action, expert, weight, kind in _ROW.iter_unpack(body["rows"]):
        if kind >= len(body["kinds"]):
            raise _refused("damaged", "as the service wrote it")
        use = Substitution(
            row=0, layer=layer, slot=slot, action=action, expert=expert, weight=weight, kind=body["kinds"][kind]
        )
        uses.setdefault(step, []).append(use)
    return {step: tuple(named) for step, named in uses.items()}


def open_replay(request: GenerationRequest, setup: StandinSetup | None) -> Replay:
    """The substitutions a request must repeat; none when it brings no record. Raises RequestError."""
    if request.replay is None:
        return {}
    if setup is None:
        raise _refused("of a service with stand-ins", "sent to one: no stand-ins are loaded")
    replay = decode_record(request.replay, binding=setup.binding, prompt=request.prompt_token_ids)
    layers, experts = len(setup.plan.layer_slots), setup.experts
    for use in (use for uses in replay.values() for use in uses):
        known = use.layer < layers and use.expert < experts and use.slot < setup.top_k
        own = use.action == Action.OWN
        if not known or (own and setup.kind_of.get(ExpertKey(use.layer, use.expert)) != use.kind):
            raise _refused("damaged", "as the service wrote it")
        if use.action not in (Action.OWN, Action.BUDDY, Action.DROP):
            raise _refused("damaged", "as the service wrote it")
    return replay


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
        shaped = shaped and len(body["rows"]) % _ROW.size == 0 and {"binding", "prompt"} <= set(body)
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
