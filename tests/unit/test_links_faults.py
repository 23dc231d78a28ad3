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
from pathlib import Path

import pytest
import torch
from link_proxy import DelayProxy
from link_rig import SECRET, SEGMENT_BYTES, SOON, Experts, eventually, nothing_leaks, other_process, own_files

from buddymoe_ray.errors import LinkError
from buddymoe_ray.links import LinkOptions, LinkServer, PeerLink, ServerOptions, derive_secret
from buddymoe_ray.links.auth import admit, greet
from buddymoe_ray.links.stream import FrameStream
from buddymoe_ray.links.wire import Frame, Limits, pack_frame

__all__ = ["nothing_leaks"]

ROWS = {1: torch.ones(2, 8)}


@pytest.fixture
def experts() -> Experts:
    return Experts()


@pytest.fixture
def server(experts: Experts) -> Iterator[LinkServer]:
    made = LinkServer(experts, secret=SECRET, options=ServerOptions(handshake_seconds=1.0, shared_from=4096))
    yield made
    experts.open.set()
    made.close()
    assert experts.held == 0


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_another_secret_is_refused_and_never_said(server: LinkServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    link = PeerLink(server.addresses[0], b"some other secret, as long", timeout=SOON)
    with pytest.raises(LinkError, match=r"refused our secret.*hint") as caught:
        link.connect()
    eventually(lambda: server.snapshot().wrong_secret == 1, "counted")
    assert not link.snapshot().connected
    told = caplog.text + str(caught.value) + link.snapshot().last_error
    assert "some other secret" not in told and SECRET.decode() not in told
    assert not link.available(), "it is not asked again at once"
    link.close()
    with pytest.raises(LinkError, match="at least 16"):
        PeerLink(server.addresses[0], b"short")
    assert derive_secret(SECRET, "model a") != derive_secret(SECRET, "model b") != SECRET


def test_a_server_that_does_not_know_the_secret_is_not_believed() -> None:
    """It lets everybody in, and says so with a proof of its own secret."""
    listener = socket.create_server(("127.0.0.1", 0))

    def pretend() -> None:
        stream = FrameStream(listener.accept()[0], limits=Limits())
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
        stream, peer = FrameStream(ours, limits=Limits()), FrameStream(theirs, limits=Limits())
        outcome: list[object] = []
        deadline = time.monotonic() + SOON
        thread = threading.Thread(
            target=lambda s=stream, o=outcome, d=deadline: o.append(admit(s, SECRET, deadline=d, share=False))
        )
        thread.start()
        if replay:
            peer.write(said[0], deadline=deadline)
            assert peer.read(deadline=deadline, seconds=SOON) is not None
            peer.write(said[1], deadline=deadline)
            refused = peer.read(deadline=deadline, seconds=SOON)
            assert refused is not None and refused.kind == "refused"
        else:
            tapped = _Tap(theirs, said)
            assert not greet(tapped, SECRET, deadline=deadline, share=False).shared
        thread.join()
        assert (outcome[0] is None) == replay
        stream.close()
        peer.close()


class _Tap(FrameStream):
    """Remembers what the client said."""

    def __init__(self, sock: socket.socket, said: list[dict[str, object]]) -> None:
        super().__init__(sock, limits=Limits())
        self._said = said

    def write(self, header, parts=(), *, deadline):  # type: ignore[no-untyped-def]
        self._said.append(dict(header))
        super().write(header, parts, deadline=deadline)


def test_hostile_clients_are_cut_off_and_others_served(server: LinkServer) -> None:
    rng = random.Random(3)
    host, _, port = server.addresses[0].rpartition(":")
    hello = pack_frame({"kind": "hello", "nonce": bytes(32)}, 0)
    attacks = [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        rng.randbytes(5000),
        pack_frame({"kind": "hello", "nonce": bytes(32)}, 1 << 40),
        b"BML\x01" + b"\xff" * 12,
        pack_frame({"kind": "compute", "id": 0, "layer": 0, "patience": 9, "arrays": []}, 0),
        pack_frame({"kind": "hello", "nonce": "x"}, 0),
        hello + pack_frame({"kind": "proof", "mac": b"1" * 65, "witness": ""}, 0),
        hello + pack_frame({"kind": "proof", "mac": b"1" * 32, "witness": "../../etc/passwd"}, 0),
        hello,  # and then nothing: its time is limited
        b"",
    ]
    sockets = [socket.create_connection((host, int(port))) for _ in attacks]
    for sock, attack in zip(sockets, attacks, strict=True):
        sock.sendall(attack)
    link = PeerLink(server.addresses[0], SECRET, timeout=SOON)
    assert 1 in link.submit(0, ROWS).collect()
    for sock in sockets:
        sock.settimeout(SOON)
        try:
            while sock.recv(4096):
                pass
        except ConnectionResetError:
            pass
        sock.close()
    eventually(lambda: server.snapshot().connections == 1, "all but ours are gone")
    seen = server.snapshot()
    assert (seen.bad_peers, seen.wrong_secret) == (len(attacks) - 1, 1)
    link.close()


@contextlib.contextmanager
def odd_server(reply: Callable[[FrameStream, Frame], None]) -> Iterator[str]:
    """A server that knows the secret and answers each question as `reply` does."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        stream = FrameStream(listener.accept()[0], limits=Limits())
        try:
            assert admit(stream, SECRET, deadline=time.monotonic() + SOON, share=False)
            while (frame := stream.read(deadline=time.monotonic() + SOON, seconds=SOON)) is not None:
                stream.skip(frame.nbytes, deadline=time.monotonic() + SOON)
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
    host, _, port = server.addresses[0].rpartition(":")
    stream = FrameStream(socket.create_connection((host, int(port))), limits=Limits())
    assert greet(stream, SECRET, deadline=time.monotonic() + SOON, share=True).shared
    return stream


@pytest.mark.parametrize(
    ("header", "nbytes"),
    [
        ({"kind": "compute", "id": 1, "layer": 0, "patience": 9, "arrays": [[1, "float32", [2**40]]]}, 64),
        ({"kind": "compute", "id": 1, "layer": 0, "patience": 9, "arrays": [[1, "object", [1]]]}, 64),
        ({"kind": "echo", "id": 1}, 2**50),
        ({"kind": "echo", "id": 1, "shared": "../passwd", "size": 10}, 0),
        ({"kind": "echo", "id": 1, "shared": "/etc/passwd", "size": 10}, 0),
        ({"kind": "echo", "id": 1, "shared": "buddymoe-link.1.1.1.zz", "size": 10}, 0),
        ({"kind": "echo", "id": 1, "shared": 7, "size": 10}, 0),
        ({"kind": "echo", "id": 1, "shared": "x", "size": 2**60}, 0),
        ({"kind": "read", "id": 1, "layer": 0, "expert": 1, "segment": 0, "want": 5}, 64),
        ({"kind": "answer", "id": 1, "arrays": [], "declined": []}, 0),
        ({"kind": "hello", "nonce": bytes(32)}, 0),
    ],
)
def test_known_peers_that_send_nonsense_are_cut_off(
    server: LinkServer, experts: Experts, header: dict[str, object], nbytes: int
) -> None:
    stream = known_stream(server)
    deadline = time.monotonic() + SOON
    stream._sock.send(pack_frame(header, nbytes) + bytes(min(nbytes, 64)))
    try:
        assert stream.read(deadline=deadline, seconds=SOON) is None
    except LinkError as error:
        assert "lost" in str(error), "reset by the server, not our own deadline"
    stream.close()
    eventually(lambda: server.snapshot().bad_peers == 1, "counted")
    assert experts.calls == 0 and server.snapshot().inside == 0


def test_a_slow_peer_costs_one_timeout_and_late_answers_are_dropped(server: LinkServer) -> None:
    clock = Clock()
    with DelayProxy(server.addresses[0]) as proxy:
        link = PeerLink(proxy.address, SECRET, timeout=SOON, options=LinkOptions(shared_from=None), clock=clock)
        assert 1 in link.submit(0, ROWS).collect(SOON)
        proxy.delay_seconds = 1000.0
        pending = [link.submit(0, {1: torch.full((1, 4), float(at))}) for at in range(5)]
        for answer in pending:  # the first opens the breaker; the others do not wait
            with pytest.raises(LinkError, match="did not answer"):
                answer.collect(0.3 if answer is pending[0] else SOON * 100)
        sent = link.snapshot()
        assert sent.failed == 5 and sent.times_opened == 1 and sent.state == "open"
        for _ in range(100):
            with pytest.raises(LinkError, match="not asked for a while"):
                link.submit(0, ROWS)
        assert link.snapshot().requests == sent.requests and link.snapshot().bytes_out == sent.bytes_out
        assert link.snapshot().refused == 100 and not link.available()
        proxy.delay_seconds = 0.0
        eventually(lambda: server.snapshot().computed + server.snapshot().declined == 6, "the late ones reached it")
        clock.now += 0.51
        assert link.available()
        rows = torch.full((1, 4), 77.0)
        assert link.submit(0, {1: rows}).collect(SOON)[1].equal(rows), "late answers are not this one's"
        assert link.snapshot().state == "closed" and link.snapshot().connects == 1, "the connection stayed"
        link.close()


def test_a_fetch_that_is_cut_short_leaves_its_buffer_alone() -> None:
    """Half of the bytes come in time. What comes later must not reach the buffer, which has another use by then."""
    half, rest = threading.Event(), threading.Event()

    def reply(stream: FrameStream, frame: Frame) -> None:
        stream._sock.send(pack_frame({"kind": "bytes", "id": frame.whole("id")}, 1000) + b"a" * 500)
        half.set()
        assert rest.wait(SOON)
        stream._sock.send(b"b" * 500)

    with odd_server(reply) as address:
        link, into = PeerLink(address, SECRET, timeout=SOON), bytearray(1000)
        link.connect()
        outcome: list[LinkError] = []

        def fetch() -> None:
            try:
                link.fetch(0, 2, 0, into, deadline_seconds=0.3)
            except LinkError as error:
                outcome.append(error)

        thread = threading.Thread(target=fetch)
        thread.start()
        assert half.wait(SOON)
        thread.join(SOON)
        assert not thread.is_alive() and len(outcome) == 1, "it does not wait for the rest"
        into[:] = b"c" * 1000
        rest.set()
        eventually(lambda: not link.snapshot().connected, "the connection's end")
        link.close()
        assert into == b"c" * 1000


@pytest.mark.parametrize(
    "answer",
    [
        {"kind": "answer", "arrays": [[1, "float32", [1, 16]]], "declined": []},  # other rows
        {"kind": "answer", "arrays": [[1, "int64", [1, 8]]], "declined": []},
        {"kind": "answer", "arrays": [[2, "float32", [2, 8]]], "declined": []},
        {"kind": "answer", "arrays": [[1, "float32", [2, 8]], [2, "float32", [0]]], "declined": []},
        {"kind": "answer", "arrays": [], "declined": ["1"]},
        {"kind": "bytes"},
        {"kind": "declined", "reason": "busy"},  # with a payload
        {"kind": "failed", "message": "no"},
        {"kind": "echo"},
        {"kind": "answer", "arrays": [[1, "float32", [2, 8]]], "declined": [], "id": 77},  # never asked
        {"kind": "answer", "arrays": [[1, "float32", [2, 8]]], "declined": [], "shared": "x", "size": 64},
    ],
)
def test_answers_that_do_not_fit_their_question_are_not_believed(answer: dict[str, object]) -> None:
    def reply(stream: FrameStream, frame: Frame) -> None:
        stream._sock.send(pack_frame({"id": frame.whole("id"), **answer}, 64) + bytes(64))

    with odd_server(reply) as address:
        link = PeerLink(address, SECRET, timeout=SOON)
        with pytest.raises(LinkError):
            link.submit(0, ROWS).collect()
        eventually(lambda: not link.snapshot().connected, "nothing more is believed")
        assert not link.available() and link.snapshot().failed == 1
        link.close()


def test_bytes_of_another_length_are_not_believed() -> None:
    def reply(stream: FrameStream, frame: Frame) -> None:
        stream._sock.send(pack_frame({"kind": "bytes", "id": frame.whole("id")}, 64) + bytes(64))

    with odd_server(reply) as address:
        link, into = PeerLink(address, SECRET, timeout=SOON), bytearray(b"x" * 65)
        with pytest.raises(LinkError, match="64 bytes, must be the 65"):
            link.fetch(0, 1, 0, into)
        assert into == b"x" * 65
        link.close()


def test_a_lost_connection_fails_what_is_under_way_and_is_opened_again(server: LinkServer, experts: Experts) -> None:
    clock = Clock()
    with DelayProxy(server.addresses[0]) as proxy:
        link = PeerLink(proxy.address, SECRET, timeout=SOON, clock=clock)
        for round_ in range(3):
            experts.open.clear()
            pending = [link.submit(0, ROWS) for _ in range(3)]
            eventually(lambda: experts.running == 1, "computing")
            proxy.cut()
            for answer in pending:
                with pytest.raises(LinkError, match=r"closed the connection|lost"):
                    answer.collect()
            experts.open.set()
            eventually(lambda: server.snapshot().inside == 0, "the queue emptied")
            clock.now += 1000
            assert 1 in link.submit(0, ROWS).collect()
            assert link.snapshot().connects == round_ + 2
        assert link.snapshot().failed == 9 and link.snapshot().state == "closed"
        link.close()


def test_nobody_listens(server: LinkServer) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{taken.getsockname()[1]}"
    taken.close()
    link = PeerLink(address, SECRET, timeout=SOON)
    with pytest.raises(LinkError, match="cannot be reached"):
        link.submit(0, ROWS)
    with pytest.raises(LinkError, match="not asked for a while"):
        link.fetch(0, 0, 0, bytearray(4))
    link.close()


def test_a_server_that_never_answers_the_handshake() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    link = PeerLink(f"127.0.0.1:{listener.getsockname()[1]}", SECRET, timeout=0.2)
    with pytest.raises(LinkError, match="too slow"):
        link.connect()
    link.close()
    listener.close()
    assert not own_files(), "its witness is gone"


def test_too_many_connections_are_turned_away(experts: Experts) -> None:
    server = LinkServer(experts, secret=SECRET, options=ServerOptions(max_connections=2))
    links = [PeerLink(server.addresses[0], SECRET, timeout=SOON) for _ in range(3)]
    links[0].connect()
    links[1].connect()
    with pytest.raises(LinkError):
        links[2].connect()
    assert server.snapshot().turned_away == 1
    links[0].close()
    eventually(lambda: server.snapshot().connections == 1, "one left")
    again = PeerLink(server.addresses[0], SECRET, timeout=SOON)
    again.connect()
    for link in [*links, again]:
        link.close()
    server.close()


def test_closing_under_load_ends_everything(experts: Experts, tmp_path: Path) -> None:
    server = LinkServer(
        experts,
        secret=SECRET,
        addresses=[f"unix:{tmp_path}/s"],
        options=ServerOptions(shared_from=4096, max_waiting=50),
    )
    links = [
        PeerLink(server.addresses[0], SECRET, timeout=SOON, options=LinkOptions(shared_from=4096)) for _ in range(6)
    ]
    idle = socket.socket(socket.AF_UNIX)  # never says a word
    idle.connect(f"{tmp_path}/s")
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
    eventually(lambda: server.snapshot().computed > 30, "load")
    server.close()
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive()
    for link in links:
        link.close()
    idle.close()
    assert not wrong and server.snapshot().connections == 0 and server.snapshot().inside == 0


def test_a_peer_that_never_reads_holds_up_nobody_else(experts: Experts) -> None:
    """It asks for bytes again and again and takes none; others are served, and it is cut off after `send_seconds`."""
    server = LinkServer(experts, secret=SECRET, options=ServerOptions(send_seconds=0.5, shared_from=None))
    host, _, port = server.addresses[0].rpartition(":")
    stream = FrameStream(socket.create_connection((host, int(port))), limits=Limits())
    greet(stream, SECRET, deadline=time.monotonic() + SOON, share=False)
    for number in range(4):
        header = {"kind": "read", "id": number, "layer": 0, "expert": 1, "segment": 0, "want": SEGMENT_BYTES}
        stream.write(header, deadline=time.monotonic() + SOON)
    link = PeerLink(server.addresses[0], SECRET, timeout=SOON)
    assert 1 in link.submit(0, ROWS).collect()
    eventually(lambda: server.snapshot().bad_peers == 1, "cut off")
    assert experts.held == 0
    link.close()
    stream.close()
    server.close()


def test_kill_9_of_a_server(tmp_path: Path) -> None:
    """Stopped, its clients time out; killed, they fail at once, nothing of theirs stays; started again, it answers."""
    address, clock = f"unix:{tmp_path}/s", Clock()
    link = PeerLink(address, SECRET, timeout=SOON, options=LinkOptions(shared_from=1 << 20), clock=clock)
    rows = {1: torch.randn(1024, 512)}
    with other_process(address) as child:
        clock.now += 1000
        assert link.submit(0, rows).collect(SOON)[1].equal(rows[1]) and link.snapshot().shared_out > 0
        child.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED)  # all its threads
        pending = [link.submit(0, rows) for _ in range(3)]
        assert len(own_files()) == 3, "in flight"
        with pytest.raises(LinkError, match=r"within 0\.1 s"):
            pending[0].collect(0.1)
        assert len(own_files()) == 2, "what nobody waits for is taken back"
        child.kill()
        child.wait()
        for answer in pending[1:]:
            with pytest.raises(LinkError):
                answer.collect()
        eventually(lambda: not own_files(), "what was in flight is removed")
    assert os.path.exists(f"{tmp_path}/s"), "it was killed, so its socket file is still there"
    with other_process(address):
        clock.now += 1000
        assert link.submit(0, rows).collect(SOON)[1].equal(rows[1])
    link.close()
