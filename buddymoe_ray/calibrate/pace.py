"""On how many tokens a calibration is worth its time.

They follow from the model's shape alone, so that a calibration can be repeated. Knows no weights. Neighbour: run.py
asks.
"""

from __future__ import annotations

from math import prod

from buddymoe_ray.engine.parts import EngineParts

__all__ = ["scored_tokens", "traced_tokens"]

_TRACE_FLOPS, _SCORED_FLOPS = 1e13, 1e12
"""Of tracing, and of one pass over the scored text: minutes, and seconds, of a CPU core."""
_MOST_TRACED, _LEAST_ROWS = 65_536, 256
_MOST_SCORED, _LEAST_SCORED = 6144, 768


def traced_tokens(parts: EngineParts) -> int:
    """As many as a few minutes allow, and at least so many that the usual expert has 256 rows; 65,536 at most."""
    experts = max(parts.experts.cache.layout.experts_per_layer)
    least = _LEAST_ROWS * experts // parts.loaded.experts_per_token
    return min(_MOST_TRACED, max(least, int(_TRACE_FLOPS / _flops(parts))))


def scored_tokens(parts: EngineParts) -> int:
    """Of held-out text, on which every stand-in is scored: 768 to 6,144."""
    return min(_MOST_SCORED, max(_LEAST_SCORED, int(_SCORED_FLOPS / _flops(parts))))


def _flops(parts: EngineParts) -> float:
    """Of a token, about: twice the weights that it meets."""
    layout = parts.experts.cache.layout
    dense = sum(p.numel() for p in parts.loaded.model.parameters() if not p.is_meta)
    expert = sum(prod(shape) for shape in layout.shapes.values())
    return 2.0 * (dense + len(layout.experts_per_layer) * parts.loaded.experts_per_token * expert)
