"""The code that trained builtin:tiny. In `tests/`: `python -m tiny_training.train`, then `.evaluate` and `.export`."""
