"""ℓ = ½‖M(k) − v‖² (Titans, eq. 12, with the ½ of its appendix C, so that a step of η is the delta rule's β)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nestling.memory.biases.base import Bias


@dataclass(frozen=True)
class L2(Bias):
    """ℓ(p, v) = ½‖p − v‖², so ∂ℓ/∂p = p − v."""

    def __str__(self) -> str:
        return "squared error (L2)"

    def loss(self, prediction: Tensor, value: Tensor) -> Tensor:
        return 0.5 * (prediction - value).square().sum(-1)

    def error(self, prediction: Tensor, value: Tensor) -> Tensor:
        return prediction - value
