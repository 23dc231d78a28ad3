"""Reads ahead: begun on a guess, taken over by who asks, else given up; no bit changes, and they stop where they do not
pay."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experts_on_disk import expert_bytes_of, make_layout, plan_of
from families import build_checkpoint

import buddymoe_ray.residency.tier as tier
from buddymoe_ray import LLM
from buddymoe_ray.cache import DiskReader, ExpertCache, open_private
from buddymoe_ray.cache.disk import Bytes, ReadTicket, _Read
from buddymoe_ray.errors import CacheError, ConfigError
from buddymoe_ray.moe import FirstLayer, MoEBlock, ReadAhead
from buddymoe_ray.policy import ReadAheadGain
from buddymoe_ray.types import ExpertKey, ExpertPiece, GenerationRequest, SamplingParams

PROMPTS = [[5 + (7 * i + 3 * j) % 90 for j in range(n)] for i, n in enumerate((23, 3, 17))]


def settle(gain: ReadAheadGain, rounds: int, *, right: float, misses: int = 2, read_cost: float = 0.2) -> None:
    """So many passes with `misses` guesses, of which the first ranks are right and the last in `right` of the cases."""
    rng = random.Random(0)
    for _ in range(rounds):
        missing = {rank: rank for rank in range(misses)}
        used = set(range(misses - 1)) | ({misses - 1} if rng.random() < right else set())
        gain.note(1, missing, used, read_cost=read_cost)


def test_reads_begin_where_guesses_are_right_and_end_where_they_are_not() -> None:
    gain = ReadAheadGain(2, 4)
    assert gain.guesses(1, 3) and not any(gain.reads(1)), "first it only looks"
    settle(gain, 40, right=0.8)
    assert list(gain.reads(1)) == [True, True, False, False]
    assert gain.guesses(1, 3)
    settle(gain, 60, right=0.1)
    assert list(gain.reads(1)) == [True, False, False, False], "the rank that is wrong stops, the other goes on"
    settle(gain, 60, right=0.0, misses=1)
    assert not any(gain.reads(1)) and not gain.guesses(1, 3)
    assert gain.guesses(1, 32), "now and then it looks again"
    settle(gain, 60, right=1.0, misses=1)
    assert gain.reads(1)[0]


def test_where_little_can_hide_only_sure_guesses_are_read() -> None:
    """Four reads take 8 times as long as a layer computes: seven in eight useful reads hide nothing."""
    for right, pays in ((0.8, False), (0.95, True)):
        gain, rng = ReadAheadGain(2, 1), random.Random(1)
        for _ in range(200):
            used = {0} if rng.random() < right else set()
            gain.note(1, {0: 0}, used, read_cost=8.0)
        assert gain.reads(1)[0] is pays, right


def test_what_was_read_is_counted_and_what_was_only_guessed_is_not() -> None:
    gain = ReadAheadGain(2, 4)
    settle(gain, 7, right=1.0)
    assert (gain.useful, gain.wasted) == (0, 0)
    settle(gain, 20, right=1.0)
    useful = gain.useful
    assert useful > 20 and gain.wasted == 0
    gain.note(1, {0: 0, 1: 1}, {0}, read_cost=0.2)
    assert (gain.useful, gain.wasted) == (useful + 1, 1)


class Slow(DiskReader):
    """Reads once `gate` is open, one at a time."""

    def __init__(self) -> None:
        super().__init__(depth=1, buffer_bytes=8192)
        self.gate = threading.Event()
        self.gate.set()

    def _read_through(self, *args: Any) -> None:
        assert self.gate.wait(60), "the gate was never opened"
        super()._read_through(*args)

    def submit(self, pieces: Sequence[ExpertPiece], destination: Bytes) -> ReadTicket:
        """None of them at once, however small."""
        places = [destination[piece.slot_offset : piece.slot_offset + piece.nbytes] for piece in pieces]
        reads = [_Read(piece.path, piece.offset, (at,)) for piece, at in zip(pieces, places, strict=True)]
        return ReadTicket(tuple(self._start(read) for read in reads))


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    layout, truth = make_layout(tmp_path, experts_per_layer=(6, 6, 6))
    plan = plan_of(layout, 11)
    reader = Slow()
    with open_private(layout, plan, reader=reader) as cache:
        cache.warm()
        yield cache, truth, reader
        reader.gate.set()


def lend(cache: ExpertCache, truth: dict[ExpertKey, bytes], layer: int, experts: list[int]) -> list[int]:
    order = []
    for leases in cache.stream(layer, experts, protect_residency=False):
        for lease in leases:
            assert expert_bytes_of(dict(lease.tensors())) == truth[lease.key]
            order.append(lease.key.expert)
    return order


def arrive(cache: ExpertCache) -> None:
    """All that was begun ahead."""
    for load in cache._loads.ahead._loads.values():
        load.ticket.settle()
    cache._loads.ahead.land()


def absent(cache: ExpertCache, layer: int) -> list[int]:
    return sorted(set(range(6)) - cache.resident(layer))


def test_what_was_read_ahead_is_a_hit_or_on_its_way(opened: Any) -> None:
    cache, truth, reader = opened
    first, second, *_ = absent(cache, 1)
    cache.read_ahead(1, [first])
    arrive(cache)
    before = cache.stats()
    assert first in cache.resident(1) and lend(cache, truth, 1, [first]) == [first]
    assert cache.stats().misses == before.misses and cache.stats().bytes_read_disk == before.bytes_read_disk
    reader.gate.clear()
    cache.read_ahead(1, [second])
    assert second not in cache.resident(1)
    threading.Timer(0.05, reader.gate.set).start()
    requested = reader.bytes_requested
    assert lend(cache, truth, 1, [second]) == [second], "taken over, not read twice"
    assert reader.bytes_requested == requested + cache.layout.expert_bytes
    cache.check_integrity()


def test_a_wrong_guess_is_given_up_and_goes_first(opened: Any) -> None:
    cache, truth, reader = opened
    wrong, wanted, *_ = absent(cache, 1)
    kept = sorted(cache.resident(1))
    lend(cache, truth, 1, kept)
    reader.gate.clear()
    cache.read_ahead(0, absent(cache, 0)[:1])  # keeps the one reader busy
    cache.read_ahead(1, [*kept[1:], wrong])
    assert cache.resident(1) == set(kept[1:]), "room is made of what was not guessed"
    threading.Timer(0.05, reader.gate.set).start()
    requested = reader.bytes_requested
    assert lend(cache, truth, 1, [wanted]) == [wanted]
    cache.settle_ahead()
    assert wrong not in cache.resident(1) and wanted in cache.resident(1)
    assert reader.bytes_requested <= requested + 2 * cache.layout.expert_bytes, "the given up one was not read whole"
    cache.check_integrity()
    cache.read_ahead(1, [wrong])
    arrive(cache)
    lend(cache, truth, 1, sorted(cache.resident(1) - {wrong}))
    lend(cache, truth, 1, absent(cache, 1)[:1])
    assert wrong not in cache.resident(1), "nobody asked for it, so it is evicted before all others"


def test_a_failed_read_ahead_is_nobodys_until_it_is_asked_for(opened: Any, tmp_path: Path) -> None:
    cache, truth, _ = opened
    bad, *_ = absent(cache, 1)
    path = tmp_path / "layer1.bin"
    cache._reader._files.clear()
    path.rename(path.with_suffix(".away"))
    cache.read_ahead(1, [bad])
    arrive(cache)
    cache.check_integrity()
    with pytest.raises(CacheError, match="No such file"):
        lend(cache, truth, 1, [bad])
    path.with_suffix(".away").rename(path)
    cache.read_ahead(1, [bad])
    arrive(cache)
    assert lend(cache, truth, 1, [bad]) == [bad]
    cache.check_integrity()


def test_random_guesses_change_no_byte_and_leak_no_slot(opened: Any) -> None:
    cache, truth, _ = opened
    rng = random.Random(0)
    for _ in range(400):
        layer = rng.randrange(3)
        guess, asked = rng.sample(range(6), rng.randint(1, 4)), rng.sample(range(6), rng.randint(1, 4))
        if rng.random() < 0.7:
            cache.read_ahead(layer, guess, protect_residency=rng.random() < 0.5)
        assert sorted(lend(cache, truth, rng.choice([layer, (layer + 1) % 3]), asked)) == sorted(asked)
        if rng.random() < 0.3:
            cache.settle_ahead()
        cache.check_integrity()
    cache.settle_ahead()
    assert not cache.store.tables.lease.any(), "no slot is claimed for ever"


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Toy experts are read by the threads too, and every guess is acted on from the first."""
    monkeypatch.setattr("buddymoe_ray.cache.disk.READ_ON_THE_SPOT", 0)
    monkeypatch.setattr(tier, "READ_ON_THE_SPOT", 0)
    monkeypatch.setattr(ReadAheadGain, "guesses", lambda *_: True)
    monkeypatch.setattr(ReadAheadGain, "reads", lambda self, layer: [True] * 8)


