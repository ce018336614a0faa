"""W ← (αI − βxᵀx)W − η∇ℓ: delta gradient descent (Nested Learning, eq. 56–57 and 88), and, with the dot-product bias, the
delta rule of DeltaNet and Gated DeltaNet.

The first layer's input is the key, of unit norm, and erases with β. A hidden layer's input x is not of unit norm and erases
with β/(1 + β‖x‖²), the exact proximal value, which keeps the factor along x in (0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nestling.memory.rules.base import Erase, Rule
from nestling.memory.settings import switches


def erasure(x: Tensor, read: Tensor, strength: Tensor | float) -> Tensor:
    """Σ_t β_t x_tᵀ r_t, what W loses along x_t when r_t = x_t W: x `[…, time, in]`, read `[…, time, out]`, strength β a number
    or `[…, time, 1]` → `[…, in, out]`.
    """
    return x.mT @ (strength * read)


def proximal(lr: Tensor, square: Tensor) -> Tensor:
    """η/(1 + η‖x‖²), the strength of the implicit step: smaller than 1/‖x‖² for every η."""
    return lr / (1 + lr * square)


@dataclass(frozen=True)
class DeltaGradient(Rule):
    """Gradient descent that also erases along its input.

    order           "with_decay": (αI − βxᵀx)W, as Hope; "after_decay": α(I − βxᵀx)W, as Gated DeltaNet
    with_momentum   carry S over with `gates.momentum`
    """

    order: Erase = "with_decay"
    with_momentum: bool = False

    def __post_init__(self) -> None:
        if self.order not in ("with_decay", "after_decay"):
            raise ValueError(f"DeltaGradient.order is {self.order!r}; expected 'with_decay' or 'after_decay'")
        switches(self, with_momentum=self.with_momentum)

    def __str__(self) -> str:
        order = "erases what stood before the decay" if self.order == "with_decay" else "decays, then erases"
        return f"delta gradient descent{' with momentum' if self.with_momentum else ''}: {order}"

    @property
    def momentum(self) -> bool:
        return self.with_momentum

    @property
    def erase(self) -> Erase:
        return self.order
