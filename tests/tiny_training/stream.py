"""The endless token stream: documents packed in a new order every epoch and cut into windows.

A window depends on (seed, index) alone, so a resumed run sees what an uninterrupted one sees. Knows nothing of text
or models.
Neighbours: tokenizer.py encodes the documents, trainer.py asks for batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from buddymoe_ray.errors import ConfigError


class TokenStream:
    """Windows of seq_len + 1 tokens over documents packed in a new order every epoch."""

    def __init__(self, documents: Sequence[np.ndarray], seq_len: int, seed: int) -> None:
        self._documents, self._seq_len, self._seed = documents, seq_len, seed
        self.windows = (sum(map(len, documents)) - 1) // seq_len
        if self.windows < 1:
            raise ConfigError(f"corpus is shorter than {seq_len} tokens, must fill one window. hint: lower --seq-len")
        self._epoch = -1
        self._tokens = np.zeros(0, dtype=np.uint16)
        self._order = np.zeros(0, dtype=np.int64)

    def _open_epoch(self, epoch: int) -> None:
        rng = np.random.default_rng([self._seed, epoch])
        self._tokens = np.concatenate([self._documents[i] for i in rng.permutation(len(self._documents))])
        self._order = rng.permutation(self.windows)
        self._epoch = epoch

    def window(self, index: int) -> np.ndarray:
        """The index-th window of the endless stream."""
        epoch, place = divmod(index, self.windows)
        if epoch != self._epoch:
            self._open_epoch(epoch)
        start = int(self._order[place]) * self._seq_len
        return self._tokens[start : start + self._seq_len + 1]

    def batch(self, first: int, count: int) -> Tensor:
        """Windows first ... first + count - 1 as [count, seq_len + 1] int64."""
        return torch.from_numpy(np.stack([self.window(i) for i in range(first, first + count)]).astype(np.int64))
