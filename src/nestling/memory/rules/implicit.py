"""The implicit step: W_t = argmin_W ½‖kW − v‖² + ‖W − αW_{t−1}‖²/2η (Longhorn; Titans, eq. 35; Miras, Table 1).

    W_t = αW_{t−1} − β kᵀ(kαW_{t−1} − v),      β = η/(1 + η‖k‖²)

The gradient is taken where the step ends, not where it begins: β‖k‖² < 1 for every η, so that no step is too long. With the
dot-product bias, erasing on the running weights, this is the recurrence of every token, whatever the chunk. The squared error is
the rule's own, in closed form for a matrix alone: other biases (L2 as well, which would erase twice) and networks are refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nestling.memory.rules.base import Erase, Rule
from nestling.memory.rules.delta import proximal


@dataclass(frozen=True)
class Implicit(Rule):
    """Erases and writes with the same strength η/(1 + η‖k‖²); η is `gates.lr`, any number of at least 0.

    Needs `DotProduct()` and `Matrix()`.
    """

    def __str__(self) -> str:
        return "implicit step, as strong to erase as to write"

    @property
    def erase(self) -> Erase:
        return "after_decay"

    def damped(self, lr: Tensor, k: Tensor) -> Tensor:
        """β of η `[…]` and k `[…, key_dim]`."""
        return proximal(lr, k.square().sum(-1))
