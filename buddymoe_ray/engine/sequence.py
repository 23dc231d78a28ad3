"""One request while it is served: its tokens, its blocks, its text, what it cost.

Knows how a sequence ends (end token, stop string, length) and builds the TokenEvents that leave the engine; not when it
runs. On the token path: `append` turns a sampled token into an event. Resumed tokens are taken in as if they had been
sampled here, and what they would have said is dropped: the client has it.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import deque
from collections.abc import Sequence as Ids
from enum import Enum
from typing import Any

from torch import Tensor

from buddymoe_ray.engine.account import Account
from buddymoe_ray.engine.detokenize import IncrementalDetokenizer
from buddymoe_ray.engine.replay import Replay
from buddymoe_ray.engine.sampler import Sampled, SamplingState, reported
from buddymoe_ray.engine.stop import StopChecker, special_stops
from buddymoe_ray.engine.structured import GrammarState, TokenRule
from buddymoe_ray.engine.thoughts import ThoughtLimit
from buddymoe_ray.errors import BuddyMoEError, RequestError
from buddymoe_ray.types import FinishReason, GenerationRequest, TokenEvent, TokenLogprob, Usage

__all__ = ["Sequence", "SequenceState"]


class SequenceState(Enum):
    """Where a sequence stands; it moves down this list, or back to its top when its blocks are taken from it."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Made by the engine from a request. Raises RequestError when prompt and model limit leave no room for output, or
    when the resumed tokens have already ended.

    `num_computed` tokens have their KV computed; `blocks` is the sequence's block table while it is admitted, of which
    the first `num_remembered` can be found by others. `account` is what the request may spend on stand-ins and has
    spent, `replay` the substitutions it must repeat, by decode step. Of its prompt `cached_tokens` were not computed.
    """

    def __init__(
        self,
        request: GenerationRequest,
        *,
        tokenizer: Any = None,
        eos_token_ids: frozenset[int] = frozenset(),
        max_model_len: int,
        default_seed: int | None = None,
        account: Account | None = None,
        replay: Replay | None = None,
    ) -> None:
        prompt, params = request.prompt_token_ids, request.sampling
        if len(prompt) >= max_model_len:
            raise RequestError(
                f"prompt is {len(prompt)} tokens, must be at most {max_model_len - 1} for this model's limit of "
                f"{max_model_len} tokens. hint: shorten the prompt",
                param="prompt",
            )
        if params.stop and tokenizer is None:
            raise RequestError(
                "stop is set, must be empty for a model without tokenizer. hint: use stop_token_ids", param="stop"
            )
        self.request, self.request_id = request, request.request_id
        self.prompt_length, self.num_resumed = len(prompt), len(request.resumed_token_ids)
        self.max_tokens = min(params.max_tokens, max_model_len - len(prompt))
        self.state = SequenceState.WAITING
        self.blocks: list[int] = []
        self.num_computed = self.num_remembered = self.cached_tokens = 0
        self.computing = 0  # tokens of a pass that is in progress
        self._exact = self._again = 0  # tokens whose KV no stand-in touched; tokens to compute again
        self._digests: list[bytes] = []
        self._ids = list(prompt)
        self._special_stops = special_stops(params.stop, tokenizer, silent=params.skip_special_tokens)
        self.ends = frozenset(params.stop_token_ids) | self._special_stops.keys()
        self.ends |= frozenset() if params.ignore_eos else eos_token_ids
        self.grammar: GrammarState | None = None
        self._thoughts = None if request.thoughts is None else ThoughtLimit(request.thoughts)
        seed = params.seed if params.seed is not None else _drawn(default_seed, request.request_id)
        self.sampling_state = SamplingState(params=params, seed=seed, token_ids=self._ids, prompt_length=len(prompt))
        self._detokenizer = (
            None
            if tokenizer is None
            else IncrementalDetokenizer(tokenizer, prompt, specials=not params.skip_special_tokens)
        )
        self._begins: deque[int] = deque() if self._detokenizer is None else self._detokenizer.begins
        self._told = self._placed = 0  # characters of text, and tokens whose beginning in it is known
        self._stop = StopChecker(params.stop)
        self.account = account or Account(mode="exact", budget=0.0, price=0.0)
        self.replay: Replay = replay or {}
        wanted = None if request.resumed_token_ids else params.prompt_logprobs  # they came with the first of those
        self._prompt_logprobs: list[TokenLogprob | None] = []
        self._told_prompt = wanted is None
        self._resume(request.resumed_token_ids)

    @property
    def scores(self) -> bool:
        """Whether logits of tokens of its prompt are wanted and not there yet."""
        return not self._told_prompt and len(self._prompt_logprobs) < self.prompt_length

    def score(self, start: int, logits_TV: Tensor) -> None:
        """Take in the logits `[T, V]` of its tokens from `start` on: what they made of the prompt's next ones."""
        targets = self._ids[start + 1 : min(start + 1 + len(logits_TV), self.prompt_length)]
        found = reported(logits_TV[: len(targets)], targets, self.request.sampling.prompt_logprobs or 0)
        if start == 0 and len(logits_TV):
            self._prompt_logprobs = [None]
        self._prompt_logprobs += [
            TokenLogprob(token_id=one.token_id, logprob=one.logprob, top=one.top)
            for one in found
            if one.logprob is not None
        ]

    @property
    def output_ids(self) -> list[int]:
        """Tokens generated so far."""
        return self._ids[self.prompt_length :]

    @property
    def num_output(self) -> int:
        """How many tokens were generated so far."""
        return len(self._ids) - self.prompt_length

    @property
    def max_length(self) -> int:
        """Most tokens of prompt and output this sequence can come to."""
        return self.prompt_length + self.max_tokens

    @property
    def prompt_computed(self) -> bool:
        """Whether the whole prompt, and what was resumed after it, has its KV."""
        return self.num_computed >= self.prefill_length

    @property
    def prefill_length(self) -> int:
        """Tokens that are computed before the next one is chosen: the prompt and what was resumed, or all there were
        when its blocks were taken away."""
        return max(self.prompt_length + self.num_resumed, self._again)

    @property
    def finished(self) -> bool:
        """Whether it ended."""
        return self.state is SequenceState.FINISHED

    def token_ids(self, start: int, end: int) -> list[int]:
        """Tokens `[start, end)` of prompt and output."""
        return self._ids[start:end]

    @property
    def repeats(self) -> bool:
        """Whether it keeps, or follows, an account by decode step: then no token may be computed another way."""
        return bool(self.replay) or self.account.recorder is not None

    def follow(self, grammar: GrammarState) -> None:
        """From now on `grammar`, which is at its start, rules the output. Raises RequestError when the resumed tokens
        break or end it."""
        try:
            for token_id in self.output_ids:
                grammar.accept(token_id)
        except BuddyMoEError as error:
            raise RequestError(f"resumed_token_ids: {error}", param="resumed_token_ids") from error
        if self.num_output and grammar.ended:
            raise _ended("stop", self.num_output, self.num_output)
        self.grammar = grammar

    @property
    def rule(self) -> TokenRule | None:
        """What says which tokens may come next, if not all may."""
        return self._thoughts if self._thoughts is not None and self._thoughts.spent else self.grammar

    @property
    def unruled(self) -> bool:
        """Whether logits and its settings alone say which tokens come next, and nothing else is asked of them."""
        ruled = self.grammar is not None or self._thoughts is not None or self.sampling_state.shifts or self.replay
        return not ruled and self.request.sampling.logprobs is None

    def advance(self, count: int, *, exact: bool = True) -> None:
        """Note that `count` more tokens have their KV; `exact` if no stand-in could have answered."""
        computed = self.num_computed + count
        assert computed <= len(self._ids), f"computed {computed} of {len(self._ids)} tokens"
        if exact and self._exact == self.num_computed:
            self._exact = computed
        self.num_computed = computed

    def exact_blocks(self, block_size: int) -> int:
        """Full blocks from the beginning whose KV no stand-in touched."""
        return self._exact // block_size

    def digests(self, count: int, block_size: int) -> list[bytes]:
        """What the first `count` full blocks hold, and everything before: SHA-256, so that nobody finds another's."""
        while len(self._digests) < count:
            at = len(self._digests) * block_size
            before = self._digests[-1] if self._digests else hashlib.sha256(self.request.cache_salt.encode()).digest()
            text = b"".join(token_id.to_bytes(8, "little") for token_id in self._ids[at : at + block_size])
            self._digests.append(hashlib.sha256(before + text).digest())
        return self._digests[:count]

    @property
    def preempted(self) -> bool:
        """Whether its blocks were taken from it before."""
        return self._again > 0

    def begin(self, blocks: list[int], found: int, block_size: int) -> None:
        """It is admitted with these blocks, of which the first `found` hold their tokens' KV already."""
        tokens = found * block_size
        if not self.preempted:
            self.cached_tokens = min(tokens, self.prompt_length)
        self.blocks, self.num_remembered, self.state = blocks, found, SequenceState.PREFILLING
        self.num_computed = self._exact = tokens

    def preempt(self) -> None:
        """Its blocks are another's now: all its tokens will be computed again."""
        self.state, self.blocks, self._again = SequenceState.WAITING, [], len(self._ids)
        self.num_computed = self.num_remembered = self._exact = self.computing = 0
        if self.scores:
            self._prompt_logprobs = []

    def append(self, sampled: Sampled) -> TokenEvent:
        """Take the next token; returns its event, which carries the finish reason when it is the last."""
        assert not self.finished, f"sequence {self.request_id} is finished, must be running to take a token"
        self.state = SequenceState.RUNNING
        text, stopped, reason = self._take(sampled.token_id)
        if reason is not None and not stopped:
            rest, stopped = self._rest()
            text, reason = text + rest, "stop" if stopped else reason
        logprobs: tuple[TokenLogprob, ...] = ()
        standins, self.account.stood_in = self.account.stood_in, 0  # a prompt's own pass adds none
        if sampled.logprob is not None:
            told = TokenLogprob(token_id=sampled.token_id, logprob=sampled.logprob, top=sampled.top, standins=standins)
            logprobs = (told,)
        return self._event((sampled.token_id,), text, reason, logprobs=logprobs)

    def finish(self, reason: FinishReason, *, error: str | None = None) -> TokenEvent:
        """End without a further token: cancelled or failed."""
        assert not self.finished, f"sequence {self.request_id} is finished, must be live to be ended"
        return self._event((), "" if reason == "cancelled" else self._rest()[0], reason, error=error)

    def fail(self, error: str) -> TokenEvent:
        """End by an error, also by one in what its last words would need."""
        try:
            return self.finish("error", error=error)
        except Exception:
            self.state = SequenceState.FINISHED
            return TokenEvent(
                request_id=self.request_id, token_ids=(), text="", finish_reason="error", usage=Usage(), error=error
            )

    def usage(self) -> Usage:
        """What it cost so far."""
        return Usage(
            prompt_tokens=self.prompt_length,
            completion_tokens=self.num_output,
            resumed=self.num_resumed,
            hits=self.account.hits,
            peer=self.account.peer,
            host=self.account.host,
            fetched=self.account.fetched,
            mode=self.account.mode,
            requested_mode=self.account.requested_mode,
            budget=self.account.budget,
            standins=self.account.standins,
            expected_rise=self.account.expected_rise,
            guard=self.account.guard,
            record=self.account.recorder.text() if self.account.recorder is not None and self.finished else None,
            cached_tokens=self.cached_tokens,
            calibration=self.account.calibration,
        )

    def _take(self, token_id: int) -> tuple[str, bool, FinishReason | None]:
        """Add a token: the text it frees, whether a stop string was met, and how the output ends by it, if so."""
        self._ids.append(token_id)
        if token_id in self.ends:
            if self.grammar is not None:
                self.grammar.end()
            return "", False, "stop"
        if self._thoughts is not None:
            self._thoughts.accept(token_id)
        if self.grammar is not None:
            self.grammar.accept(token_id)
        text, stopped = self._stop.push(self._text([token_id]))
        if stopped:
            return text, True, "stop"
        if self.grammar is not None and self.grammar.ended:
            return text, False, "stop"
        return text, False, "length" if self.num_output >= self.max_tokens else None

    def _resume(self, token_ids: Ids[int]) -> None:
        """Take in what was generated elsewhere, token by token: what is held back depends on how the text was cut."""
        for at, token_id in enumerate(token_ids, start=1):
            text, _, reason = self._take(token_id)
            self._offsets(text, ended=False)
            if reason is not None:
                raise _ended(reason, at, len(token_ids))

    def _text(self, ids: Ids[int]) -> str:
        if self._detokenizer is None:
            self._begins.extend([0] * len(ids))
            return ""
        return self._detokenizer.push(ids)

    def _offsets(self, text: str, *, ended: bool) -> tuple[int, ...]:
        """Where tokens begin in the text that the caller has once it has `text`: of the next tokens for which that is
        settled. What a stop string may still cut off is not; at the end, what was cut off begins at the text's end."""
        self._told += len(text)
        found = []
        while self._begins and (ended or self._begins[0] <= self._told):
            found.append(min(self._begins.popleft(), self._told))
        if ended:
            found += [self._told] * (self.num_output - self._placed - len(found))
        self._placed += len(found)
        return tuple(found)

    def _rest(self) -> tuple[str, bool]:
        """Text held back by the detokenizer and the stop checker, at the end, and whether a stop string was in it."""
        if self._detokenizer is None:
            return "", False
        text, stopped = self._stop.push(self._detokenizer.flush())
        return text + self._stop.flush(), stopped

    def _event(
        self,
        ids: tuple[int, ...],
        text: str,
        reason: FinishReason | None,
        *,
        logprobs: tuple[TokenLogprob, ...] = (),
        error: str | None = None,
    ) -> TokenEvent:
        if reason is not None:
            self.state = SequenceState.FINISHED
        offsets = self._offsets(text, ended=reason is not None)
        prompt, self._told_prompt = () if self._told_prompt else tuple(self._prompt_logprobs), True
        return TokenEvent(
            request_id=self.request_id,
            token_ids=ids,
            text=text,
            logprobs=logprobs,
            text_offsets=() if self.request.sampling.logprobs is None else offsets,
            prompt_logprobs=prompt,
            finish_reason=reason,
            usage=self.usage() if reason is not None else None,
            stop=self._stop.met or self._special_stops.get(self._ids[-1]) if reason == "stop" else None,
            error=error,
        )


def _ended(reason: FinishReason, at: int, count: int) -> RequestError:
    return RequestError(
        f"resumed_token_ids end by {reason} at token {at} of {count}, must be unfinished. "
        "hint: nothing is left to generate",
        param="resumed_token_ids",
    )


def _drawn(default_seed: int | None, request_id: str) -> int:
    """A seed (64 bits) for a request that brings none: a hash of engine seed and request id, so that every engine of a
    service draws the same and a moved request goes on with its own numbers; random without an engine seed."""
    if default_seed is None:
        return secrets.randbits(63)
    return int.from_bytes(hashlib.blake2b(f"{default_seed}/{request_id}".encode(), digest_size=8).digest())
