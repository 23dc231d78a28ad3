"""Stop strings against brute force: whatever the text and however it is cut, the outcome is that of the whole text."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_tokenizers import SPECIALS, bpe

from buddymoe_ray.engine.stop import StopChecker, special_stops
from buddymoe_ray.errors import RequestError

letters = st.text(alphabet="abc", max_size=24)
stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4)
cuts = st.lists(st.integers(min_value=0, max_value=24), max_size=10)


def brute_force(text: str, wanted: list[str]) -> tuple[str, bool]:
    """Read character by character; the text ends when its end is a stop string, before the longest such."""
    for end in range(1, len(text) + 1):
        met = [stop for stop in wanted if text[:end].endswith(stop)]
        if met:
            return text[: end - max(map(len, met))], True
    return text, False


def pieces_of(text: str, at: list[int]) -> list[str]:
    edges = [0, *sorted(min(cut, len(text)) for cut in at), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def must_hold(text: str, wanted: list[str]) -> int:
    """How much of the end of `text` may still become a stop string."""
    ends = [n for stop in wanted for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return max(ends, default=0)


@settings(max_examples=700)
@example(text="abc", wanted=["abc", "b"], at=[2])
@example(text="aab", wanted=["aab", "ab"], at=[])
@example(text="ababc", wanted=["abc"], at=[1, 2, 3, 4])
@given(text=letters, wanted=stops, at=cuts)
def test_equals_brute_force_however_it_is_cut(text: str, wanted: list[str], at: list[int]) -> None:
    checker, emitted, read, stopped = StopChecker(wanted), "", "", False
    for piece in pieces_of(text, at):
        read += piece
        emit, stopped = checker.push(piece)
        emitted += emit
        if stopped:
            break
        assert emitted + checker.held == read, "text is lost or doubled"
        assert len(checker.held) == must_hold(read, wanted), "holds back more or less than may become a stop string"
    if not stopped:
        emitted += checker.flush()
    assert (emitted, stopped) == brute_force(text, wanted)
    assert checker.held == ""
    assert checker.flush() == ""


def test_without_stop_strings_nothing_is_held() -> None:
    checker = StopChecker(())
    assert checker.push("any <text>") == ("any <text>", False)
    assert checker.flush() == ""


def test_one_string_spread_over_many_pushes() -> None:
    checker = StopChecker(["\n\nUser:"])
    assert [checker.push(c) for c in ["Hi", "\n", "\n", "Us", "er"]] == [("Hi", False)] + [("", False)] * 4
    assert checker.held == "\n\nUser"
    assert checker.push(": more") == ("", True)


def test_a_false_alarm_is_released() -> None:
    checker = StopChecker(["<end>"])
    assert checker.push("a<en") == ("a", False)
    assert checker.push("try>") == ("<entry>", False)


def test_flush_gives_what_is_held_once() -> None:
    checker = StopChecker(["END"])
    assert checker.push("the EN") == ("the ", False)
    assert checker.flush() == "EN"
    assert checker.flush() == ""


def test_wide_characters() -> None:
    checker = StopChecker(["世界", "🙂🙂"])
    assert checker.push("你好世") == ("你好", False)
    assert checker.push("人🙂") == ("世人", False)
    assert checker.push("🙂") == ("", True)


def test_the_match_that_is_complete_first_wins() -> None:
    for cut in (["ab", "c"], ["abc"], ["a", "b", "c"]):
        checker, emitted = StopChecker(["abc", "b"]), ""
        for piece in cut:
            emit, stopped = checker.push(piece)
            emitted += emit
            if stopped:
                break
        assert (emitted, stopped, checker.met) == ("a", True, "b"), f"cut {cut}"


def test_an_empty_stop_string_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="empty"):
        StopChecker(["x", ""])


def test_many_long_strings_cost_the_same_for_every_character() -> None:
    """Held text as long as a stop string, met one character at a time, must not be compared anew each time."""

    class Counted(str):
        compared = 0

        def __getitem__(self, at: object) -> str:
            Counted.compared += 1
            return super().__getitem__(at)  # type: ignore[index]

    checker = StopChecker([Counted("a" * 1000 + "b")])
    Counted.compared = 0
    text = "a" * 4000
    out = "".join(checker.push(char)[0] for char in text) + checker.flush()
    assert out == text and Counted.compared <= 3 * len(text)


def test_a_special_token_that_is_a_stop_string_ends_by_its_id() -> None:
    end = bpe().convert_tokens_to_ids(SPECIALS[2])
    assert special_stops(("x", SPECIALS[2]), bpe()) == {end: SPECIALS[2]}
    assert special_stops(("im_end", "<|im_", " "), bpe()) == special_stops((), bpe()) == {}
    assert special_stops((SPECIALS[2],), None) == {}


@pytest.mark.parametrize("stop", [SPECIALS[2] + "\n", "a" + SPECIALS[0], SPECIALS[0] + SPECIALS[2]])
def test_a_special_token_beside_other_text_could_never_stop_and_is_refused(stop: str) -> None:
    with pytest.raises(RequestError, match=r"stop holds '<\|(im_)?end\|>' beside other text") as caught:
        special_stops((stop,), bpe())
    assert caught.value.param == "stop"
