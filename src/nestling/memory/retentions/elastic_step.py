"""Elastic net as a step from the last weights (Miras, eq. 22): soft forgetting by λ, hard forgetting by a threshold.

    W_t = S_γ(λ_t W_{t−1} − ζ_t ∇ℓ(W_{t−1})),      S_γ(z) = sign(z) max(|z| − γ, 0)

which minimizes ζ⟨∇ℓ, W⟩ + ½‖W − λW_{t−1}‖² + γ‖W‖₁ up to constants. λ is `gates.retention`, ζ is `gates.lr`, learned apart (the
paper ties λ = β/(β+η), ζ = ηλ, γ = ηβ/(α(η+β)) for the strengths α and β of its two norms). Unlike `ElasticNet` (eq. 23), what is
cut is gone: a weight comes back only by a step that passes γ at once.

In a chunk the recurrence is linear, and S_γ acts at its end, as the papers let non-linear maps do (§5.4; our choice here);
chunk 1 is the printed form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.memory.retentions.base import Settled
from nestling.memory.settings import numbers, switches


@dataclass(frozen=True)
class ElasticStep(Settled):
    """Cut at the end of every chunk what is smaller than `threshold`; `gates.retention` is the share kept of the rest.

    smooth  |z| arctan(z/γ)/(π/2) in place of S_γ: sends gradients through small entries, and takes (2/π)γ from large ones
    """

    threshold: float = 0.01
    smooth: bool = False

    def __post_init__(self) -> None:
        numbers(self, above=0, hint=", or choose Decay()", threshold=self.threshold)
        switches(self, smooth=self.smooth)

    def __str__(self) -> str:
        return (
            f"decay to 0, then a {'smooth' if self.smooth else 'soft'} threshold {self.threshold:g} (elastic net step)"
        )

    def settle(self, weights: Tensor, anchor: Tensor) -> Tensor:
        if self.smooth:
            return weights.abs() * torch.atan(weights / self.threshold) * (2 / math.pi)
        return torch.nn.functional.softshrink(weights, self.threshold)
