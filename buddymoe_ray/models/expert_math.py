"""How the experts of a transformers module compute, in the kernels' words. Reads no weights.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from buddymoe_ray.kernels import ExpertLayer, ExpertMath
from buddymoe_ray.types import ExpertLayout

__all__ = ["expert_math", "read_as_stored"]


def expert_math(module: nn.Module, layout: ExpertLayout) -> ExpertMath:
    """The arithmetic of an experts module, which may be on meta, on what a checkpoint stores as `layout` says:
    quantised matrices are `[out, in]` in every family."""
    gated = bool(module.has_gate)
    post_norm = bool(getattr(module, "has_post_expert_norm", False))
    return ExpertMath(
        activate=module._apply_gate if gated else module.act_fn,  # type: ignore[arg-type]
        gated=gated,
        bias=bool(module.has_bias),
        transposed=bool(module.is_transposed) and not layout.coded,
        post_norm=module.post_expert_norm if post_norm else None,  # type: ignore[arg-type]
    )


def read_as_stored(maths: Iterable[ExpertMath], layout: ExpertLayout) -> bool:
    """Whether a CPU's kernels compute such experts from the bytes in their slots, whatever the compute dtype."""
    return all(ExpertLayer.covers(layout.tensors, None, math, layout.coded) for math in maths)
