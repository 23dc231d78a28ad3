"""Peers that are slow, dead, hostile or leaving: an error by the deadline, one timeout a peer, nothing left behind."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from link_proxy import DelayProxy
from link_rig import CONTENTS_BYTES, SECRET, SOON, Experts, eventually, nothing_leaks, other_process

from buddymoe_ray.errors import LinkError
from buddymoe_ray.links import LinkServer, PeerLink, derive_secret, guest
from buddymoe_ray.links import server as server_module
from buddymoe_ray.links.auth import admit, greet
from buddymoe_ray.links.breaker import Breaker
from buddymoe_ray.links.messages import number_of
from buddymoe_ray.links.stream import FrameStream
from buddymoe_ray.links.wire import Frame, FrameLimits, pack_frame

__all__ = ["nothing_leaks"]

ROWS = {1: torch.ones(2, 8)}


@pytest.fixture
def experts() -> Experts:
    return Experts()


@pytest.fixture
def server(experts: Experts, monkeypatch: pytest.MonkeyPatch) -> Iterator[LinkServer]:
    monkeypatch.setattr(guest, "HANDSHAKE_SECONDS", 1.0)
    made = LinkServer(experts, secret=SECRET)
    yield made
    experts.open.set()
    made.close()


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG)
    return caplog


class Clock:
    """A link's breaker's."""

    def __init__(self, link: PeerLink) -> None:
        self.now = 0.0
        link._breaker = Breaker(clock=lambda: self.now, probe_seconds=3 * link.timeout)


def connected(link: PeerLink) -> bool:
    return link._session is not None and link._session.alive


def connections(server: LinkServer) -> int:
    return sum(not guest.done for guest in server._guests)


def inside(server: LinkServer) -> int:
    return server._house.places._of.total()


def test_another_secret_is_refused_and_never_said(server: LinkServer, told: pytest.LogCaptureFixture) -> None:
    link = PeerLink(server.address, b"some other secret, as long", timeout=SOON)
    with pytest.raises(LinkError, match=r"refused our secret.*hint") as caught:
        link.submit(0, ROWS)
    eventually(lambda: "another cluster secret was refused" in told.text, "said")
    assert not connected(link)
    with pytest.raises(LinkError, match="not asked for a while") as again:
        link.submit(0, ROWS)
    said = told.text + str(caught.value) + str(again.value)
    assert "some other secret" not in said and SECRET.decode() not in said
    link.close()
    with pytest.raises(LinkError, match="at least 16"):
        PeerLink(server.address, b"short")
    assert derive_secret(SECRET, "model a") != derive_secret(SECRET, "model b") != SECRET


def test_a_server_that_does_not_know_the_secret_is_not_believed() -> None:
    """It lets everybody in, and says so with a proof of its own secret."""
    listener = socket.create_server(("127.0.0.1", 0))

    def pretend() -> None:
        stream = FrameStream(listener.accept()[0], limits=FrameLimits())
        deadline = time.monotonic() + SOON
        stream.read(deadline=deadline, seconds=SOON)
        stream.write({"kind": "challenge", "nonce": bytes(32)}, deadline=deadline)
        stream.read(deadline=deadline, seconds=SOON)
        stream.write({"kind": "welcome", "mac": bytes(32)}, deadline=deadline)
        stream.read(deadline=deadline, seconds=SOON)
        stream.close()

    thread = threading.Thread(target=pretend)
    thread.start()
    link = PeerLink(f"127.0.0.1:{listener.getsockname()[1]}", SECRET, timeout=SOON)
    with pytest.raises(LinkError, match="does not know this cluster's secret"):
        link.submit(0, ROWS)
    thread.join()
    link.close()
    listener.close()


def test_a_proof_cannot_be_sent_back_or_again() -> None:
    """A hostile client that records another's handshake, or reflects the server's challenge, is not let in."""
    said: list[dict[str, object]] = []
    for replay in (False, True):
        ours, theirs = socket.socketpair()
        stream, peer = FrameStream(ours, limits=FrameLimits()), FrameStream(theirs, limits=FrameLimits())
        outcome: list[object] = []
        deadline = time.monotonic() + SOON
        thread = threading.Thread(target=lambda s=stream, o=outcome, d=deadline: o.append(admit(s, SECRET, deadline=d)))
        thread.start()
        if replay:
            peer.write(said[0], deadline=deadline)
            assert peer.read(deadline=deadline, seconds=SOON) is not None
            peer.write(said[1], deadline=deadline)
            refused = peer.read(deadline=deadline, seconds=SOON)
            assert refused is not None and refused.kind == "refused"
        else:
            tapped = _Tap(theirs, said)
            greet(tapped, SECRET, deadline=deadline)
        thread.join()
        assert outcome == [not replay]
        stream.close()
        peer.close()


class _Tap(FrameStream):
    """Remembers what the client said."""

    def __init__(self, sock: socket.socket, said: list[dict[str, object]]) -> None:
        super().__init__(sock, limits=FrameLimits())
        self._said = said

    def write(self, header, parts=(), *, deadline):  # type: ignore[no-untyped-def]
        self._said.append(dict(header))
        super().write(header, parts, deadline=deadline)


def test_hostile_clients_are_cut_off_and_others_served(server: LinkServer, told: pytest.LogCaptureFixture) -> None:
    rng = random.Random(3)
    host, _, port = server.address.rpartition(":")
    hello = pack_frame({"kind": "hello", "nonce": bytes(32)}, 0)
    attacks = [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        rng.randbytes(5000),
        pack_frame({"kind": "hello", "nonce": bytes(32)}, 1 << 40),
        b"BML\x01" + b"\xff" * 12,
        pack_frame({"kind": "compute", "id": 0, "layer": 0, "patience": 9, "arrays": []}, 0),
        pack_frame({"kind": "hello", "nonce": "x"}, 0),
        hello + pack_frame({"kind": "proof", "mac": b"1" * 33}, 0),
        hello + pack_frame({"kind": "proof", "mac": "1" * 32}, 0),
        hello + pack_frame({"kind": "proof", "mac": b"1" * 32}, 0),
        hello,  # and then nothing: its time is limited
        b"",
    ]
    sockets = [socket.create_connection((host, int(port))) for _ in attacks]
    for sock, attack in zip(sockets, attacks, strict=True):
        sock.sendall(attack)
    link = PeerLink(server.address, SECRET, timeout=SOON)
    assert 1 in link.submit(0, ROWS).collect()
    for sock in sockets:
        sock.settimeout(SOON)
        try:
            while sock.recv(4096):
                pass
        except ConnectionResetError:
            pass
        sock.close()
    eventually(lambda: connections(server) == 1, "all but ours are gone")
    assert told.text.count("a peer was cut off") == len(attacks) - 1
    assert told.text.count("another cluster secret") == 1
    link.close()


@contextlib.contextmanager
def odd_server(reply: Callable[[FrameStream, Frame], None]) -> Iterator[str]:
    """A server that knows the secret and answers each question as `reply` does."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        stream = FrameStream(listener.accept()[0], limits=FrameLimits())
        try:
            assert admit(stream, SECRET, deadline=time.monotonic() + SOON)
            while (frame := stream.read(deadline=time.monotonic() + SOON, seconds=SOON)) is not None:
                reply(stream, frame)
        except (LinkError, OSError):
            pass  # the client has had enough
        finally:
            stream.close()

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    thread.join()
    listener.close()


