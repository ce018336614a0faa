"""What every retention answers.

The state is the *dual* variable Z; the weights are link(Z). In the dual every rule of the linear family stays linear,
Z_t = α_t Z_{t−1} + S_t, and the gradient is taken with respect to the weights (Miras, eq. 21 and 27; mirror descent).
For most retentions the link is the identity and Z = W.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Retention(Protocol):
    @property
    def decays(self) -> bool:
        """Whether it reads `gates.retention`."""
        ...

    @property
    def linear(self) -> bool:
        """Whether link is the identity."""
        ...

    def link(self, dual: Tensor) -> Tensor:
        """Weights of the dual variable, both `[…, in, out]`."""
        ...

    def dual(self, initial: Tensor) -> Tensor:
        """Initial dual variable from a network's initial weights `[head, in, out]`."""
        ...
