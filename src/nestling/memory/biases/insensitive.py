"""ℓ = Σ_j max(|e_j| − ε, 0), e = M(k) − v: errors up to ε write nothing; with ε = 0 the L1 bias (Miras, eq. 12).

    ∂ℓ/∂p = sign(e) where |e| > ε, else 0

Miras names "value-less" L1: a step depends on the side of the value alone. The margin is our addition.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.memory.biases.base import Bias
from nestling.memory.settings import numbers


@dataclass(frozen=True)
class EpsilonInsensitive(Bias):
    """The loss of support vector regression; `EpsilonInsensitive(0.0)` is exact L1, which `Lp(1)` smooths."""

    epsilon: float = 0.1

    def __post_init__(self) -> None:
        numbers(self, least=0, epsilon=self.epsilon)

    def __str__(self) -> str:
        return f"absolute error beyond {self.epsilon:g}" if self.epsilon else "absolute error (L1)"

    def loss(self, prediction: Tensor, value: Tensor) -> Tensor:
        return ((prediction - value).abs() - self.epsilon).clamp_min(0.0).sum(-1)

    def error(self, prediction: Tensor, value: Tensor) -> Tensor:
        error = prediction - value
        return torch.where(error.abs() > self.epsilon, error.sign(), 0.0)