def bits(folder: Path, **options: Any) -> tuple[list[list[tuple[int, float]]], tuple[int, int]]:
    with LLM(str(folder), **{"max_model_len": 64, **options}) as llm:
        results = llm.generate(PROMPTS, max_tokens=12, logprobs=0)
        ahead = llm.engine._experts.ahead
        llm.engine.cache.check_integrity()
        snapshot = llm.engine.snapshot()
    if ahead is not None:
        assert snapshot.read_ahead_useful_bytes == ahead.gain.useful * llm.engine.cache.layout.expert_bytes
    found = [[(item.token_id, item.logprob) for item in result.logprobs] for result in results]
    return found, (0, 0) if ahead is None else (ahead.gain.useful, ahead.gain.wasted)


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("olmoe", {}),
        ("olmoe", {"dtype": "bfloat16", "max_running": 1}),
        ("mixtral", {"expert_dtype": "int4", "dense_dtype": "int8"}),
        ("qwen3_moe", {"threads": 2}),  # the modules' path
        ("deepseek_v3", {"dtype": "bfloat16"}),  # a router of its own
        ("qwen2_moe", {"max_running": 1}),
    ],
)
def test_no_bit_depends_on_it(family: str, form: dict[str, Any], tmp_path: Path, eager: None) -> None:
    build_checkpoint(family, tmp_path)
    whole, none = bits(tmp_path, memory="100%", **form)
    on, counts = bits(tmp_path, memory="40%", **form)
    assert none == (0, 0) and on == whole
    assert sum(counts) > 0, "guesses were acted on"


