"""ℓ = −⟨M(k), v⟩, the Hebbian objective (Miras, eq. 8; Nested Learning, eq. 64)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nestling.memory.biases.base import Bias


@dataclass(frozen=True)
class DotProduct(Bias):
    """ℓ(p, v) = −⟨p, v⟩, so ∂ℓ/∂p = −v: a descent step writes +kᵀv."""

    def __str__(self) -> str:
        return "dot product"

    @property
    def reads_prediction(self) -> bool:
        return False

    def loss(self, prediction: Tensor, value: Tensor) -> Tensor:
        return -(prediction * value).sum(-1)

    def error(self, prediction: Tensor, value: Tensor) -> Tensor:
        return -value
