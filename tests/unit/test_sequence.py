"""How one request ends and what its events say, with real tokenizers and without one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import SPECIALS, bpe

from buddymoe_ray.engine.sampler import Sampled
from buddymoe_ray.engine.sequence import Sequence, SequenceState
from buddymoe_ray.errors import RequestError
from buddymoe_ray.moe import StepOutcome
from buddymoe_ray.types import GenerationRequest, SamplingParams, TokenEvent, TokenLogprob, Usage

EOS = bpe().convert_tokens_to_ids(SPECIALS[0])


def encode(text: str) -> list[int]:
    return bpe().encode(text, add_special_tokens=False)


def make(prompt: str = "The fox", *, max_model_len: int = 1000, tokenizer: Any = "bpe", **sampling: Any) -> Sequence:
    params = SamplingParams(**{"max_tokens": 100, **sampling})
    request = GenerationRequest(request_id="r", prompt_token_ids=tuple(encode(prompt)), sampling=params)
    chosen = bpe() if tokenizer == "bpe" else tokenizer
    return Sequence(request, tokenizer=chosen, eos_token_ids=frozenset({EOS}), max_model_len=max_model_len)


def feed(seq: Sequence, ids: list[int]) -> list[TokenEvent]:
    """Append ids until the sequence ends."""
    events = []
    for token in ids:
        events.append(seq.append(Sampled(token_id=token)))
        if seq.finished:
            break
    return events


def text_of(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def test_a_new_sequence_waits() -> None:
    seq = make("The fox", max_tokens=5)
    assert seq.state is SequenceState.WAITING
    assert (seq.output_ids, seq.num_output, seq.num_computed, seq.blocks) == ([], 0, 0, [])
    assert seq.max_length == seq.prompt_length + 5
    assert not seq.finished
    assert not seq.prompt_computed


def test_length_ends_and_the_text_is_whole() -> None:
    ids = encode(" jumps over 世界 🙂 again and again")
    seq = make(max_tokens=len(ids))
    events = feed(seq, ids)
    assert text_of(events) == " jumps over 世界 🙂 again and again"
    assert [e.finish_reason for e in events] == [None] * (len(ids) - 1) + ["length"]
    assert [t for e in events for t in e.token_ids] == ids == seq.output_ids
    assert all(e.request_id == "r" and e.error is None for e in events)
    assert seq.state is SequenceState.FINISHED


def test_the_end_token_ends_without_text() -> None:
    seq = make()
    events = feed(seq, [*encode(" dog"), EOS, *encode(" never")])
    assert text_of(events) == " dog"
    assert events[-1].finish_reason == "stop"
    assert events[-1].token_ids == (EOS,)
    assert seq.output_ids[-1] == EOS


def test_ignore_eos_goes_on() -> None:
    seq = make(ignore_eos=True, max_tokens=4)
    events = feed(seq, [EOS, EOS, *encode(" x")[:1], EOS])
    assert len(events) == 4
    assert events[-1].finish_reason == "length"
    assert "end" not in text_of(events)


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_stop_token_ids_end_also_with_ignore_eos(ignore_eos: bool) -> None:
    ids = encode(" over the lazy")
    seq = make(stop_token_ids=(ids[-1],), ignore_eos=ignore_eos)
    events = feed(seq, [*ids, *encode(" dog")])
    assert events[-1].finish_reason == "stop"
    assert events[-1].token_ids == (ids[-1],)
    assert text_of(events) == bpe().decode(ids[:-1])


def test_an_end_token_as_last_of_the_length_is_a_stop() -> None:
    seq = make(max_tokens=1)
    assert feed(seq, [EOS])[0].finish_reason == "stop"


def test_a_stop_string_across_tokens_is_neither_shown_nor_passed() -> None:
    ids = encode("a b STOP c d")
    seq = make(stop=("STOP",))
    events = feed(seq, ids)
    assert len(events) < len(ids)
    assert text_of(events) == "a b "
    assert (events[-1].finish_reason, events[-1].stop) == ("stop", "STOP")
    assert events[-1].usage is not None


def test_held_text_comes_out_at_the_length() -> None:
    ids = encode("x ST")
    seq = make(stop=("STOP",), max_tokens=len(ids))
    events = feed(seq, ids)
    assert text_of(events) == "x ST"
    assert text_of(events[:-1]) in ("x", "x ", "")
    assert events[-1].finish_reason == "length"


def test_held_text_comes_out_at_the_end_token() -> None:
    seq = make(stop=("STOP",))
    events = feed(seq, [*encode("x STO"), EOS])
    assert text_of(events) == "x STO" and events[-1].stop is None
    assert events[-1].text.endswith("STO")


def test_a_stop_string_met_by_the_last_token_is_a_stop() -> None:
    ids = encode("x STOP")
    seq = make(stop=("STOP",), max_tokens=len(ids))
    events = feed(seq, ids)
    assert (text_of(events), events[-1].finish_reason) == ("x ", "stop")


def test_a_stop_string_held_by_an_unfinished_character_is_still_met() -> None:
    """The last token completes the stop string and begins a character: the text comes with the flush."""

    class Joined:
        """Two ids: the second is a letter and the first byte of a character, as a BPE merge may be."""

        def decode(self, token_ids: list[int], **_: Any) -> str:
            return b"".join({1: b"a", 2: b"b\xe4"}[i] for i in token_ids).decode(errors="replace")

    request = GenerationRequest(
        request_id="r", prompt_token_ids=(1,), sampling=SamplingParams(stop=("ab",), max_tokens=2)
    )
    seq = Sequence(request, tokenizer=Joined(), max_model_len=10)
    events = feed(seq, [1, 2])
    assert (text_of(events), events[-1].finish_reason) == ("", "stop")


def test_an_unfinished_character_is_dropped_at_the_length() -> None:
    ids = encode("ab龘")
    seq = make(max_tokens=len(ids) - 1)
    assert text_of(feed(seq, ids)) == "ab"


@settings(max_examples=200)
@given(
    text=st.text(alphabet="ab 世🙂", max_size=20),
    stops=st.lists(st.text(alphabet="ab 世🙂", min_size=1, max_size=4), max_size=2),
)
def test_text_is_that_before_the_stop_string(text: str, stops: list[str]) -> None:
    ids = encode(text)
    events = feed(make(stop=tuple(stops)), [*ids, EOS])
    ends = sorted((text.find(s) + len(s), text.find(s)) for s in stops if s in text)
    assert text_of(events) == (text[: ends[0][1]] if ends else text)
    assert events[-1].finish_reason == "stop"


def test_the_models_limit_clamps_the_length() -> None:
    prompt = encode("The quick brown fox")
    seq = make("The quick brown fox", max_model_len=len(prompt) + 3, max_tokens=100)
    assert seq.max_tokens == 3
    assert seq.max_length == len(prompt) + 3
    events = feed(seq, encode(" a b c d e f g"))
    assert len(events) == 3
    assert events[-1].finish_reason == "length"


def test_a_prompt_without_room_is_refused_and_names_the_limit() -> None:
    length = len(encode("The quick brown fox"))
    with pytest.raises(RequestError, match=rf"prompt is {length} tokens, must be at most {length - 1}") as caught:
        make("The quick brown fox", max_model_len=length)
    assert caught.value.param == "prompt"
    assert str(length) in str(caught.value)
    make("The quick brown fox", max_model_len=length + 1)


def test_without_tokenizer_tokens_go_on_without_text() -> None:
    seq = make(tokenizer=None, max_tokens=3)
    events = feed(seq, encode(" over the lazy dog"))
    assert len(events) == 3
    assert text_of(events) == ""
    assert events[-1].finish_reason == "length"
    assert feed(make(tokenizer=None), [EOS])[0].finish_reason == "stop"


def test_stop_strings_without_tokenizer_are_refused() -> None:
    with pytest.raises(RequestError, match="hint: use stop_token_ids") as caught:
        make(tokenizer=None, stop=("x",))
    assert caught.value.param == "stop"


def test_logprobs_are_passed_through() -> None:
    seq = make(logprobs=2)
    event = seq.append(Sampled(token_id=40, logprob=-0.5, top=((40, -0.5), (41, -1.5))))
    assert event.logprobs == (TokenLogprob(token_id=40, logprob=-0.5, top=((40, -0.5), (41, -1.5))),)
    assert make().append(Sampled(token_id=40)).logprobs == ()
    assert make(logprobs=0).append(Sampled(token_id=40, logprob=0.0)).logprobs[0].top == ()


def test_usage_comes_once_with_the_last_event() -> None:
    seq = make("The fox", max_tokens=3)
    events = []
    for token in encode(" a b c d"):
        seq.account.settle(
            StepOutcome(accesses_TA=np.array([[3, 1, 0, 0, *[0] * 5]]), loss_T=np.zeros(1, np.float32)), 0
        )
        events += feed(seq, [token])
        if seq.finished:
            break
    assert [e.usage for e in events[:-1]] == [None, None]
    assert events[-1].usage == Usage(
        prompt_tokens=len(encode("The fox")), completion_tokens=3, hits=9, fetched=3, mode="exact"
    )


def test_cancelled_ends_without_more_text() -> None:
    seq = make(stop=("STOP",))
    feed(seq, encode("x STO"))
    event = seq.finish("cancelled")
    assert (event.finish_reason, event.text, event.token_ids, event.error) == ("cancelled", "", (), None)
    assert event.usage is not None
    assert event.usage.completion_tokens == len(encode("x STO"))
    assert seq.finished


def test_an_error_ends_with_its_message_and_the_held_text() -> None:
    seq = make(stop=("STOP",))
    events = feed(seq, encode("x STO"))
    event = seq.finish("error", error="disk is gone")
    assert (event.finish_reason, event.error) == ("error", "disk is gone")
    assert text_of([*events, event]) == "x STO"


def test_a_waiting_sequence_can_be_cancelled() -> None:
    event = make().finish("cancelled")
    assert event.usage is not None
    assert event.usage.completion_tokens == 0


def test_nothing_follows_the_end() -> None:
    seq = make()
    seq.finish("cancelled")
    with pytest.raises(AssertionError, match="is finished"):
        seq.append(Sampled(token_id=40))
    with pytest.raises(AssertionError, match="is finished"):
        seq.finish("error", error="again")


def test_advance_counts_what_is_computed() -> None:
    seq = make("The quick brown fox")
    seq.advance(2)
    assert not seq.prompt_computed
    seq.advance(seq.prompt_length - 2)
    assert seq.prompt_computed
    with pytest.raises(AssertionError, match="computed"):
        seq.advance(1)
    token = encode(" x")[0]
    seq.append(Sampled(token_id=token))
    seq.advance(1)
    assert seq.token_ids(seq.prompt_length, seq.num_computed) == [token]
    assert seq.state is SequenceState.RUNNING


def test_the_sampling_state_lives_with_the_tokens() -> None:
    seq = make("The fox", seed=9)
    assert seq.sampling_state.seed == 9
    assert seq.sampling_state.position == seq.prompt_length
    seq.append(Sampled(token_id=40))
    assert seq.sampling_state.position == seq.prompt_length + 1
    ids, often = seq.sampling_state.seen()
    assert dict(zip(ids.tolist(), often.tolist(), strict=True))[40] == 1


def test_seeds_of_requests_without_one() -> None:
    request = GenerationRequest(request_id="a", prompt_token_ids=(1, 2))

    def seed(request_id: str, default: int | None) -> int:
        seq = Sequence(replace(request, request_id=request_id), max_model_len=50, default_seed=default)
        return seq.sampling_state.seed

    assert seed("a", 7) == seed("a", 7), "the same engine seed and id draw the same"
    assert len({seed("a", 7), seed("b", 7), seed("a", 8), seed("b", 8)}) == 4
    assert seed("a", None) != seed("a", None)


@pytest.mark.parametrize("size", [1, 3, 50])
def test_offsets_index_the_text_that_a_stop_string_left(size: int) -> None:
    ids = encode(" jumps 世界 over the moon")
    whole, stop = " jumps 世界 over the moon", "r the"
    seq = make(stop=(stop,), logprobs=0)
    events, told = [], 0
    for token in ids[: size * len(ids)]:
        events.append(seq.append(Sampled(token_id=token, logprob=-1.0)))
        told += len(events[-1].text)
        assert all(offset <= told for offset in events[-1].text_offsets), "an offset points at text that is not out"
        if seq.finished:
            break
    offsets = [offset for event in events for offset in event.text_offsets]
    text = text_of(events)
    assert text == whole[: whole.index(stop)] and len(offsets) == seq.num_output
    prompt = encode("The fox")
    begun = [len(bpe().decode(prompt + ids[:at]).rstrip("\ufffd")) - len("The fox") for at in range(len(offsets))]
    assert offsets == [min(begin, len(text)) for begin in begun]


def test_offsets_of_silent_tokens_and_of_a_resumed_answer() -> None:
    ids = [*encode(" 世"), bpe().convert_tokens_to_ids(SPECIALS[1]), *encode(" 界🙂 the fox"), EOS]

    def offsets(resumed: int) -> list[int]:
        params = SamplingParams(max_tokens=100, logprobs=0, stop=("the moon",))
        prompt, had = tuple(encode("The fox")), tuple(ids[:resumed])
        request = GenerationRequest(request_id="r", prompt_token_ids=prompt, sampling=params, resumed_token_ids=had)
        seq = Sequence(request, tokenizer=bpe(), eos_token_ids=frozenset({EOS}), max_model_len=1000)
        return [offset for event in feed(seq, ids[resumed:]) for offset in event.text_offsets]

    whole = offsets(0)
    assert len(whole) == len(ids) and whole[-1] == len(" 世 界🙂 the fox")
    for resumed in range(1, len(ids)):
        rest = offsets(resumed)
        assert rest == whole[len(whole) - len(rest) :]  # nothing is told twice
        assert len(ids) - resumed <= len(rest)  # and what was not settled is told now


def test_a_model_without_text_has_offsets_of_nothing() -> None:
    events = feed(make(tokenizer=None, max_tokens=3, logprobs=0), [5, 6, 7])
    assert [event.text_offsets for event in events] == [(0,), (0,), (0,)]
    assert [event.text_offsets for event in feed(make(max_tokens=2), [5, 6])] == [(), ()]


def test_a_stop_string_that_only_a_special_token_spells_stops() -> None:
    ids = [*encode(" jumps"), bpe().convert_tokens_to_ids(SPECIALS[2]), *encode(" over")]
    events = feed(make(stop=(SPECIALS[2],), ignore_eos=True), ids)
    assert events[-1].stop == SPECIALS[2]
    assert (text_of(events), events[-1].finish_reason) == (" jumps", "stop")
    assert len(events) == len(encode(" jumps")) + 1
    spelt = encode(" jumps <|im_") + encode("end|> over")  # as ordinary text it stops as ever
    assert text_of(feed(make(stop=(SPECIALS[2],)), spelt)) == " jumps "


def test_where_special_tokens_give_text_a_stop_string_may_hold_one_beside_other_text() -> None:
    ids = [*encode(" jumps"), bpe().convert_tokens_to_ids(SPECIALS[1]), *encode(" over")]
    events = feed(make(stop=(SPECIALS[1] + " o",), skip_special_tokens=False), ids)
    assert (text_of(events), events[-1].finish_reason, events[-1].stop) == (" jumps", "stop", SPECIALS[1] + " o")
