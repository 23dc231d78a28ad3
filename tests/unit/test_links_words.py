"""Frames, arrays, messages, addresses and the breaker, without peers: what is malformed is refused before it costs."""

from __future__ import annotations

import random
import socket
import struct
import time

import msgpack
import pytest
import torch

from buddymoe_ray.errors import LinkError
from buddymoe_ray.links.address import listen, parse
from buddymoe_ray.links.arrays import DTYPES, cut, gather, parse_specs
from buddymoe_ray.links.breaker import Breaker
from buddymoe_ray.links.messages import CONTENTS, Computation, number_of, parse_question
from buddymoe_ray.links.stream import FrameStream
from buddymoe_ray.links.wire import Frame, FrameLimits, pack_frame

NOTHING = torch.empty(0, dtype=torch.uint8)


def read_frame(raw: bytes, *, limits: FrameLimits | None = None, end: bool = True) -> Frame | None:
    ours, theirs = socket.socketpair()
    stream = FrameStream(ours, limits=limits or FrameLimits(max_header=512, max_payload=1 << 20))
    try:
        theirs.sendall(raw)
        if end:
            theirs.close()
        return stream.read(deadline=time.monotonic() + 0.2, seconds=0.2)
    finally:
        stream.close()
        theirs.close()


def prefix(header: int, payload: int, magic: bytes = b"BML\x01") -> bytes:
    return struct.pack(">4sIQ", magic, header, payload)


def test_a_frame_arrives_as_it_was_sent() -> None:
    frame = read_frame(pack_frame({"kind": "bytes", "id": 3}, 9) + b"123456789")
    assert frame is not None and (frame.kind, number_of(frame)) == ("bytes", 3)
    assert frame.payload_B.numpy().tobytes() == b"123456789"
    assert read_frame(b"") is None


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "begins with"),
        (prefix(2, 0, b"BML\x02") + b"\x80\x80", "begins with"),
        (prefix(513, 0), "header of 513"),
        (prefix(0xFFFFFFFF, 0), "header of"),
        (prefix(2, (1 << 20) + 1), "announces 1048577"),
        (prefix(2, 2**64 - 1), "announces"),
        (pack_frame({"kind": "contents"}, 0)[:-1], "middle of a frame"),
        (prefix(20, 0)[:7], "middle of a frame"),
        (pack_frame({"kind": "bytes", "id": 3}, 9) + b"12345678", "middle of a frame"),
        (prefix(1, 0) + b"\xc1", "not msgpack"),
        (prefix(1, 0) + b"\x93", "not msgpack"),
        (prefix(2, 0) + b"\x80\x80", "not msgpack"),
        (prefix(1, 0) + msgpack.packb(5), "must be a map"),
        (prefix(3, 0) + msgpack.packb([1, 2]), "must be a map"),
        (prefix(3, 0) + msgpack.packb({1: 2}), "must be a map|not msgpack"),
        (prefix(400, 0) + b"\x81\xa1a" + b"\x91" * 397, "not msgpack"),
        (pack_frame({"kind": "exec"}, 0), "kind is 'exec'"),
        (pack_frame({"kind": ["contents"]}, 0), "kind is"),
        (pack_frame({}, 0), "kind is None"),
    ],
)
def test_a_malformed_frame_is_refused(raw: bytes, says: str) -> None:
    with pytest.raises(LinkError, match=says):
        read_frame(raw)


def test_a_frame_that_stops_half_way_ends_at_its_deadline() -> None:
    with pytest.raises(LinkError, match="too slow"):
        read_frame(prefix(20, 0) + b"\x80", end=False)


def test_random_bytes_never_get_through() -> None:
    rng = random.Random(5)
    whole = pack_frame({"kind": "compute", "id": 1, "layer": 2, "patience": 5, "arrays": [[1, "uint8", [4]]]}, 4)
    for _ in range(200):
        raw = bytearray(whole if rng.random() < 0.7 else rng.randbytes(60))
        for _ in range(rng.randrange(1, 5)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        try:
            frame = read_frame(bytes(raw))
            assert frame is not None
            question = parse_question(frame)
        except LinkError:
            continue
        if question is not None:
            assert sum(spec.nbytes for spec in question.specs) < 2**63


@pytest.mark.parametrize("name", sorted(DTYPES))
@pytest.mark.parametrize("shape", [(0, 7), (1, 1), (5, 13), ()])
def test_arrays_are_equal_byte_for_byte(name: str, shape: tuple[int, ...]) -> None:
    raw = torch.randint(0, 256, (*shape, DTYPES[name].itemsize), dtype=torch.uint8)
    tensor = raw.view(DTYPES[name]).reshape(shape)
    strided = torch.randn(12, 6).to(DTYPES[name]).t()[::2]
    specs, parts = gather({3: tensor, 9: strided, 4: tensor})
    payload_B = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)
    found = cut(parse_specs(msgpack.unpackb(msgpack.packb([spec.packed() for spec in specs]))), payload_B)
    for key, expected in ((3, tensor), (9, strided), (4, tensor)):
        assert found[key].dtype == expected.dtype and found[key].shape == expected.shape
        assert (
            found[key]
            .contiguous()
            .reshape(-1)
            .view(torch.uint8)
            .equal(expected.contiguous().reshape(-1).view(torch.uint8))
        ), "NaNs included"


