"""Prompts that are computed beside decode steps: which pass goes on, and for how long.

A step gives prompts about twice the time that a slow one of the latest decodes took: nobody's next token waits much
longer than three times what the slowest take alone. Several passes take turns, so a short prompt does not wait for a
long one's end. What takes no longer than that is not worth setting aside. Times are measured; no bit depends on them.

With turns that cost nothing a prompt takes M / (M - 1) times as long as alone where tokens take M times: 1.5 at 3. They
cost something, as caches are cold after each: of OLMoE (int4, 8 layers, all in memory) a decode step takes 1.11 times
as long, a prompt's pieces 1.03 times; builtin:tiny 1.9 and 1.2. So both are had where the slowest tokens alone take
some more than the mean, as they do where anything else runs: slices go by those, not by the slowest tenth, which gave
prompts 1.61 and 1.56 times at 100 and 25 % and the slowest tokens 2.7 and 2.3 times; now 1.52 to 1.57 and 1.34, 3.0 to
4.1 and 2.8, the prompt alone 6.3 and 6.6 s (7.7 before rows far behind took less). At 100 % neither has any slack left:
gaps are 40 to 44 ms, of which a decode is 14 (12.3 alone), and a layer's last slice is half empty (.945 filled in all).
Only the slowest gaps count, so slices must be alike. At 100 % the slowest were single forwards behind 1,500 tokens and
more, longer than a slice by themselves: with as many rows everywhere one took up to 3.4 times as long as the first. So
they are cut, and begun, by what they take where they are. Of .45, .6 and .9 of a slice (thread's clock, one to three
rounds each, a loaded machine): of fifty slices the longest takes 1.04 to 1.09 times what it should instead of 1.10 to
1.20, of twenty 1.03 to 1.04 instead of 1.07 to 1.13; filled .94 to .97 instead of .93 to .94; forwards of .45 take 1.06
times as long in all as those of .9.

Forwards of half as many rows everywhere, begun by what each took in the layer before, a pass in the memory of the one
before, and slices 2.1 times: filled .97, but at 100 % 1.58 times and the slowest tokens 4.0 times (25 %: 1.45 and 2.9;
one quiet run), so that was dropped. At 100 % new memory is none of it: passes of 512 tokens get theirs back from the
allocator and fault 0 to 2 pages a forward. One pass of 2,048 there: filled .96, but the prompt 1.57 instead of 1.58
times (thread's clock, 3 and 4 rounds), and experts into new memory take 1.4 to 1.7 times a slice in the first layer.
A pass's first forward of a third of the rows, to fill what a layer's end leaves: filled .95 to .96, the prompt 1.57
instead of 1.53 times.

What did not help (1,024 and 512 tokens beside one stream, 4 layers of OLMoE int4): to end a slice where the next expert
has yet to arrive, so that decode runs meanwhile: wave slots are few, the disk idles, and the prompt takes 1.9 to 2.2
times as long as alone instead of 1.6. Slices by the mean decode and twice its deviation, which one outlier moves: the
prompt 1.34 times instead of 1.40, but the slowest gaps 3.9 instead of 3.3.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from torch import Tensor

from buddymoe_ray.engine.pieces import RowsAt
from buddymoe_ray.engine.scheduler import SHORT, PrefillChunk
from buddymoe_ray.engine.suspended import PassParts, SuspendedPass
from buddymoe_ray.observe import smoothed

__all__ = ["PrefillBeside"]

_SHARE, _ALONE_SECONDS, _LEAST_SECONDS, _SMOOTHING = 2.0, 0.1, 2e-3, 0.2
_RECENT, _SELDOM, _OFTEN, _MOST = 64, 0.97, 0.9, 1.4
"""A slow decode takes longer than so many of the latest; if it is one of few that take more than so many times the
median, that is chance."""
_ROWS_BESIDE, _ROWS_ALONE, _PART = 16, 128, 0.75
"""Of a forward: at least, at most and where nobody decodes, and as many as take such a part of a slice."""
_AT_ONCE = 128
"""So many tokens are computed at once before it is known how long they take."""


class PrefillBeside:
    """The passes of one engine. `parts` None: nothing is set aside."""

    def __init__(self, parts: PassParts | None) -> None:
        self._parts = parts
        self._passes = deque[SuspendedPass]()
        self._decodes = deque[float](maxlen=_RECENT)
        self._token_seconds = 0.0

    @property
    def busy(self) -> bool:
        """Whether a prompt is being computed."""
        return bool(self._passes)

    def decoded(self, seconds: float) -> None:
        """A step's decode took so long."""
        self._decodes.append(seconds)

    def computed(self, tokens: int, seconds: float) -> None:
        """So many prompt tokens took so long."""
        self._token_seconds = smoothed(self._token_seconds, seconds / tokens, _SMOOTHING)

    def begin(self, chunks: Sequence[PrefillChunk], *, decodes: bool) -> bool:
        """Begin to compute prompts that take long; False where they take so little that they are computed at once."""
        if self._parts is None or not chunks:
            return False
        sizes = [chunk.end - chunk.start for chunk in chunks]
        seconds = sum(sizes) * self._token_seconds
        short = seconds <= self._slice(decodes) if seconds else sum(sizes) <= _AT_ONCE
        if short or sum(sizes) <= _ROWS_BESIDE:
            return False
        apart = [chunk for chunk, size in zip(chunks, sizes, strict=True) if SHORT * size <= max(sizes)]
        together = [chunk for chunk in chunks if chunk not in apart]
        rows = self._rows(decodes)
        self._passes.extend(SuspendedPass(self._parts, group, rows=rows) for group in (apart, together) if group)
        return True

    def advance(self, *, decodes: bool) -> list[tuple[PrefillChunk, Tensor, str]]:
        """Go on with one of the passes; what has ended with it, as `SuspendedPass.take` has it.

        Raises what a forward raises; `give_up` then says which prompts were in it.
        """
        if not self._passes:
            return []
        first = self._passes[0]
        first.leave()
        first.advance(time.perf_counter() + self._slice(decodes))
        if not first.done:
            self._passes.rotate(-1)
            return []
        self._passes.popleft()
        if first.rows:
            self.computed(first.rows, first.seconds)
        return first.take()

    def give_up(self) -> list[PrefillChunk]:
        """Close the pass whose turn it is; its prompts are to be computed another way."""
        return self._passes.popleft().close()

    def leave(self) -> None:
        """Let go of prompts that ended since: their blocks are another's."""
        for each in self._passes:
            each.leave()

    def reset(self) -> None:
        """Close all."""
        while self._passes:
            self._passes.popleft().close()

    def _rows(self, decodes: bool) -> RowsAt:
        """How many a forward has that begins behind so many tokens."""
        if not decodes or self._parts is None or not self._parts.forwards.known:
            return lambda start: _ROWS_ALONE
        forwards, seconds = self._parts.forwards, _PART * self._slice(decodes)
        return lambda start: min(_ROWS_ALONE, max(_ROWS_BESIDE, forwards.rows(start, seconds) // 16 * 16))

    def _slice(self, decodes: bool) -> float:
        if not decodes:
            return _ALONE_SECONDS
        latest = sorted(self._decodes) or [0.0]
        seldom, often, median = (latest[int(share * (len(latest) - 1))] for share in (_SELDOM, _OFTEN, 0.5))
        return max(_LEAST_SECONDS, _SHARE * max(often, min(seldom, _MOST * median)))
