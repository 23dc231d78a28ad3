"""Who may talk: both ends of a new connection prove that they know the cluster's secret, without saying it.

    client -> hello(nonce)        server -> challenge(nonce)
    client -> proof(HMAC)         server -> welcome(HMAC) or refused

HMAC-SHA256 over a role and both nonces, so a proof fits one connection and one direction only. Invariant: nothing else
is read from a peer before it proved itself, and no longer than the deadline. What follows is not encrypted: keep links
inside a network that is trusted.
"""

from __future__ import annotations

import hmac
import secrets
import time

from buddymoe_ray.errors import LinkError
from buddymoe_ray.links.stream import FrameStream
from buddymoe_ray.links.wire import Frame, FrameLimits

__all__ = ["HANDSHAKE_LIMITS", "admit", "check_secret", "derive_secret", "greet"]

HANDSHAKE_LIMITS = FrameLimits(max_header=512, max_payload=0)
"""What a peer that has not proved itself may announce."""

_NONCE_BYTES = 32
_LEAST_SECRET = 16


def check_secret(secret: bytes) -> bytes:
    """Raises LinkError for a secret that could be guessed."""
    if len(secret) < _LEAST_SECRET:
        raise LinkError(f"the secret has {len(secret)} bytes, must have at least {_LEAST_SECRET}. hint: 32 random ones")
    return secret


def derive_secret(secret: bytes, purpose: str) -> bytes:
    """A secret for one purpose (a model's fingerprint, say), so that workers of another do not get through."""
    return _mac(check_secret(secret), b"derive", purpose.encode())


def greet(stream: FrameStream, secret: bytes, *, deadline: float) -> None:
    """The client's half.

    Raises:
        LinkError: the server refused us, does not know the secret itself, was too slow or spoke nonsense.
    """
    ours = secrets.token_bytes(_NONCE_BYTES)
    stream.write({"kind": "hello", "nonce": ours}, deadline=deadline)
    theirs = _raw(_expect(stream, "challenge", deadline), "nonce")
    stream.write({"kind": "proof", "mac": _mac(secret, b"client", ours, theirs)}, deadline=deadline)
    answer = _expect(stream, "welcome", deadline)
    if not hmac.compare_digest(_raw(answer, "mac"), _mac(secret, b"server", ours, theirs)):
        raise LinkError("the peer does not know this cluster's secret, must be a worker of it. hint: check its address")


def admit(stream: FrameStream, secret: bytes, *, deadline: float) -> bool:
    """The server's half: False when the client's secret is another, which the client is told.

    Raises:
        LinkError: the client was too slow, left, or spoke nonsense.
    """
    theirs, ours = _raw(_expect(stream, "hello", deadline), "nonce"), secrets.token_bytes(_NONCE_BYTES)
    stream.write({"kind": "challenge", "nonce": ours}, deadline=deadline)
    proof = _raw(_expect(stream, "proof", deadline), "mac")
    if len(theirs) != _NONCE_BYTES or not hmac.compare_digest(proof, _mac(secret, b"client", theirs, ours)):
        stream.write({"kind": "refused"}, deadline=deadline)
        return False
    stream.write({"kind": "welcome", "mac": _mac(secret, b"server", theirs, ours)}, deadline=deadline)
    return True


def _raw(frame: Frame, name: str) -> bytes:
    return frame.field(name, bytes, most=_NONCE_BYTES)  # a MAC is as long


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
