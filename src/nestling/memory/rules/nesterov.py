"""Nesterov's momentum: the gradient is taken where momentum is about to carry the weights.

    S_t = μ_t S_{t−1} − η_t G_t,      W_t = α_t W_{t−1} + μ_t S_t − η_t G_t

W is the looked-ahead point itself, which is what is read and where gradients are taken: with V the classical sequence,
V_t = V_{t−1} + S_t and S_t = μS_{t−1} − η∇ℓ(V_{t−1} + μS_{t−1}), this is W_t = V_t + μS_t, exactly so for constant μ and α = 1
(derived). The papers' memories have plain momentum; this form of it is our addition.
"""

from __future__ import annotations

from dataclasses import dataclass

from nestling.memory.rules.base import Rule


@dataclass(frozen=True)
class Nesterov(Rule):
    """Gradient descent with Nesterov's momentum; `gates.momentum` is μ (None: 0, plain descent)."""

    def __str__(self) -> str:
        return "gradient descent with Nesterov's momentum"

    @property
    def momentum(self) -> bool:
        return True
