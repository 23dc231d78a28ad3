"""Expert links: one worker asks another to run tokens through its experts, over sockets between nodes.

address   where a worker listens        wire, stream   frames, and frames on a socket
auth      both ends prove the secret    arrays         tensors as bytes
messages  questions and answers         breaker        when a peer may be asked
client    peers, as asked; calls, what is under way to one of them
server    the end that answers; guest, one of those who ask

Questions of a step go straight from worker to worker; no actor call, no object store.
"""

from buddymoe_ray.links.auth import derive_secret
from buddymoe_ray.links.client import PeerLink, PeerLinks, PendingAnswer
from buddymoe_ray.links.guest import ExpertService
from buddymoe_ray.links.server import LinkServer

__all__ = ["ExpertService", "LinkServer", "PeerLink", "PeerLinks", "PendingAnswer", "derive_secret"]
