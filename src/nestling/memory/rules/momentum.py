"""S ← μS − η∇ℓ, W ← αW + S: past surprise carries over (Titans, eq. 13–14)."""

from __future__ import annotations

from dataclasses import dataclass

from nestling.memory.rules.base import Rule


@dataclass(frozen=True)
class Momentum(Rule):
    """Gradient descent with momentum; the decay of S (`gates.momentum`) is its own, apart from that of W."""

    def __str__(self) -> str:
        return "gradient descent with momentum"

    @property
    def momentum(self) -> bool:
        return True
