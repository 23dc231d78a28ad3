"""Error feedback within a group of inputs, in machine code: of GPTQ (Frantar et al. 2023) what runs input by input.

Does not know what is behind the group. `calibrate.rounding_compensated` has the spec.

Legend: N outputs, S inputs of a group.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from buddymoe_ray.kernels.cpu import Kernel
from buddymoe_ray.kernels.feedback_calls import FeedbackCall, FeedbackPlan
from buddymoe_ray.kernels.lowbit_format import LowbitFormat
from buddymoe_ray.kernels.trellis import levels_above, search_address, search_room

__all__ = ["round_group"]


def round_group(
    W_SN: Tensor, scale_N: Tensor, counts_S: Tensor, factor_SS: Tensor, fmt: LowbitFormat, errors_SN: Tensor
) -> Tensor:
    """Codes uint8 `[S, N]` of a group's weights float32 `[S, N]`, each input, or quad of a trellis, rounded after the
    errors of those before it were spread over it: `W` is changed so. `errors` become those that others are told of.

    `factor_SS` is the group's part of the upper Cholesky factor of the inverse moment, `counts_S` what an input's
    errors count, negative where there is none: then codes of a trellis are 0.
    """
    codes_SN = torch.empty_like(W_SN, dtype=torch.uint8)
    room, table, plan = torch.empty(0), torch.empty(0), FeedbackPlan(fmt.bits, 0, 0, 0)
    if fmt.trellis:
        room, table = search_room(), levels_above(fmt.bits, W_SN.device)
        plan = FeedbackPlan(fmt.bits, search_address(fmt.bits), table.data_ptr(), room.data_ptr())
    parts = [W_SN, errors_SN, codes_SN, scale_N.contiguous(), counts_S.contiguous(), factor_SS.contiguous()]
    assert parts[0].is_contiguous() and parts[1].is_contiguous(), "weights and errors must lie together"
    ints = np.array(plan, np.int64)
    feedback_kernel()((*(part.data_ptr() for part in parts), W_SN.shape[1]), ints.ctypes.data)
    return codes_SN


@cache
def feedback_kernel() -> Kernel:
    """See `FeedbackCall` and `FeedbackPlan`."""
    from buddymoe_ray.kernels.feedback_numba import compile_feedback
    from buddymoe_ray.kernels.numba_calls import kernel

    return kernel(compile_feedback, len(FeedbackCall._fields))
