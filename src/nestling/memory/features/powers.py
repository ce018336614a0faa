"""φ(x) = [x, x∘x, …, x∘…∘x]: element-wise powers, the cheap variant.

NOT the polynomial kernel: products of different entries are missing, so that capacity grows with p·d and not with dᵖ (derived).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.memory.features.base import Features
from nestling.memory.settings import whole_numbers


@dataclass(frozen=True)
class Powers(Features):
    """Every entry's powers up to `degree`; p·d features, no parameters."""

    degree: int = 2

    def __post_init__(self) -> None:
        whole_numbers(self, degree=self.degree)

    def __str__(self) -> str:
        return f"each entry's powers up to {self.degree}"

    def width(self, key_dim: int) -> int:
        return self.degree * key_dim

    def apply(self, x: Tensor, own: Sequence[Tensor]) -> Tensor:
        made = [x]
        for _ in range(self.degree - 1):
            made.append(made[-1] * x)
        return torch.cat(made, -1)