def test_the_kernel_guesses_what_the_next_router_chooses(
    tmp_path: Path, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_checkpoint("olmoe", tmp_path)
    looks, seen = MoEBlock._look_ahead, list[int]()

    def looked(self: MoEBlock, hidden_TD: torch.Tensor, guess_TK: torch.Tensor | None) -> None:
        if guess_TK is not None and self._ahead is not None:
            assert torch.equal(guess_TK, self._ahead.choose(self.layer + 1, hidden_TD))
            seen.append(self.layer)
        looks(self, hidden_TD, guess_TK)

    monkeypatch.setattr(MoEBlock, "_look_ahead", looked)
    with LLM(str(tmp_path), memory="40%", max_model_len=64) as llm:
        llm.generate(PROMPTS, max_tokens=12)
    assert len(seen) > 5 and set(seen) == {0, 1}, "the last layer has none behind it"


def test_a_first_layer_asks_again_for_what_a_token_asked_for() -> None:
    first = FirstLayer(9, 2, lambda x_TD: x_TD.long(), lambda tokens_T: torch.stack([tokens_T, tokens_T + 1], 1))
    seen_TK, others_TK = first.guesses([3, 5])
    assert seen_TK.shape == (0, 2) and others_TK.tolist() == [[3, 4], [5, 6]], "the router on what is known of them"
    first.learn([5, 7], np.array([[1, 0], [2, 3]]))
    seen_TK, others_TK = first.guesses([3, 5])
    assert (seen_TK.tolist(), others_TK.tolist()) == ([[1, 0]], [[3, 4]])
    assert FirstLayer(9, 2, lambda x_TD: x_TD, None).guesses([3])[1].shape == (0, 2)


def test_a_first_layer_whose_guesses_do_not_pay_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step would pay for an embedding and a router."""
    first = FirstLayer(9, 2, lambda _: pytest.fail("the router was asked"), lambda tokens_T: tokens_T)
    ahead = ReadAhead(None, [lambda x_TD: x_TD] * 2, experts_per_token=2, first=first)  # type: ignore[arg-type]
    monkeypatch.setattr(ahead.gain, "guesses", lambda way, passes: False)
    ahead.begin([3, 5])


def test_the_first_layer_is_read_for_tokens_that_were_chosen(tmp_path: Path, eager: None) -> None:
    build_checkpoint("olmoe", tmp_path)
    with LLM(str(tmp_path), memory="40%", max_model_len=64) as llm:
        engine, cache, ahead = llm.engine, llm.engine.cache, llm.engine._experts.ahead
        assert ahead is not None and ahead._first is not None
        begun, read = list[list[int]](), cache.read_ahead

        def noted(layer: int, experts: Sequence[int]) -> None:
            begun.extend([list(experts)] if layer == 0 else [])
            read(layer, experts)

        cache.read_ahead = noted  # type: ignore[method-assign]
        sampling = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
        engine.add(GenerationRequest(request_id="a", prompt_token_ids=tuple(PROMPTS[0]), sampling=sampling))
        chosen = list[int]()
        for _ in range(8):
            before, events = len(begun), engine.step()
            chosen += events[-1].token_ids if events else ()
            if len(begun) > before:
                learnt, other = ahead._first.guesses(events[-1].token_ids)
                guess = (learnt if len(learnt) else other)[0].tolist()
                assert set(begun[-1]) <= set(guess), "what the token will ask for, before the step that computes it"
        assert begun
        assert len(ahead._first.guesses([*PROMPTS[0], *chosen[:-1]])[1]) == 0, "prompts and texts are learnt from"
        for layer in range(1, 3):
            read(layer, range(8))
        engine.cancel("a")
        assert not cache._loads.ahead._loads, "nobody else waits for what nobody goes on with"
        cache.check_integrity()


def test_for_prompts_wave_slots_are_filled_and_nothing_else_goes(opened: Any) -> None:
    cache, truth, reader = opened
    before = [cache.resident(layer) for layer in range(3)]
    wanted, later = absent(cache, 1), absent(cache, 2)
    assert not cache.read_ahead(1, wanted, protect_residency=True), "there are two wave slots for three"
    arrive(cache)
    assert cache.resident(1) == before[1] | set(wanted[:2]) and cache.resident(0) == before[0]
    assert not cache.read_ahead(2, later, protect_residency=True) and cache.resident(1) == before[1] | set(wanted[:2])
    read = reader.bytes_requested
    assert lend(cache, truth, 1, wanted[:2]) == wanted[:2] and reader.bytes_requested == read
    cache.read_ahead(1, wanted[:1], protect_residency=True)
    assert not cache.read_ahead(2, later[:2], protect_residency=True), "one of them will be asked for again"
    arrive(cache)
    assert cache.resident(1) == before[1] | {wanted[0]}
    lend(cache, truth, 1, wanted[:1])
    assert cache.read_ahead(2, later[:2], protect_residency=True), "they were asked for, so they may go"
    arrive(cache)
    assert cache.resident(2) == before[2] | set(later[:2]) and cache.resident(1) == before[1]
    assert cache.read_ahead(2, sorted(cache.resident(2)), protect_residency=True), "all are there"
    cache.check_integrity()


def test_who_asks_waits_for_the_slot_of_what_nobody_asked_for(opened: Any) -> None:
    cache, truth, reader = opened
    reader.gate.clear()
    cache.read_ahead(1, absent(cache, 1), protect_residency=True)
    threading.Timer(0.05, reader.gate.set).start()
    [leases] = cache.stream(2, absent(cache, 2)[:1], protect_residency=True)
    assert expert_bytes_of(dict(leases[0].tensors())) == truth[leases[0].key]
    cache.settle_ahead()
    cache.check_integrity()


def test_a_prompt_gives_no_guess_up(opened: Any) -> None:
    cache, _, reader = opened
    guessed, *_ = absent(cache, 1)
    reader.gate.clear()
    cache.read_ahead(0, absent(cache, 0)[:1])
    cache.read_ahead(1, [guessed])
    threading.Timer(0.05, reader.gate.set).start()
    for _ in cache.stream(2, absent(cache, 2)[:1], protect_residency=True):
        pass
    arrive(cache)
    assert guessed in cache.resident(1)


def test_where_nothing_is_to_be_hidden_nothing_is_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_checkpoint("olmoe", tmp_path)
    # resident, experts that are read on the spot, and where nobody wants it
    for options in ({"memory": "100%"}, {"memory": "40%"}, {"memory": "40%", "read_ahead": "off"}):
        if "read_ahead" in options:
            monkeypatch.setattr(tier, "READ_ON_THE_SPOT", 0)
        with LLM(str(tmp_path), max_model_len=64, **options) as llm:
            assert llm.engine._experts.ahead is None
    with pytest.raises(ConfigError, match="read_ahead is 'on', must be auto or off"):
        LLM(str(tmp_path), read_ahead="on")
