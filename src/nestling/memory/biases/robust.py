"""ℓ = max_{‖s‖ ≤ Δ} ½‖M(k) − v − s‖²: robust to a shift of the value (Miras, eq. 17).

ℓ = ½‖e‖² + Δ‖e‖ + ½Δ²,      ∂ℓ/∂p = e + Δ e/‖e‖,      e = M(k) − v,  worst shift s = −Δ e/‖e‖
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nestling.memory.biases.base import Bias

EPS = 1e-12  # under the root of ‖e‖², which has no slope at 0


@dataclass(frozen=True)
class Robust(Bias):
    """Δ is `gates.threshold`, one per lane, head and token (None: 1), and stands as the last coordinate of the target."""

    def __str__(self) -> str:
        return "squared error at the worst shift up to a threshold"

    @property
    def reads_threshold(self) -> bool:
        return True

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        error, shift = prediction - target[..., :-1], target[..., -1]
        square = error.square().sum(-1)
        return 0.5 * square + shift * (square + EPS).sqrt() + 0.5 * shift.square()

    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        error, shift = prediction - target[..., :-1], target[..., -1:]
        return error + shift * error * (error.square().sum(-1, keepdim=True) + EPS).rsqrt()
