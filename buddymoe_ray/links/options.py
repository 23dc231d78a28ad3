"""How the two ends of a link behave: one home for each default.

Shared memory is used when both ends ask for it. The client does not by default: a new file costs a page for every 4 KB,
and 3 to 32 MB took 1.3 to 2.5 times as long as by a socket where it was measured (Linux 6.18, 2 cores). It pays where a
sender must not wait for a receiver that is slow to read.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from buddymoe_ray.links.wire import Limits

__all__ = ["LinkOptions", "ServerOptions"]


@dataclass(frozen=True, kw_only=True)
class LinkOptions:
    """How a client behaves.

    `shared_from`: payloads of as many bytes go by shared memory where both ends see the same; None never.
    `frame_seconds`: how long an answer that has begun may take to arrive. `backoff_seconds` and `cap_seconds`: the
    breaker's first and longest wait.
    """

    shared_from: int | None = None
    limits: Limits = field(default_factory=Limits)
    frame_seconds: float = 30.0
    backoff_seconds: float = 0.5
    cap_seconds: float = 30.0


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How a server behaves.

    `max_concurrent` computes at once and `max_waiting` behind them, over all peers, of which none has more than half;
    `shared_from` as in `LinkOptions`; `send_seconds`: how long a peer may take to accept an answer, or is cut off.
    """

    max_connections: int = 64
    max_concurrent: int = 1
    max_waiting: int = 8
    shared_from: int | None = 1 << 20
    limits: Limits = field(default_factory=Limits)
    handshake_seconds: float = 2.0
    send_seconds: float = 5.0
    frame_seconds: float = 30.0
