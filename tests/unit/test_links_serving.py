"""Links over real sockets: what comes back is equal, in any order, over TCP, Unix sockets and shared memory."""

from __future__ import annotations

import os
import random
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from link_rig import EXPERTS, HIDDEN, SECRET, SEGMENT_BYTES, SOON, Experts, eventually, nothing_leaks

from buddymoe_ray.errors import LinkError
from buddymoe_ray.links import (
    LinkOptions,
    LinkServer,
    PeerLink,
    PeerLinks,
    ServerOptions,
    measure,
    sweep_leftovers,
)
from buddymoe_ray.links.arrays import DTYPES

__all__ = ["nothing_leaks"]

WAYS = ("tcp", "unix", "shared")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def experts() -> Experts:
    return Experts()


@pytest.fixture
def server(experts: Experts, tmp_path: Path) -> Iterator[LinkServer]:
    addresses = ("127.0.0.1:0", f"unix:{tmp_path}/s")
    options = ServerOptions(shared_from=4096, max_waiting=100)
    made = LinkServer(experts, secret=SECRET, addresses=addresses, options=options)
    yield made
    made.close()
    made.close()
    assert experts.held == 0, "bytes that were lent came back"


@pytest.fixture
def link(server: LinkServer, way: str) -> Iterator[PeerLink]:
    made = PeerLink(
        server.addresses[way != "tcp"],
        SECRET,
        timeout=SOON,
        options=LinkOptions(shared_from=4096 if way == "shared" else None),
    )
    yield made
    made.close()
    made.close()


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and raw[0].equal(raw[1])


def test_rows_come_back_byte_for_byte(link: PeerLink, way: str) -> None:
    for name, dtype in DTYPES.items():
        width = 2048 // dtype.itemsize
        raw = torch.randint(0, 256, (9, width * dtype.itemsize), dtype=torch.uint8)
        rows = {
            0: raw.view(dtype),
            3: torch.empty(0, width, dtype=dtype),
            5: raw.view(dtype)[::2, ::3],
            7: raw.view(dtype)[:1].t(),
        }
        answer = link.submit(0, rows).collect()
        assert set(answer) == set(rows)
        assert all(same(answer[expert], rows[expert]) for expert in rows), name
    assert link.submit(0, {}).collect() == {}
    seen = link.snapshot()
    assert seen.shares_memory == (way == "shared") and (seen.shared_out > 0) == (way == "shared")
    assert (seen.shared_in > 0) == (way == "shared") and seen.connects == 1


def test_outputs_are_those_of_the_experts(link: PeerLink, experts: Experts) -> None:
    experts.missing = frozenset({2})
    rows = {e: torch.randn(e + 1, HIDDEN) for e in range(EXPERTS)}
    answer = link.submit(1, rows).collect()
    assert set(answer) == set(rows) - {2}, "what it does not have is left out"
    assert all(same(answer[e], rows[e] @ experts.weights_EDD[e]) for e in answer)
    assert link.submit(1, {2: rows[2]}).collect() == {}
    assert (link.snapshot().answered, link.snapshot().declined) == (1, 1)


def test_rows_may_be_changed_once_they_are_sent(link: PeerLink, experts: Experts) -> None:
    experts.open.clear()
    rows = torch.randn(64, HIDDEN)
    before = rows.clone()
    pending = link.submit(0, {1: rows})
    rows.zero_()
    experts.open.set()
    assert same(pending.collect()[1], before)
    assert pending.collect() is pending.collect(), "collecting again gives the same"


def test_bytes_of_experts_are_fetched(link: PeerLink, experts: Experts) -> None:
    into = bytearray(SEGMENT_BYTES)
    for expert in (3, 0):
        assert link.fetch(1, expert, 0, into) and into == experts.bytes_of(expert)
    assert not link.fetch(2, 1, 0, into), "not there"
    assert not link.fetch(1, 1, 0, memoryview(into)[1:]), "not of that size"
    assert link.fetch(1, 5, 0, memoryview(into)) and into == experts.bytes_of(5)
    with pytest.raises(AssertionError, match="writable"):
        link.fetch(1, 1, 0, memoryview(bytes(4)))  # type: ignore[arg-type]


def test_answers_are_matched_by_number(link: PeerLink) -> None:
    rows = [torch.full((1 + at % 3, 700), float(at)) for at in range(40)]
    pending = [link.submit(0, {at % EXPERTS: rows[at]}) for at in range(40)]
    order = list(range(40))
    random.Random(1).shuffle(order)
    for at in order:
        assert same(pending[at].collect()[at % EXPERTS], rows[at])


def test_fifty_threads_on_one_link(link: PeerLink, server: LinkServer, experts: Experts) -> None:
    wrong: list[object] = []

    def ask(at: int) -> None:
        try:
            rows = torch.full((2, 1500), float(at))
            if not same(link.submit(0, {1: rows}).collect()[1], rows):
                wrong.append(at)
            into = bytearray(SEGMENT_BYTES)
            if at % 10 == 0 and not (link.fetch(0, at % EXPERTS, 0, into) and into == experts.bytes_of(at % EXPERTS)):
                wrong.append(at)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=ask, args=[at]) for at in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert experts.most_running == 1, "one compute at a time"
    assert link.snapshot().requests == link.snapshot().answered == 55
    assert server.snapshot().computed == 50
    eventually(lambda: server.snapshot().inside == 0, "the last one left")


