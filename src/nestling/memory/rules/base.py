"""What every rule of the linear family answers.

    S_t = μ_t S_{t−1} − η_t G_t
    W_t = (α_t I − ε_t x_tᵀ x_t) W_{t−1} + S_t

G_t is the gradient at the anchor, x_t the layer's own input. A rule says which of the terms it has; the engine has them all.
"""

from __future__ import annotations

from typing import Literal, Protocol

Erase = Literal["none", "with_decay", "after_decay"]
"""ε = 0;  ε = β: erase what stood before the decay;  ε = αβ: decay first, then erase."""


class Rule(Protocol):
    @property
    def momentum(self) -> bool:
        """Whether S carries over, with `gates.momentum`."""
        ...

    @property
    def erase(self) -> Erase:
        """Whether and in which order the running weights are erased along x; strength `gates.delta`, None: `gates.lr`."""
        ...

    def step(self, key_dim: int) -> float:
        """Constant factor of the learning rate."""
        ...
