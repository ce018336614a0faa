"""What every rule of the linear family answers.

    S_t = μ_t S_{t−1} − η_t G_t
    W_t = (α_t I − ε_t x_tᵀ x_t) W_{t−1} + S_t

G_t is the gradient at the anchor, x_t the layer's own input. A rule says which of the terms it has; the engine has them all.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

Erase = Literal["none", "with_decay", "after_decay"]
"""ε = 0;  ε = β: erase what stood before the decay;  ε = αβ: decay first, then erase."""


@runtime_checkable
class Rule(Protocol):
    """A rule that leaves all as it is here is gradient descent."""

    @property
    def momentum(self) -> bool:
        """Whether S carries over, with `gates.momentum`. Default: no."""
        return False

    @property
    def erase(self) -> Erase:
        """Whether and in which order the running weights are erased along x; strength `gates.delta`, None: `gates.lr`.

        Default: "none".
        """
        return "none"

    def step(self, key_dim: int) -> float:
        """Constant factor of the learning rate. Default: 1."""
        return 1.0


class Directed(Rule):
    """A rule whose step goes along a map of the momentum, so that the engine's linear recurrence ends there.

    S_t = μ_t S_{t−1} − Σ_i γ_i G_i        every token
    W_t = α_t W_{t−1} + η_t D(S_t)         every token, every r-th, or the last token of each chunk; else W_t = α_t W_{t−1}
    """

    @property
    def momentum(self) -> bool:
        return True

    @property
    @abstractmethod
    def per_token(self) -> bool:
        """Whether D acts at every token."""

    @property
    def stride(self) -> int | None:
        """D acts at every r-th token of the lane, r dividing the chunk;  None: at the chunks' last tokens."""
        return None

    @property
    def largest_step(self) -> float:
        """Largest η that a layer should take."""
        return 1.0

    def due(self, position: Tensor, closing: Tensor) -> Tensor:
        """In which lanes D acts, bool `[lane]`: those at `position` after the token, whose chunk is `closing`."""
        if self.per_token:
            return torch.ones_like(closing)
        return closing if self.stride is None else position % self.stride == 0

    @abstractmethod
    def direction(self, s: Tensor) -> Tensor:
        """D, `[…, in, out]` → the same shape. Differentiable; 0 for S = 0."""
