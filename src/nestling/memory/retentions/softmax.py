"""KL retention (Miras, eq. 21 and 27): W_t = Softmax(α log W_{t−1} − η∇), kept as logits.

    Z_t = α_t Z_{t−1} − η_t ∇_W ℓ(softmax(Z)),      W_t = softmax(Z_t)

The two are equal for every t (the logits differ from log W by a constant per slice, which a gate per head does not touch).
The softmax runs over the input index of each output unit, so every unit reads a weighted mean of its inputs; slice sum 1.
Inside a chunk the gradients stand at the anchor, and every read uses softmax(Z_t) of its own token exactly. The paper's own
chunks are linear in the weights behind one token of the full rule (Miras, eq. 30–32), and may leave the simplex: `SoftmaxLag`. In
the logits no such token is needed (derived).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from nestling.memory.retentions.base import Retention


@dataclass(frozen=True)
class Softmax(Retention):
    """Fast weights on the simplex; the state holds their logits, which keep the share `gates.retention`."""

    def __str__(self) -> str:
        return "decay of logits, weights their softmax (KL)"

    def link(self, dual: Tensor) -> Tensor:
        return dual.softmax(-2)

    def dual(self, initial: Tensor) -> Tensor:
        # Logits of unit spread: with logits near 0 all hidden units would be the same mean and stay so.
        return initial * math.sqrt(initial.shape[-2])
