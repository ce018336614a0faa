"""W ← (αI − βxᵀx)W − η∇ℓ: delta gradient descent (Nested Learning, eq. 56–57 and 88), and, with the dot-product bias, the
delta rule of DeltaNet and Gated DeltaNet.

The first layer's input is the key, of unit norm, and erases with β. A hidden layer's input x is not of unit norm and erases
with β/(1 + β‖x‖²), the exact proximal value, which keeps the factor along x in (0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

from nestling.memory.rules.base import Erase


@dataclass(frozen=True)
class DeltaGradient:
    """Gradient descent that also erases along its input.

    order           "with_decay": (αI − βxᵀx)W, as Hope; "after_decay": α(I − βxᵀx)W, as Gated DeltaNet
    with_momentum   carry S over with `gates.momentum`
    """

    order: Erase = "with_decay"
    with_momentum: bool = False

    def __post_init__(self) -> None:
        if self.order not in ("with_decay", "after_decay"):
            raise ValueError(f"DeltaGradient.order is {self.order!r}; expected 'with_decay' or 'after_decay'")

    def __str__(self) -> str:
        order = "erases what stood before the decay" if self.order == "with_decay" else "decays, then erases"
        return f"delta gradient descent{' with momentum' if self.with_momentum else ''}: {order}"

    @property
    def momentum(self) -> bool:
        return self.with_momentum

    @property
    def erase(self) -> Erase:
        return self.order

    def step(self, key_dim: int) -> float:
        return 1.0
