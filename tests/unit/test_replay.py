"""A request's record: it comes back as it was, and anything else is refused with a reason."""

from __future__ import annotations

import base64
import zlib

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from buddymoe_ray.engine.replay import Recorder, decode_record
from buddymoe_ray.errors import RequestError
from buddymoe_ray.moe import Substitution

PROMPT = (5, 6, 7)


def access(step: int = 0, **changes: object) -> tuple[int, Substitution]:
    fields = {"layer": 1, "slot": 2, "action": 2, "expert": 9, "weight": 0.25, "kind": "lowbit3"} | changes
    return step, Substitution(**fields)  # type: ignore[arg-type]


def encode_record(accesses: list[tuple[int, Substitution]], *, binding: str, prompt: tuple[int, ...]) -> str:
    recorder = Recorder(binding=binding, prompt=prompt)
    for step, one in accesses:
        recorder.add(step, [one])
    return recorder.text()


recorded = st.builds(
    access,
    step=st.integers(0, 2**31),
    layer=st.integers(0, 300),
    slot=st.integers(0, 63),
    action=st.integers(2, 4),
    expert=st.integers(0, 1000),
    weight=st.floats(0, 1, width=32),
    kind=st.sampled_from(["lowbit2", "lowbit4", "buddy", "drop", "mean"]),
)


@given(st.lists(recorded, max_size=30))
def test_round_trip(accesses: list[tuple[int, Substitution]]) -> None:
    text = encode_record(accesses, binding="model", prompt=PROMPT)
    rows, kinds = decode_record(text, binding="model", prompt=PROMPT)
    back = [(step, *rest, kinds[kind]) for step, *rest, kind in rows.tolist()]
    assert back == [(step, u.layer, u.slot, u.action, u.expert, u.weight, u.kind) for step, u in accesses]


@pytest.mark.parametrize(
    ("binding", "prompt", "said"), [("other", PROMPT, "another binding"), ("model", (5, 6), "another prompt")]
)
def test_it_is_bound(binding: str, prompt: tuple[int, ...], said: str) -> None:
    text = encode_record([access()], binding="model", prompt=PROMPT)
    with pytest.raises(RequestError, match=said) as caught:
        decode_record(text, binding=binding, prompt=prompt)
    assert caught.value.param == "buddymoe.replay" and "hint:" in str(caught.value)


def changed(**fields: object) -> str:
    body = msgpack.unpackb(base64.b64decode(encode_record([access(), access(1)], binding="model", prompt=PROMPT)))
    return base64.b64encode(msgpack.packb(body | fields)).decode()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not base64!",
        base64.b64encode(b"\xc1").decode(),
        base64.b64encode(msgpack.packb([1, 2])).decode(),
        base64.b64encode(msgpack.packb({"version": 1})).decode(),
        changed(version=2),
        changed(rows=b"123"),
        changed(rows=zlib.compress(b"123")),
        changed(rows=zlib.compress(bytes(64))[:-5]),
        changed(rows="text"),
        changed(kinds=[]),
        changed(kinds=[3]),
        changed()[:-6],
    ],
)
def test_damage_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match=r"replay is damaged, must be as the service wrote it\. hint:"):
        decode_record(text, binding="model", prompt=PROMPT)
