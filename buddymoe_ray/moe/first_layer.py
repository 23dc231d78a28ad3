"""What the first MoE layer will ask for, told by the token alone: before any layer has run.

Two guesses. What the layer asked for when the token was last seen, in a prompt or a text, kept for every token; and its
router on the token's own embedding, for one that was not seen. Of builtin:tiny, which was trained, three tokens in four
were seen, and .89 of what the first names is asked for (.34 of the second's); of an OLMoE shape with random weights,
whose attention adds little, .97 of the second's.

Legend: V vocabulary, T tokens, K experts per token, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["FirstLayer"]

Ints = npt.NDArray[np.int64]


class FirstLayer:
    """`embedded` is `tokens -> [T, D]`, what the layer's router reads of tokens where nothing else is known of them;
    None where that cannot be told. Takes 2 bytes per token of the vocabulary and expert of a token."""

    def __init__(
        self,
        vocab_size: int,
        experts_per_token: int,
        choose: Callable[[Tensor], Tensor],
        embedded: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self._seen_VK = np.full((vocab_size, experts_per_token), -1, np.int16)
        self._choose, self._embedded = choose, embedded

    def learn(self, tokens: Sequence[int], ids_TK: Ints) -> None:
        """The layer asked for these."""
        self._seen_VK[list(tokens)] = ids_TK

    def guesses(self, tokens: Sequence[int]) -> tuple[Ints, Ints]:
        """For the tokens that were seen, and for the others, what each will ask for, its first choice first."""
        tokens_T = np.array(tokens, np.int64)
        seen_TK = self._seen_VK[tokens_T].astype(np.int64)
        is_seen_T = seen_TK[:, 0] >= 0
        others_T = tokens_T[~is_seen_T]
        if self._embedded is None or not len(others_T):
            return seen_TK[is_seen_T], seen_TK[:0]
        with torch.inference_mode():
            chosen_TK = self._choose(self._embedded(torch.from_numpy(others_T)))
        return seen_TK[is_seen_T], chosen_TK.numpy()
