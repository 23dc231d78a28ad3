"""How a wave of leased experts is computed: one after the other, or all in a single call.

Knows neither residency nor why these experts run. Invariant: the bits of an access depend on its row and its expert
alone, whichever way it is computed and whatever is in its wave.

Legend: T tokens, K experts per token, N = T*K accesses, E experts, R rows of one expert, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from buddymoe_ray.cache import Lease
from buddymoe_ray.device import upload
from buddymoe_ray.kernels import ExpertLayer, TritonExperts, combine, combine_on_device
from buddymoe_ray.moe.rows import Accesses

__all__ = ["ExpertCompute", "OnDevice", "OneByOne", "OneCall", "WaveCompute"]

Ints = npt.NDArray[np.int64]
ExpertCompute = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
"""`compute(x_RD, a slot's tensors) -> y_RD`, before the router weight."""


class WaveCompute(Protocol):
    """The arithmetic of one layer's experts; `kernel` is that of all in one call, if that is how they are computed.
    `beside`: it runs beside the host, which need not know first who is named; `complete`: nor afterwards, as every
    expert is there for good."""

    @property
    def kernel(self) -> ExpertLayer | None: ...
    @property
    def beside(self) -> bool: ...
    @property
    def complete(self) -> bool: ...

    def __call__(self, hidden_TD: Tensor, accesses: Accesses, leases: Sequence[Lease], y_ND: Tensor) -> None:
        """Write the rows of `y_ND` whose expert is leased, before the router weight."""

    def resident(self, hidden_TD: Tensor, ids_TK: Tensor, at_E: Ints, y_ND: Tensor) -> bool:
        """Write all rows of `y_ND` from experts that are where `at_E` says; False, with nothing done, where that cannot
        be."""

    def combine(self, y_TKD: Tensor, weight_TK: Tensor) -> Tensor:
        """As `kernels.combine`."""


class OneByOne:
    """Expert by expert."""

    kernel, beside, complete, combine = None, False, False, staticmethod(combine)

    def __init__(self, compute: ExpertCompute) -> None:
        self._compute = compute

    def __call__(self, hidden_TD: Tensor, accesses: Accesses, leases: Sequence[Lease], y_ND: Tensor) -> None:
        """See WaveCompute."""
        for lease in leases:
            rows_R, tokens_R = accesses.rows[lease.key.expert]
            y_ND.index_copy_(0, rows_R, self._compute(hidden_TD.index_select(0, tokens_R), lease.tensors()))

    def resident(self, hidden_TD: Tensor, ids_TK: Tensor, at_E: Ints, y_ND: Tensor) -> bool:
        """Not by address."""
        return False


class OneCall:
    """All experts of a wave in one call of the kernel, read where they lie in their slots. CPU only."""

    beside, complete, combine = False, False, staticmethod(combine)

    def __init__(self, layer: ExpertLayer, experts: int) -> None:
        self.kernel: ExpertLayer = layer
        self._experts = experts

    def __call__(self, hidden_TD: Tensor, accesses: Accesses, leases: Sequence[Lease], y_ND: Tensor) -> None:
        """See WaveCompute."""
        at_E = torch.full((self._experts,), -1, dtype=torch.int64)
        at = at_E.numpy()
        for lease in leases:
            at[lease.key.expert] = lease.address()
        self.kernel(hidden_TD, None, at_E, torch.from_numpy(accesses.expert_TK), y_ND)

    def resident(self, hidden_TD: Tensor, ids_TK: Tensor, at_E: Ints, y_ND: Tensor) -> bool:
        """See WaveCompute."""
        self.kernel(hidden_TD, None, torch.from_numpy(at_E), ids_TK, y_ND)
        return True


class OnDevice:
    """All experts of a decode wave by kernels that find them in a table on the device, which nobody waits for."""

    kernel, beside, combine = None, True, staticmethod(combine_on_device)

    def __init__(self, layer: TritonExperts, experts: int, *, complete: bool) -> None:
        self.kernels, self._experts, self.complete = layer, experts, complete
        self._known_E, self._table_E = np.full(experts, -1, np.int64), torch.empty(0)

    def table(self, at_E: Ints, device: torch.device) -> Tensor:
        """Where experts are, on the device: one tensor, to be read by what is launched from now on."""
        if not self._table_E.numel() or not np.array_equal(at_E, self._known_E):
            self._known_E = at_E.copy()
            new_E = upload(torch.from_numpy(at_E.copy()), device)
            self._table_E = self._table_E.copy_(new_E) if self._table_E.numel() else new_E
        return self._table_E

    def __call__(self, hidden_TD: Tensor, accesses: Accesses, leases: Sequence[Lease], y_ND: Tensor) -> None:
        """See WaveCompute."""
        at_E = np.full(self._experts, -1, np.int64)
        for lease in leases:
            at_E[lease.key.expert] = lease.address()
        table_E = upload(torch.from_numpy(at_E), hidden_TD.device)  # the one of residents stays
        self.kernels(hidden_TD, None, table_E, accesses.named_TK, y_ND)

    def resident(self, hidden_TD: Tensor, ids_TK: Tensor, at_E: Ints, y_ND: Tensor) -> bool:
        """See WaveCompute; experts that are not at hand, and others' accesses, are left alone."""
        self.kernels(hidden_TD, None, self.table(at_E, hidden_TD.device), ids_TK, y_ND)
        return True
