"""What a pass over prompts is made of: each prompt's part, and the rows of each forward.

Legend: T rows, D hidden, K experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from greenlet import greenlet
from torch import Tensor

from buddymoe_ray.engine.attention import ChunkRows, PackedPass
from buddymoe_ray.engine.scheduler import PrefillChunk
from buddymoe_ray.moe import MoEBlock

__all__ = ["Member", "Piece", "RowsAt", "cut_pieces"]
RowsAt = Callable[[int], int]


@dataclass(eq=False)
class Member:
    """A prompt's part of the pass. `blocks` are the KV blocks that it began with, `logits_nV` those that are wanted, by
    pieces; `lost` says which expert could not be had. One that is `gone` has no forward any more."""

    chunk: PrefillChunk
    blocks: list[int]
    logits_nV: list[Tensor] = field(default_factory=list)
    lost: str = ""
    gone: bool = False

    @property
    def there(self) -> bool:
        """Whether the prompt still waits for it: it did not end, nor lose its blocks."""
        return not self.chunk.seq.finished and self.chunk.seq.blocks is self.blocks


@dataclass(frozen=True, kw_only=True)
class Share:
    """Tokens `[start, end)` of a member, and those of them whose logits are wanted."""

    member: Member
    start: int
    end: int
    wanted: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many rows they are."""
        return self.end - self.start


@dataclass(eq=False)
class Piece:
    """Rows of one forward, one member's share after the other's, and what it waits for; `first` of the pass's rows."""

    first: int
    shares: list[Share]
    packed: PackedPass
    ids: list[int]
    positions: list[int]
    wanted: list[int]  # rows whose logits are
    thread: greenlet | None = None
    block: MoEBlock | None = None
    hidden_TD: Tensor | None = None
    ids_TK: npt.NDArray[np.int64] | None = None
    weight_TK: Tensor | None = None
    y_ND: Tensor | None = None

    @property
    def gone(self) -> bool:
        """Whether a prompt in it is."""
        return any(share.member.gone for share in self.shares)


def cut_pieces(members: Iterable[Member], rows: RowsAt, block_size: int, device: torch.device) -> Iterator[Piece]:
    """Forwards of at most so many `rows` behind so many tokens: parts of long prompts, and short ones side by side."""
    first = 0
    for shares in _together(map(_whole, members), rows):
        spans, ids, positions, wanted = [], list[int](), list[int](), list[int]()
        for share in shares:
            spans.append(ChunkRows(row=len(ids), count=share.count, start=share.start, blocks=(*share.member.blocks,)))
            wanted += (len(ids) + position - share.start for position in share.wanted)
            ids += share.member.chunk.seq.token_ids(share.start, share.end)
            positions += range(share.start, share.end)
        packed = PackedPass(spans, decode=False, block_size=block_size, device=device)
        yield Piece(first=first, shares=shares, packed=packed, ids=ids, positions=positions, wanted=wanted)
        first += len(ids)


def _whole(member: Member) -> Share:
    """All of a member."""
    chunk = member.chunk
    wanted = {position for position in chunk.also if chunk.start <= position < chunk.end}
    if chunk.end == chunk.seq.prefill_length:
        wanted.add(chunk.end - 1)
    return Share(member=member, start=chunk.start, end=chunk.end, wanted=tuple(sorted(wanted)))


def _together(wholes: Iterable[Share], rows: RowsAt) -> Iterator[list[Share]]:
    some: list[Share] = []
    for whole in wholes:
        most = rows(whole.start)
        if some and sum(share.count for share in some) + whole.count > most:
            yield some
            some = []
        if whole.count < most:
            some.append(whole)
            continue
        end = whole.start
        while end < whole.end:
            start, end = end, min(end + rows(end), whole.end)
            wanted = tuple(position for position in whole.wanted if start <= position < end)
            yield [Share(member=whole.member, start=start, end=end, wanted=wanted)]
    if some:
        yield some
