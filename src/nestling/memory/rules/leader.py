"""Follow the regularized leader: weights are the best answer to all losses so far, measured from the initial weights.

    W_t = argmin_W Σ_{i≤t} ⟨G_i, W⟩ + ‖W − W_0‖²/2η_t          (Miras, §3.2 and eq. 7)

    S_t = μ_t S_{t−1} − G_t,      W_t = W_0 + η_t S_t           in closed form, μ_t = 1

For a constant η this is gradient descent, W_t = W_{t−1} − ηG_t (Miras, eq. 5 and 7). Where η changes it is not: there the
newest η weighs all losses anew, so that a token with η = 0 reads the initial weights, and the next one may have everything back.
Leaders of other regularizers, for a constant η, are `Gradient()` with `ElasticNet` (eq. 23), `LqDual` and `Bregman`: the state
of these retentions is the sum S. As a gate, μ < 1 lets old losses fade (our addition; not given, it is 1 here).
"""

from __future__ import annotations

from dataclasses import dataclass

from nestling.memory.rules.base import Rule


@dataclass(frozen=True)
class Leader(Rule):
    """Needs `Full()` retention: its prior, the initial weights, is the retention."""

    def __str__(self) -> str:
        return "follows the regularized leader: all gradients so far, from the initial weights"

    @property
    def momentum(self) -> bool:
        return True
