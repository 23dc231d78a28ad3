"""The scheduler against random operations and the rules it promises: order, admission, chunk bounds, nothing lost."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buddymoe_ray.engine.sampler import Sampled
from buddymoe_ray.engine.scheduler import Scheduler, StepPlan
from buddymoe_ray.engine.sequence import Sequence, SequenceState
from buddymoe_ray.errors import RequestError
from buddymoe_ray.policy import Prefill
from buddymoe_ray.types import GenerationRequest, SamplingParams

MAX_LEN = 10_000


def make(request_id: str, prompt: int, max_tokens: int, tenant: str = "", weight: float = 1.0) -> Sequence:
    request = GenerationRequest(
        request_id=request_id,
        prompt_token_ids=(1,) * prompt,
        sampling=SamplingParams(max_tokens=max_tokens),
        tenant=tenant,
        weight=weight,
    )
    return Sequence(request, max_model_len=MAX_LEN)


def scheduler(*, blocks: int = 16, block_size: int = 4, max_running: int = 8, chunk: int = 8) -> Scheduler:
    return Scheduler(
        num_blocks=blocks, block_size=block_size, max_running=max_running, prefill=Prefill(beside=chunk, alone=chunk)
    )


def ids_of(plan: StepPlan) -> tuple[list[str], list[str]]:
    return [c.seq.request_id for c in plan.prefill], [s.request_id for s in plan.decode]


def take(pool: Scheduler, seq: Sequence) -> None:
    """Give a sequence its next token, as the engine does."""
    if seq.append(Sampled(token_id=2)).finish_reason is not None:
        pool.finish(seq)


def carry_out(pool: Scheduler, plan: StepPlan) -> None:
    """Do what the plan says."""
    for chunk in plan.prefill:
        chunk.seq.advance(chunk.end - chunk.start)
        if chunk.seq.prompt_computed:
            take(pool, chunk.seq)
    for seq in plan.decode:
        seq.advance(1)
        take(pool, seq)


def test_a_request_goes_from_waiting_to_its_end() -> None:
    pool, seq = scheduler(chunk=4), make("a", prompt=6, max_tokens=3)
    pool.add(seq)
    assert (pool.num_waiting, pool.num_running, seq.state) == (1, 0, SequenceState.WAITING)
    plan = pool.schedule()
    assert seq.state is SequenceState.PREFILLING
    assert (pool.num_waiting, pool.num_running) == (0, 1)
    assert len(seq.blocks) == 3  # 9 tokens of 4
    assert pool.free_blocks == 13
    assert [(c.start, c.end) for c in plan.prefill] == [(0, 4)]
    carry_out(pool, plan)
    plan = pool.schedule()
    assert [(c.start, c.end) for c in plan.prefill] == [(4, 6)]
    assert plan.decode == ()
    carry_out(pool, plan)
    assert seq.state is SequenceState.RUNNING
    for _ in range(2):
        plan = pool.schedule()
        assert ids_of(plan) == ([], ["a"])
        carry_out(pool, plan)
    assert seq.finished
    assert not pool.has_work()
    assert pool.free_blocks == 16
    assert seq.blocks == []
    assert pool.schedule() == StepPlan(prefill=(), decode=())


def test_first_come_first_served_even_when_a_later_one_would_fit() -> None:
    pool = scheduler(blocks=10)
    for name, prompt in (("big", 28), ("huge", 20), ("small", 1)):
        pool.add(make(name, prompt, 4))
    pool.schedule()
    assert (pool.num_running, pool.num_waiting) == (1, 2), "small must not overtake huge"
    pool.finish(_live(pool, "big"))
    plan = pool.schedule()
    assert ids_of(plan)[0][0] == "huge"
    assert pool.num_waiting == 0


def test_prefill_goes_in_order_of_arrival_and_shares_the_chunk() -> None:
    pool = scheduler(chunk=8, blocks=100)
    for name, prompt in (("a", 5), ("b", 10), ("c", 2)):
        pool.add(make(name, prompt, 4))
    plan = pool.schedule()
    assert [(c.seq.request_id, c.start, c.end) for c in plan.prefill] == [("a", 0, 5), ("b", 0, 3)]
    carry_out(pool, plan)
    plan = pool.schedule()
    assert [(c.seq.request_id, c.start, c.end) for c in plan.prefill] == [("b", 3, 10), ("c", 0, 1)]
    assert [s.request_id for s in plan.decode] == ["a"], "decoding goes on beside prefill"
    carry_out(pool, plan)
    plan = pool.schedule()
    assert [(c.seq.request_id, c.start, c.end) for c in plan.prefill] == [("c", 1, 2)]
    assert [s.request_id for s in plan.decode] == ["a", "b"]


def test_a_prompt_alone_is_computed_in_larger_parts_than_beside_others() -> None:
    pool = Scheduler(num_blocks=100, block_size=4, max_running=8, prefill=Prefill(beside=4, alone=20))
    for name, prompt in (("a", 9), ("b", 30)):
        pool.add(make(name, prompt, 4))
    plan = pool.schedule()
    assert [(c.seq.request_id, c.start, c.end) for c in plan.prefill] == [("a", 0, 9), ("b", 0, 11)]
    carry_out(pool, plan)
    plan = pool.schedule()
    assert ids_of(plan) == (["b"], ["a"]) and [(c.start, c.end) for c in plan.prefill] == [(11, 15)]
    pool.finish(_live(pool, "a"))
    assert [(c.start, c.end) for c in pool.schedule().prefill] == [(11, 30)]


def test_where_bits_depend_on_it_a_prompt_is_cut_as_if_it_were_alone() -> None:
    pool = Scheduler(num_blocks=100, block_size=4, max_running=8, prefill=Prefill(beside=8, alone=8, fixed=True))
    lengths = {"a": 21, "b": 3, "c": 18, "d": 2}
    for name, length in lengths.items():
        pool.add(make(name, prompt=length, max_tokens=4))
    steps = []
    while pool.num_waiting or not all(seq.prompt_computed for seq in pool._admitted.values()):
        plan = pool.schedule()
        steps.append([(chunk.seq.request_id, chunk.start, chunk.end) for chunk in plan.prefill])
        carry_out(pool, plan)
    assert steps == [
        *([("a", 0, 8)], [("a", 8, 16)], [("a", 16, 21), ("b", 0, 3)], [("c", 0, 8)], [("c", 8, 16)]),
        [("c", 16, 18), ("d", 0, 2)],
    ]


def test_no_more_than_max_running_are_admitted() -> None:
    pool = scheduler(max_running=3, blocks=100, chunk=100)
    for n in range(5):
        pool.add(make(str(n), 2, 50))
    carry_out(pool, pool.schedule())
    assert (pool.num_running, pool.num_waiting) == (3, 2)
    pool.finish(_live(pool, "1"))
    plan = pool.schedule()
    assert ids_of(plan) == (["3"], ["0", "2"])


def test_admission_reserves_for_the_whole_output() -> None:
    pool = scheduler(blocks=4, block_size=4, chunk=100)
    pool.add(make("a", prompt=1, max_tokens=8))  # 9 tokens: 3 blocks
    pool.add(make("b", prompt=1, max_tokens=4))  # 5 tokens: 2 blocks, one too many
    pool.schedule()
    assert (pool.num_running, pool.free_blocks) == (1, 1)
    while pool.num_running and pool.num_waiting:
        carry_out(pool, pool.schedule())
        pool.check_integrity()
    carry_out(pool, pool.schedule())
    assert _live(pool, "b").num_output == 1


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "fits"), [(1, 63, True), (1, 64, False), (63, 1, True), (64, 1, False)]
)
def test_what_can_never_fit_is_refused_with_the_limit(prompt: int, max_tokens: int, fits: bool) -> None:
    pool = scheduler(blocks=16, block_size=4)
    seq = make("a", prompt, max_tokens)
    if fits:
        pool.add(seq)
        pool.schedule()
        assert pool.free_blocks == 0
        return
    with pytest.raises(RequestError, match=rf"are {prompt + max_tokens} tokens, must be at most 64") as caught:
        pool.add(seq)
    assert caught.value.param == "max_tokens"
    assert "hint" in str(caught.value)
    assert not pool.has_work()


def test_a_live_id_is_refused_and_a_finished_one_is_free_again() -> None:
    pool = scheduler()
    pool.add(make("a", 2, 2))
    with pytest.raises(RequestError, match="request_id is 'a', must be unique"):
        pool.add(make("a", 3, 3))
    pool.schedule()
    with pytest.raises(RequestError, match="must be unique"):
        pool.add(make("a", 3, 3))
    pool.finish(_live(pool, "a"))
    pool.add(make("a", 3, 3))
    assert pool.num_waiting == 1


def test_cancel_while_waiting() -> None:
    pool = scheduler(max_running=1)
    first, second, third = make("1", 2, 2), make("2", 2, 2), make("3", 2, 2)
    for seq in (first, second, third):
        pool.add(seq)
    pool.schedule()
    assert pool.cancel("2") is second
    pool.finish(second)
    assert pool.cancel("2") is None
    pool.check_integrity()
    assert (pool.num_running, pool.num_waiting) == (1, 1)
    pool.finish(first)
    assert ids_of(pool.schedule())[0] == ["3"]


@pytest.mark.parametrize("steps", [1, 2, 3], ids=["mid prefill", "after prefill", "decoding"])
def test_cancel_while_admitted_frees_the_blocks(steps: int) -> None:
    pool, seq = scheduler(chunk=4), make("a", 7, 20)
    pool.add(seq)
    for _ in range(steps):
        carry_out(pool, pool.schedule())
    assert pool.free_blocks < 16
    assert pool.cancel("a") is seq
    pool.finish(seq)
    pool.check_integrity()
    assert (pool.free_blocks, pool.has_work(), seq.blocks) == (16, False, [])


def test_cancel_of_a_stranger_is_nothing() -> None:
    assert scheduler().cancel("who") is None


def test_finishing_a_waiting_sequence_takes_it_from_the_queue() -> None:
    pool, seq = scheduler(), make("a", 2, 2)
    pool.add(seq)
    pool.finish(seq)
    assert not pool.has_work()
    assert pool.schedule() == StepPlan(prefill=(), decode=())


def test_finishing_a_cancelled_sequence_leaves_its_ids_new_owner_alone() -> None:
    pool, old, new = scheduler(), make("a", 2, 2), make("a", 3, 3)
    pool.add(old)
    pool.cancel("a")
    pool.add(new)
    pool.schedule()
    pool.finish(old)
    pool.check_integrity()
    assert pool.num_running == 1
    assert _live(pool, "a") is new


def test_finishing_twice_is_harmless() -> None:
    pool, seq = scheduler(), make("a", 2, 2)
    pool.add(seq)
    pool.schedule()
    pool.finish(seq)
    pool.finish(seq)
    pool.check_integrity()


def test_check_integrity_sees_lost_blocks() -> None:
    pool, seq = scheduler(), make("a", 5, 5)
    pool.add(seq)
    pool.schedule()
    seq.blocks = seq.blocks[:-1]
    with pytest.raises(AssertionError, match="held"):
        pool.check_integrity()


@pytest.mark.parametrize("size", ["blocks", "block_size", "max_running", "chunk"])
def test_sizes_must_be_positive(size: str) -> None:
    with pytest.raises(AssertionError, match="must be positive"):
        scheduler(**{size: 0})


def _live(pool: Scheduler, request_id: str) -> Sequence:
    seq = pool._admitted.get(request_id) or pool._waiting.get(request_id)
    assert seq is not None, f"{request_id} is not live"
    return seq


class Model:
    """Random traffic, and what must be true of every plan."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.block_size, self.max_running = rng.choice([1, 3, 16]), rng.choice([1, 2, 5, 40])
        self.blocks, self.chunk = rng.choice([4, 20, 90]), rng.choice([1, 7, 64])
        self.pool = scheduler(
            blocks=self.blocks, block_size=self.block_size, max_running=self.max_running, chunk=self.chunk
        )
        self.queue: list[Sequence] = []  # in order of arrival, not admitted
        self.live: list[Sequence] = []  # in order of admission
        self.added = self.ended = 0

    def operate(self) -> None:
        kind = self.rng.random()
        if kind < 0.3:
            self.add()
        elif kind < 0.4:
            self.cancel()
        else:
            self.step()
        self.check()

    def add(self) -> None:
        room = self.blocks * self.block_size
        seq = make(str(self.added), self.rng.randint(1, room), self.rng.randint(1, max(1, room // 3)))
        self.added += 1
        if seq.max_length > room:
            with pytest.raises(RequestError, match=str(room)):
                self.pool.add(seq)
            self.ended += 1
        else:
            self.pool.add(seq)
            self.queue.append(seq)

    def cancel(self) -> None:
        everyone = [*self.queue, *self.live]
        if everyone:
            seq = self.rng.choice(everyone)
            assert self.pool.cancel(seq.request_id) is seq
            seq.finish("cancelled")
            self.pool.finish(seq)
            self.forget(seq)

    def forget(self, seq: Sequence) -> None:
        (self.queue if seq in self.queue else self.live).remove(seq)
        self.ended += 1

    def admit(self) -> None:
        """What the rules say is admitted now: from the front, while there is room for all it may need."""
        free = self.blocks - sum(self.need(s) for s in self.live)
        while self.queue and len(self.live) < self.max_running and self.need(self.queue[0]) <= free:
            free -= self.need(self.queue[0])
            self.live.append(self.queue.pop(0))

    def need(self, seq: Sequence) -> int:
        return -(-seq.max_length // self.block_size)

    def step(self) -> None:
        self.admit()
        plan = self.pool.schedule()
        room, prefill = self.chunk, []
        for seq in self.live:
            tokens = min(room, seq.prompt_length - seq.num_computed)
            if tokens > 0:
                prefill.append((seq.request_id, seq.num_computed, seq.num_computed + tokens))
                room -= tokens
        assert [(c.seq.request_id, c.start, c.end) for c in plan.prefill] == prefill
        assert sum(c.end - c.start for c in plan.prefill) <= self.chunk
        assert list(plan.decode) == [s for s in self.live if s.num_output > 0]
        assert all(s.state is SequenceState.RUNNING for s in plan.decode)
        assert plan.prefill or plan.decode or not self.pool.has_work(), "work stands still"
        carry_out(self.pool, plan)
        for seq in [s for s in self.live if s.finished]:
            self.forget(seq)

    def check(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_waiting == len(self.queue)
        assert self.pool.num_running == len(self.live)
        assert self.pool.free_blocks == self.blocks - sum(self.need(s) for s in self.live)
        assert all(len(s.blocks) == self.need(s) for s in self.live)
        assert self.pool.has_work() == bool(self.queue or self.live)


@pytest.mark.parametrize("seed", range(8))
def test_random_operations_follow_the_rules(seed: int) -> None:
    model = Model(random.Random(seed))
    for _ in range(600):
        model.operate()
    while model.pool.has_work():
        model.step()
        model.check()
    assert model.ended == model.added
    assert model.pool.free_blocks == model.blocks


@settings(max_examples=40)
@given(randomness=st.randoms(use_true_random=False), operations=st.integers(1, 60))
def test_any_operations_follow_the_rules(randomness: random.Random, operations: int) -> None:
    model = Model(randomness)
    for _ in range(operations):
        model.operate()


def growing(*, blocks: int, max_running: int) -> Scheduler:
    room = Prefill(beside=64, alone=64)
    return Scheduler(num_blocks=blocks, block_size=4, max_running=max_running, prefill=room, grows=True)


@pytest.mark.parametrize("grows", [False, True])
def test_one_tenant_with_many_requests_does_not_starve_another(grows: bool) -> None:
    pool = growing(blocks=400, max_running=4) if grows else scheduler(blocks=400, max_running=4)
    for at in range(64):
        pool.add(make(f"a{at}", 5, 40, "a"))
    for _ in range(10):
        carry_out(pool, pool.schedule())
    pool.add(make("b", 5, 10, "b"))
    steps = 0
    while "b" in {*pool._waiting, *pool._admitted}:
        carry_out(pool, pool.schedule())
        pool.check_integrity()
        steps += 1
    assert steps <= (14 if grows else 60), "it has the next place that is free, or one that is taken for it at once"
    assert pool.preemptions == int(grows)
    while pool.has_work():
        carry_out(pool, pool.schedule())
    assert pool.free_blocks == 400


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_tenants_that_always_wait_get_what_they_weigh(weight: float) -> None:
    pool, made = growing(blocks=400, max_running=6), {"a": 0, "b": 0}
    count = 0
    for _ in range(1500):
        while sum(seq.request.tenant == "a" for seq in pool._waiting.values()) < 20:
            pool.add(make(f"a{(count := count + 1)}", 4, 9, "a", weight))
        while sum(seq.request.tenant == "b" for seq in pool._waiting.values()) < 2:
            pool.add(make(f"b{(count := count + 1)}", 20, 30, "b"))
        plan = pool.schedule()
        for seq in plan.decode:
            made[seq.request.tenant] += 2
        for chunk in plan.prefill:
            made[chunk.seq.request.tenant] += chunk.end - chunk.start
        carry_out(pool, plan)
    assert made["a"] == pytest.approx(weight * made["b"], rel=0.06), "short requests or long ones, many or few"
    assert pool.preemptions < 30, "who has a place keeps it"


def test_a_short_prompt_does_not_wait_for_another_tenants_long_ones() -> None:
    pool = scheduler(blocks=400, chunk=8)
    for at in range(3):
        pool.add(make(f"a{at}", 14, 4, "a"))
    carry_out(pool, pool.schedule())
    pool.add(make("b", 6, 4, "b"))
    order = []
    for _ in range(2):
        plan = pool.schedule()
        order.append(ids_of(plan)[0])
        carry_out(pool, plan)
    assert order == [["a0", "a1"], ["b", "a1"]], "as much of another's as of its own, not all"


def test_room_in_the_cache_is_shared_like_places() -> None:
    pool = growing(blocks=16, max_running=8)
    for at in range(3):
        pool.add(make(f"a{at}", 17, 40, "a"))
    for _ in range(3):
        carry_out(pool, pool.schedule())
    assert pool.num_running == 2 and pool.free_blocks == 6, "too few beside what the two want next"
    pool.add(make("b", 20, 4, "b"))
    carry_out(pool, pool.schedule())
    carry_out(pool, pool.schedule())
    assert {seq.request.tenant for seq in pool._admitted.values()} == {"a", "b"}
    pool.check_integrity()


def test_what_repeats_a_record_and_whose_prompt_is_computed_keep_their_places() -> None:
    pool = growing(blocks=400, max_running=2)
    for at in range(4):
        pool.add(make(f"a{at}", 200, 4, "a"))
    pool.schedule()
    pool.add(make("b", 5, 4, "b"))
    pool.schedule()
    assert pool.preemptions == 0, "a prompt is not begun twice"
    alone = growing(blocks=400, max_running=2)
    for name in "abc":
        alone.add(make(name, 5, 40, name))
    for _ in range(20):
        carry_out(alone, alone.schedule())
    assert alone.preemptions == 0, "who has one place keeps it"


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_tenants_at_random_all_come_to_their_end(seed: int) -> None:
    rng = random.Random(seed)
    pool = growing(blocks=rng.randrange(12, 60), max_running=rng.randrange(1, 6))
    live: dict[str, Sequence] = {}
    for at in range(40):
        seq = make(str(at), rng.randrange(1, 30), rng.randrange(1, 15), rng.choice("aaab") + rng.choice(["", "c"]))
        pool.add(seq)
        live[seq.request_id] = seq
        for _ in range(rng.randrange(4)):
            carry_out(pool, pool.schedule())
            pool.check_integrity()
        if rng.random() < 0.2:
            gone = rng.choice([*live.values()])
            if not gone.finished:
                gone.finish("cancelled")
                pool.cancel(gone.request_id)
                pool.finish(gone)
    for _ in range(3000):
        if not pool.has_work():
            break
        carry_out(pool, pool.schedule())
        pool.check_integrity()
    assert not pool.has_work() and all(seq.finished for seq in live.values())
