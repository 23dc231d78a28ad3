"""Who may talk: both ends of a new connection prove that they know the cluster's secret, without saying it.

    client -> hello(nonce)        server -> challenge(nonce)
    client -> proof(HMAC)         server -> welcome(HMAC) or refused

HMAC-SHA256 over a role and both nonces, so a proof fits one connection and one direction only. In passing the server
proves whether it sees the client's /dev/shm. Invariant: nothing else is read from a peer before it proved itself, and
no longer than the deadline. What follows is not encrypted: keep links inside a network that is trusted.
"""

from __future__ import annotations

import hmac
import secrets
import time
from dataclasses import dataclass

from buddymoe_ray.errors import LinkError
from buddymoe_ray.links.shared_files import Mailbox, read_file
from buddymoe_ray.links.stream import FrameStream
from buddymoe_ray.links.wire import Frame, Limits

__all__ = ["HANDSHAKE_LIMITS", "Admission", "admit", "check_secret", "derive_secret", "greet"]

HANDSHAKE_LIMITS = Limits(max_header=512, max_payload=0)
"""What a peer that has not proved itself may announce."""

_NONCE_BYTES = 32
_LEAST_SECRET = 16


@dataclass(frozen=True, kw_only=True)
class Admission:
    """A handshake that ended well. `shared`: both ends see the same /dev/shm as the same user."""

    shared: bool


def check_secret(secret: bytes) -> bytes:
    """Raises LinkError for a secret that could be guessed."""
    if len(secret) < _LEAST_SECRET:
        raise LinkError(f"the secret has {len(secret)} bytes, must have at least {_LEAST_SECRET}. hint: 32 random ones")
    return secret


def derive_secret(secret: bytes, purpose: str) -> bytes:
    """A secret for one purpose (a model's fingerprint, say), so that workers of another do not get through."""
    return _mac(check_secret(secret), b"derive", purpose.encode())


def greet(stream: FrameStream, secret: bytes, *, deadline: float, share: bool) -> Admission:
    """The client's half. Offers a shared file as a witness with `share`.

    Raises:
        LinkError: the server refused us, does not know the secret itself, was too slow or spoke nonsense.
    """
    mailbox = Mailbox(least_bytes=1)
    try:
        ours, witness = secrets.token_bytes(_NONCE_BYTES), secrets.token_bytes(_NONCE_BYTES)
        stream.write({"kind": "hello", "nonce": ours}, deadline=deadline)
        theirs = _expect(stream, "challenge", deadline).raw("nonce", most=_NONCE_BYTES)
        offered = (mailbox.post([memoryview(witness)]) if share else None) or ""
        proof = _mac(secret, b"client", ours, theirs, offered.encode())
        stream.write({"kind": "proof", "mac": proof, "witness": offered}, deadline=deadline)
        answer = _expect(stream, "welcome", deadline)
        mac = answer.raw("mac")
        if hmac.compare_digest(mac, _mac(secret, b"server", ours, theirs, witness)):
            return Admission(shared=bool(offered))
        if hmac.compare_digest(mac, _mac(secret, b"server", ours, theirs, b"")):
            return Admission(shared=False)
        raise LinkError("the peer does not know this cluster's secret, must be a worker of it. hint: check its address")
    finally:
        mailbox.close()


def admit(stream: FrameStream, secret: bytes, *, deadline: float, share: bool) -> Admission | None:
    """The server's half: None when the client's secret is another, which the client is told.

    Raises:
        LinkError: the client was too slow, left, or spoke nonsense.
    """
    theirs = _expect(stream, "hello", deadline).raw("nonce", most=_NONCE_BYTES)
    ours = secrets.token_bytes(_NONCE_BYTES)
    stream.write({"kind": "challenge", "nonce": ours}, deadline=deadline)
    proof = _expect(stream, "proof", deadline)
    offered = proof.text("witness")
    expected = _mac(secret, b"client", theirs, ours, offered.encode())
    if len(theirs) != _NONCE_BYTES or not hmac.compare_digest(proof.raw("mac"), expected):
        stream.write({"kind": "refused"}, deadline=deadline)
        return None
    witness = bytearray(_NONCE_BYTES)
    seen = bool(offered) and share and _seen(offered, witness)
    mac = _mac(secret, b"server", theirs, ours, bytes(witness) if seen else b"")
    stream.write({"kind": "welcome", "mac": mac}, deadline=deadline)
    return Admission(shared=seen)


def _seen(name: str, into: bytearray) -> bool:
    try:
        return read_file(name, memoryview(into))
    except LinkError:
        return False  # not our user's file: payloads take the socket


def _expect(stream: FrameStream, kind: str, deadline: float) -> Frame:
    frame = stream.read(deadline=deadline, seconds=max(0.0, deadline - time.monotonic()))
    if frame is None:
        raise LinkError("the peer closed the connection before it was known. hint: it may have all the peers it takes")
    if frame.kind == "refused":
        raise LinkError("the peer refused our secret, must be the same on every worker. hint: set one cluster secret")
    if frame.kind != kind:
        raise LinkError(f"the peer said {frame.kind}, must say {kind} first")
    return frame


def _mac(secret: bytes, role: bytes, *parts: bytes) -> bytes:
    """Every part is preceded by its length, so that no two lists of parts look alike."""
    text = b"buddymoe link 1" + b"".join(len(part).to_bytes(4, "big") + part for part in (role, *parts))
    return hmac.digest(secret, text, "sha256")
