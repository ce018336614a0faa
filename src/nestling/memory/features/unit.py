"""φ(x) = φ'(x/‖x‖): L2 normalization before another map (Atlas, §5 and appendix E: normalized keys and queries)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.memory.features.base import Features
from nestling.memory.features.identity import Identity
from nestling.memory.norm import l2_norm
from nestling.memory.settings import choice


@dataclass(frozen=True)
class Unit(Features):
    """`Unit(Polynomial())`: the unit vector's features. For keys that come without a norm; a memory layer's have one."""

    inner: Features = Identity()

    def __post_init__(self) -> None:
        choice(self, "inner", self.inner, Features, "Identity()")

    def __str__(self) -> str:
        return "the key at unit norm" if self.inner == Identity() else f"unit norm, then {self.inner}"

    def width(self, key_dim: int) -> int:
        return self.inner.width(key_dim)

    def shapes(self, key_dim: int) -> tuple[tuple[int, int], ...]:
        return self.inner.shapes(key_dim)

    def init(self, key_dim: int, heads: int, generator: torch.Generator | None) -> tuple[Tensor, ...]:
        return self.inner.init(key_dim, heads, generator)

    def apply(self, x: Tensor, own: Sequence[Tensor]) -> Tensor:
        return self.inner.apply(l2_norm(x), own)
