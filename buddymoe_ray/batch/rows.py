"""How many sequences a batch decodes side by side, and when it fills up the places of those that ended. Pure.

A step reads each missing expert once for all its rows, so rows are nearly free where reading is what takes time.
"""

from __future__ import annotations

import math

from buddymoe_ray.policy import activation_bytes, rows_held

__all__ = ["MOST_ROWS", "most_rows", "refill_at"]

MOST_ROWS = 256
_LARGEST_SHARE = 0.25


def most_rows(*, choices: int, hidden: int, experts_per_token: int, item_bytes: int, vocab: int) -> int:
    """Sequences side by side: as many as there are `choices`, as 256 MiB of activations and logits hold, at most 256.

    Args:
        hidden, experts_per_token, vocab: the model's sizes.
        item_bytes: bytes of a number in the compute dtype; logits are float32, kept twice while a token is chosen.
    """
    row_bytes = activation_bytes(hidden=hidden, experts_per_token=experts_per_token, item_bytes=item_bytes) + 8 * vocab
    return max(1, min(MOST_ROWS, choices, rows_held(row_bytes)))


def refill_at(rows: int, *, mean_output: float, fully_resident: bool) -> int:
    """Places that must be free before new requests take them, all at once.

    Their prompts are a pass of their own that reads nearly every missing expert again, so they come in groups. With R
    rows of L tokens R / L places come free a step; a group of g costs g / 2 idle rows and a pass every g L / R steps,
    which is least at g = R sqrt(2 / L). At most a quarter: L is known from those that ended first, the short ones.
    """
    if fully_resident:
        return 1
    share = math.sqrt(2 / max(2.0, mean_output))
    return max(1, min(rows, int(rows * min(_LARGEST_SHARE, share))))
