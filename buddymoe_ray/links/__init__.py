"""Expert links: one worker asks another to run tokens through its experts, or for an expert's bytes.

address   where a worker listens                wire, stream   frames, and frames on a socket
auth      both ends prove the secret            shared_files   big payloads within a node
arrays    tensors as bytes                      messages       questions and answers
channel   one connection's messages             breaker        when a peer may be asked
client    a peer, as asked; session, its connection; peers, all of them
server    those who ask; guest, one of them; gate, how many at once; service, what they get
measure   what a link costs                     options, counters   how it behaves, what was done

Questions of a step go straight from worker to worker; no actor call, no object store.
"""

from buddymoe_ray.links.auth import derive_secret
from buddymoe_ray.links.breaker import Breaker, BreakerState
from buddymoe_ray.links.client import PeerLink, PendingAnswer
from buddymoe_ray.links.counters import LinkSnapshot, ServerSnapshot
from buddymoe_ray.links.measure import LinkCost, measure
from buddymoe_ray.links.options import LinkOptions, ServerOptions
from buddymoe_ray.links.peers import PeerLinks
from buddymoe_ray.links.server import LinkServer
from buddymoe_ray.links.service import ExpertService
from buddymoe_ray.links.shared_files import sweep_leftovers
from buddymoe_ray.links.wire import Limits

__all__ = [
    "Breaker",
    "BreakerState",
    "ExpertService",
    "Limits",
    "LinkCost",
    "LinkOptions",
    "LinkServer",
    "LinkSnapshot",
    "PeerLink",
    "PeerLinks",
    "PendingAnswer",
    "ServerOptions",
    "ServerSnapshot",
    "derive_secret",
    "measure",
    "sweep_leftovers",
]