def known_stream(server: LinkServer) -> FrameStream:
    """A connection of a peer that knows the secret and then misbehaves."""
    host, _, port = server.address.rpartition(":")
    stream = FrameStream(socket.create_connection((host, int(port))), limits=FrameLimits())
    greet(stream, SECRET, deadline=time.monotonic() + SOON)
    return stream


@pytest.mark.parametrize(
    ("header", "nbytes"),
    [
        ({"kind": "compute", "id": 1, "layer": 0, "patience": 9, "arrays": [[1, "float32", [2**40]]]}, 64),
        ({"kind": "compute", "id": 1, "layer": 0, "patience": 9, "arrays": [[1, "object", [1]]]}, 64),
        ({"kind": "compute", "id": 1, "layer": 0, "patience": 9, "arrays": []}, 2**50),
        ({"kind": "compute", "layer": 0, "patience": 9, "arrays": []}, 0),
        ({"kind": "contents", "id": 1}, 64),
        ({"kind": "contents", "id": -1}, 0),
        ({"kind": "read", "id": 1, "layer": 0, "expert": 1, "segment": 0, "want": 5}, 0),
        ({"kind": "answer", "id": 1, "arrays": []}, 0),
        ({"kind": "hello", "nonce": bytes(32)}, 0),
    ],
)
def test_known_peers_that_send_nonsense_are_cut_off(
    server: LinkServer, experts: Experts, told: pytest.LogCaptureFixture, header: dict[str, object], nbytes: int
) -> None:
    stream = known_stream(server)
    deadline = time.monotonic() + SOON
    stream._sock.send(pack_frame(header, nbytes) + bytes(min(nbytes, 64)))
    try:
        assert stream.read(deadline=deadline, seconds=SOON) is None
    except LinkError as error:
        assert "lost" in str(error), "reset by the server, not our own deadline"
    stream.close()
    eventually(lambda: "a peer was cut off" in told.text, "said")
    assert experts.calls == 0 and inside(server) == 0


