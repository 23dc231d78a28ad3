"""Where Ray Serve sends a request for a worker: `policy.affinity` behind Ray's seam for request routers.

Lives in every process that holds a handle to the workers (the ingress, Python clients), each with its own memory.
Decides new `generate` calls only; what moved here from a dead worker, and control calls, go by Ray's power of two.
Knows of a worker what Ray's cache of queue lengths knows: an entry that is 10 s old counts as empty, and the first
reply corrects it. What a worker's node has in memory comes with Ray's routing statistics, every 5 s.
Invariant: a worker that Ray has dropped is forgotten, and Ray's own choice stands behind every one made here.
"""

from __future__ import annotations

import random
from typing import Any

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

from buddymoe_ray.policy.prefix_affinity import PrefixAffinity, RouteCandidate, prefix_blocks
from buddymoe_ray.serve.work import Work

__all__ = ["AffinityRouter", "affinity_routing", "prompt_pieces"]

SLACK_SHARE = 8  # a worker may have an eighth of its slots more than the idlest one


def affinity_routing(max_running: int) -> RequestRouterConfig:
    """What a deployment of workers with so many slots each is given to be routed by affinity."""
    router: Any = f"{__name__}:{AffinityRouter.__name__}"
    kwargs: Any = {"slack": max(1, max_running // SLACK_SHARE)}  # Any: ray annotates its constructor wrongly
    return RequestRouterConfig(request_router_class=router, request_router_kwargs=kwargs)


def prompt_pieces(work: Work) -> list[bytes]:
    """What tells a prompt's prefix: every message is a piece; of several prompts the first, as text or as ids."""
    if work.messages:
        pieces = [f"{message.role}\0{message.name or ''}\0{message.content}" for message in work.messages]
    else:
        pieces = [prompt if isinstance(prompt, str) else " ".join(map(str, prompt)) for prompt in work.prompts[:1]]
    return [piece.encode(errors="surrogatepass") for piece in pieces]


class AffinityRouter(PowerOfTwoChoicesRequestRouter):
    """Ray's router with a first choice before its own two."""

    def initialize_state(self, *, slack: int) -> None:  # type: ignore[override]
        """Ray calls it once, with the keywords of `affinity_routing`."""
        self._affinity = PrefixAffinity(slack=slack)
        self._rng = random.Random()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The worker of the prompt's prefix first; then Ray's two, should it not answer or be full."""
        plain = await super().choose_replicas(candidate_replicas, pending_request)
        work = _new_work(pending_request)
        open_replicas = self.select_available_replicas(candidate_replicas)
        if work is None or not open_replicas:
            return plain
        candidates = [
            RouteCandidate(
                name=replica.replica_id,
                queue=self.replica_queue_len_cache.get(replica.replica_id) or 0,
                residency=replica.routing_stats.get("residency"),
            )
            for replica in open_replicas
        ]
        chosen = self._affinity.choose(candidates, prefix_blocks(prompt_pieces(work)), self._rng)
        return [[open_replicas[chosen.index]], *plain]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """A worker took it, and what moved to it counts too: the conversation's next turn follows."""
        super().on_request_routed(pending_request, replica_id, result)
        work = _work(pending_request)
        if work is not None and replica_id in self.curr_replicas:
            self._affinity.note(replica_id, prefix_blocks(prompt_pieces(work)))

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Ray has seen it dead."""
        super().on_replica_actor_died(replica_id)
        self._affinity.keep(self.curr_replicas)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Ray's controller says who runs."""
        super().update_replicas(replicas)
        self._affinity.keep(self.curr_replicas)

    def _get_pending_request_matching_metadata(self, request_metadata: Any = None) -> PendingRequest | None:
        """The request that the choice was made for; Ray's own router would give the worker to whoever came first.

        When that one has a worker already, the first in the queue gets it: Ray's loop ends when all have one.
        """
        return self._get_pending_request_matching_internal_request_id(request_metadata)


def _work(pending: PendingRequest | None) -> Work | None:
    if pending is None or pending.metadata.call_method != "generate":
        return None
    return next((argument for argument in pending.args if isinstance(argument, Work)), None)


def _new_work(pending: PendingRequest | None) -> Work | None:
    work = _work(pending)
    return None if work is None or work.resume else work
