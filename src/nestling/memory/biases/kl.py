"""ℓ = KL(softmax(v) ‖ softmax(M(k))): values and predictions as logits of distributions (derived).

    ∂ℓ/∂p = softmax(p) − softmax(v)

Miras uses the divergence to retain (eq. 19–21); as a loss on values it is the cross-entropy less a constant.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nestling.memory.biases.base import Bias


@dataclass(frozen=True)
class KL(Bias):
    """Kullback–Leibler divergence of the predicted distribution from the value's. Steps are bounded: ‖∂ℓ/∂p‖ ≤ √2."""

    def __str__(self) -> str:
        return "KL divergence from softmax(v)"

    def loss(self, prediction: Tensor, value: Tensor) -> Tensor:
        log_p, log_v = prediction.log_softmax(-1), value.log_softmax(-1)
        return (log_v.exp() * (log_v - log_p)).sum(-1)

    def error(self, prediction: Tensor, value: Tensor) -> Tensor:
        return prediction.softmax(-1) - value.softmax(-1)
