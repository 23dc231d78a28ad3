"""Streamed text equals decoded text for every way a tokenizer spells it, at every cut, and costs linear time."""

from __future__ import annotations

import random
import unicodedata
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_tokenizers import SPECIALS, TEXT, bpe, byte_fallback, metaspace

from buddymoe_ray.engine.detokenize import IncrementalDetokenizer

BROKEN = "\ufffd"
RANGES = [
    (0x20, 0x7E),
    (0xC0, 0x24F),
    (0x300, 0x36F),  # combining marks
    (0x400, 0x44F),
    (0x5D0, 0x5EA),
    (0x900, 0x94D),
    (0x3040, 0x30FF),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0x1F300, 0x1FAFF),
    (0x20000, 0x2A6DF),
]
characters = st.one_of(
    *(st.characters(min_codepoint=low, max_codepoint=high) for low, high in RANGES),
    st.sampled_from([" ", "  ", "\n", "\t", "\u200d", "\ufe0f", "👩‍👩‍👧‍👦", "🇩🇪", "the ", " over"]),
)
texts = st.lists(characters, max_size=24).map("".join)
sizes = st.lists(st.integers(min_value=1, max_value=40), min_size=1, max_size=8)


class Counting:
    """A real tokenizer that notes how many ids each decode was given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.windows: list[int] = []

    def decode(self, token_ids: list[int], **how: Any) -> str:
        self.windows.append(len(token_ids))
        return self.tokenizer.decode(token_ids, **how)


def decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stream(tokenizer: Any, prompt: list[int], ids: list[int], chunk_sizes: list[int]) -> list[str]:
    """Push the ids in chunks of the sizes, over and over; the last item is the flush."""
    detokenizer, pushed, at, turn = IncrementalDetokenizer(tokenizer, prompt), [], 0, 0
    while at < len(ids):
        size = chunk_sizes[turn % len(chunk_sizes)]
        pushed.append(detokenizer.push(ids[at : at + size]))
        at, turn = at + size, turn + 1
    return [*pushed, detokenizer.flush()]


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@settings(max_examples=250)
@example(prompt="", text="🙂", chunk_sizes=[1])
@example(prompt="", text="ÀÀÀÀÀ一👩\u200d👩\u200d👧\u200d👦", chunk_sizes=[5, 12])
@example(prompt="", text="e\u0301" * 20 + "世", chunk_sizes=[17])
@example(prompt="🙂你好", text="世界", chunk_sizes=[1])
@given(prompt=texts, text=texts, chunk_sizes=sizes)
def test_byte_level_text_is_exact_at_any_cut(prompt: str, text: str, chunk_sizes: list[int]) -> None:
    tokenizer = bpe()
    ids = encode(tokenizer, text)
    pushed = stream(tokenizer, encode(tokenizer, prompt), ids, chunk_sizes)
    assert "".join(pushed) == decode(tokenizer, ids) == text
    assert BROKEN not in "".join(pushed)


@settings(max_examples=200)
@example(prompt="🙂你", text="世界", chunk_sizes=[1])
@example(prompt="é你好🙂", text="世 界", chunk_sizes=[1])
@example(prompt="the", text=" 世界 over", chunk_sizes=[2])
@given(prompt=texts, text=texts, chunk_sizes=sizes)
def test_byte_fallback_text_is_exact_at_any_cut(prompt: str, text: str, chunk_sizes: list[int]) -> None:
    tokenizer = byte_fallback()
    head, ids = encode(tokenizer, prompt), encode(tokenizer, text)
    pushed = stream(tokenizer, head, ids, chunk_sizes)
    whole = decode(tokenizer, head + ids)
    assert decode(tokenizer, head) + "".join(pushed) == whole
    assert BROKEN not in "".join(pushed)


@settings(max_examples=200)
@given(
    words=st.lists(st.sampled_from(TEXT.split()), max_size=30),
    prompt=st.lists(st.sampled_from(TEXT.split()), max_size=10),
    chunk_sizes=sizes,
)
def test_spaces_inside_tokens_are_exact_at_any_cut(words: list[str], prompt: list[str], chunk_sizes: list[int]) -> None:
    tokenizer = metaspace()
    head, ids = encode(tokenizer, " ".join(prompt)), encode(tokenizer, " ".join(words))
    pushed = stream(tokenizer, head, ids, chunk_sizes)
    assert decode(tokenizer, head) + "".join(pushed) == decode(tokenizer, head + ids)


def test_the_first_word_after_a_prompt_keeps_its_space() -> None:
    for tokenizer in (metaspace(), byte_fallback()):
        head, ids = encode(tokenizer, "the lazy"), encode(tokenizer, "dog the")
        assert "".join(stream(tokenizer, head, ids, [1])) == " dog the"
        assert "".join(stream(tokenizer, [], ids, [1])) == "dog the"


@pytest.mark.parametrize("make", [bpe, byte_fallback])
def test_each_push_is_whole_characters_and_prompt(make: Any) -> None:
    """A character is shown with the token that completes it, not later."""
    tokenizer = make()
    text = "a世b🙂c"
    detokenizer = IncrementalDetokenizer(tokenizer, encode(tokenizer, "the"))
    ids, shown = encode(tokenizer, text), ""
    for at, token in enumerate(ids):
        shown += detokenizer.push([token])
        known = decode(tokenizer, encode(tokenizer, "the") + ids[: at + 1]).removeprefix("the")
        assert shown == known.rstrip(BROKEN)
    assert shown.strip() == text


def test_a_long_chunk_that_ends_inside_a_character_holds_only_that() -> None:
    tokenizer = bpe()
    ids = encode(tokenizer, "plain words go first and then comes one 龘")
    assert len(ids) > 20
    for cut in (1, 2):
        detokenizer = IncrementalDetokenizer(tokenizer, [])
        assert detokenizer.push(ids[:-cut]).startswith("plain words")
        assert detokenizer.push(ids[-cut:]).endswith("龘")
        assert detokenizer.flush() == ""


def test_a_real_replacement_character_is_text() -> None:
    tokenizer = bpe()
    text = "a\ufffdb" + BROKEN * 30 + "世 end"
    ids = encode(tokenizer, text)
    for size in (1, 2, 3, 7, 50):
        assert "".join(stream(tokenizer, [], ids, [size])) == text


@pytest.mark.parametrize("spelt", ["é", "Ł"], ids=["0xE9 begins a character", "0x9F goes on with one"])
def test_broken_bytes_are_shown_in_the_end_and_do_not_eat_what_follows(spelt: str) -> None:
    tokenizer = bpe()
    lone = tokenizer.convert_tokens_to_ids(spelt)  # a byte-level alphabet spells each byte as one letter
    assert decode(tokenizer, [lone]) == BROKEN
    follows = encode(tokenizer, "龘世")
    for count in range(1, 60):
        ids = [lone] * count + follows
        assert "".join(stream(tokenizer, [], ids, [1])) == decode(tokenizer, ids) == BROKEN * count + "龘世"


def test_tokens_that_each_end_a_character_and_begin_the_next_are_shown_whole() -> None:
    """No cut in such a run is whole, however long it gets: joined emoji are written so."""
    tokenizer = bpe()
    for count in (10, 16, 17, 40):
        text = "x" + "👩\u200d" * count + "y"
        ids = encode(tokenizer, text)
        assert any(decode(tokenizer, [i]).endswith(BROKEN) and len(decode(tokenizer, [i])) > 1 for i in ids)
        for size in (1, 2, 5, 40):
            assert "".join(stream(tokenizer, [], ids, [size])) == text


def test_broken_bytes_inside_such_tokens_are_kept() -> None:
    tokenizer, rng = bpe(), random.Random(0)
    straddling = [i for i in range(len(tokenizer)) if len(t := decode(tokenizer, [i])) > 1 and t.endswith(BROKEN)]
    for _ in range(200):
        ids = [rng.choice(straddling) for _ in range(40)] + encode(tokenizer, " end")
        assert "".join(stream(tokenizer, [], ids, [1])) == decode(tokenizer, ids)


def test_flush_drops_an_unfinished_character_only() -> None:
    tokenizer = bpe()
    ids = encode(tokenizer, "ab龘")
    detokenizer = IncrementalDetokenizer(tokenizer, [])
    shown = detokenizer.push(ids[:-1])
    assert shown + detokenizer.flush() == "ab"
    assert detokenizer.flush() == ""


def test_a_character_begun_in_the_prompt_is_shown_when_complete() -> None:
    tokenizer = bpe()
    ids = encode(tokenizer, "xy龘z")
    half = next(n for n in range(1, len(ids)) if decode(tokenizer, ids[:n]) == "xy" + BROKEN)
    detokenizer = IncrementalDetokenizer(tokenizer, ids[:half])
    assert "".join(detokenizer.push([i]) for i in ids[half:]) == "龘z"


def test_special_tokens_give_no_text_and_change_nothing() -> None:
    for tokenizer in (bpe(), metaspace(), byte_fallback()):
        special = tokenizer.convert_tokens_to_ids(SPECIALS[0])
        ids = encode(tokenizer, "the quick 世 dog")
        mixed = [token for i in ids for token in (special, i, special)]
        if tokenizer is byte_fallback():  # specials inside a character are no case for it
            mixed = [special, *encode(tokenizer, "the"), special, special, *encode(tokenizer, "dog")]
            ids = [i for i in mixed if i != special]
        for prompt in ([], encode(tokenizer, "over")):
            shown = "".join(stream(tokenizer, prompt, mixed, [1]))
            assert decode(tokenizer, prompt) + shown == decode(tokenizer, prompt + ids)


def worst_window(tokenizer: Any, prompt: list[int], ids: list[int]) -> tuple[int, int]:
    counting = Counting(tokenizer)
    stream(counting, prompt, ids, [1])
    return max(counting.windows), sum(counting.windows)


@pytest.mark.parametrize("kind", ["text", "end tokens", "past the vocabulary", "broken bytes", "replacement", "all"])
@pytest.mark.parametrize("prompted", [False, True])
def test_cost_is_linear(kind: str, prompted: bool) -> None:
    tokenizer, rng = bpe(), random.Random(1)
    special = tokenizer.convert_tokens_to_ids(SPECIALS[0])
    many = {
        "text": (encode(tokenizer, TEXT) * 8)[:1500],
        "end tokens": [special] * 1500,
        "past the vocabulary": encode(tokenizer, "a") + [len(tokenizer) + 7] * 1500,
        "broken bytes": [tokenizer.convert_tokens_to_ids("Ł")] * 1500,
        "replacement": encode(tokenizer, BROKEN * 500)[:1500],
        "all": [rng.randrange(len(tokenizer)) for _ in range(1500)],
    }[kind]
    prompt = encode(tokenizer, TEXT) if prompted else []
    worst, total = worst_window(tokenizer, prompt, many)
    assert worst <= 40, f"a decode was given {worst} ids"
    assert total <= 60 * len(many), f"{total} ids were decoded for {len(many)}"


def test_the_test_text_is_worth_testing() -> None:
    assert any(unicodedata.combining(c) for c in TEXT)
    assert max(len(encode(bpe(), c)) for c in "龘🜁𠀀") >= 3
    assert len(encode(byte_fallback(), "🙂")) >= 4


@settings(max_examples=150)
@example(prompt="a", text="naïve 🙂ü", noise=[], chunk_sizes=[1])
@given(
    prompt=texts,
    text=texts,
    noise=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 250)), max_size=4),
    chunk_sizes=st.one_of(st.just([1]), sizes),
)
@pytest.mark.parametrize("make", [bpe, metaspace, byte_fallback])
def test_tokens_begin_where_the_text_before_them_ends(
    make: Any, prompt: str, text: str, noise: list[tuple[int, int]], chunk_sizes: list[int]
) -> None:
    tokenizer, before, ids = make(), encode(make(), prompt)[-6:], encode(make(), text)
    for at, token in noise:  # special tokens, which give no text; of spelt bytes only those that break no character
        ids.insert(at % (len(ids) + 1), token % (len(SPECIALS) + 1) if make is not bpe else token % len(SPECIALS))
    detokenizer, pushed, at = IncrementalDetokenizer(tokenizer, before), "", 0
    for turn in range(len(ids)):
        size = chunk_sizes[turn % len(chunk_sizes)]
        pushed += detokenizer.push(ids[at : at + size])
        at += size
    pushed += detokenizer.flush()
    begins = list(detokenizer.begins)
    assert len(begins) == len(ids) and begins == sorted(begins) and all(0 <= begin <= len(pushed) for begin in begins)
    context = decode(tokenizer, before)
    if BROKEN not in pushed and BROKEN not in context and decode(tokenizer, before + ids) == context + pushed:
        whole = 0  # characters; a begun one may spoil finished ones before it, so the text can seem to shrink
        for at, begin in enumerate(begins):
            whole = max(whole, len(decode(tokenizer, before + ids[:at]).rstrip(BROKEN)) - len(context))
            assert begin == whole, (at, tokenizer.convert_ids_to_tokens(ids))


def test_real_broken_characters_take_their_place() -> None:
    broken = [bpe().convert_tokens_to_ids("Ģ")] * 3  # a byte that begins no character
    detokenizer = IncrementalDetokenizer(bpe(), encode(bpe(), "x"))
    text = "".join(detokenizer.push([token]) for token in [*broken, *encode(bpe(), " the")])
    assert text == BROKEN * 3 + " the"
    assert list(detokenizer.begins)[:4] == [0, 1, 2, 3]
