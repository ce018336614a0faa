"""φ(x) = x."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nestling.memory.features.base import Features


@dataclass(frozen=True)
class Identity(Features):
    """Keys and queries as they are."""

    def __str__(self) -> str:
        return "the key itself"

    def width(self, key_dim: int) -> int:
        return key_dim

    def apply(self, x: Tensor, own: Sequence[Tensor]) -> Tensor:
        return x
