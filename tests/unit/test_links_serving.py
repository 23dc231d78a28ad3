"""Links over real sockets: what comes back is equal, in any order, from whoever is there."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest
import torch
from link_rig import CONTENTS_BYTES, EXPERTS, HIDDEN, SECRET, SOON, Experts, eventually, nothing_leaks

from buddymoe_ray.errors import LinkError
from buddymoe_ray.links import LinkServer, PeerLink, PeerLinks
from buddymoe_ray.links.arrays import DTYPES
from buddymoe_ray.links.guest import Places

__all__ = ["nothing_leaks"]

ONE_ROW = {1: torch.ones(1, 4)}


@pytest.fixture
def experts() -> Experts:
    return Experts()


@pytest.fixture
def server(experts: Experts) -> Iterator[LinkServer]:
    made = LinkServer(experts, secret=SECRET)
    yield made
    made.close()
    made.close()


@pytest.fixture
def link(server: LinkServer) -> Iterator[PeerLink]:
    made = PeerLink(server.address, SECRET, timeout=SOON)
    yield made
    made.close()
    made.close()


def places(server: LinkServer, total: int) -> None:
    server._house.places._total = total


def inside(server: LinkServer) -> int:
    return server._house.places._of.total()


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and raw[0].equal(raw[1])


def test_rows_come_back_byte_for_byte(link: PeerLink) -> None:
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


def test_outputs_are_those_of_the_experts(link: PeerLink, experts: Experts) -> None:
    experts.missing = frozenset({2})
    rows = {e: torch.randn(e + 1, HIDDEN) for e in range(EXPERTS)}
    answer = link.submit(1, rows).collect()
    assert set(answer) == set(rows) - {2}, "what it does not have is left out"
    assert all(same(answer[e], rows[e] @ experts.weights_EDD[e]) for e in answer)
    assert link.submit(1, {2: rows[2]}).collect() == {}


def test_rows_may_be_changed_once_they_are_sent(link: PeerLink, experts: Experts) -> None:
    experts.open.clear()
    rows = torch.randn(64, HIDDEN)
    before = rows.clone()
    pending = link.submit(0, {1: rows})
    rows.zero_()
    experts.open.set()
    assert same(pending.collect()[1], before)
    assert pending.collect() is pending.collect(), "collecting again gives the same"


def test_a_peer_says_what_it_has(link: PeerLink, experts: Experts) -> None:
    found_B, seconds = link.contents(CONTENTS_BYTES)
    assert found_B.numpy().tobytes() == experts.stored and 0 < seconds < SOON
    with pytest.raises(LinkError, match="must have 7 bytes"):
        link.contents(7)


def test_what_an_answer_took_is_the_peers_time_not_the_askers(link: PeerLink) -> None:
    """It is noted when the answer arrives, however late somebody collects it."""
    pending = link.submit(0, ONE_ROW)
    eventually(lambda: pending.seconds > 0, "the answer arrives though nobody waits for it")
    took = pending.seconds
    pending.collect()
    assert pending.seconds == took


def test_answers_are_matched_by_number(link: PeerLink, server: LinkServer) -> None:
    places(server, 100)
    rows = [torch.full((1 + at % 3, 700), float(at)) for at in range(40)]
    pending = [link.submit(0, {at % EXPERTS: rows[at]}) for at in range(40)]
    order = list(range(40))
    random.Random(1).shuffle(order)
    for at in order:
        assert same(pending[at].collect()[at % EXPERTS], rows[at])


def test_fifty_threads_on_one_link(link: PeerLink, server: LinkServer, experts: Experts) -> None:
    places(server, 100)
    wrong: list[object] = []

    def ask(at: int) -> None:
        try:
            rows = torch.full((2, 1500), float(at))
            if not same(link.submit(0, {1: rows}).collect()[1], rows):
                wrong.append(at)
            if at % 10 == 0 and link.contents(CONTENTS_BYTES)[0].numpy().tobytes() != experts.stored:
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
    assert experts.calls == 50
    eventually(lambda: inside(server) == 0, "the last one left")


def test_what_does_not_fit_is_declined_at_once(server: LinkServer, experts: Experts) -> None:
    places(server, 3)
    links = [PeerLink(server.address, SECRET, timeout=SOON) for _ in range(3)]
    experts.open.clear()
    first = links[0].submit(0, ONE_ROW)
    eventually(lambda: experts.running == 1, "computing")
    waiting = [link.submit(0, ONE_ROW) for link in links[:2]]
    eventually(lambda: inside(server) == 3, "waiting")
    for link in links:
        assert link.submit(0, ONE_ROW).collect() == {}, "busy, while the others still compute"
        assert link.contents(CONTENTS_BYTES), "and it is asked again"
    assert experts.calls == 1
    experts.open.set()
    assert all(1 in pending.collect() for pending in [first, *waiting])
    for link in links:
        link.close()
    assert experts.most_running == 1


def test_no_peer_takes_all_places() -> None:
    places = Places(4)
    assert [places.admit("greedy") for _ in range(5)] == [True, True, False, False, False]
    assert places.admit("other"), "another peer is let in"
    places.leave("greedy")
    assert places.admit("greedy") and places.admit("other") and not places.admit("third")


def test_questions_nobody_waits_for_any_more_are_not_begun(server: LinkServer, experts: Experts) -> None:
    patient, hasty = (PeerLink(server.address, SECRET, timeout=SOON) for _ in range(2))
    hasty.contents(CONTENTS_BYTES)  # connected
    hasty.timeout = 0.2
    experts.open.clear()
    first = patient.submit(0, ONE_ROW)
    eventually(lambda: experts.running == 1, "computing")
    with pytest.raises(LinkError, match=r"within 0\.02 s"):
        hasty.submit(0, ONE_ROW).collect(0.02)
    eventually(lambda: inside(server) == 1, "declined as late")
    experts.open.set()
    assert 1 in first.collect()
    hasty.close()
    patient.close()
    assert experts.calls == 1


def test_a_service_that_fails_or_answers_wrongly_is_an_error(link: PeerLink) -> None:
    with pytest.raises(LinkError, match="ValueError: layer 2 has no experts"):
        link.submit(2, {1: torch.ones(2, HIDDEN)}).collect()
    with pytest.raises(LinkError, match="not asked for a while"):
        link.submit(0, ONE_ROW)
    other = PeerLink(link.address, SECRET, timeout=SOON)
    with pytest.raises(LinkError, match="expert 1 was answered as"):
        other.submit(3, {1: torch.ones(2, HIDDEN)}).collect()
    other.close()


def test_links_follow_who_is_there(server: LinkServer, experts: Experts) -> None:
    second = LinkServer(experts, secret=SECRET)
    peers = PeerLinks(SECRET, timeout=SOON)
    peers.update({"a": server.address, "b": second.address})
    kept, dropped = peers.get("a"), peers.get("b")
    assert kept.submit(0, ONE_ROW).collect() and dropped.submit(0, ONE_ROW).collect()
    with pytest.raises(LinkError):
        peers.update({"a": server.address, "c": "nowhere"})
    assert peers.names() == ("a", "b"), "nothing changed"
    peers.update({"a": server.address, "b": server.address, "c": second.address})
    assert peers.get("a") is kept and peers.get("b") is not dropped and peers.names() == ("a", "b", "c")
    with pytest.raises(LinkError, match="closed"):
        dropped.submit(0, ONE_ROW)
    with pytest.raises(LinkError, match="'d' is unknown"):
        peers.get("d")
    assert kept._session is not None and kept._session.alive, "it kept its connection"
    peers.close()
    peers.close()
    with pytest.raises(LinkError):
        peers.update({"a": server.address})
    second.close()


def test_an_address_that_is_taken_is_an_error(server: LinkServer, experts: Experts) -> None:
    with pytest.raises(LinkError, match="cannot be listened on"):
        LinkServer(experts, secret=SECRET, address=server.address)
