"""W ← αW − η∇ℓ: gradient descent on the stream (Miras, eq. 5; TTT)."""

from __future__ import annotations

from dataclasses import dataclass

from nestling.memory.rules.base import Rule
from nestling.memory.settings import switches


@dataclass(frozen=True)
class Gradient(Rule):
    """Plain gradient descent. `per_key_dim` divides the step by key_dim, as TTT does."""

    per_key_dim: bool = False

    def __post_init__(self) -> None:
        switches(self, per_key_dim=self.per_key_dim)

    def __str__(self) -> str:
        return "gradient descent" + (", step / key_dim" if self.per_key_dim else "")

    def step(self, key_dim: int) -> float:
        return 1.0 / key_dim if self.per_key_dim else 1.0