def test_a_slow_peer_costs_one_timeout_and_late_answers_are_dropped(server: LinkServer, experts: Experts) -> None:
    with DelayProxy(server.address) as proxy:
        link = PeerLink(proxy.address, SECRET, timeout=SOON)
        clock = Clock(link)
        assert 1 in link.submit(0, ROWS).collect(SOON)
        proxy.delay_seconds = 1000.0
        pending = [link.submit(0, {1: torch.full((1, 4), float(at))}) for at in range(5)]
        for answer in pending:  # the first opens the breaker; the others do not wait
            with pytest.raises(LinkError, match="did not answer"):
                answer.collect(0.3 if answer is pending[0] else SOON * 100)
        assert link._breaker._state == "open" and link._session is not None
        asked = link._session._asked
        for _ in range(100):
            with pytest.raises(LinkError, match="not asked for a while"):
                link.submit(0, ROWS)
        assert link._session._asked == asked, "it does not touch the socket"
        proxy.delay_seconds = 0.0
        eventually(lambda: experts.calls == 6, "the late ones reached it")
        clock.now += 0.51
        rows = torch.full((1, 4), 77.0)
        assert link.submit(0, {1: rows}).collect(SOON)[1].equal(rows), "late answers are not this one's"
        assert link._breaker._state == "closed" and proxy.connections == 1, "the connection stayed"
        link.close()


def test_an_answer_of_which_half_comes_ends_at_its_deadline() -> None:
    """What comes later is dropped, and the connection serves the next question."""
    half, rest = threading.Event(), threading.Event()

    def reply(stream: FrameStream, frame: Frame) -> None:
        stream._sock.send(pack_frame({"kind": "bytes", "id": number_of(frame)}, 1000) + b"a" * 500)
        half.set()
        assert rest.wait(SOON)
        stream._sock.send(b"b" * 500)

    with odd_server(reply) as address:
        link = PeerLink(address, SECRET, timeout=SOON)
        clock = Clock(link)
        rest.set()
        link.contents(1000)
        rest.clear()
        half.clear()
        link.timeout = 0.3
        with pytest.raises(LinkError, match=r"within 0\.3 s"):
            link.contents(1000)
        assert half.is_set(), "it does not wait for the rest"
        rest.set()
        link.timeout = SOON
        clock.now += 1000
        assert link.contents(1000)[0].numpy().tobytes() == b"a" * 500 + b"b" * 500
        link.close()


@pytest.mark.parametrize(
    "answer",
    [
        {"kind": "answer", "arrays": [[1, "float32", [1, 16]]]},  # other rows
        {"kind": "answer", "arrays": [[1, "int64", [1, 8]]]},
        {"kind": "answer", "arrays": [[2, "float32", [2, 8]]]},
        {"kind": "answer", "arrays": [[1, "float32", [2, 8]], [2, "float32", [0]]]},
        {"kind": "answer", "arrays": "1"},
        {"kind": "bytes"},
        {"kind": "failed", "message": "no"},  # with a payload
        {"kind": "declined", "reason": "busy"},
        {"kind": "contents"},
        {"kind": "answer", "arrays": [[1, "float32", [2, 8]]], "id": 77},  # never asked
    ],
)
def test_answers_that_do_not_fit_their_question_are_not_believed(answer: dict[str, object]) -> None:
    def reply(stream: FrameStream, frame: Frame) -> None:
        stream._sock.send(pack_frame({"id": number_of(frame), **answer}, 64) + bytes(64))

    with odd_server(reply) as address:
        link = PeerLink(address, SECRET, timeout=SOON)
        with pytest.raises(LinkError):
            link.submit(0, ROWS).collect()
        eventually(lambda: not connected(link), "nothing more is believed")
        assert link._breaker._state == "open"
        link.close()


