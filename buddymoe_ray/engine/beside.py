"""Prompts that are computed beside decode steps: which pass goes on, and for how long.

A step gives prompts somewhat over twice the time that a slow one of the latest decodes took: nobody's next token waits
much longer than three times what the slowest take alone. Several passes take turns, so a short prompt does not wait for
a long one's end. What takes no longer than that is not worth setting aside. Times are measured; no bit depends on them.

With turns that cost nothing a prompt takes M / (M - 1) times as long as alone where tokens take M times: 1.5 at 3. They
cost something, as caches are cold after each: of OLMoE (int4, 8 layers, all in memory) a decode step takes 1.11 times
as long, a prompt's pieces 1.03 times; builtin:tiny 1.9 and 1.2. So both are had where the slowest tokens alone take
some more than the mean, as they do where anything else runs: slices go by those, not by the slowest tenth, which gave
prompts 1.61 and 1.56 times at 100 and 25 % and the slowest tokens 2.7 and 2.3 times; now 1.54 and 1.47, 3.05 and 2.9.
Only the slowest gaps count, so slices must be alike: of twenty the longest takes 1.04 times what it should; 1.11 where
a forward began if half of it fitted. Since those figures forwards are half as large and begin by what each took in the
layer before, and a pass computes in the memory of the one before: zeroing 17 MB of new pages had held up the first
slice of each 512 tokens by 22 to 33 ms, one of 70. By the thread's own clock, on a busy machine, slices are filled .97
(one run; before .93, .94, .95 and .93) and 99 of 100 take at most 3 ms too long, so they may be 1.05 times as long.
Forwards of 32 rows fill .98, but a prompt's pieces took 1.045 and 1.055 times as long as alone, of 48 rows 1.03.

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

from buddymoe_ray.engine.scheduler import SHORT, PrefillChunk
from buddymoe_ray.engine.suspended import PassParts, SuspendedPass
from buddymoe_ray.observe import smoothed

__all__ = ["PrefillBeside"]

_SHARE, _ALONE_SECONDS, _LEAST_SECONDS, _SMOOTHING = 2.1, 0.1, 2e-3, 0.2
_RECENT, _SELDOM, _OFTEN, _MOST = 64, 0.97, 0.9, 1.4
"""A slow decode takes longer than so many of the latest; if it is one of few that take more than so many times the
median, that is chance."""
_ROWS_BESIDE, _ROWS_ALONE, _PART = 16, 128, 0.75
"""Of a forward: as many as compute a layer without experts, about half of the whole, in a third of a slice, so that
little is left of it where the next does not fit; more where nobody decodes."""
_AT_ONCE = 128
"""So many tokens are computed at once before it is known how long they take."""


class PrefillBeside:
    """The passes of one engine. `parts` None: nothing is set aside."""

    def __init__(self, parts: PassParts | None) -> None:
        self._parts = parts
        self._passes = deque[SuspendedPass]()
        self._decodes = deque[float](maxlen=_RECENT)
        self._token_seconds = 0.0
        self._room: Tensor | None = None  # of the pass that ended in the latest step

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
        for group in filter(None, (apart, together)):
            self._passes.append(SuspendedPass(self._parts, group, rows=rows, room=self._room))
            self._room = None
        return True

    def advance(self, *, decodes: bool) -> list[tuple[PrefillChunk, Tensor, str]]:
        """Go on with one of the passes; what has ended with it, as `SuspendedPass.take` has it.

        Raises what a forward raises; `give_up` then says which prompts were in it.
        """
        self._room = None
        if not self._passes:
            return []
        first = self._passes[0]
        first.leave()
        first.advance(time.perf_counter() + self._slice(decodes))
        if not first.done:
            self._passes.rotate(-1)
            return []
        self._passes.popleft()
        self._room = first.room
        if first.rows:
            self.computed(first.rows, first.seconds)
        return first.take()

    def give_up(self) -> list[PrefillChunk]:
        """Close the pass whose turn it is; its prompts are to be computed another way."""
        return self._passes.popleft().close()

    def leave(self) -> None:
        """Let go of prompts that ended since: their blocks are another's."""
        self._room = None
        for each in self._passes:
            each.leave()

    def reset(self) -> None:
        """Close all."""
        self._room = None
        while self._passes:
            self._passes.popleft().close()

    def _rows(self, decodes: bool) -> int:
        if not decodes or self._parts is None or not self._token_seconds:
            return _ROWS_ALONE
        rows = int(_PART * self._slice(decodes) * self._parts.layers / self._token_seconds)
        return min(_ROWS_ALONE, max(_ROWS_BESIDE, (rows + 8) // 16 * 16))

    def _slice(self, decodes: bool) -> float:
        if not decodes:
            return _ALONE_SECONDS
        latest = sorted(self._decodes) or [0.0]
        seldom, often, median = (latest[int(share * (len(latest) - 1))] for share in (_SELDOM, _OFTEN, 0.5))
        return max(_LEAST_SECONDS, _SHARE * max(often, min(seldom, _MOST * median)))
