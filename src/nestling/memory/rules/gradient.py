"""W ← αW − η∇ℓ: gradient descent on the stream (Miras, eq. 5; TTT)."""

from __future__ import annotations

from dataclasses import dataclass

from nestling.memory.rules.base import Erase


@dataclass(frozen=True)
class Gradient:
    """Plain gradient descent. `per_key_dim` divides the step by key_dim, as TTT does."""

    per_key_dim: bool = False

    def __str__(self) -> str:
        return "gradient descent" + (", step / key_dim" if self.per_key_dim else "")

    @property
    def momentum(self) -> bool:
        return False

    @property
    def erase(self) -> Erase:
        return "none"

    def step(self, key_dim: int) -> float:
        return 1.0 / key_dim if self.per_key_dim else 1.0