def test_a_lost_connection_fails_what_is_under_way_and_is_opened_again(server: LinkServer, experts: Experts) -> None:
    with DelayProxy(server.address) as proxy:
        link = PeerLink(proxy.address, SECRET, timeout=SOON)
        clock = Clock(link)
        for round_ in range(3):
            experts.open.clear()
            pending = [link.submit(0, ROWS) for _ in range(3)]
            eventually(lambda: experts.running == 1, "computing")
            proxy.cut()
            for answer in pending:
                with pytest.raises(LinkError, match=r"closed the connection|lost"):
                    answer.collect()
            experts.open.set()
            eventually(lambda: inside(server) == 0, "the queue emptied")
            clock.now += 1000
            assert 1 in link.submit(0, ROWS).collect()
            assert proxy.connections == round_ + 2
        assert link._breaker._state == "closed"
        link.close()


def test_nobody_listens(server: LinkServer) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{taken.getsockname()[1]}"
    taken.close()
    link = PeerLink(address, SECRET, timeout=SOON)
    with pytest.raises(LinkError, match="cannot be reached"):
        link.submit(0, ROWS)
    with pytest.raises(LinkError, match="not asked for a while"):
        link.contents(4)
    link.close()


def test_a_server_that_never_answers_the_handshake() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    link = PeerLink(f"127.0.0.1:{listener.getsockname()[1]}", SECRET, timeout=0.2)
    with pytest.raises(LinkError, match="too slow"):
        link.submit(0, ROWS)
    link.close()
    listener.close()


def test_too_many_connections_are_turned_away(
    server: LinkServer, told: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 2)
    links = [PeerLink(server.address, SECRET, timeout=SOON) for _ in range(4)]
    assert all(link.submit(0, ROWS).collect() for link in links[:2])
    with pytest.raises(LinkError):
        links[2].submit(0, ROWS)
    assert told.text.count("a peer was turned away") == 1
    links[0].close()
    eventually(lambda: connections(server) == 1, "one left")
    assert links[3].submit(0, ROWS).collect()
    for link in links:
        link.close()


def test_closing_under_load_ends_everything(experts: Experts) -> None:
    server = LinkServer(experts, secret=SECRET)
    links = [PeerLink(server.address, SECRET, timeout=SOON) for _ in range(6)]
    host, _, port = server.address.rpartition(":")
    idle = socket.create_connection((host, int(port)))  # never says a word
    wrong: list[object] = []

    def ask(link: PeerLink) -> None:
        try:
            while True:
                rows = torch.randn(8, 400)
                answer = link.submit(0, {1: rows}).collect()
                if answer and not answer[1].equal(rows):
                    wrong.append("other rows")
        except LinkError:
            pass
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=ask, args=[link]) for link in links]
    for thread in threads:
        thread.start()
    eventually(lambda: experts.calls > 30, "load")
    server.close()
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive()
    for link in links:
        link.close()
    idle.close()
    assert not wrong and connections(server) == 0 and inside(server) == 0


def test_a_peer_that_never_reads_holds_up_nobody_else(
    server: LinkServer, told: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks for bytes again and again and takes none; others are served, and it is cut off after `SEND_SECONDS`."""
    monkeypatch.setattr(guest, "SEND_SECONDS", 0.5)
    stream = known_stream(server)
    for number in range(4):
        stream.write({"kind": "contents", "id": number}, deadline=time.monotonic() + SOON)
    link = PeerLink(server.address, SECRET, timeout=SOON)
    assert 1 in link.submit(0, ROWS).collect() and link.contents(CONTENTS_BYTES)
    eventually(lambda: "a peer was cut off" in told.text, "cut off")
    link.close()
    stream.close()


def test_kill_9_of_a_server() -> None:
    """Stopped, its clients time out; killed, they fail at once; started again, it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    link = PeerLink(address, SECRET, timeout=SOON)
    clock = Clock(link)
    rows = {1: torch.randn(256, 512)}
    with other_process(address) as child:
        assert link.submit(0, rows).collect(SOON)[1].equal(rows[1])
        child.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED)  # all its threads
        pending = [link.submit(0, rows) for _ in range(3)]
        with pytest.raises(LinkError, match=r"within 0\.1 s"):
            pending[0].collect(0.1)
        child.kill()
        child.wait()
        for answer in pending[1:]:
            with pytest.raises(LinkError):
                answer.collect()
    with other_process(address):
        clock.now += 1000
        assert link.submit(0, rows).collect(SOON)[1].equal(rows[1])
    link.close()