@pytest.mark.parametrize(
    "arrays",
    [
        [[1, "float64", [1]]],
        [[1, "float32", [-1]]],
        [[1, "float32", [True]]],
        [[1, "float32", [1, 1, 1, 1, 1]]],
        [[True, "float32", [1]]],
        [[1, "float32"]],
        [["1", "float32", [1]]],
        [[1, ["float32"], [1]]],
        [7],
        [[1, "uint8", [1]], [1, "uint8", [1]]],
    ],
)
def test_malformed_announcements_of_arrays_are_refused(arrays: list[object]) -> None:
    with pytest.raises(LinkError):
        parse_specs(arrays)


@pytest.mark.parametrize("shape", [[0], [17], [65], [2**40, 2**7], [2**47, 2**47, 2**47]])
def test_arrays_that_do_not_fit_their_payload_are_refused(shape: list[int]) -> None:
    with pytest.raises(LinkError, match="must be the payload's 64"):
        cut(parse_specs([[1, "float32", shape]]), torch.zeros(64, dtype=torch.uint8))


def test_an_empty_array_of_sizes_that_no_tensor_has_is_refused() -> None:
    with pytest.raises(LinkError, match="must be one that exists"):
        cut(parse_specs([[1, "float32", [2**47, 2**47, 0, 2**47]]]), torch.zeros(0, dtype=torch.uint8))


def test_float64_rows_are_refused_before_they_are_sent() -> None:
    with pytest.raises(LinkError, match="float64"):
        gather({1: torch.zeros(1, dtype=torch.float64)})


@pytest.mark.parametrize(
    "header",
    [
        {"kind": "compute", "id": True, "layer": 0, "patience": 1, "arrays": []},
        {"kind": "compute", "id": 1, "layer": -1, "patience": 1, "arrays": []},
        {"kind": "compute", "id": 1, "layer": 2**63, "patience": 1, "arrays": []},
        {"kind": "compute", "id": 1, "patience": 1, "arrays": []},
        {"kind": "compute", "id": 1, "layer": 0, "patience": 1.5, "arrays": []},
        {"kind": "compute", "id": 1, "layer": 0, "patience": 1, "arrays": {}},
        {"kind": "answer", "id": 1, "arrays": [], "declined": []},
        {"kind": "hello", "id": 1},
    ],
)
def test_malformed_questions_are_refused(header: dict[str, object]) -> None:
    frame = Frame(kind=str(header["kind"]), header=header, payload_B=NOTHING)
    with pytest.raises(LinkError):
        assert number_of(frame) == 1 and parse_question(frame)


def test_questions_survive_the_wire() -> None:
    question = Computation(layer=2, patience_ms=3, specs=parse_specs([[4, "int64", [5, 6]]]))
    frame = read_frame(pack_frame({**question.header(), "id": 9}, 0))
    assert frame is not None and parse_question(frame) == question and number_of(frame) == 9
    frame = read_frame(pack_frame(CONTENTS, 0))
    assert frame is not None and parse_question(frame) is None
    with pytest.raises(LinkError, match="without a payload"):
        parse_question(Frame(kind="contents", header={}, payload_B=torch.zeros(1)))


@pytest.mark.parametrize("text", ["", "host", ":1", "h:", "h:70000", "h:1x", "unix:/x", "h:²"])
def test_addresses_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(LinkError):
        parse(text)


def test_addresses_are_read() -> None:
    assert parse("127.0.0.1:0") == ("127.0.0.1", 0) and parse("[::1]:9") == ("::1", 9)
    assert parse("node-3.local:65535") == ("node-3.local", 65535)
    for host in ("127.0.0.1", "[::1]"):
        sock, address = listen(f"{host}:0")
        assert address == f"{host}:{sock.getsockname()[1]}"
        sock.close()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_breaker() -> tuple[Breaker, Clock]:
    clock = Clock()
    return Breaker(clock=clock, probe_seconds=2.0), clock


def test_the_breaker_waits_twice_as_long_after_each_failed_probe() -> None:
    breaker, clock = make_breaker()
    ticket = breaker.enter()
    assert ticket is not None and breaker.current(ticket)
    breaker.failed(ticket)
    for wait in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0):
        assert breaker._state == "open" and breaker.enter() is None
        clock.now += wait - 0.01
        assert breaker.enter() is None
        clock.now += 0.02
        probe = breaker.enter()
        assert probe is not None and breaker._state == "half-open"
        assert breaker.enter() is None, "one probe at a time"
        breaker.failed(probe)
    clock.now += 31
    probe = breaker.enter()
    assert probe is not None
    breaker.succeeded(probe)
    assert breaker._state == "closed"
    again = breaker.enter()
    assert again is not None
    breaker.failed(again)
    clock.now += 0.51
    assert breaker.enter() is not None, "after a success the first wait holds again"


def test_late_news_changes_nothing() -> None:
    breaker, clock = make_breaker()
    first, second = breaker.enter(), breaker.enter()
    assert first is not None and second is not None
    breaker.failed(first)
    clock.now += 0.25
    breaker.failed(second)
    breaker.succeeded(second)
    assert breaker._state == "open" and not breaker.current(second)
    clock.now += 0.26
    probe = breaker.enter()
    assert probe is not None, "the second failure did not move the probe"
    breaker.succeeded(first)
    assert breaker._state == "half-open"
    breaker.succeeded(probe)
    breaker.failed(first)
    assert breaker._state == "closed"


def test_a_probe_nobody_follows_up_has_failed() -> None:
    breaker, clock = make_breaker()
    ticket = breaker.enter()
    assert ticket is not None
    breaker.failed(ticket)
    clock.now += 1.01
    assert breaker.enter() is not None
    clock.now += 2.0
    assert breaker.enter() is None and breaker._state == "open"
    clock.now += 2.01
    assert breaker.enter() is not None
