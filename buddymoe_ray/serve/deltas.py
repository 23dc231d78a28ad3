"""Deltas: from an engine's events, those of one choice joined, and what a call cost added up.

Pure; knows neither HTTP nor engines. Used by the worker (to batch) and by whoever collects a whole answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import TypeVar

from buddymoe_ray.models.token_bytes import TokenBytes
from buddymoe_ray.serve.work import Delta, TokenText
from buddymoe_ray.types import StandinAccesses, TokenEvent, TokenLogprob, Usage

__all__ = ["Echo", "delta_of", "described", "joined", "merge", "total_usage"]

Part = TypeVar("Part", Delta, TokenEvent)


@dataclass(frozen=True, kw_only=True)
class Echo:
    """A prompt that is told before its answer: its text, and where each of its tokens begins in it.

    `told` where the caller has it already, and its answers only begin behind it.
    """

    token_ids: tuple[int, ...]
    text: str
    offsets: tuple[int, ...]
    told: bool = False

    def before(self, delta: Delta, event: TokenEvent, token_bytes: TokenBytes) -> Delta:
        """The delta of an event, behind the prompt where the event is the request's first."""
        delta = replace(delta, text_offsets=tuple(len(self.text) + offset for offset in delta.text_offsets))
        if self.told:
            return delta
        entries = (
            [
                TokenText(token_id=token, logprob=None, data=token_bytes(token))
                if entry is None
                else described(entry, token_bytes)
                for token, entry in zip(self.token_ids, event.prompt_logprobs, strict=True)
            ]
            if event.prompt_logprobs
            else []
        )
        return replace(
            delta,
            text=self.text + delta.text,
            logprobs=(*entries, *delta.logprobs),
            text_offsets=(*self.offsets[: len(entries)], *delta.text_offsets),
        )


def delta_of(choice: int, event: TokenEvent, token_bytes: TokenBytes) -> Delta:
    """What an event adds to the choice that its request answers."""
    return Delta(
        choice=choice,
        token_ids=event.token_ids,
        text=event.text,
        logprobs=tuple(described(entry, token_bytes) for entry in event.logprobs),
        text_offsets=event.text_offsets,
        finish_reason=event.finish_reason,
        usage=event.usage,
        stop=event.stop,
        error=event.error,
    )


def described(entry: TokenLogprob, token_bytes: TokenBytes) -> TokenText:
    """An engine's log probability with its bytes and those of its alternatives."""
    top = tuple(TokenText(token_id=id_, logprob=value, data=token_bytes(id_)) for id_, value in entry.top)
    return TokenText(
        token_id=entry.token_id,
        logprob=entry.logprob,
        data=token_bytes(entry.token_id),
        top=top,
        standins=entry.standins,
    )


def merge(deltas: Iterable[Delta]) -> tuple[Delta, ...]:
    """One delta per choice, in order of first appearance; texts and tokens are joined, the end is the last one's."""
    by_choice: dict[int, list[Delta]] = {}
    for delta in deltas:
        by_choice.setdefault(delta.choice, []).append(delta)
    return tuple(map(joined, by_choice.values()))


def joined(parts: Sequence[Part]) -> Part:
    """What follows each other, of one choice or request: texts and tokens are joined, the end is the last one's."""
    if len(parts) == 1:
        return parts[0]
    assert all(part.finish_reason is None for part in parts[:-1]), f"{parts[0]} goes on after its end"
    last = parts[-1]
    return replace(
        parts[0],
        token_ids=tuple(token for part in parts for token in part.token_ids),
        text="".join(part.text for part in parts),
        logprobs=tuple(logprob for part in parts for logprob in part.logprobs),
        text_offsets=tuple(offset for part in parts for offset in part.text_offsets),
        finish_reason=last.finish_reason,
        usage=last.usage,
        stop=last.stop,
        error=last.error,
    )


def total_usage(last_deltas: Iterable[Delta], *, n: int) -> Usage:
    """The cost of a call: every choice's tokens and expert accesses, and each prompt once for its `n` choices."""
    usages = []
    for delta in last_deltas:
        assert delta.usage is not None, f"choice {delta.choice} ended ({delta.finish_reason}) without usage"
        shared = delta.choice % n != 0  # the prompt was counted with its first choice
        usages.append(replace(delta.usage, prompt_tokens=0, cached_tokens=0) if shared else delta.usage)
    return reduce(_added, usages) if usages else Usage()


def _added(one: Usage, other: Usage) -> Usage:
    """The sum of two choices of one call; a tripped guard of either is told."""
    worse = one if one.guard == "tripped" else other
    kinds = [field.name for field in fields(StandinAccesses)]
    return replace(
        worse,
        prompt_tokens=one.prompt_tokens + other.prompt_tokens,
        cached_tokens=one.cached_tokens + other.cached_tokens,
        completion_tokens=one.completion_tokens + other.completion_tokens,
        resumed=one.resumed + other.resumed,
        hits=one.hits + other.hits,
        peer=one.peer + other.peer,
        host=one.host + other.host,
        fetched=one.fetched + other.fetched,
        standins=StandinAccesses(**{k: getattr(one.standins, k) + getattr(other.standins, k) for k in kinds}),
        expected_rise=one.expected_rise + other.expected_rise,
    )
