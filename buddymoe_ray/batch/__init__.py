"""Many requests of a file through one engine, kept as they end: what `buddymoe batch` does.

Reading order: `lines` (the input) → `sizes` and `rows` (how many side by side) → `run` (lines through the engine) →
`journal` (what is finished) → `output` (all of it, in order).
"""
