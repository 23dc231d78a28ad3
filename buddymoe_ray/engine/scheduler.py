"""Continuous batching: which sequences prefill and which decode in the next step. Touches no tensor and no clock.

Tenants take turns by what was computed for each (`policy.fair`), the requests of each first come, first served. With
`grows` a sequence takes blocks as its text grows, and where none is left the youngest gives up its own and waits ahead
of its tenant's others, to be computed again: for runners that do so to the same bits. There a tenant that has none
admitted gets the place of the youngest of who has the most. Without, a sequence is admitted only when blocks for all it
may ever need are free. With `reuses` it begins with the blocks that hold the same beginning. With `suspends` prompts
that were begun are still being computed when others begin.
Invariant: blocks held by sequences and free blocks make up the pool (`check_integrity`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from buddymoe_ray.engine.blocks import BlockAllocator
from buddymoe_ray.engine.sequence import Sequence
from buddymoe_ray.errors import RequestError
from buddymoe_ray.policy import Prefill
from buddymoe_ray.policy.fair import GENERATED_WEIGHT, FairShare

__all__ = ["SHORT", "PrefillChunk", "Scheduler", "StepPlan"]

SHORT = 4
"""A prompt of so many times fewer tokens than the longest is short."""
_ANY = 1 << 62


@dataclass(frozen=True, kw_only=True)
class PrefillChunk:
    """Tokens `[start, end)` of a prompt and what was resumed after it. Logits are wanted of its last token, if it is in
    the chunk, and of those at the positions `also`."""

    seq: Sequence
    start: int
    end: int
    also: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One step: prompt chunks, and sequences that decode one token each. From the `preempted` all was taken."""

    prefill: tuple[PrefillChunk, ...]
    decode: tuple[Sequence, ...]
    preempted: tuple[Sequence, ...] = ()


