"""Many requests of a file through one engine, kept as they end: what `buddymoe batch` does.

Reading order: `sizes` and `rows` (how many side by side) → `run` (lines through the engine); lines, their answers and
the journal of those are `serve.batches`.
"""
