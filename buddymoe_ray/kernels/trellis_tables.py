"""The tables of trellis codes, and how their rings lie. Imports nothing.

Trained by turns on a million normal numbers: coded by the table, and every level moved to the mean of what it stands
for; the best of six beginnings of 30 turns each.
"""

from __future__ import annotations

__all__ = ["DEAR", "MIDPOINT", "QUAD", "RINGS", "SPREAD", "TABLES", "WINDOW"]

WINDOW = 7
RINGS = {1: 64, 2: 32, 3: 16}
"""Positions of a ring, by bits."""
QUAD = 4
"""Inputs of a ring."""
MIDPOINT = 127.5
"""Of the levels in a table: a weight's value is its scale times what its level is above that."""

TABLES = {
    bits: bytes.fromhex(text)
    for bits, text in {
        1: (
            "8cc48c58bc8b8050d082829b8457a16e6ba48844755494868f64bb7b63a0723b61a78e71688e4d92"
            "953e75512f6a79b46093467480a274a26db575a7a5a1726a5779598870509b988f3d66777b98569f"
            "6c51b884c697655460a283c79667a084ac7665a29f8879564b7ea29d8892a1619b668bbb827b3672"
            "aa713f747166c498"
        ),
        2: (
            "a4718854b464957e355e8298a0b6678b7bb13b5c3b598576682b9249644086a2a3ca53888a72b151"
            "7b96c8b74a5273808856c39fc76d9c838ca170669d6f4f7c84aa6877359069d8b7846c638acea54d"
            "537696268d7ecca8816348976aaf13465985a6bc673e86b15deca2807692306aa18c6f707c9b525c"
            "5e8eb37b7a93b2dc"
        ),
        3: (
            "6c6b6086c642a9b6597b9099b26975a42a97026c50823e5f91849f6d83b96c514c9f7c85b0756991"
            "acbc81845296926f5f5830a8749248e1fa953862784c59c387b8647794a3213cd35f6d4ba87c848f"
            "9e38c890786589a182a25877c6d7a2b56e8a9744a35a7e74be3b72ac91124de27e7897638a25594c"
            "9bcf828c62a9b66c"
        ),
    }.items()
}
"""Levels of the windows, trained on normal weights."""
SPREAD = 40.0
"""What the tables take for one standard deviation."""
DEAR = 1e30
"""What a way costs in a search that may not be taken."""