class Scheduler:
    """`prefill` bounds the prompt tokens of a step, `max_running` the sequences admitted at once."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_running: int,
        prefill: Prefill,
        grows: bool = False,
        reuses: bool = False,
        suspends: bool = False,
    ) -> None:
        assert min(num_blocks, block_size, max_running, prefill.beside, prefill.alone) > 0, "sizes must be positive"
        self._grows, self._reuses, self._suspends = grows, reuses, suspends
        self.preemptions = self.cached_tokens = self.prompt_tokens = 0
        self.num_blocks, self._block_size = num_blocks, block_size
        self._max_running, self._prefill = max_running, prefill
        self.reset()

    def reset(self) -> None:
        """Forget every sequence and loan, also where an interrupt left the tables half written."""
        self._allocator = BlockAllocator(self.num_blocks)
        self._waiting: dict[str, Sequence] = {}  # in order of arrival
        self._admitted: dict[str, Sequence] = {}
        self._lent: set[int] = set()
        self._turns, self._prompt_turns = FairShare(), FairShare()  # of places, and of room in a step

    @property
    def num_waiting(self) -> int:
        """Sequences not yet admitted."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences admitted and not finished."""
        return len(self._admitted)

    @property
    def free_blocks(self) -> int:
        """Blocks nobody holds."""
        return self._allocator.free

    @property
    def next_tokens(self) -> list[int]:
        """Those that the next step decodes, of sequences that are admitted by now."""
        running = (seq for seq in self._admitted.values() if seq.prompt_computed)
        return [token for seq in running for token in seq.token_ids(seq.num_computed, seq.num_computed + 1)]

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. Raises RequestError when it could never be admitted, or its id is taken."""
        if seq.request_id in self._admitted or seq.request_id in self._waiting:
            raise RequestError(f"request_id is {seq.request_id!r}, must be unique. hint: wait until that request ends")
        if self._blocks_for(seq.max_length) > self.num_blocks:
            limit = self.num_blocks * self._block_size
            raise RequestError(
                f"prompt and max_tokens are {seq.max_length} tokens, must be at most {limit}, the KV cache. "
                "hint: lower max_tokens",
                param="max_tokens",
            )
        self._turns.join(_tenant(seq), map(_tenant, chain(self._admitted.values(), self._waiting.values())))
        self._waiting[seq.request_id] = seq

    def cancel(self, request_id: str) -> Sequence | None:
        """The live sequence of that id, for the caller to finish; None when there is none."""
        return self._admitted.get(request_id) or self._waiting.pop(request_id, None)

    def has_work(self) -> bool:
        """Whether `schedule` would return anything."""
        return bool(self._waiting or self._admitted)

    def schedule(self) -> StepPlan:
        """Give running sequences their blocks, admit what fits, then plan one step."""
        self._preempted: list[Sequence] = []
        if self._grows:
            self._grow()
        self._admit()
        decode = tuple(seq for seq in self._admitted.values() if seq.prompt_computed)
        for seq in decode:
            self._turns.charge(_tenant(seq), GENERATED_WEIGHT, seq.request.weight)
        room, longest = self._room(bool(decode))
        prefill = []
        for seq in sorted(self._prompts(), key=lambda seq: self._prompt_turns.spent(_tenant(seq))):
            if room > 0 and seq.prefill_length - seq.num_computed <= longest and not seq.computing:
                most = self._prefill.beside if self._prefill.fixed else room
                end = min(seq.prefill_length, seq.num_computed + most)
                if end - seq.num_computed > room:
                    break  # it is not cut elsewhere than if it were alone
                prefill.append(PrefillChunk(seq=seq, start=seq.num_computed, end=end))
                room -= end - seq.num_computed
                self._prompt_turns.charge(_tenant(seq), end - seq.num_computed, seq.request.weight)
        return StepPlan(prefill=tuple(prefill), decode=decode, preempted=tuple(self._preempted))

    def finish(self, seq: Sequence) -> None:
        """Free what the sequence holds; one that was never admitted holds nothing."""
        for held in (self._admitted, self._waiting):
            if held.get(seq.request_id) is seq:  # its id may already be another's when it never was admitted
                del held[seq.request_id]
        self._allocator.release(seq.blocks)
        seq.blocks = []

    def remember(self, seq: Sequence) -> None:
        """Let others find the blocks of a sequence that are full by now."""
        full = seq.exact_blocks(self._block_size) if self._reuses else 0
        if full > seq.num_remembered:
            new = slice(seq.num_remembered, full)
            for block, digest in zip(seq.blocks[new], seq.digests(full, self._block_size)[new], strict=True):
                self._allocator.remember(block, digest)
            seq.num_remembered = full

    def borrow(self, tokens: int) -> list[int] | None:
        """Blocks for `tokens` tokens of work beside the requests, to be given back; None when they are not free."""
        wanted = self._blocks_for(tokens)
        if not self._allocator.can_allocate(wanted + self._spare):
            return None
        blocks = self._allocator.allocate(wanted)
        self._lent.update(blocks)
        return blocks

    def give_back(self, blocks: list[int]) -> None:
        """Return borrowed blocks."""
        self._lent.difference_update(blocks)
        self._allocator.release(blocks)

    def check_integrity(self) -> None:
        """Blocks held by admitted sequences are exactly those the allocator gave out."""
        self._allocator.check_integrity()
        held = {*self._lent, *(block for seq in self._admitted.values() for block in seq.blocks)}
        assert len(held) + self._allocator.free == self.num_blocks, f"{len(held)} held, {self._allocator.free} free"
        own = [block for seq in self._admitted.values() for block in seq.blocks[seq.num_remembered :]]
        assert len(own) == len({*own}), f"a block is written by two: {sorted(own)}"
        assert not self._lent.intersection(own), f"lent blocks {self._lent} are written by a sequence"
        assert all(not seq.blocks for seq in self._waiting.values()), "a waiting sequence holds blocks"

    @property
    def _spare(self) -> int:
        """Blocks that running sequences will want next."""
        return len(self._admitted) if self._grows else 0

    def _room(self, decodes: bool) -> tuple[int, int]:
        """Prompt tokens that may be begun now, and of how many at most a prompt may be that is.

        Beside prompts that take long there is room for shorter ones, which are not to wait for their end. What comes
        meanwhile waits and begins together: a pass for each of 32 prompts took 1.2 times as long.
        """
        if not self._suspends:
            return (self._prefill.beside if decodes else self._prefill.alone), _ANY
        begun = [seq.prefill_length - seq.num_computed for seq in self._admitted.values() if seq.computing]
        if not begun:
            return self._prefill.alone, _ANY
        many, short = sum(begun) >= SHORT * self._prefill.beside, max(begun) // SHORT
        if any(left <= short for left in begun):
            return 0, 0
        return self._prefill.beside, self._prefill.beside if many else short

    def _prompts(self) -> Iterator[Sequence]:
        """Those that are being computed."""
        return (seq for seq in self._admitted.values() if not seq.prompt_computed)

    def _admit(self) -> None:
        while self._waiting:
            full = len(self._admitted) >= self._max_running
            if full and self._turns.alone:
                return
            turn = self._turns.next(map(_tenant, self._waiting.values()))
            if full and self._beyond_share(turn) is None:
                return
            seq = next(seq for seq in self._waiting.values() if _tenant(seq) == turn)
            found = self._found(seq)
            wanted = self._first_blocks(seq) - len(found)
            while not self._fits(wanted + self._allocator.idle(found)):
                if (last := self._beyond_share(turn)) is None:
                    return
                self._preempt(last)
            del self._waiting[seq.request_id]
            self._allocator.share(found)
            if not seq.preempted:
                self.prompt_tokens += seq.prompt_length
                self.cached_tokens += min(seq.prompt_length, len(found) * self._block_size)
                self._turns.charge(turn, seq.prefill_length - len(found) * self._block_size, seq.request.weight)
            seq.begin(found + self._allocator.allocate(wanted), len(found), self._block_size)
            self._prompt_turns.join(turn, map(_tenant, self._prompts()))
            self._admitted[seq.request_id] = seq

    def _fits(self, blocks: int) -> bool:
        """Whether one more may be admitted that needs so many."""
        return len(self._admitted) < self._max_running and self._allocator.can_allocate(blocks + self._spare)

    def _beyond_share(self, tenant: str) -> Sequence | None:
        """Who makes room for a tenant that has none admitted: the youngest of who has the most, and more than one."""
        held = Counter(map(_tenant, self._admitted.values()))
        if not self._grows or not held or tenant in held:
            return None
        [(most, count)] = held.most_common(1)
        mine = (seq for seq in reversed(self._admitted.values()) if _tenant(seq) == most)
        return next((seq for seq in mine if seq.prompt_computed and not self._stays(seq)), None) if count > 1 else None

    def _found(self, seq: Sequence) -> list[int]:
        """Blocks that hold the beginning of a waiting sequence; its last token is computed, for what comes next."""
        if not self._reuses or seq.scores:
            return []
        return self._allocator.find(seq.digests((seq.prefill_length - 1) // self._block_size, self._block_size))

    def _first_blocks(self, seq: Sequence) -> int:
        """Blocks that a sequence is admitted with: of one that grows, for what is known and a token more."""
        if self._grows and not self._stays(seq):
            return self._blocks_for(min(seq.prefill_length + 1, seq.max_length))
        return self._blocks_for(seq.max_length)

    def _stays(self, seq: Sequence) -> bool:
        """Whether it cannot be computed again to the same bits: a prompt that is scored is cut into small pieces."""
        return seq.repeats or (self._prefill.fixed and seq.request.sampling.prompt_logprobs is not None)

    def _grow(self) -> None:
        """A block for every sequence whose next token has none, the oldest first."""
        for seq in list(self._admitted.values()):
            while seq.request_id in self._admitted and len(seq.blocks) * self._block_size <= seq.num_computed:
                if self._allocator.can_allocate(1):
                    seq.blocks += self._allocator.allocate(1)
                else:
                    youngest = reversed(self._admitted.values())
                    self._preempt(next(s for s in youngest if s is seq or not self._stays(s)))

    def _preempt(self, seq: Sequence) -> None:
        del self._admitted[seq.request_id]
        self._allocator.release(seq.blocks)
        seq.preempt()
        self._preempted.append(seq)
        self._waiting = {seq.request_id: seq, **self._waiting}
        self.preemptions += 1

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_size)


def _tenant(seq: Sequence) -> str:
    return seq.request.tenant
