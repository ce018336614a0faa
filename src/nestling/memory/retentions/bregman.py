"""Bregman retention, mirror descent (Miras, §5.2): D(W, W') = F(W) − F(W') − ⟨∇F(W'), W − W'⟩ with F a sum over the entries.

    W_t = g(F'(W_{t−1}) − η_t ∇ℓ(W_{t−1})),      g = (F')⁻¹        in the dual     Y_t = α_t Y_{t−1} − η_t ∇ℓ(g(Y)),  W = g(Y)

    "sigmoid"   F' = logit             entries in (0, 1)
    "tanh"      F' = artanh            entries in (−1, 1)
    "exp"       F' = log               entries positive: the exponentiated gradient, an f-divergence (KL) without a simplex

The dual is what is carried, never W: a saturated sigmoid is exactly 1, and its logit infinite. F = τ²/2 is gradient descent, and
`Softmax` is F = Σ τ log τ on the simplex. The paper has no α here; as a gate on Y it draws W to g(0) (our addition).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from nestling.memory.retentions.base import Retention

CAP = 30.0  # of the exponential: e^30 is far outside any memory, and its square is finite in float32


@dataclass(frozen=True)
class Bregman(Retention):
    """An elementwise mirror map; initial weights of a network are taken as the dual."""

    map: Literal["sigmoid", "tanh", "exp"] = "tanh"

    def __post_init__(self) -> None:
        if self.map not in ("sigmoid", "tanh", "exp"):
            raise ValueError(f"Bregman.map is {self.map!r}; expected 'sigmoid', 'tanh' or 'exp'")

    def __str__(self) -> str:
        return f"decay of a dual, weights its {self.map} (Bregman)"

    def link(self, dual: Tensor) -> Tensor:
        if self.map == "sigmoid":
            return dual.sigmoid()
        return dual.tanh() if self.map == "tanh" else dual.clamp_max(CAP).exp()
