"""φ(x) = x."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Identity:
    """Keys and queries as they are."""

    def __str__(self) -> str:
        return "the key itself"

    def width(self, key_dim: int) -> int:
        return key_dim

    def shapes(self, key_dim: int) -> tuple[tuple[int, int], ...]:
        return ()

    def init(self, key_dim: int, heads: int, generator: torch.Generator | None) -> tuple[Tensor, ...]:
        return ()

    def apply(self, x: Tensor, own: Sequence[Tensor]) -> Tensor:
        return x