def test_what_does_not_fit_is_declined_at_once(experts: Experts) -> None:
    server = LinkServer(experts, secret=SECRET, options=ServerOptions(max_concurrent=1, max_waiting=2))
    links = [PeerLink(server.addresses[0], SECRET, timeout=SOON) for _ in range(3)]
    experts.open.clear()
    first = links[0].submit(0, {1: torch.ones(1, 4)})
    eventually(lambda: experts.running == 1, "computing")
    waiting = [link.submit(0, {1: torch.ones(1, 4)}) for link in links[:2]]
    eventually(lambda: server.snapshot().inside == 3, "waiting")
    for link in links:
        assert link.submit(0, {1: torch.ones(1, 4)}).collect() == {}, "busy, while the others still compute"
        assert link.available() and link.snapshot().declined == 1
    assert experts.calls == 1
    experts.open.set()
    assert all(1 in pending.collect() for pending in [first, *waiting])
    for link in links:
        link.close()
    server.close()
    assert server.snapshot().declined == 3 and experts.most_running == 1


def test_no_peer_takes_all_places(experts: Experts) -> None:
    server = LinkServer(experts, secret=SECRET, options=ServerOptions(max_concurrent=1, max_waiting=3))
    greedy, other = (PeerLink(server.addresses[0], SECRET, timeout=SOON) for _ in range(2))
    experts.open.clear()
    pending = [greedy.submit(0, {1: torch.ones(1, 4)}) for _ in range(5)]
    for late in pending[2:]:
        assert late.collect() == {}, "half of the places are taken"
    third = other.submit(0, {1: torch.ones(1, 4)})
    eventually(lambda: server.snapshot().inside == 3, "another peer is let in")
    experts.open.set()
    assert all(1 in answer.collect() for answer in [*pending[:2], third])
    greedy.close()
    other.close()
    server.close()


def test_questions_nobody_waits_for_any_more_are_not_begun(experts: Experts) -> None:
    server = LinkServer(experts, secret=SECRET)
    patient, hasty = (PeerLink(server.addresses[0], SECRET, timeout=SOON) for _ in range(2))
    hasty.connect()
    hasty.timeout = 0.2
    experts.open.clear()
    first = patient.submit(0, {1: torch.ones(1, 4)})
    eventually(lambda: experts.running == 1, "computing")
    with pytest.raises(LinkError, match=r"within 0\.02 s"):
        hasty.submit(0, {1: torch.ones(1, 4)}).collect(0.02)
    eventually(lambda: server.snapshot().declined == 1, "declined as late")
    experts.open.set()
    assert 1 in first.collect()
    hasty.close()
    patient.close()
    server.close()
    assert experts.calls == 1


def test_a_service_that_fails_or_answers_wrongly_is_an_error(link: PeerLink, server: LinkServer) -> None:
    link.connect()
    with pytest.raises(LinkError, match="ValueError: layer 2 has no experts"):
        link.submit(2, {1: torch.ones(2, HIDDEN)}).collect()
    assert not link.available() and link.snapshot().failed == 1
    other = PeerLink(link.address, SECRET, timeout=SOON)
    with pytest.raises(LinkError, match="expert 1 was answered as"):
        other.submit(3, {1: torch.ones(2, HIDDEN)}).collect()
    other.close()
    assert server.snapshot().failed == 2 and server.snapshot().computed == 0


def test_links_follow_who_is_there(server: LinkServer) -> None:
    tcp, unix = server.addresses
    peers = PeerLinks(SECRET, timeout=SOON)
    peers.update({"a": tcp, "b": unix})
    kept, dropped = peers.get("a"), peers.get("b")
    assert kept.echo(b"x") == b"x" and dropped.echo(b"y") == b"y"
    with pytest.raises(LinkError):
        peers.update({"a": tcp, "c": "nowhere"})
    assert peers.names() == ("a", "b"), "nothing changed"
    peers.update({"a": tcp, "b": tcp, "c": unix})
    assert peers.get("a") is kept and peers.get("b") is not dropped and peers.names() == ("a", "b", "c")
    with pytest.raises(LinkError, match="closed"):
        dropped.echo(b"z")
    assert not dropped.available()
    with pytest.raises(LinkError, match="'d' is unknown"):
        peers.get("d")
    seen = peers.snapshot()
    assert seen["a"].answered == 1 and seen["a"].connected and seen["c"].requests == 0
    assert seen["a"].bytes_out > 0 and seen["a"].bytes_in > 0
    peers.close()
    peers.close()
    with pytest.raises(LinkError):
        peers.update({"a": tcp})


def test_a_link_is_measured(link: PeerLink) -> None:
    cost = measure(link, rounds=20, big_rounds=3)
    assert 0 < cost.round_trip_seconds < SOON and 1e6 < cost.bytes_per_second < 1e13
    assert cost.seconds(1000) == cost.round_trip_seconds + 1000 / cost.bytes_per_second
    assert link.snapshot().answered == 25


def test_the_unix_socket_is_private_and_goes_away(tmp_path: Path, experts: Experts) -> None:
    path = tmp_path / "s"
    server = LinkServer(experts, secret=SECRET, addresses=[f"unix:{path}"])
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    with pytest.raises(LinkError, match="in use by another server"):
        LinkServer(experts, secret=SECRET, addresses=["127.0.0.1:0", f"unix:{path}"])
    server.close()
    assert not path.exists()
    path.write_text("mine")
    with pytest.raises(LinkError, match="no socket"):
        LinkServer(experts, secret=SECRET, addresses=[f"unix:{path}"])
    assert path.read_text() == "mine" and sweep_leftovers() == 0
