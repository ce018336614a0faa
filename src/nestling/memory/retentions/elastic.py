"""Elastic net as a regularized leader (Miras, eq. 23): the dual A is carried, the weights are A without what is small.

    A_t = α_t A_{t−1} − η_t ∇ℓ(W),      W = S_γ(A) = sign(A) max(|A| − γ, 0)

L1 forgets by the threshold, exactly to 0; L2 by α. A is never cut itself, so that a weight can come back: an entry is 0 until
its evidence passes γ. The paper's threshold is η/α with its own fixed η and α; here γ is one number, and α a gate (our default).

The paper's smooth surrogate S_γ(z) ≈ |z| arctan(z/γ)/(π/2) sends gradients through small entries as well; it takes (2/π)γ
instead of γ from large ones, and nothing to exactly 0 (derived).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.memory.retentions.base import Retention
from nestling.memory.settings import numbers, switches


@dataclass(frozen=True)
class ElasticNet(Retention):
    """Soft threshold γ at every token's read, `gates.retention` as the share of A that is kept.

    smooth  the arctangent surrogate
    """

    threshold: float = 0.05
    smooth: bool = False

    def __post_init__(self) -> None:
        numbers(self, above=0, hint=", or choose Decay()", threshold=self.threshold)
        switches(self, smooth=self.smooth)

    def __str__(self) -> str:
        return f"decay, {'smooth' if self.smooth else 'soft'} threshold {self.threshold:g} (elastic net)"

    def link(self, dual: Tensor) -> Tensor:
        if self.smooth:
            return dual.abs() * torch.atan(dual / self.threshold) * (2 / math.pi)
        return torch.nn.functional.softshrink(dual, self.threshold)

    def dual(self, initial: Tensor) -> Tensor:
        """Outside the threshold by the initial weight, so that link(dual(W)) = W in the exact form."""
        return initial + self.threshold * initial.sign()
