"""A prompt's missing experts, read by all workers of a node over their own links at once (after MoEShard, 2503.08467).

Who computes a prompt deals what a layer lacks and no peer has in as many parts as there are workers, and says to each
which is its: they read that into wave slots between steps of their own, as they would for themselves, and publish it.
Meanwhile it reads its own part, and copies what a peer has as soon as that is there. A peer that is not done when twice
the time of the own part is over, is gone or stands still, is waited for no more: what it lacks is read here, and it is
asked for nothing for a while. Nobody relies on a helper: what it was asked is gone with the connection, with the next
message or after some seconds, and what is copied counts if its slot was not used anew. Where GPUs read each other no
faster than the host nothing is dealt: it would all come over one's own link. Knows no sockets and no bytes.

MoEShard has each GPU compute with its part and exchanges rows and partial sums instead. Of a layer that lacks M bytes
they are 6 T D bytes for each helper (rows in 2 bytes, sums in 4; T tokens), copies M / N: fewer below M / (6 N D)
tokens, that is for any prompt (4 GPUs: 14,000 of Mixtral at 50 %, 18,000 of Qwen3-30B at 25 %). With NVLink that gains
nothing while copies hide behind reads, up to N - 1 = NVLink / PCIe, about 5 GPUs; of 8 up to 1.8 times. Beside PCIe
alone it would: 2,048 tokens of Mixtral on 4 GPUs .5 GB a layer over the own link for 1.4. Not done, for a segment's sum
has other bits than a whole expert's, and differs with who helped; helpers would compute a prompt between their own
steps, which reads do not delay.

On a CPU's links of 49 ms an expert (3 layers of 8, 2 wave slots) a prompt waited 1.22 s with one, .76 with two, .31
with four, nothing taken back. What peers have read is had before the own part: else they wait for room. What did not
help: peers that begin with the next layer's parts (.73, .31), as the own part takes as long as before.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from buddymoe_ray.cache.slot_peers import SlotPeers
from buddymoe_ray.types import ExpertKey

__all__ = ["ShardedReads"]

LEAST_BYTES = 16 << 20
"""Of a part: PCIe takes .3 to .6 ms for it, asking a tenth of that."""
BOX = 2.0
"""Times what the own part took: then the others' is to be there."""
_LATE_SECONDS = 1.0


class ShardedReads:
    """What this worker asks of `peers`. `helped` counts experts that a peer read for it, `taken_back` those that were
    to be and that it read itself."""

    def __init__(self, peers: SlotPeers, expert_bytes: int) -> None:
        self.peers, self._expert_bytes = peers, expert_bytes
        self.helped = self.taken_back = 0
        self._layer, self._asked = -1, dict[int, int]()  # who reads an expert, by its place
        self._began, self._until = 0.0, math.inf
        self._late = dict[int, float]()  # until when, by place

    def deal(self, layer: int, missing: Sequence[int]) -> None:
        """A prompt wants these of a layer, until `end`: ask peers for their parts of what none of them has."""
        held, now = set(self.peers.experts(layer)), time.perf_counter()
        nowhere = [expert for expert in missing if expert not in held]
        helpers = [at for at in self.peers.helpers if self._late.get(at, now) <= now]
        parts = min(1 + len(helpers), len(nowhere) * self._expert_bytes // LEAST_BYTES)
        if parts < 2 or self.peers.nearer <= 0:
            return
        self._layer, self._began, self._until = layer, now, math.inf
        self._asked = {e: helpers[at % parts - 1] for at, e in enumerate(nowhere) if at % parts}
        self._ask()

    def end(self) -> None:
        """Nothing of it is wanted any more."""
        if self._asked:
            self._forget(self._asked.keys())

    def due(self, missing: Sequence[ExpertKey], *, reading: bool) -> Sequence[ExpertKey]:
        """Those of a layer's missing experts that are to be had now: what peers have read, which needs their slots no
        longer then, before the own part; `reading`: something is being read here."""
        if not self._asked or all(key.layer != self._layer for key in missing):
            return missing
        here, helpers = set(self.peers.experts(self._layer)), self.peers.helpers
        asked = [key for key in missing if key.expert in self._asked]
        theirs = {key.expert for key in asked if key.expert not in here}
        lost = {expert for expert in theirs if self._asked[expert] not in helpers}
        if len(theirs) == len(missing) and not reading:  # the own part is over
            now = time.perf_counter()
            if self._until == math.inf:
                self._until = self._began + BOX * (now - self._began)
            if now >= self._until:
                lost = theirs
                self._late |= {self._asked[expert]: now + _LATE_SECONDS for expert in lost}
        if lost:
            self.taken_back += len(lost)
            self._forget(lost)
        arrived = [key for key in asked if key.expert in here]
        return arrived + [key for key in missing if key not in arrived and key.expert not in theirs - lost]

    def took(self, key: ExpertKey) -> None:
        """The expert was found at a peer's: whoever was asked for it need not keep it."""
        if key.layer == self._layer and key.expert in self._asked:
            self.helped += 1
            self._forget({key.expert})

    def _forget(self, experts: AbstractSet[int]) -> None:
        self._asked = {expert: at for expert, at in self._asked.items() if expert not in experts}
        self._ask()

    def _ask(self) -> None:
        keys_of = dict[int, list[ExpertKey]]()
        for expert, at in self._asked.items():
            keys_of.setdefault(at, []).append(ExpertKey(self._layer, expert))
        self.peers.ask(keys_of)
